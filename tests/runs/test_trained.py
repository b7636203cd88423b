"""trained.py: what a run leaves on disk reloads to the same model, and what is no model is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import changed_by_hand, files_below, load, logits_of, read_json, write_csv, write_tiny_model
from models import inject_all, perturb
from parity_helpers import write_checkpoint
from safetensors.torch import load_file, save_file

from minipeft import (
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    LoraConfig,
    PrefixTuningConfig,
    load_adapter,
    save_adapter,
)
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
        logits_of(model, task, test.texts), test.labels, task.label_names)


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


def test_a_base_model_is_not_taken_for_a_trained_one_with_a_random_head(tiny_model, options, tmp_path):
    with pytest.raises(AdapterError, match=r"does not say what it was trained for, and holds no head that would"):
        load_finetuned(tiny_model)
    with pytest.raises(AdapterError, match=r"holds no score, which a model for classification has: train first"):
        load_finetuned(tiny_model, task="classification")
    assert load_finetuned(tiny_model, task="summarization")[1].label_names == []
    finetune(options("full", training_values={"epochs": 1}))
    folder = tmp_path / "output" / "full"
    shutil.copy(tiny_model / "model.safetensors", folder)
    changed_by_hand(folder)
    with pytest.raises(AdapterError, match=r"full holds no score, which a model for classification has"):
        load_finetuned(folder)


def test_a_whole_model_without_notes_is_for_the_task_whose_head_it_has(tiny_model, tmp_path):
    GPT2ForTokenClassification.from_pretrained(tiny_model, num_labels=5).save_pretrained(tmp_path)
    model, task = load_finetuned(tmp_path)
    assert type(model) is GPT2ForTokenClassification and task.name == "tagging"
    assert task.label_names == ["0", "1", "2", "3", "4"] and model.classifier.out_features == 5


def test_as_many_labels_are_noted_as_a_whole_model_has(tiny_model, tmp_path):
    GPT2ForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(tmp_path)
    (tmp_path / "minipeft.json").write_text('{"task": "classification", "label_names": ["bad", "good"]}')
    with pytest.raises(WeightsError, match=r"score\.weight is \(3, 16\), expected \(2, 16\)"):
        load_finetuned(tmp_path)


@pytest.mark.parametrize("shape", [[10**11, 0], [], [2], [2, 17], [0, 16], [1, 2, 16]], ids=str)
@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_a_head_of_an_impossible_shape_is_refused_before_labels_are_counted(tiny_model, tmp_path, shape, kind):
    if kind == "adapter":
        save_adapter(inject_all(GPT2ForSequenceClassification.from_pretrained(tiny_model), LoraConfig()), tmp_path)
        changed_by_hand(tmp_path)
    else:
        GPT2ForSequenceClassification.from_pretrained(tiny_model).save_pretrained(tmp_path)
    file, = tmp_path.glob("*model.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("score.weight"))
    save_file({**tensors, name: torch.zeros(shape)}, file)
    with pytest.raises(AdapterError, match=r"score\.weight is \(.*\), which should be 16 numbers for each label"):
        load_finetuned(tmp_path)


@pytest.mark.parametrize("names", [["good", "good"], ["good", "b\x1b[31mad"], ["good", "b\nad"], ["good", "b\tad"]])
def test_label_names_that_merge_or_break_a_line_are_refused(options, tmp_path, names):
    finetune(options(training_values={"epochs": 1}))
    account = tmp_path / "output" / "lora" / "minipeft.json"
    account.write_text(json.dumps({**read_json(account), "label_names": names}))
    with pytest.raises(AdapterError, match=r"minipeft\.json: label_names: (two labels have the name|the label 'b\\)"):
        load_finetuned(account.parent)


@pytest.mark.parametrize(("first", "second"), [("lora", "full"), ("full", "lora")])
def test_a_folder_that_another_method_wrote_before_loads_what_was_written_last(
        options, trained_model, tmp_path, first, second):
    for method in (first, second):
        finetune(options(method, output=str(tmp_path / "output"), overwrite=True))
    model, task = load_finetuned(tmp_path / "output")
    assert read_json(tmp_path / "output" / "minipeft.json")["method"] == second
    assert torch.equal(logits_of(model, task), logits_of(trained_model[1], task))


@pytest.mark.kind("0: a vocabulary cut at a line's end")
@pytest.mark.parametrize("lines", [255, 256, 262])
def test_a_vocabulary_cut_off_at_a_lines_end_is_refused_since_its_end_of_text_is_another(options, tmp_path, lines):
    """Its ranks still count up from 0, so that only the end-of-text token, which takes the next number, tells."""
    base = write_tiny_model(tmp_path / "base")
    file = base / "vocab.tiktoken"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:lines]))
    with pytest.raises(WeightsError, match=r"end-of-text token is|lacks some of the 256 bytes"):
        finetune(options(model=str(base)))


@pytest.mark.kind("0: a folder changes as a whole")
def test_a_whole_model_with_the_weights_of_another_save_is_refused_by_name(options, tmp_path):
    for name, seed in (("old", 0), ("new", 1)):
        finetune(options("full", output=str(tmp_path / name), results_dir=str(tmp_path / name),
                         training_values={"seed": seed}))
    (tmp_path / "old" / "model.safetensors").write_bytes((tmp_path / "new" / "model.safetensors").read_bytes())
    with pytest.raises(AdapterError, match=r"holds files of different saves: model\.safetensors is not what"):
        load_finetuned(tmp_path / "old")


# --- what others left -------------------------------------------------------------------------------------------------

TEXTS = ["a good film", "a bad film number 7, truly bad", "x"]


@torch.no_grad()
def assert_same_logits(model, task, theirs):
    """The same logits as peft's model of each text by itself; a classifier's, a tagger's or a language model's."""
    for text in TEXTS:
        ids = torch.tensor([task.tokenizer.encode(text)])
        torch.testing.assert_close(model(ids), theirs(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, on its own attributes
@pytest.mark.parametrize(("kind", "asked", "expected", "model_class"), [
    ("SEQ_CLS", None, "classification", GPT2ForSequenceClassification),
    ("TOKEN_CLS", None, "tagging", GPT2ForTokenClassification),
    ("CAUSAL_LM", "summarization", "summarization", GPT2LMHeadModel)])
@pytest.mark.parametrize("method", ["LoRA", "prefix tuning"])
@pytest.mark.kind("6: a trainer's folder loads with its base, its task and as many labels as its head has")
def test_a_trainer_s_checkpoint_loads_with_its_head_s_task_and_labels(
        tiny_model, tmp_path, kind, asked, expected, model_class, method):
    theirs = write_checkpoint(tmp_path / "checkpoint-8", tiny_model, kind, method, num_labels=5)
    model, task = load_finetuned(tmp_path / "checkpoint-8", str(tiny_model), task=asked)
    assert type(model) is model_class and task.name == expected and not model.training
    assert task.label_names == ([] if kind == "CAUSAL_LM" else ["0", "1", "2", "3", "4"])
    assert task.max_length == (64 if method == "LoRA" else 59)  # five virtual tokens take positions
    if kind != "TOKEN_CLS" or method == "LoRA":  # peft fails there itself: virtual rows among the tokens'
        assert_same_logits(model, task, theirs)


def test_a_language_model_s_adapter_without_notes_says_that_its_task_has_to_be_named(tiny_model, tmp_path):
    write_checkpoint(tmp_path, tiny_model, "CAUSAL_LM")
    with pytest.raises(AdapterError, match=r"does not say what it was trained for, .*--task summarization or transl"):
        load_finetuned(tmp_path, str(tiny_model))
    with pytest.raises(AdapterError, match="was trained for CAUSAL_LM, this model is for SEQ_CLS"):
        load_finetuned(tmp_path, str(tiny_model), task="classification")


def test_a_folder_of_checkpoints_names_them(tiny_model, tmp_path):
    for number in (100, 200):
        write_checkpoint(tmp_path / "runs" / f"checkpoint-{number}", tiny_model, "SEQ_CLS")
    with pytest.raises(AdapterError, match=r"name one of .*runs/checkpoint-100; .*runs/checkpoint-200$"):
        load_finetuned(tmp_path / "runs", str(tiny_model))


@pytest.mark.parametrize("account", [True, False], ids=["with an account", "from before the accounts"])
@pytest.mark.parametrize("noted", [True, False], ids=["with details", "without details"])
@pytest.mark.kind("6: a folder of several methods loads")
def test_a_folder_of_several_methods_loads(tiny_model, tmp_path, account, noted):
    model = GPT2ForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    perturb(inject_all(model, LoraConfig(r=2), PrefixTuningConfig(num_virtual_tokens=3)))
    details = {"task": "classification", "label_names": ["bad", "dull", "good"], "max_length": 32}
    save_adapter(model, tmp_path, details if noted else None)
    if not account:
        (tmp_path / "minipeft.json").unlink()
    loaded, task = load_finetuned(tmp_path)
    assert task.label_names == (details["label_names"] if noted else ["0", "1", "2"])
    assert task.max_length == (32 if noted else 61)
    assert torch.equal(logits_of(loaded, task), logits_of(model.eval(), task))


def test_notes_beside_a_pickled_adapter_name_its_labels(tiny_model, tmp_path):
    theirs = write_checkpoint(tmp_path, tiny_model, "SEQ_CLS")
    notes = {"label_names": ["negative", "positive"], "base_model": str(tiny_model)}
    (tmp_path / "minipeft.json").write_text(json.dumps(notes))
    model, task = load_finetuned(tmp_path)
    assert task.label_names == ["negative", "positive"]
    assert_same_logits(model, task, theirs)


def test_an_adapter_of_ours_whose_notes_were_lost_keeps_the_number_of_its_labels(options, tiny_model, tmp_path):
    labels = ("good", "bad", "dull")
    write_csv(tmp_path / "films.csv", [(f"{label} film {i}", label) for i in range(20) for label in labels])
    finetune(options())
    (tmp_path / "output" / "lora" / "minipeft.json").unlink()
    tensors = load_file(tmp_path / "output" / "lora" / "adapter_model.safetensors")
    model, task = load_finetuned(tmp_path / "output" / "lora", str(tiny_model))
    assert task.label_names == ["0", "1", "2"]
    assert torch.equal(model.score.weight, tensors["base_model.model.score.weight"])
    save_file({name: tensor for name, tensor in tensors.items() if "score" not in name},
              tmp_path / "output" / "lora" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="holds no head that would"):
        load_finetuned(tmp_path / "output" / "lora", str(tiny_model))
