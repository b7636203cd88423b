"""finetune.py: one run from names to results. What it chooses, refuses and leaves, and that what it leaves reloads."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import files_below, read_json, rows, write_csv, write_imdb, write_tiny_model
from safetensors.torch import load_file

from minipeft import GPT2ForSequenceClassification, load_adapter
from minipeft.data.datasets import load_dataset
from minipeft.errors import AdapterError, ConfigError, DataError, OutputError
from minipeft.methods import METHODS
from minipeft.methods.injection import fingerprint
from minipeft.model.tokenizer import get_tokenizer
from minipeft.runs import finetune
from minipeft.runs.finetune import Options, baseline, results_path
from minipeft.runs.trained import load_finetuned
from minipeft.tasks import classification
from minipeft.tasks.classification import Classification
from minipeft.tasks.task import Task

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def options(tiny_model, tmp_path, monkeypatch):
    """options(method, **changes): a run of a second on a tiny model and forty rows, writing below tmp_path."""
    monkeypatch.delenv("MINIPEFT_DATA", raising=False)
    write_csv(tmp_path / "films.csv")

    def make(method="lora", training_values=None, **changes):
        training = {"epochs": 3, "batch_size": 4, "learning_rate": 2e-2, **(training_values or {})}
        return Options(**{"method": method, "model": str(tiny_model), "dataset": str(tmp_path / "films.csv"),
                          "precision": "fp32", "max_length": 48, "output": str(tmp_path / "output" / method),
                          "results_dir": str(tmp_path / "results"), "training_values": training, **changes})

    return make


@pytest.fixture
def trained_model(monkeypatch):
    """A list that will hold the model of each training, as training left it."""
    models = []
    train = finetune.train

    def noting_train(model, *arguments, **named):
        models.append(model)
        return train(model, *arguments, **named)

    monkeypatch.setattr(finetune, "train", noting_train)
    return models


def logits_of(model, task, texts=("a good film", "a bad film", "neither")):
    ids = classification.encode(list(texts), task.tokenizer, task.max_length, task.truncation)
    return classification.predict_logits(model, ids, CPU, torch.float32)


# --- what a run leaves ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_results_file_has_everything_needed_to_judge_and_repeat_the_run(options, tiny_model, tmp_path, method):
    returned = finetune.finetune(options(method, training_values={"seed": 5}))
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


def test_the_baselines_results_file_has_both_baselines_and_no_training(options, tmp_path):
    returned = baseline(options("baseline"))
    results = read_json(tmp_path / "results" / "baseline_films_results.json")
    assert results["method"] == returned["method"] == "baseline"
    assert results["metrics"].keys() == {"untrained_head", "zero_shot"}
    for found in results["metrics"].values():
        assert {"accuracy", "accuracy_95_interval", "f1", "confusion_matrix"} <= found.keys()
        assert found["examples"] == 4
    assert results["parameters"]["trainable"] == 0 < results["parameters"]["total"]
    assert results["zero_shot"]["prompt"] and results["zero_shot"]["words"]["positive"]
    assert {"base_model", "dataset", "choices", "precision", "machine", "versions", "seed", "seconds",
            "peak_memory_bytes", "samples_per_second"} <= results.keys()
    assert files_below(tmp_path / "output") == []


def test_the_zero_shot_baseline_needs_labels_that_are_sentiments(options, tmp_path):
    write_csv(tmp_path / "films.csv", rows(labels=(0, 1)))
    assert baseline(options("baseline"))["metrics"].keys() == {"untrained_head"}


def test_a_run_leaves_the_adapter_the_results_and_nothing_else(options, tmp_path):
    finetune.finetune(options())
    assert [os.path.relpath(file, tmp_path) for file in files_below(tmp_path)] == [
        "films.csv", "output/lora/adapter_config.json", "output/lora/adapter_model.safetensors",
        "output/lora/minipeft.json", "results/fine_tuned_lora_films_results.json"]


@pytest.mark.parametrize(("dataset", "file"), [
    ("imdb", "fine_tuned_lora_results.json"), ("sample", "fine_tuned_lora_sample_results.json"),
    ("films", "fine_tuned_lora_films_results.json")])
def test_a_results_file_is_named_after_its_dataset_unless_that_is_imdb(tmp_path, dataset, file):
    assert results_path(tmp_path, "fine_tuned_lora", dataset) == tmp_path / file


@pytest.mark.parametrize("name", ["imdb", "sample"])
def test_results_on_a_file_of_ones_own_never_take_the_place_of_those_on_a_known_dataset(options, tmp_path, name):
    write_csv(tmp_path / f"{name}.csv")
    finetune.finetune(options(dataset=str(tmp_path / f"{name}.csv")))
    assert not results_path(tmp_path / "results", "fine_tuned_lora", name).exists()


# --- reloading --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_saved_reloads_to_identical_predictions(options, trained_model, tmp_path, method):
    results = finetune.finetune(options(method))
    model, task = load_finetuned(tmp_path / "output" / method)
    assert task.label_names == ["negative", "positive"]
    test = load_dataset(str(tmp_path / "films.csv")).test
    assert (task.max_length, task.truncation) == (48, "head_tail")
    expected = logits_of(trained_model[0], task)
    assert torch.equal(logits_of(model, task), expected)
    assert not model.training
    assert results["metrics"]["test"] == classification.metrics(
        logits_of(model, task, test.texts), test.labels)


def test_an_adapter_folder_loads_by_hand_on_a_fresh_base(options, tiny_model, trained_model, tmp_path):
    finetune.finetune(options())
    by_hand = load_adapter(GPT2ForSequenceClassification.from_pretrained(tiny_model), tmp_path / "output" / "lora")
    task = Classification(get_tokenizer(tiny_model), ["negative", "positive"], max_length=48)
    assert torch.equal(logits_of(by_hand, task), logits_of(trained_model[0], task))


def test_a_fully_trained_model_is_a_model_folder_of_its_own(options, trained_model, tmp_path):
    finetune.finetune(options("full"))
    assert [Path(file).name for file in files_below(tmp_path / "output")] == [
        "config.json", "minipeft.json", "model.safetensors", "vocab.tiktoken"]
    model = GPT2ForSequenceClassification.from_pretrained(tmp_path / "output" / "full")
    for name, parameter in trained_model[0].named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_three_labels_train_test_and_reload(options, tmp_path, method):
    labels = ("good", "bad", "dull")
    write_csv(tmp_path / "films.csv", [(f"{label} film {i}", label) for i in range(20) for label in labels])
    results = finetune.finetune(options(method))
    assert results["dataset"]["label_names"] == ["bad", "dull", "good"]
    assert len(results["metrics"]["test"]["confusion_matrix"]) == 3
    model, task = load_finetuned(tmp_path / "output" / method)
    assert logits_of(model, task).shape == (3, 3)


def test_an_adapter_that_peft_wrote_needs_its_base_to_be_named(options, tiny_model, tmp_path):
    finetune.finetune(options())
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
        finetune.finetune(options(method, output=str(tmp_path / "output")))
    model, task = load_finetuned(tmp_path / "output")
    assert read_json(tmp_path / "output" / "minipeft.json")["method"] == second
    assert torch.equal(logits_of(model, task), logits_of(trained_model[1], task))


# --- choices ----------------------------------------------------------------------------------------------------------

def test_an_explicit_choice_is_never_replaced_and_is_told_from_a_default(options, monkeypatch, tmp_path):
    monkeypatch.setattr(finetune, "choose_dataset", lambda *a: pytest.fail("chose a dataset although one was named"))
    monkeypatch.setattr(finetune.defaults, "CPU_TRAIN_SIZE", 4)
    said = []
    results = finetune.finetune(options(
        train_size=20, device="cpu", precision="bf16", max_length=33, truncation="head", dropout=0.0,
        method_values={"r": 2, "lora_alpha": 3.0, "target_modules": ["c_fc"]},
        training_values={"epochs": 1, "seed": 3, "weight_decay": 0.5}), said.append)
    assert results["choices"]["dataset"] == f"{tmp_path / 'films.csv'} (asked for)"
    assert results["choices"]["model"].endswith("(asked for)")
    assert results["choices"]["device"] == "cpu (asked for)"
    assert results["choices"]["precision"] == "bfloat16 (asked for)"
    assert results["precision"] == "bfloat16"
    assert results["dataset"]["sizes"]["train"] == 20
    assert (results["dataset"]["max_length"], results["dataset"]["truncation"]) == (33, "head")
    assert (results["method_config"]["r"], results["method_config"]["lora_alpha"]) == (2, 3.0)
    assert results["method_config"]["target_modules"] == ["c_fc"]
    training = results["training_config"]
    assert (training["epochs"], training["seed"], training["weight_decay"]) == (1, 3, 0.5)


def test_what_was_chosen_is_said_before_anything_else(options, monkeypatch):
    said = []
    monkeypatch.setattr(finetune, "load_dataset", lambda *a, **k: pytest.fail("read data before saying which"))
    with pytest.raises(pytest.fail.Exception):
        finetune.finetune(options(device=None, precision="auto"), said.append)
    printed = "\n".join(said)
    for word in ("device", "precision", "model", "dataset", "asked for", "what this machine has", "best here"):
        assert word in printed


@pytest.mark.parametrize(("cuda", "model"), [(False, "mini"), (True, "gpt2")])
def test_without_a_model_gpt2_is_taken_on_cuda_and_mini_on_a_cpu(options, monkeypatch, cuda, model):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    said = []

    def stop(name):
        said.append(name)
        raise DataError("far enough")

    monkeypatch.setattr(finetune, "find", stop)
    with pytest.raises(DataError, match="far enough"):
        finetune.finetune(options(model=None, device=None))
    assert said == [model]


def test_on_a_cpu_a_subset_is_taken_unless_all_is_asked_for(options, monkeypatch, tmp_path):
    for name, size in (("TRAIN", 8), ("VALIDATION", 2), ("TEST", 2)):
        monkeypatch.setattr(finetune.defaults, f"CPU_{name}_SIZE", size)
    subset = finetune.finetune(options(training_values={"epochs": 1}))
    assert subset["dataset"]["sizes"] == {"train": 8, "validation": 2, "test": 2}
    assert "--full" in subset["choices"]["sizes"]
    everything = finetune.finetune(options(training_values={"epochs": 1}, full=True))
    assert everything["dataset"]["sizes"] == {"train": 32, "validation": 4, "test": 4}
    assert "--full" not in everything["choices"]["sizes"]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_split_of_any_size_can_be_asked_for(options, split, size):
    results = finetune.finetune(options(training_values={"epochs": 1}, **{f"{split}_size": size}))
    assert results["dataset"]["sizes"][split] == size


def test_imdb_is_found_in_the_data_folder_without_being_named(options, tmp_path):
    write_imdb(tmp_path, train=40, test=20)
    results = finetune.finetune(options(dataset=None, data_dir=str(tmp_path), training_values={"epochs": 1}))
    assert results["dataset"]["name"] == "imdb"
    assert f"found in {tmp_path}" in results["choices"]["dataset"]
    assert (tmp_path / "results" / "fine_tuned_lora_results.json").is_file()


def test_a_text_length_beyond_the_models_positions_is_refused_not_replaced(options):
    with pytest.raises(ConfigError, match=r"max_length.*64"):
        finetune.finetune(options(max_length=500))


def test_the_default_text_length_fits_the_model(options):
    results = finetune.finetune(options(max_length=None, training_values={"epochs": 1}))
    assert results["dataset"]["max_length"] == 64


def test_gradient_checkpointing_changes_no_number(options, tmp_path):
    for name, on in (("with", True), ("without", False)):
        finetune.finetune(options(output=str(tmp_path / name), gradient_checkpointing=on, dropout=0.0))
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with", "without")]
    for name, value in files[0].items():
        torch.testing.assert_close(files[1][name], value, atol=1e-5, rtol=1e-4)


def test_the_same_run_twice_writes_the_same_adapter_bit_for_bit(options, tmp_path):
    for name in ("first", "second"):
        finetune.finetune(options(output=str(tmp_path / name)))
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


# --- refusals come before the work ------------------------------------------------------------------------------------

@pytest.fixture
def no_work(monkeypatch):
    """Training or testing anything fails the test."""
    monkeypatch.setattr(finetune, "train", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr(classification, "predict_logits", lambda *a, **k: pytest.fail("tested"))


@pytest.mark.parametrize("place", ["output", "results_dir"])
def test_a_place_that_cannot_be_written_is_known_before_training_starts(options, tmp_path, no_work, place):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="cannot write to"):
        finetune.finetune(options(**{place: str(tmp_path / "file" / "below")}))


def test_a_results_folder_that_cannot_be_written_is_known_before_a_baseline_is_tested(options, tmp_path, no_work):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="cannot write to"):
        baseline(options("baseline", results_dir=str(tmp_path / "file" / "below")))


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"method": "lore"}, ConfigError, "unknown method 'lore': use baseline, full, head"),
    ({"method_values": {"rank": 8}}, ConfigError, "LoraConfig has no field rank"),
    ({"method_values": {"r": 0}}, ConfigError, "r must be a positive integer"),
    ({"max_length": 0}, ConfigError, "max_length must be at least 1, got 0"),
    ({"truncation": "tail"}, ConfigError, "truncation must be one of"),
    ({"test_size": 0}, ConfigError, "test_size must be at least 1, got 0"),
    ({"training_values": {"seed": -1}}, ConfigError, "seed"),
    ({"dropout": 1.0}, ConfigError, "probability")])
def test_an_impossible_request_is_refused_before_anything_is_written(
        options, tmp_path, no_work, changes, error, message):
    with pytest.raises(error, match=message):
        finetune.finetune(options(**changes))
    assert files_below(tmp_path) == [str(tmp_path / "films.csv")]
    assert not (tmp_path / "output").exists(), "an empty output folder was left behind"


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def ctrl_c(monkeypatch):
    """ctrl_c(n): press Ctrl-C during the n-th loss computed from now on; None never."""
    original = Task.loss_sum
    state = {"left": None}

    def loss_sum(logits, batch):
        if state["left"] is not None:
            state["left"] -= 1
            if state["left"] == 0:
                os.kill(os.getpid(), signal.SIGINT)
        return original(logits, batch)

    monkeypatch.setattr(Task, "loss_sum", staticmethod(loss_sum))
    return lambda number: state.update(left=number)


@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_ctrl_c_leaves_a_model_that_loads_and_resuming_ends_as_if_uninterrupted(
        options, ctrl_c, tmp_path, method, step):
    expected = finetune.finetune(options(method, output=str(tmp_path / "whole")))
    said = []
    ctrl_c(step)
    assert finetune.finetune(options(method, output=str(tmp_path / "cut")), said.append) == {}
    assert "--resume" in said[-1]
    model, task = load_finetuned(tmp_path / "cut")
    assert torch.isfinite(logits_of(model, task)).all()

    ctrl_c(None)
    results = finetune.finetune(options(method, output=str(tmp_path / "cut"), resume=True))
    tensors = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    assert (tmp_path / "cut" / tensors).read_bytes() == (tmp_path / "whole" / tensors).read_bytes()
    assert results["metrics"] == expected["metrics"]
    assert not (tmp_path / "cut" / "training_state").exists()


def test_an_interrupted_run_writes_no_results_file(options, ctrl_c, tmp_path):
    ctrl_c(3)
    finetune.finetune(options())
    assert files_below(tmp_path / "results") == []


def test_without_resume_an_interrupted_run_starts_anew(options, ctrl_c, tmp_path):
    ctrl_c(3)
    finetune.finetune(options())
    ctrl_c(None)
    results = finetune.finetune(options(training_values={"learning_rate": 1e-2}))
    assert results["training_config"]["learning_rate"] == 1e-2
    assert results["curve"][-1]["step"] == 24


@pytest.mark.parametrize("change", [
    {"training_values": {"learning_rate": 1e-3}}, {"method_values": {"lora_alpha": 99}}, {"method_values": {"r": 2}},
    {"max_length": 20}, {"train_size": 10}, {"dataset": "sample"}, {"truncation": "head"}, {"dropout": 0.3}],
    ids=lambda change: "-".join(change))
def test_resuming_with_another_request_is_refused(options, ctrl_c, change):
    ctrl_c(3)
    finetune.finetune(options())
    ctrl_c(None)
    with pytest.raises((ConfigError, OutputError)):
        finetune.finetune(options(resume=True, **change))


def test_resuming_on_another_base_model_is_refused(options, ctrl_c, tmp_path):
    ctrl_c(3)
    finetune.finetune(options())
    ctrl_c(None)
    with pytest.raises((ConfigError, OutputError)):
        finetune.finetune(options(resume=True, model=str(write_tiny_model(tmp_path / "other", seed=1))))


# --- every method -----------------------------------------------------------------------------------------------------

SMALL = {"vera": {"r": 8}, "prompt": {"num_virtual_tokens": 4}, "ptuning": {"num_virtual_tokens": 4},
         "prefix": {"num_virtual_tokens": 4}}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_tests_writes_its_results_and_reloads_to_identical_predictions(
        options, trained_model, tmp_path, method):
    results = finetune.finetune(options(method, method_values=SMALL.get(method, {}), training_values={"epochs": 1}))
    assert read_json(tmp_path / "results" / f"fine_tuned_{method}_films_results.json") == results
    assert results["method"] == method and 0 < results["parameters"]["trainable"] <= results["parameters"]["total"]
    model, task = load_finetuned(tmp_path / "output" / method)
    if method != "head":  # whose features alone went through `train`
        assert torch.equal(logits_of(model, task), logits_of(trained_model[0], task))
    ids = classification.encode(read_examples(tmp_path).texts, task.tokenizer, task.max_length, task.truncation)
    found = classification.metrics(classification.predict_logits(model, ids, CPU, torch.float32),
                                   read_examples(tmp_path).labels)
    assert found == results["metrics"]["test"]


def read_examples(folder):
    return load_dataset(str(folder / "films.csv")).test


def test_a_head_trained_on_features_computed_once_is_the_head_trained_the_long_way(options, tmp_path, monkeypatch):
    """Without dropout the two differ by nothing but the order in which batches are made of texts of like lengths."""
    runs, computed, pooled_features = {}, [], classification.pooled_features

    def noting_features(*arguments, progress):
        computed.append(progress.split()[0])
        return pooled_features(*arguments, progress=progress)

    monkeypatch.setattr(classification, "pooled_features", noting_features)
    for recompute in (False, True):
        options_of_run = options("head", recompute_features=recompute, dropout=0.0, training_values={
            "batch_size": 64, "epochs": 5}, output=str(tmp_path / str(recompute)))
        runs[recompute] = finetune.finetune(options_of_run)
    cached, recomputed = (load_finetuned(tmp_path / str(recompute))[0].score.weight
                          for recompute in (False, True))
    torch.testing.assert_close(cached, recomputed, atol=1e-5, rtol=1e-4)
    assert runs[False]["metrics"]["test"]["accuracy"] == runs[True]["metrics"]["test"]["accuracy"]
    assert computed == ["training", "validation"]


def test_virtual_tokens_leave_less_room_for_the_text_and_the_message_says_how_much(options):
    with pytest.raises(ConfigError, match="of which 20 hold virtual tokens: 44 tokens fit"):
        finetune.finetune(options("prompt"))


def test_the_default_length_makes_room_for_virtual_tokens(options):
    assert finetune.finetune(options("prefix", max_length=None))["dataset"]["max_length"] == 44
