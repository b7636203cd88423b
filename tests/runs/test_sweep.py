"""sweep.py: trials are compared on the validation split, methods on the test split, and what was found is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers import files_below, read_json, rows, write_csv

from minipeft import GPT2ForSequenceClassification
from minipeft.errors import ConfigError, DataError, OutputError
from minipeft.files import write_json_file
from minipeft.methods.injection import fingerprint
from minipeft.runs import sweep
from minipeft.runs.finetune import finetune
from minipeft.runs.plan import check_method, choose
from minipeft.runs.request import request_of
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


@pytest.mark.kind("7: committed results are not overwritten by a trial")
def test_beside_published_results_trials_of_ones_own_go_to_results_mine(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    Path("results/README.md").write_text("published")
    Path("results/tuning_lora.json").write_text('{"trials": []}')
    results = tune(dataclasses.replace(shared, results_dir=None), [{"epochs": 1}])
    assert read_json(Path("results/mine/tuning_lora.json")) == results
    assert read_json(Path("results/tuning_lora.json")) == {"trials": []}


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

METRICS = {"accuracy": 0.5, "f1": 0.5}
RESULTS = {"base_model": {"name": "tiny"}, "metrics": {"test": METRICS, "untrained_head": METRICS},
           "parameters": {"trainable": 1, "total": 2}, "seconds": {"train": 60}, "training_config": {"epochs": 1}}


@pytest.fixture
def comparing(options, tmp_path, monkeypatch):
    """comparing(methods, **changes): compare without training; a run writes a results file, but prompt tuning fails.

    Returns:
        (exit code, methods that were run, lines that were said).
    """
    def run(methods, **changes):
        requests = {method: options(method, **changes) for method in methods}
        ran, said = [], []

        def write_results(command):
            ran.append(command[0])
            options = requests[command[0]]
            if options.method == "prompt":
                return 7
            plan = choose(options, baseline=options.method == "baseline")
            request = request_of(plan, fingerprint(GPT2ForSequenceClassification.from_pretrained(plan.model_name)))
            write_json_file(plan.results_file, {**RESULTS, "method": options.method, "request": request,
                                                "dataset": {"name": plan.data.name, "sizes": plan.sizes}})
            return 0

        monkeypatch.setattr(sweep, "_run", write_results)
        return compare(requests, {method: [method] for method in methods}, said.append), ran, said

    return run


def test_methods_run_one_after_the_other_and_a_table_of_them_follows(comparing):
    code, ran, said = comparing(["baseline", "ia3"])
    assert (code, ran, said[:2]) == (0, ["baseline", "ia3"], ["\n--- baseline", "\n--- ia3"])
    assert "| baseline: untrained head | tiny | " in said[2] and "| ia3 | tiny | 1 (50.00 %) | 32 | " in said[2]


@pytest.mark.kind("7: compare matches results by content")
def test_what_has_results_of_the_very_request_is_not_run_again(comparing, tmp_path):
    comparing(["ia3"])
    code, ran, said = comparing(["ia3", "bitfit"])
    assert (code, ran) == (0, ["bitfit"])
    assert said[0] == (f"ia3: {tmp_path / 'results' / 'fine_tuned_ia3_films_results.json'} is there (tiny, 32 training "
                       "examples)")


CHANGES = {"sizes": ({"train_size": 8}, "train_size 32, not 8"),
           "settings": ({"max_length": 20}, "max_length 48, not 20"),
           "a seed": ({"training_values": {"seed": 1}}, "seed 0, not 1")}


@pytest.mark.kind("7: compare matches results by content")
@pytest.mark.parametrize(("changes", "named"), CHANGES.values(), ids=CHANGES)
def test_results_with_other_settings_are_refused_before_the_first_run(comparing, changes, named):
    comparing(["ia3"])
    with pytest.raises(OutputError, match=rf"fine_tuned_ia3_films_results\.json holds another run \({named}\)"):
        comparing(["bitfit", "ia3"], **changes)
    assert comparing(["bitfit", "ia3"], overwrite=True, **changes)[:2] == (0, ["bitfit", "ia3"])


@pytest.mark.kind("7: compare matches results by content")
def test_results_on_another_file_of_the_same_name_are_never_shown(comparing, tmp_path):
    comparing(["ia3", "bitfit"])
    (tmp_path / "other").mkdir()
    other = write_csv(tmp_path / "other" / "films.csv", rows(30))
    with pytest.raises(OutputError, match="holds another run \\(another content of films\\)"):
        comparing(["ia3"], dataset=other)
    code, ran, said = comparing(["ia3"], dataset=other, overwrite=True)
    assert (code, ran) == (0, ["ia3"])
    assert "| bitfit |" not in said[-1] and "| ia3 | tiny | 1 (50.00 %) | 48 |" in said[-1]


@pytest.mark.kind("7: compare refuses a file that is not there")
def test_a_file_that_is_not_there_is_refused_although_there_are_results_of_its_name(comparing, tmp_path):
    comparing(["ia3"])
    (tmp_path / "films.csv").unlink()
    with pytest.raises(DataError, match=r"there is no file .*films\.csv"):
        comparing(["ia3"])


def test_results_on_the_same_content_under_another_path_are_the_same(comparing, tmp_path):
    comparing(["ia3"])
    (tmp_path / "moved").mkdir()
    (tmp_path / "films.csv").rename(tmp_path / "moved" / "films.csv")
    assert comparing(["ia3"], dataset=str(tmp_path / "moved" / "films.csv"))[:2] == (0, [])


def test_a_folder_of_another_run_is_refused_before_the_first_run(comparing, options):
    finetune(options("ia3", training_values={"epochs": 1, "seed": 4}, results_dir=options().output))
    with pytest.raises(OutputError, match=r"output/ia3 holds another run \(epochs 1, not 3; seed 4, not 0\)"):
        comparing(["bitfit", "ia3"])


def test_a_run_that_fails_ends_the_comparison_with_its_code(comparing):
    assert comparing(["ia3", "prompt", "bitfit"], max_length=None)[:2] == (7, ["ia3", "prompt"])


def test_an_unknown_method_is_refused_before_the_first_is_trained(comparing):
    with pytest.raises(ConfigError, match="unknown method 'lorra': use baseline, full"):
        comparing(["ia3", "lorra"])


def test_the_methods_compared_by_default_are_methods():
    for method in sweep.COMPARED:
        check_method(method, also=("baseline",))
