"""finetune.py: one run from names to results. What it leaves, how it is interrupted, every method."""

from __future__ import annotations

import math
import os
import signal
from unittest.mock import Mock

import pytest
import torch
from helpers import files_below, load, logits_of, read_json, write_tiny_model
from safetensors.torch import load_file

from minipeft import GPT2ForSequenceClassification
from minipeft.errors import ConfigError, OutputError, TrainingError
from minipeft.methods import METHODS
from minipeft.methods.injection import fingerprint
from minipeft.runs.finetune import finetune
from minipeft.runs.trained import load_finetuned
from minipeft.tasks import classification
from minipeft.tasks.classification import Classification
from minipeft.tasks.task import Task
from minipeft.training import loop

CPU = torch.device("cpu")


# --- what a run leaves ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_results_file_has_everything_needed_to_judge_and_repeat_the_run(options, tiny_model, tmp_path, method):
    returned = finetune(options(method, training_values={"seed": 5}))
    results = read_json(tmp_path / "results" / f"fine_tuned_{method}_films_results.json")
    assert results == returned | {"choices": results["choices"]}

    assert results["base_model"] == {"name": str(tiny_model), "fingerprint": fingerprint(
        GPT2ForSequenceClassification.from_pretrained(tiny_model))}
    assert results["method"] == method
    if method == "lora":
        assert {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "bias": "none",
                "layers_to_transform": None}.items() <= results["method_config"].items()
    training = results["training_config"]
    assert {"epochs": 3, "batch_size": 4, "learning_rate": 2e-2, "seed": 5}.items() <= training.items()
    assert {"gradient_accumulation", "weight_decay", "warmup_ratio", "max_grad_norm"} <= training.keys()
    assert {"name": "films", "source": str(tmp_path / "films.csv"), "label_names": ["negative", "positive"],
            "max_length": 48, "sizes": {"train": 32, "validation": 4, "test": 4}}.items() <= results["dataset"].items()
    for found in (results["metrics"]["test"], results["metrics"]["best_validation"]):
        assert 0 <= found["accuracy"] <= 1 and found["loss"] > 0
    low, high = results["metrics"]["test"]["accuracy_95_interval"]
    assert low <= results["metrics"]["test"]["accuracy"] <= high
    assert sum(map(sum, results["metrics"]["test"]["confusion_matrix"])) == 4
    trainable, total = results["parameters"]["trainable"], results["parameters"]["total"]
    assert 0 < trainable < total if method == "lora" else trainable == total
    for part in ("train", "test"):
        assert results["seconds"][part] >= 0 and results["samples_per_second"][part] > 0
    assert results["peak_memory_bytes"] > 10**6
    assert results["curve"][-1]["step"] == 3 * 32 // 4
    assert {"train_loss", "validation_loss", "validation_accuracy"} <= results["curve"][0].keys()
    assert results["seed"] == 5 and results["precision"] == "float32"
    assert {"python", "torch", "minipeft"} <= results["versions"].keys()
    assert {"system", "processor", "cores", "memory_gib"} <= results["machine"].keys()


def test_a_run_leaves_the_adapter_the_results_and_nothing_else(options, tmp_path):
    finetune(options())
    assert [os.path.relpath(file, tmp_path) for file in files_below(tmp_path)] == [
        "films.csv", "output/lora/adapter_config.json", "output/lora/adapter_model.safetensors",
        "output/lora/minipeft.json", "results/fine_tuned_lora_films_results.json"]


@pytest.mark.parametrize("place", ["output", "results_dir"])
def test_a_place_that_cannot_be_written_is_known_before_training_starts(options, tmp_path, no_work, place):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="cannot write to"):
        finetune(options(**{place: str(tmp_path / "file" / "below")}))


def test_a_training_that_ends_in_no_number_is_an_error_and_no_result(options, tmp_path, monkeypatch):
    """As from a rate that is far too high: the trained values are NaN from the first step on."""
    def broken(parameters, max_norm):
        for parameter in parameters:
            parameter.data.fill_(math.nan)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    with pytest.raises(TrainingError, match=r"the loss is nan at every validation, .* lower --learning-rate"):
        finetune(options("lora"))
    assert not list(tmp_path.glob("results/*.json"))


def test_gradient_checkpointing_changes_no_number(options, tmp_path):
    for name, on in (("with", True), ("without", False)):
        finetune(options(output=str(tmp_path / name), gradient_checkpointing=on, dropout=0.0))
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with", "without")]
    for name, value in files[0].items():
        torch.testing.assert_close(files[1][name], value, atol=1e-5, rtol=1e-4)


def test_the_same_run_twice_writes_the_same_adapter_bit_for_bit(options, tmp_path):
    for name in ("first", "second"):
        finetune(options(output=str(tmp_path / name)))
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def ctrl_c(monkeypatch):
    """ctrl_c(n): press Ctrl-C during the n-th loss computed from now on; None never."""
    original = Task.loss_sum
    state = {"left": None}

    def loss_sum(logits, targets):
        if state["left"] is not None:
            state["left"] -= 1
            if state["left"] == 0:
                os.kill(os.getpid(), signal.SIGINT)
        return original(logits, targets)

    monkeypatch.setattr(Task, "loss_sum", staticmethod(loss_sum))
    return lambda number: state.update(left=number)


