"""`minipeft convert`, and the other commands on what somebody else's trainer left."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from helpers import files_below, write_csv
from parity_helpers import TASKS, load_theirs, write_checkpoint

from minipeft.model.tokenizer import get_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, on its own attributes
TEXT = "a good film number 3, truly good"


@pytest.fixture
def checkpoint(folder, tiny_model):
    """A trainer's checkpoint for three labels, and peft's model."""
    return folder / "checkpoint-8", write_checkpoint(folder / "checkpoint-8", tiny_model, "SEQ_CLS", num_labels=3)


@torch.no_grad()
def expected(theirs, base):
    """The label and the probability that peft's model gives TEXT."""
    ids = torch.tensor([get_tokenizer(base).encode(TEXT)])
    probabilities = theirs(input_ids=ids).logits[0].softmax(dim=0)
    return f"{int(probabilities.argmax())}\t{probabilities.max():.4f}\t{TEXT}\n"


@pytest.mark.kind("6: a trainer's folder with --model works in predict and evaluate")
def test_predict_and_evaluate_take_a_trainer_s_folder(script, checkpoint, tiny_model):
    adapter, theirs = checkpoint
    rows = [(f"{label} film {i}", label) for i in range(20) for label in ("bad", "dull", "good")]
    films, before = write_csv("three.csv", rows), {path.name: path.read_bytes() for path in adapter.iterdir()}
    outcome = script("predict.py", "--adapter", adapter, "--model", tiny_model, TEXT, "--precision", "fp32")
    assert (outcome.code, outcome.out) == (0, expected(theirs, tiny_model)), outcome.err
    outcome = script("evaluate.py", "--adapter", adapter, "--model", tiny_model, "--dataset", films, "--json", "t.json")
    assert outcome.code == 0 and outcome.error_lines == [], outcome.err
    assert "labels     0 = bad, 1 = dull, 2 = good (in the dataset's order" in outcome.out
    assert len(json.loads((adapter.parent / "t.json").read_text())["metrics"]["confusion_matrix"]) == 3
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_without_a_base_both_ask_for_one(script, checkpoint, tiny_model):
    for command, more in (("predict.py", ["text"]), ("evaluate.py", [])):
        outcome = script(command, "--adapter", checkpoint[0], *more)
        assert outcome.code == 2
        assert outcome.error_lines == [f"error: {checkpoint[0]} does not say which base model it belongs to: name it "
                                       f"with --model; whoever trained it noted '{tiny_model}'"]


def test_a_tagger_that_does_not_say_what_it_was_trained_on_asks_for_a_dataset(script, folder, tiny_model):
    write_checkpoint(folder / "tagger", tiny_model, "TOKEN_CLS", num_labels=3)
    outcome = script("evaluate.py", "--adapter", "tagger", "--model", tiny_model)
    assert (outcome.code, outcome.error_lines) == (2, [
        "error: tagger does not say what it was trained on: name a dataset with --dataset"])
    rows = [{"tokens": ["Ada", "saw", f"Rome{i}"], "ner_tags": ["B-person", "O", "I-person"]} for i in range(20)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = script("evaluate.py", "--adapter", "tagger", "--model", tiny_model, "--dataset", "words.jsonl", "--task",
                     "tagging")
    assert outcome.code == 0 and "labels     0 = " in outcome.out, outcome.err


def test_what_is_ignored_is_a_line_on_stderr(script, checkpoint, tiny_model, monkeypatch):
    adapter, theirs = checkpoint
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as outside of pytest, which puts its own there
    outcome = script("predict.py", "--adapter", adapter, "--model", tiny_model, TEXT, "--precision", "fp32")
    assert (outcome.code, outcome.out) == (0, expected(theirs, tiny_model)), outcome.err
    assert outcome.error_lines == [f"{adapter}: task_type CAUSAL_LM is ignored, since the adapter holds the score of a "
                                   "SEQ_CLS model"]


@pytest.mark.kind("6: convert turns adapter_model.bin into safetensors")
def test_a_converted_folder_predicts_the_same_and_peft_reads_it(script, folder, checkpoint, tiny_model):
    adapter, theirs = checkpoint
    outcome = script("convert.py", adapter, "films")
    size = (folder / "films" / "adapter_model.safetensors").stat().st_size
    config = (folder / "films" / "adapter_config.json").stat().st_size
    assert outcome.out == (f"wrote films/adapter_model.safetensors, {size:,} bytes\n"
                           f"wrote films/adapter_config.json, {config:,} bytes\n")
    assert outcome.code == 0 and len(files_below(folder / "films")) == 2
    outcome = script("predict.py", "--adapter", "films", "--model", tiny_model, TEXT, "--precision", "fp32")
    assert outcome.out == expected(theirs, tiny_model)
    transformers = pytest.importorskip("transformers")
    base = getattr(transformers, TASKS["SEQ_CLS"]).from_pretrained(tiny_model, num_labels=3)

    class Base:
        @staticmethod
        def theirs():
            return base

    assert expected(load_theirs(Base, folder / "films"), tiny_model) == expected(theirs, tiny_model)


def test_without_an_output_it_converts_in_place_once(script, checkpoint):
    adapter, _ = checkpoint
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert script("convert.py", adapter).code == 0
    after = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert set(after) - set(before) == {"adapter_model.safetensors"}
    assert {name: after[name] for name in before} == before
    outcome = script("convert.py", adapter)
    assert (outcome.code, outcome.error_lines) == (2, [
        f"error: {adapter} holds adapter_model.safetensors: there is nothing to convert"])


@pytest.mark.parametrize("command", ["convert.py", "predict.py", "evaluate.py"])
def test_a_file_of_more_than_tensors_is_one_line_in_every_command(script, folder, checkpoint, tiny_model, command):
    adapter, _ = checkpoint
    tensors = torch.load(adapter / "adapter_model.bin", weights_only=True)
    torch.save({**tensors, "optimizer": {"lr": 0.1}}, adapter / "adapter_model.bin")
    before = files_below(folder)
    loading = ["--adapter", adapter, "--model", tiny_model]
    options = {"convert.py": [adapter, "new"], "predict.py": [*loading, "text"], "evaluate.py": loading}
    outcome = script(command, *options[command])
    assert outcome.code == 2 and files_below(folder) == before
    assert outcome.error_lines == [
        f"error: {adapter}/adapter_model.bin is refused, and nothing in it was run: optimizer is dict, not a tensor. "
        "It should hold tensors by name and nothing else, as peft writes it"]
