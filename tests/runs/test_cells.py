"""cells.py and costs.py: what one cell of a comparison runs, notes and leaves behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import files_below, read_json, write_csv, write_tiny_model

from minipeft.errors import InUseError
from minipeft.files import locked
from minipeft.methods import METHODS
from minipeft.runs import cells
from minipeft.runs.budget import FEW_EXAMPLES, Budget, Cell
from minipeft.runs.cells import Job, counted_as, job_of, packed, run_cell, score_of, unpacked
from minipeft.runs.costs import language_loss
from minipeft.runs.plan import Options, choose
from minipeft.runs.trained import load_finetuned
from minipeft.tasks import TASKS
from minipeft.tasks.tagging import Tagging
from minipeft.tasks.task import Task
from minipeft.training.hardware import machine
from minipeft.training.stopping import Stopped

BUDGET = Budget(epochs=2, tuning_epochs=1, tuning_size=16, batch_size=4)
TERMS = {"dataset": {"name": "films"}}
RATE = (("learning_rate", 1e-2),)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", n_positions=128)


@pytest.fixture
def job(tiny, tmp_path, monkeypatch):
    """job(method, kind, values): a cell of a second on forty rows."""
    monkeypatch.delenv("MINIPEFT_DATA", raising=False)
    write_csv(tmp_path / "films.csv")
    shared = Options(model=str(tiny), dataset=str(tmp_path / "films.csv"), precision="fp32", max_length=48)

    def make(method="lora", kind="final", values=RATE, seed=0):
        return job_of(Cell("films", method, seed, kind, () if method == "baseline" else values), shared, BUDGET, TERMS,
                      tmp_path / "results", tmp_path / "trained")

    return make


# --- run --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_a_cell_of_every_method_holds_quality_what_was_forgotten_and_each_example(job, method):
    work = job(method)
    run_cell(work)
    found = read_json(work.file)
    assert found["cell"] == {"dataset": "films", "method": method, "seed": 0, "kind": "final",
                             "values": [["learning_rate", 1e-2]], "size": None}
    assert found["terms"] == TERMS and found["training_config"]["epochs"] == 2
    assert unpacked(found["each"]).mean() == pytest.approx(found["metrics"]["test"]["accuracy"])
    costs = found["costs"]
    assert costs["adapter_bytes"] > 100
    lost = costs["forgetting"]["after"] - costs["forgetting"]["before"]
    assert lost == 0 if method == "head" else lost != 0
    assert (work.folder / "minipeft.json").is_file() and not (work.folder / "training_state").exists()


@pytest.mark.parametrize("method", METHODS)
def test_the_costs_of_every_method_are_those_of_a_short_training_and_leave_their_file_alone(job, method, tmp_path,
                                                                                            monkeypatch):
    for name in ("test", "test_each"):
        monkeypatch.setattr(Task, name, lambda *a, **k: pytest.fail("the test split was read"))
    work = job(method, "costs", seed=2)
    assert work.options.training_values["epochs"] == BUDGET.epochs
    run_cell(work)
    found = read_json(work.file)
    costs = found["costs"]
    assert found["machine"] == machine() and 0 < costs["core_seconds_per_1000_examples"] < 10_000
    assert costs["training_memory_bytes"] >= 0
    mergeable = {"full": "nothing to merge", "head": "nothing to merge", "bitfit": "nothing to merge",
                 "adapter": "no", "prompt": "no", "ptuning": "no", "prefix": "no"}.get(method, "yes")
    assert costs["inference"]["mergeable"] == mergeable
    assert (costs["inference"]["merged_seconds"] is not None) == (mergeable == "yes")
    assert (costs["inference"]["base_seconds"] is None) == (method == "full")
    assert {file.rpartition("/")[2] for file in files_below(tmp_path)} == {"films.csv", f"{method}_turn2.json"}


def test_forgetting_is_the_mean_loss_of_next_tokens_with_the_adapter_in_place(job, tiny):
    work = job("prompt")
    run_cell(work)
    model, _ = load_finetuned(work.folder)
    ids = [np.array([3, 5, 8, 13]), np.array([21, 2])]
    losses = []
    for row in ids:
        hidden = model.transformer(torch.tensor(row)[None])[0]                                     # (T, C)
        logits = hidden @ model.transformer.wte.weight.T                                           # (T, vocab)
        losses += [-logits.log_softmax(dim=-1)[t, row[t + 1]].item() for t in range(len(row) - 1)]
    found = language_loss(model, ids, torch.device("cpu"), torch.float32)
    assert found == pytest.approx(sum(losses) / 4, abs=1e-5)


def test_the_best_is_trained_and_validated_on_all_examples():
    limited = Budget(train_size=16, validation_size=8, test_size=9)
    options = {kind: job_of(Cell("films", "lora", 0, kind), Options(), limited, TERMS, Path(), Path()).options
               for kind in ("final", "best")}
    assert (options["final"].train_size, options["final"].validation_size) == (16, 8)
    assert (options["best"].train_size, options["best"].validation_size, options["best"].test_size) == (None, None, 9)


def test_few_examples_are_validated_and_tested_on_no_more_than_the_budget_has():
    def sizes(budget):
        options = job_of(Cell("films", "lora", 0, "size", RATE, 16), Options(), budget, TERMS, Path(), Path()).options
        return options.train_size, options.validation_size, options.test_size

    assert sizes(Budget()) == (16, FEW_EXAMPLES.validation_size, FEW_EXAMPLES.test_size)
    assert sizes(Budget(validation_size=7, test_size=9)) == (16, 7, 9)


def test_a_trial_never_reads_the_test_split_and_leaves_its_file_alone(job, tmp_path, monkeypatch):
    for name in ("test", "test_each"):
        monkeypatch.setattr(Task, name, lambda *a, **k: pytest.fail("the test split was read"))
    work = job("lora", "tuning", (("learning_rate", 1e-2), ("r", 2), ("lora_alpha", 4)))
    run_cell(work)
    found = read_json(work.file)
    assert work.file.name == "lora_0.01_2.json" and found["method_config"]["r"] == 2
    assert found["sizes"]["train"] == 16 and found["training_config"]["epochs"] == 1
    assert score_of(found) == -found["validation"]["loss"], "of few examples the loss decides"
    assert {file.rpartition("/")[2] for file in files_below(tmp_path)} == {"films.csv", "lora_0.01_2.json"}


def test_of_few_examples_each_seed_draws_its_own_and_sees_them_often(job, tmp_path):
    shared = job().options
    first, second = (job_of(Cell("films", "lora", seed, "size", RATE, 16), shared, BUDGET, TERMS, tmp_path / "results",
                            tmp_path / "trained") for seed in (0, 1))
    assert first.options.training_values["epochs"] == 20 and first.options.training_values["batch_size"] == 4
    assert FEW_EXAMPLES.training(1024, BUDGET)["epochs"] == 2 and FEW_EXAMPLES.training(10**6, BUDGET)["epochs"] == 2
    taken = [set(choose(work.options).data.train.texts) for work in (first, second)]
    assert taken[0] != taken[1] and len(taken[0]) == 16
    run_cell(first)
    found = read_json(tmp_path / "results/cells/films/size/lora_16_seed0.json")
    assert found["dataset"]["sizes"]["train"] == 16 and found["curve"][-1]["step"] == 80


def test_what_has_no_budget_is_trained_on_all_examples(job, tmp_path):
    budget = dataclasses.replace(BUDGET, train_size=20, tuning_size=10)
    sizes = {kind: job_of(Cell("films", "lora", 0, kind, RATE), job().options, budget, TERMS, tmp_path, tmp_path)
             .options.train_size for kind in ("tuning", "final", "best")}
    assert sizes == {"tuning": 10, "final": 20, "best": None}


def test_a_baseline_is_a_cell_too(job):
    work = job("baseline")
    run_cell(work)
    assert {"most_frequent_label", "untrained_head", "zero_shot"} == read_json(work.file)["metrics"].keys()


def test_what_is_there_is_not_run_again_and_what_another_process_is_at_is_left_to_it(job, monkeypatch):
    work = job()
    with locked(work.folder), pytest.raises(InUseError):
        run_cell(work)
    work.file.parent.mkdir(parents=True)
    work.file.write_text(json.dumps({"cell": dataclasses.asdict(work.cell)}))
    monkeypatch.setattr(cells, "choose", lambda *a, **k: pytest.fail("it was run again"))
    run_cell(work)


def test_a_stopped_cell_goes_on_where_it_stopped_to_the_same_numbers(job, tmp_path, monkeypatch):
    whole, cut = job(seed=1), job(seed=1)
    run_cell(whole)
    expected = read_json(whole.file)
    whole.file.unlink()

    def stopping(run, train=cells.train):
        history = train(run)
        return dataclasses.replace(history, stopped_by=15)

    with monkeypatch.context() as patched:
        patched.setattr(cells, "train", stopping)
        with pytest.raises(Stopped):
            run_cell(cut)
    assert not cut.file.exists() and (cut.folder / "training_state").is_dir()
    run_cell(cut)
    found = read_json(cut.file)
    assert found["metrics"] == expected["metrics"] and found["each"] == expected["each"]


# --- files ------------------------------------------------------------------------------------------------------------

def test_another_budget_or_setting_has_another_folder(job):
    folders = {job().folder, job(values=()).folder, job(seed=1).folder,
               dataclasses.replace(job(), terms={}).folder}
    assert len(folders) == 3  # the folder is chosen when the job is made


def test_a_job_survives_the_command_line(job):
    work = job(kind="tuning", values=(("learning_rate", 1e-2), ("r", 2)))
    assert Job.from_json(work.as_json()) == work


@pytest.mark.parametrize("counts", [[[1], [0], [1]], [[3, 0], [2, 255]], [[70000, 1], [0, 2]], [[0], [0]]])
def test_counts_survive_a_file(counts):
    content = json.loads(json.dumps(packed(np.array(counts))))
    assert unpacked(content).tolist() == counts


def test_25_000_right_or_wrong_reviews_take_few_bytes():
    counts = (np.random.default_rng(0).random((25000, 1)) < 0.9).astype(np.int64)
    assert len(json.dumps(packed(counts))) < 4500
    assert np.array_equal(unpacked(packed(counts)), counts)


def test_a_loss_that_is_no_number_is_no_score():
    assert score_of({"best_by": "loss", "validation": {"loss": None}}) is None


def test_a_task_counts_as_the_one_that_it_inherits_from():
    class Truecasing(Tagging):
        name = "truecasing"

    class Other(Tagging):
        name, headline = "other", "precision"

    class Counting(Tagging):
        name = "counting"

        @classmethod
        def headline_of(cls, sums, examples):
            return sums[..., 0] / examples

    assert [counted_as(object.__new__(kind)) for kind in (Tagging, Truecasing, Other, Counting)] == [
        "tagging", "tagging", None, None]
    assert {name for name, task in TASKS.items() if counted_as(object.__new__(task)) == name} >= {
        "classification", "tagging"}


def test_on_a_gpu_what_training_has_asked_for_is_waited_for_before_a_validation_is_timed(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("waited"))
    run = SimpleNamespace(material=SimpleNamespace(validate=lambda: order.append("validated") or {"loss": 1.0}),
                          plan=SimpleNamespace(device=torch.device("cuda")))
    seconds = cells._timed(run)
    assert run.material.validate() == {"loss": 1.0} and order == ["waited", "validated"] and len(seconds) == 1