@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_ctrl_c_leaves_a_model_that_loads_and_resuming_ends_as_if_uninterrupted(
        options, ctrl_c, tmp_path, method, step):
    expected = finetune(options(method, output=str(tmp_path / "whole")))
    said = []
    ctrl_c(step)
    with pytest.raises(KeyboardInterrupt):
        finetune(options(method, output=str(tmp_path / "cut")), said.append)
    assert "--resume" in said[-1]
    model, task = load_finetuned(tmp_path / "cut")
    assert torch.isfinite(logits_of(model, task)).all()

    ctrl_c(None)
    results = finetune(options(method, output=str(tmp_path / "cut"), resume=True))
    tensors = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert (tmp_path / "cut" / tensors).read_bytes() == (tmp_path / "whole" / tensors).read_bytes()
    assert results["metrics"] == expected["metrics"]
    assert not (tmp_path / "cut" / "training_state").exists()


def test_resuming_says_where_it_goes_on_or_that_there_is_nothing_or_that_the_run_has_ended(options, ctrl_c, tmp_path,
                                                                                         monkeypatch):
    def said(**more):
        lines = []
        finetune(options(training_values={"epochs": 3}, resume=True, **more), lines.append)
        return [line for line in lines if "resume" in line or "ended" in line]

    nothing = f"nothing to resume in {tmp_path / 'output' / 'lora' / 'training_state'}: training from the start"
    assert said() == [nothing]
    results = tmp_path / "results" / "fine_tuned_lora_films_results.json"
    assert said() == [f"this run has ended: {results} holds what it found", nothing]
    ctrl_c(4)
    with pytest.raises(KeyboardInterrupt):
        finetune(options())
    ctrl_c(None)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):  # cut off in its test
        patch.setattr(Classification, "test", Mock(side_effect=MemoryError))
        finetune(options(resume=True), (lines := []).append)
    assert "resumed at step 4 of 24" in lines
    assert said() == ["resumed at step 24 of 24: this training has ended"]


def test_an_interrupted_run_writes_no_results_file(options, ctrl_c, tmp_path):
    ctrl_c(3)
    with pytest.raises(KeyboardInterrupt):
        finetune(options())
    assert files_below(tmp_path / "results") == []


def test_without_resume_an_interrupted_run_starts_anew(options, ctrl_c, tmp_path):
    ctrl_c(3)
    with pytest.raises(KeyboardInterrupt):
        finetune(options())
    ctrl_c(None)
    with pytest.raises(OutputError, match=r"learning_rate 0\.02, not 0\.01"):  # its hours of work are not lost unasked
        finetune(options(training_values={"learning_rate": 1e-2}))
    results = finetune(options(training_values={"learning_rate": 1e-2}, overwrite=True))
    assert results["training_config"]["learning_rate"] == 1e-2
    assert results["curve"][-1]["step"] == 24


@pytest.mark.kind("8: float32 matmul precision is an option")
def test_a_run_computes_as_exactly_as_asked_for_and_leaves_torch_as_it_was(options, monkeypatch):
    before, seen = torch.get_float32_matmul_precision(), []
    for name in ("train", "test"):
        module, call = (loop, loop.train) if name == "train" else (Classification, Classification.test)
        monkeypatch.setattr(module, name, lambda *arguments, call=call, **named: seen.append(
            torch.get_float32_matmul_precision()) or call(*arguments, **named))
    finetune(options(matmul_precision="medium", training_values={"epochs": 1}))
    assert seen == ["medium", "medium"]
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("change", [
    {"training_values": {"learning_rate": 1e-3}}, {"method_values": {"lora_alpha": 99}}, {"method_values": {"r": 2}},
    {"max_length": 20}, {"train_size": 10}, {"dataset": "sample"}, {"truncation": "head"}, {"dropout": 0.3},
    {"matmul_precision": "highest"}], ids=lambda change: "-".join(change))
def test_resuming_with_another_request_is_refused(options, ctrl_c, change):
    ctrl_c(3)
    with pytest.raises(KeyboardInterrupt):
        finetune(options())
    ctrl_c(None)
    with pytest.raises((ConfigError, OutputError)):
        finetune(options(resume=True, **change))


def test_resuming_on_another_base_model_is_refused(options, ctrl_c, tmp_path):
    ctrl_c(3)
    with pytest.raises(KeyboardInterrupt):
        finetune(options())
    ctrl_c(None)
    with pytest.raises((ConfigError, OutputError)):
        finetune(options(resume=True, model=str(write_tiny_model(tmp_path / "other", seed=1))))


# --- every method -----------------------------------------------------------------------------------------------------

SMALL = {"vera": {"r": 8}, "prompt": {"num_virtual_tokens": 4}, "ptuning": {"num_virtual_tokens": 4},
         "prefix": {"num_virtual_tokens": 4}}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_tests_writes_its_results_and_reloads_to_identical_predictions(
        options, trained_model, tmp_path, method):
    results = finetune(options(method, method_values=SMALL.get(method, {}), training_values={"epochs": 1}))
    assert read_json(tmp_path / "results" / f"fine_tuned_{method}_films_results.json") == results
    assert results["method"] == method and 0 < results["parameters"]["trainable"] <= results["parameters"]["total"]
    model, task = load_finetuned(tmp_path / "output" / method)
    if method != "head":  # whose features alone went through `train`
        assert torch.equal(logits_of(model, task), logits_of(trained_model[0], task))
    ids = classification.encode(read_examples(tmp_path).texts, task.tokenizer, task.max_length, task.truncation)
    found = classification.metrics(classification.predict_logits(model, ids, CPU, torch.float32),
                                   read_examples(tmp_path).labels, task.label_names)
    assert found == results["metrics"]["test"]


def read_examples(folder):
    return load(str(folder / "films.csv")).test
