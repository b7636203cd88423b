"""sweep.py: trials are compared on the validation split, and what was found is kept."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
import weakref
from pathlib import Path

import pytest
from helpers import files_below, read_json

from minipeft.errors import ConfigError, MinipeftError, OutputError
from minipeft.files import locked
from minipeft.runs import sweep
from minipeft.runs.sweep import tune
from minipeft.tasks.task import Task


@pytest.fixture
def shared(options):
    """What all trials share: a LoRA run of a second."""
    return options()


def test_tuning_compares_trials_on_the_validation_split_and_never_reads_the_test_split(shared, tmp_path, monkeypatch):
    def no_test(*arguments):
        raise AssertionError("the test split was read")

    monkeypatch.setattr(Task, "test", no_test)
    trials = [{"learning_rate": 1e-3}, {"r": 4, "max_length": 32, "epochs": 1}]
    results = tune(shared, trials)
    assert results == read_json(tmp_path / "results" / "tuning_lora.json")
    first, second = results["trials"]
    assert [trial["trial"] for trial in results["trials"]] == trials
    assert first["training_config"]["learning_rate"] == 1e-3 and first["max_length"] == 48
    assert second["method_config"]["r"] == 4 and second["max_length"] == 32
    assert 0 <= first["validation"]["accuracy"] <= 1
    assert {file.rpartition("/")[2] for file in files_below(tmp_path)} == {"films.csv", "tuning_lora.json"}


@pytest.mark.kind("7: committed results are not overwritten by a trial")
def test_beside_published_results_trials_of_ones_own_go_to_results_mine(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    Path("results/README.md").write_text("published")
    Path("results/tuning_lora.json").write_text('{"trials": []}')
    results = tune(dataclasses.replace(shared, results_dir=None), [{"epochs": 1}])
    assert read_json(Path("results/mine/tuning_lora.json")) == results
    assert read_json(Path("results/tuning_lora.json")) == {"trials": []}


def test_each_trial_says_by_what_it_is_judged_and_the_last_line_which_is_the_best(shared, tmp_path):
    said, trials = [], [{"epochs": 1}, {"epochs": 1, "r": 2}]
    found = tune(shared, trials, said.append)["trials"]
    by = found[0]["best_by"]
    assert [line.partition(" after ")[0] for line in said[:-1]] == [
        f"validation {by} {trial['validation'][by]:.4f}" for trial in found]
    best = (min if by == "loss" else max)(found, key=lambda trial: trial["validation"][by])["trial"]
    assert said[-1] == f"best: {best}; wrote {tmp_path / 'results' / 'tuning_lora.json'}"


def test_a_trial_whose_loss_is_no_number_is_never_the_best_and_its_file_is_strict_json(shared, tmp_path):
    """Logits that are no numbers all mean the first label, which may be right more often than what was learned."""
    said, trials = [], [{"learning_rate": 1e30}, {"epochs": 1}]
    tune(shared, trials, said.append)
    assert said[0].endswith("; its loss is no number") and said[-1].startswith(f"best: {trials[1]}; wrote ")
    assert "NaN" not in (tmp_path / "results" / "tuning_lora.json").read_text()
    tune(shared, trials[:1], said.append)
    assert said[-1].startswith("no trial's loss came to a number; wrote ")


def test_later_trials_are_appended(shared):
    tune(shared, [{"epochs": 1}])
    assert len(tune(shared, [{"epochs": 1, "r": 2}])["trials"]) == 2


def test_trials_that_another_start_adds_meanwhile_stay(shared, tmp_path, monkeypatch):
    others, train = [], sweep.train

    def while_another_adds(run):
        others.append({"trial": len(others)})
        sweep._append(tmp_path / "results" / "tuning_lora.json", others[-1])
        return train(run)

    monkeypatch.setattr(sweep, "train", while_another_adds)
    trials = [{"epochs": 1}, {"epochs": 1, "r": 2}]
    results = tune(shared, trials)
    assert results == read_json(tmp_path / "results" / "tuning_lora.json")
    assert [trial["trial"] for trial in results["trials"]] == [0, trials[0], 1, trials[1]]


def test_a_trial_is_added_once_the_start_that_writes_just_now_has_ended(tmp_path):
    path, order, begun = tmp_path / "tuning_lora.json", [], threading.Event()

    def write():
        with locked(tmp_path):
            begun.set()
            time.sleep(0.2)
            order.append(path.is_file())

    other = threading.Thread(target=write)
    other.start()
    begun.wait()
    sweep._append(path, {"trial": 1})
    other.join()
    assert order == [False] and read_json(path) == {"trials": [{"trial": 1}]}
    assert files_below(tmp_path) == [str(path)]


def test_a_trials_model_has_gone_before_the_next_one_is_made(shared, monkeypatch):
    """Two might not fit the GPU."""
    made, prepare = [], sweep.prepare

    def noting_prepare(plan):
        gc.collect()
        assert [model for model in made if model() is not None] == []
        run = prepare(plan)
        made.append(weakref.ref(run.model))
        return run

    monkeypatch.setattr(sweep, "prepare", noting_prepare)
    tune(shared, [{"epochs": 1}] * 3)
    assert len(made) == 3


@pytest.mark.parametrize("content", ["{}", '{"trials": {}}'])
def test_a_file_that_holds_no_trials_is_refused_before_the_first_is_trained(shared, tmp_path, content):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tuning_lora.json").write_text(content)
    with pytest.raises(OutputError, match=r"tuning_lora\.json holds no list of trials to append to: move it away"):
        tune(shared, [{"epochs": 1}])
    assert (tmp_path / "results" / "tuning_lora.json").read_text() == content


def test_a_trial_leaves_what_the_trials_share_alone(shared):
    shared.method_values = {"r": 2}
    first, second = tune(shared, [{"epochs": 1, "r": 4, "max_length": 32}, {"epochs": 1}])["trials"]
    assert (first["method_config"]["r"], second["method_config"]["r"]) == (4, 2)
    assert (first["max_length"], second["max_length"]) == (32, 48)


@pytest.mark.parametrize(("trial", "message"), [
    ({"rank": 4}, "a trial cannot set"), ({"r": 4, "model": "gpt2"}, "a trial cannot set"),
    ({"r": 0}, "r must be a positive integer"), ({"learning_rate": -1}, "learning_rate must be positive"),
    ({"dropout": "much"}, "dropout must be float")])
def test_a_trial_that_cannot_be_is_refused_before_the_first_is_trained(shared, tmp_path, trial, message):
    with pytest.raises(ConfigError, match=message):
        tune(shared, [{"epochs": 1}, trial])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("trial", "message"), [
    ({"r": 9999}, "r=9999"), ({"target_modules": ["nowhere"]}, "nowhere"), ({"max_length": 9999}, "max_length=9999"),
    ({"truncation": "middle"}, "middle")])
def test_a_trial_that_the_model_cannot_carry_is_refused_before_the_first_is_trained(
        shared, tmp_path, monkeypatch, trial, message):
    monkeypatch.setattr(sweep, "train", lambda run: pytest.fail("found out only after a training"))
    with pytest.raises(MinipeftError, match=message):
        tune(shared, [{"epochs": 1}, trial])
    assert not (tmp_path / "results").exists()
