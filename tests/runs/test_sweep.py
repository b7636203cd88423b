"""tuning.py: trials are compared on the validation split, and kept."""

from __future__ import annotations

import pytest
from helpers import files_below, read_json, write_csv, write_tiny_model

from minipeft.errors import ConfigError
from minipeft.runs.plan import Options
from minipeft.runs.sweep import tune
from minipeft.tasks.task import Task


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def options(tiny_model, tmp_path):
    """A LoRA run of a second on a tiny model and forty rows."""
    return Options(model=str(tiny_model), dataset=write_csv(tmp_path / "films.csv"), precision="fp32", max_length=48,
                   results_dir=str(tmp_path / "results"), training_values={"epochs": 3, "batch_size": 4})


def test_tuning_compares_trials_on_the_validation_split_and_never_reads_the_test_split(options, tmp_path, monkeypatch):
    def no_test(*arguments):
        raise AssertionError("the test split was read")

    monkeypatch.setattr(Task, "test", no_test)
    trials = [{"learning_rate": 1e-3}, {"r": 4, "max_length": 32, "epochs": 1}]
    results = tune(options, trials)
    assert results == read_json(tmp_path / "results" / "tuning_lora.json")
    first, second = results["trials"]
    assert [trial["trial"] for trial in results["trials"]] == trials
    assert first["training_config"]["learning_rate"] == 1e-3 and first["max_length"] == 48
    assert second["method_config"]["r"] == 4 and second["max_length"] == 32
    assert 0 <= first["validation"]["accuracy"] <= 1
    assert {file.rpartition("/")[2] for file in files_below(tmp_path)} == {"films.csv", "tuning_lora.json"}


def test_later_trials_are_appended(options):
    tune(options, [{"epochs": 1}])
    assert len(tune(options, [{"epochs": 1, "r": 2}])["trials"]) == 2


@pytest.mark.parametrize("trial", [{"rank": 4}, {"r": 4, "model": "gpt2"}])
def test_a_trial_that_cannot_be_is_refused_before_the_first_is_trained(options, tmp_path, trial):
    with pytest.raises(ConfigError, match="a trial cannot set"):
        tune(options, [{"epochs": 1}, trial])
    assert not (tmp_path / "results").exists()
