"""sweep.py: trials are compared on the validation split, methods on the test split, and what was found is kept."""

from __future__ import annotations

import json
import sys

import pytest
from helpers import files_below, read_json

from minipeft.errors import ConfigError
from minipeft.runs import sweep
from minipeft.runs.sweep import compare, tune
from minipeft.tasks.task import Task


@pytest.fixture
def shared(options):
    """What all trials share: a LoRA run of a second."""
    return options()


# --- tune -------------------------------------------------------------------------------------------------------------

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


def test_later_trials_are_appended(shared):
    tune(shared, [{"epochs": 1}])
    assert len(tune(shared, [{"epochs": 1, "r": 2}])["trials"]) == 2


def test_a_trial_leaves_what_the_trials_share_alone(shared):
    shared.method_values = {"r": 2}
    first, second = tune(shared, [{"epochs": 1, "r": 4, "max_length": 32}, {"epochs": 1}])["trials"]
    assert (first["method_config"]["r"], second["method_config"]["r"]) == (4, 2)
    assert (first["max_length"], second["max_length"]) == (32, 48)


@pytest.mark.parametrize(("trial", "message"), [
    ({"rank": 4}, "a trial cannot set"), ({"r": 4, "model": "gpt2"}, "a trial cannot set"),
    ({"r": 0}, "r must be a positive integer"), ({"learning_rate": -1}, "learning_rate must be positive"),
    ({"dropout": "much"}, "dropout must be float or None")])
def test_a_trial_that_cannot_be_is_refused_before_the_first_is_trained(shared, tmp_path, trial, message):
    with pytest.raises(ConfigError, match=message):
        tune(shared, [{"epochs": 1}, trial])
    assert not (tmp_path / "results").exists()


# --- compare ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def command(tmp_path, monkeypatch):
    """In place of scripts/train.py: notes how it was called and writes a results file, or fails for prompt tuning."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(f"""
import json, sys
from pathlib import Path
asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open("calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
method = asked["--method"]
if method == "prompt":
    sys.exit(7)
name = "baseline" if method == "baseline" else f"fine_tuned_{{method}}"
folder = Path(asked["--results-dir"])
folder.mkdir(exist_ok=True)
(folder / f"{{name}}_films_results.json").write_text(json.dumps({RESULTS} | {{"method": method}}))
""")
    return [sys.executable, str(tmp_path / "train.py"), "--epochs", "1"]


METRICS = {"accuracy": 0.5, "f1": 0.5}
RESULTS = {"base_model": {"name": "mini"}, "dataset": {"name": "films", "sizes": {"train": 32}},
           "metrics": {"test": METRICS}, "parameters": {"trainable": 1, "total": 2}, "seconds": {"train": 60},
           "training_config": {"epochs": 1}}


def calls(folder):
    """The method of each run, in order."""
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return [json.loads(line)[3] for line in lines]


def test_methods_run_one_after_the_other_with_what_they_share_and_a_folder_of_their_own(command, tmp_path):
    said = []
    assert compare(["baseline", "ia3"], "films.csv", command, model="mini", say=said.append) == 0
    assert calls(tmp_path) == ["baseline", "ia3"]
    second = json.loads((tmp_path / "calls").read_text().splitlines()[1])
    assert second == ["--epochs", "1", "--method", "ia3", "--dataset", "films.csv", "--results-dir", "results",
                      "--output", "checkpoints/films_ia3", "--resume", "--model", "mini"]
    assert said[:2] == ["\n--- baseline", "\n--- ia3"] and "| ia3 | mini | 1 (50.00 %) | 32 |" in said[2]


def test_what_has_results_is_not_run_again(command, tmp_path):
    said = []
    compare(["ia3"], "films.csv", command)
    assert compare(["ia3", "bitfit"], "films.csv", command, say=said.append) == 0
    assert calls(tmp_path) == ["ia3", "bitfit"]
    assert said[0] == "ia3: results/fine_tuned_ia3_films_results.json is there (mini, 32 training examples)"
    with pytest.raises(ConfigError, match="is about mini, not about gpt2"):
        compare(["ia3"], "films.csv", command, model="gpt2")


def test_a_run_that_fails_ends_the_comparison_with_its_code(command, tmp_path):
    assert compare(["ia3", "prompt", "bitfit"], "films.csv", command) == 7
    assert calls(tmp_path) == ["ia3", "prompt"]


def test_an_unknown_method_is_refused_before_the_first_is_trained(command, tmp_path):
    with pytest.raises(ConfigError, match="unknown method 'lorra': use baseline, full"):
        compare(["ia3", "lorra"], "films.csv", command)
    assert calls(tmp_path) == []


def test_the_methods_compared_by_default_are_methods():
    for method in sweep.COMPARED:
        sweep.check_method(method, also=("baseline",))
