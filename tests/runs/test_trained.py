"""trained.py: what a run leaves on disk reloads to the same model, and what is no model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import files_below, load, logits_of, read_json, write_csv, write_tiny_model

from minipeft import GPT2ForSequenceClassification, load_adapter
from minipeft.errors import AdapterError, WeightsError
from minipeft.model.tokenizer import get_tokenizer
from minipeft.runs.finetune import finetune
from minipeft.runs.trained import load_finetuned
from minipeft.tasks import classification
from minipeft.tasks.classification import Classification


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_saved_reloads_to_identical_predictions(options, trained_model, tmp_path, method):
    results = finetune(options(method))
    model, task = load_finetuned(tmp_path / "output" / method)
    assert task.label_names == ["negative", "positive"]
    test = load(str(tmp_path / "films.csv")).test
    assert (task.max_length, task.truncation) == (48, "head_tail")
    expected = logits_of(trained_model[0], task)
    assert torch.equal(logits_of(model, task), expected)
    assert not model.training
    assert results["metrics"]["test"] == classification.metrics(
        logits_of(model, task, test.texts), test.labels)


def test_an_adapter_folder_loads_by_hand_on_a_fresh_base(options, tiny_model, trained_model, tmp_path):
    finetune(options())
    by_hand = load_adapter(GPT2ForSequenceClassification.from_pretrained(tiny_model), tmp_path / "output" / "lora")
    task = Classification(get_tokenizer(tiny_model), ["negative", "positive"], max_length=48)
    assert torch.equal(logits_of(by_hand, task), logits_of(trained_model[0], task))


def test_a_fully_trained_model_is_a_model_folder_of_its_own(options, trained_model, tmp_path):
    finetune(options("full"))
    assert [Path(file).name for file in files_below(tmp_path / "output")] == [
        "config.json", "minipeft.json", "model.safetensors", "vocab.tiktoken"]
    model = GPT2ForSequenceClassification.from_pretrained(tmp_path / "output" / "full")
    for name, parameter in trained_model[0].named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_three_labels_train_test_and_reload(options, tmp_path, method):
    labels = ("good", "bad", "dull")
    write_csv(tmp_path / "films.csv", [(f"{label} film {i}", label) for i in range(20) for label in labels])
    results = finetune(options(method))
    assert results["dataset"]["label_names"] == ["bad", "dull", "good"]
    assert len(results["metrics"]["test"]["confusion_matrix"]) == 3
    model, task = load_finetuned(tmp_path / "output" / method)
    assert logits_of(model, task).shape == (3, 3)


def test_an_adapter_that_peft_wrote_needs_its_base_to_be_named(options, tiny_model, tmp_path):
    finetune(options())
    (tmp_path / "output" / "lora" / "minipeft.json").unlink()
    with pytest.raises(AdapterError, match="--model"):
        load_finetuned(tmp_path / "output" / "lora")
    model, task = load_finetuned(tmp_path / "output" / "lora", str(tiny_model))
    assert task.details() == {"task": "classification", "label_names": ["0", "1"], "max_length": 64,
                              "truncation": "head_tail"}
    assert model.score.out_features == 2


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"holds neither adapter_config\.json nor config\.json"):
        load_finetuned(tmp_path)


@pytest.mark.parametrize(("first", "second"), [("lora", "full"), ("full", "lora")])
def test_a_folder_that_another_method_wrote_before_loads_what_was_written_last(
        options, trained_model, tmp_path, first, second):
    for method in (first, second):
        finetune(options(method, output=str(tmp_path / "output")))
    model, task = load_finetuned(tmp_path / "output")
    assert read_json(tmp_path / "output" / "minipeft.json")["method"] == second
    assert torch.equal(logits_of(model, task), logits_of(trained_model[1], task))


@pytest.mark.parametrize("lines", [255, 256, 262])
def test_a_vocabulary_cut_off_at_a_lines_end_is_refused_since_its_end_of_text_is_another(options, tmp_path, lines):
    """Its ranks still count up from 0, so that only the end-of-text token, which takes the next number, tells."""
    base = write_tiny_model(tmp_path / "base")
    file = base / "vocab.tiktoken"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:lines]))
    with pytest.raises(WeightsError, match=r"end-of-text token is|lacks some of the 256 bytes"):
        finetune(options(model=str(base)))


def test_a_whole_model_with_the_weights_of_another_save_is_refused_by_name(options, tmp_path):
    for name, seed in (("old", 0), ("new", 1)):
        finetune(options("full", output=str(tmp_path / name), training_values={"seed": seed}))
    (tmp_path / "old" / "model.safetensors").write_bytes((tmp_path / "new" / "model.safetensors").read_bytes())
    with pytest.raises(AdapterError, match=r"holds files of different saves: model\.safetensors is not what"):
        load_finetuned(tmp_path / "old")
