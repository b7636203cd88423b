"""compare.py: from a request to tables. What a cell's process would find is written by hand here."""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from cell_files import baseline_content, costs_content, final_content, trial_content
from helpers import read_json, rows, write_csv, write_tiny_model

from minipeft.errors import ConfigError, DataError, InUseError, OutputError
from minipeft.files import is_locked, locked
from minipeft.runs import compare as runs_compare
from minipeft.runs.budget import BEST
from minipeft.runs.cells import Job
from minipeft.runs.compare import Request, alone, compare
from minipeft.runs.plan import Options


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", n_positions=128)


@pytest.fixture
def comparing(tiny, tmp_path, monkeypatch):
    """comparing(*methods, **changes): compare on forty rows; prompt tuning's processes fail.

    Returns:
        (how many failed, the cells that were run, what was said).
    """
    monkeypatch.delenv("MINIPEFT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    write_csv("films.csv")

    def run(*methods, **changes):
        ran, said = [], []

        def command(job):
            ran.append(job.cell)
            if job.cell.method == "prompt":
                return [sys.executable, "-c", "print('error: this'); raise SystemExit(2)"]
            rate = dict(job.cell.values).get("learning_rate", 1)
            content = {"costs": lambda: costs_content(job.cell, job.terms),
                       "tuning": lambda: trial_content(job.cell, job.terms, 1 - abs(rate - 5e-3)),
                       "baseline": lambda: baseline_content(job.cell, job.terms)}.get(
                "baseline" if job.cell.method == "baseline" else job.cell.kind,
                lambda: final_content(job.cell, job.terms, 0.9))()
            Path("content").mkdir(exist_ok=True)
            source = Path("content", f"{len(ran)}.json")
            source.write_text(json.dumps(content))
            return [sys.executable, "-c", "import os, sys; os.makedirs(os.path.dirname(sys.argv[2]), exist_ok=True);"
                                          "os.replace(*sys.argv[1:])", str(source), str(job.file)]

        request = Request(changes.pop("datasets", ["films.csv"]), list(methods), **{
            "shared": Options(model=str(tiny), precision="fp32"), "results_dir": Path("results"), **changes})
        return compare(request, command, said.append), ran, "\n".join(said)

    run.model = str(tiny)
    return run


def test_every_method_is_tuned_then_trained_and_the_table_shows_it(comparing):
    failed, ran, said = comparing("baseline", "ia3", seeds=2)
    assert failed == 0 and len(ran) == 1 + 5 + 2 + 3
    assert [cell.kind for cell in ran if cell.method == "ia3"] == ["tuning"] * 5 + ["final"] * 2 + ["costs"] * 3
    assert "cells      11, or a few more where a best rate is at an end; 0 of them there; " in said
    assert "core hours" in said
    assert "| ia3 | learning_rate 0.005 |" in said and "| zero-shot by prompt |" in said
    assert read_json("results/comparison.json")["datasets"]["films"]["methods"]["ia3"]["seeds"] == [0, 1]
    assert read_json("results/comparison_tuning.json")["datasets"]["films"]["methods"]["ia3"]["chosen"] == {
        "learning_rate": 0.005}


def test_that_there_is_no_best_on_a_dataset_is_said_before_the_first_run(comparing, monkeypatch):
    said = "best       nothing on films: BEST in minipeft/runs/budget.py names none of these methods\n"
    _, ran, words = comparing("bitfit", tuned=False, best=True)
    assert words.startswith(said) and {cell.kind for cell in ran} == {"final", "costs"}
    assert said not in comparing("bitfit", tuned=False)[2]
    monkeypatch.setitem(BEST, "films", {"bitfit": {"epochs": 5}})
    assert said not in comparing("bitfit", tuned=False, best=True)[2]


def test_few_examples_are_trained_with_the_settings_that_were_chosen(comparing):
    _, ran, said = comparing("lora", "ia3", few_examples=True, seeds=2, changes={"epochs": 3})
    sized = [cell for cell in ran if cell.kind == "size"]
    assert [(cell.method, cell.size, cell.seed) for cell in sized] == [("lora", 16, 0), ("lora", 16, 1)]
    (chosen,) = {cell.values for cell in ran if (cell.kind, cell.method) == ("final", "lora")}
    assert {cell.values for cell in sized} == {chosen} and "cells      24, or" in said
    points = read_json("results/comparison.json")["datasets"]["films"]["few_examples"]
    assert {method: [(point["train_size"], point["seeds"]) for point in found] for method, found in points.items()} == {
        "lora": [(16, [0, 1]), (32, [0, 1])]}


@pytest.mark.kind("7: compare matches results by content")
def test_what_is_there_is_not_run_again_and_more_seeds_are_added(comparing):
    comparing("ia3")
    assert [(cell.kind, cell.seed) for cell in comparing("ia3", seeds=2)[1]] == [("final", 1)]
    failed, ran, said = comparing("ia3", seeds=2)
    assert (failed, ran) == (0, []) and "10 of them there" in said


def test_costs_are_measured_at_the_end_in_turns_and_all_on_one_machine(comparing):
    _, ran, _ = comparing("ia3", "bitfit", tuned=False)
    turns = [(turn, method) for turn in range(3) for method in ("bitfit", "ia3")]  # in the table's order
    assert [(cell.seed, cell.method) for cell in ran[2:]] == turns and {cell.kind for cell in ran[2:]} == {"costs"}
    file = Path("results/cells/films/costs/ia3_turn0.json")
    file.write_text(json.dumps(read_json(file) | {"machine": {"cores": 1000}}))
    assert comparing("ia3", "bitfit", tuned=False)[1] == [], "what is complete stays"
    Path("results/cells/films/costs/bitfit_turn1.json").unlink()
    assert [(cell.seed, cell.method) for cell in comparing("ia3", "bitfit", tuned=False)[1]] == turns[1:3]
    for file in Path("results/cells/films/costs").iterdir():
        file.write_text(json.dumps(read_json(file) | {"machine": {"cores": 1000}}))
    ran = comparing("head", tuned=False)[1]
    assert [(cell.kind, cell.method) for cell in ran] == [("final", "head")] + 3 * [
        ("costs", method) for method in ("head", "bitfit", "ia3")], "also those that are not asked for now"


def test_costs_of_another_machine_stay_where_nothing_of_the_dataset_is_measured_anew(comparing):
    write_csv("plays.csv")
    both = {"tuned": False, "datasets": ["films.csv", "plays.csv"]}
    comparing("ia3", **both)
    for file in Path("results/cells").glob("*/costs/*"):
        file.write_text(json.dumps(read_json(file) | {"machine": {"cores": 1000}}))
    comparing("bitfit", tuned=False, datasets=["plays.csv"])
    films, plays = ({read_json(file)["machine"]["cores"] for file in Path("results/cells", name, "costs").iterdir()}
                    for name in ("films", "plays"))
    assert films == {1000} and 1000 not in plays
    Path("results/cells/plays/costs/ia3_turn0.json").unlink()
    ran = comparing("ia3", **both)[1]
    assert [str(cell) for cell in ran] == ["plays/costs/ia3_turn0"], "and nothing of films is deleted"


def test_costs_of_another_machine_stay_where_what_is_missing_has_failed(comparing, monkeypatch):
    comparing("ia3", tuned=False)
    other = Path("results/cells/films/costs/ia3_turn1.json")
    other.write_text(json.dumps(read_json(other) | {"machine": {"cores": 1000}}))
    job = Path("results/cells/films/costs/ia3_turn0.json")
    job.unlink()
    monkeypatch.setattr(Job, "error_file", property(lambda job: job.file.with_suffix(".error")))
    job.with_suffix(".error").write_text("killed by signal 9")
    assert comparing("ia3", tuned=False)[:2] == (1, []) and read_json(other)["machine"] == {"cores": 1000}
    assert [cell.seed for cell in comparing("ia3", tuned=False, retry=True)[1]] == [0, 1]


@pytest.mark.parametrize("busy", ["results/cells", "checkpoints/cells/films/lora_seed0"])
def test_costs_wait_until_no_other_start_is_at_work(tmp_path, monkeypatch, busy):
    """Neither one that measures costs, too, nor one that still trains."""
    monkeypatch.chdir(tmp_path)
    Path(busy).mkdir(parents=True)
    said, order = [], []

    def work():
        with locked(busy):
            begun.set()
            time.sleep(0.6)
            order.append("the other")

    begun, other = threading.Event(), threading.Thread(target=work)
    other.start()
    begun.wait()
    with alone(Path("results"), Path("checkpoints"), said.append):
        order.append("this one")
        assert is_locked("results/cells"), "and keeps others waiting"
    other.join()
    assert order == ["the other", "this one"] and said[0].startswith("waiting for another start to end")


def test_costs_wait_where_another_start_takes_the_lock_between_a_look_and_the_lock(tmp_path, monkeypatch):
    """Then locking fails though nothing seemed to be locked."""
    tries = []

    @contextmanager
    def taken_at_first(folder):
        tries.append(folder)
        if len(tries) < 3:
            raise InUseError("another start has it")
        yield

    monkeypatch.setattr(runs_compare, "locked", taken_at_first)
    said = []
    with alone(tmp_path / "results", tmp_path / "checkpoints", said.append):
        pass
    assert len(tries) == 3 and len(said) == 1


def test_nothing_is_trained_while_another_start_measures_costs(comparing):
    Path("results/cells").mkdir(parents=True)
    begun, order = threading.Event(), []

    def measure():
        with locked("results/cells"):
            begun.set()
            time.sleep(1)
            order.extend(Path("results/cells").rglob("*.json"))

    other = threading.Thread(target=measure)
    other.start()
    begun.wait()
    assert len(comparing("ia3", tuned=False)[1]) == 1 + 3
    other.join()
    assert order == []


def test_cells_know_how_float32_was_rounded_unless_it_was_not(comparing):
    comparing("ia3", tuned=False)
    rounded = Options(model=comparing.model, precision="fp32", matmul_precision="medium")
    with pytest.raises(OutputError, match=r"holds cells of another comparison \(matmul_precision differ\)"):
        comparing("ia3", tuned=False, shared=rounded)


def test_a_method_whose_runs_fail_is_reported_and_the_others_are_compared(comparing):
    failed, ran, said = comparing("prompt", "ia3", "bitfit", tuned=False)
    assert failed == 1 and len(ran) == 3 + 6
    assert "films/prompt_seed0 failed: error: this (--retry runs it again)" in said
    assert "| ia3 | " in said and "| bitfit | " in said
    assert comparing("prompt", "ia3", tuned=False)[1] == []
    assert [cell.method for cell in comparing("prompt", "ia3", tuned=False, retry=True)[1]] == ["prompt"]


CHANGES = {"a budget": {"changes": {"epochs": 1}}, "a size": {"train_sizes": {"films.csv": 8}},
           "settings": {"tuned": True}}


@pytest.mark.kind("7: compare matches results by content")
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_cells_of_another_request_are_refused_before_the_first_run(comparing, changes):
    comparing("ia3", tuned=False)
    with pytest.raises(OutputError, match=r"results/cells/films holds cells of another comparison .*differ"):
        comparing("ia3", **{"tuned": False, **changes})
    failed, ran, _ = comparing("ia3", **{"tuned": False, "replace": True, **changes})
    assert failed == 0 and ran


@pytest.mark.kind("7: compare matches results by content")
def test_cells_on_another_file_of_the_same_name_are_never_mixed(comparing):
    comparing("ia3", tuned=False)
    Path("other").mkdir()
    write_csv("other/films.csv", rows(30))
    with pytest.raises(OutputError, match=r"another comparison \(dataset differ\)"):
        comparing("bitfit", tuned=False, datasets=["other/films.csv"])
    Path("moved").mkdir()
    Path("films.csv").rename("moved/films.csv")
    Path("films.csv").symlink_to("other/films.csv")
    assert comparing("ia3", tuned=False, datasets=["moved/films.csv"])[1] == [], "the same content, elsewhere"


def test_a_cell_that_names_another_dataset_is_neither_compared_nor_deleted(comparing):
    comparing("ia3", tuned=False)
    own = Path("results/cells/films/ia3_seed0.json")
    others, content = Path("results/cells/films/plays/lora_seed0.json"), read_json(own)
    others.parent.mkdir()
    others.write_text(json.dumps(content | {"terms": {"of": "x"}, "cell": content["cell"] | {"dataset": "plays"}}))
    assert comparing("ia3", tuned=False)[1] == []
    assert comparing("ia3", tuned=False, replace=True, changes={"epochs": 1})[1] and others.is_file()


@pytest.mark.parametrize("content", [{}, {"cell": {"dataset": "films"}}, {"terms": {}}, {"cell": 1, "terms": []}],
                         ids=str)
@pytest.mark.parametrize("replace", [False, True])
def test_a_file_among_the_cells_that_is_none_is_refused_and_never_deleted(comparing, content, replace):
    file = Path("results/cells/films/tuning/mine.json")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))
    with pytest.raises(OutputError, match=r"films/tuning/mine\.json is no cell of a comparison: move it away"):
        comparing("ia3", tuned=False, replace=replace)
    assert read_json(file) == content


@pytest.mark.parametrize("name", [".csv", "..csv", "...csv"])
def test_a_dataset_whose_cells_would_lie_in_others_folders_is_refused(comparing, name):
    write_csv(name)
    with pytest.raises(DataError, match="has no name by which results could call it"):
        comparing("ia3", tuned=False, datasets=[name], replace=True)
    assert not Path("results").exists()


@pytest.mark.kind("7: committed results are not overwritten by a trial")
def test_beside_published_results_those_of_ones_own_go_to_results_mine(comparing):
    comparing("ia3", tuned=False)
    Path("results/README.md").write_text("published")
    before = Path("results/comparison.json").stat().st_mtime_ns
    failed, ran, said = comparing("ia3", tuned=False, results_dir=None, changes={"epochs": 1})
    assert (failed, len(ran)) == (0, 1 + 3) and "results    results/mine" in said
    assert Path("results/comparison.json").stat().st_mtime_ns == before
    assert "results    results\n" in comparing("ia3", tuned=False, results_dir=None)[2] + "\n", "the published request"
    _, ran, said = comparing("ia3", "bitfit", tuned=False, results_dir=None, replace=True)
    assert "results    results/mine" in said and {cell.method for cell in ran} == {"ia3", "bitfit"}, "one more method"


@pytest.mark.kind("7: committed results are not overwritten by a trial")
@pytest.mark.parametrize("more", [{"few_examples": True, "changes": {"epochs": 3}}, {"seeds": 2}, {"costs": "gone"},
                                  {"trial": "gone"}], ids=str)
def test_published_results_serve_only_if_nothing_at_all_is_left_to_run(comparing, more):
    """Neither a training with fewer examples, nor a trial or costs."""
    comparing("lora", changes={"epochs": 3})
    Path("results/README.md").write_text("published")
    assert "results    results\n" in comparing("lora", results_dir=None, changes={"epochs": 3})[2]
    for kind, pattern in (("costs", "costs/lora_turn2.json"), ("trial", "tuning/lora_0.0015.json")):
        if kind in more:
            more = {}
            next(Path("results/cells/films").glob(pattern)).unlink()
    there = {path: path.read_bytes() for path in Path("results").rglob("*.json")}
    _, ran, said = comparing("lora", results_dir=None, **{"changes": {"epochs": 3}, **more})
    assert ran and "results    results/mine" in said
    assert {path: path.read_bytes() for path in Path("results").rglob("*.json") if "mine" not in path.parts} == there


@pytest.mark.kind("7: compare refuses a file that is not there")
def test_what_is_wrong_with_a_request_is_said_before_the_first_run(comparing):
    for changes, error, message in (
            ({"datasets": ["no.csv"]}, DataError, r"there is no file .*no\.csv"),
            ({"datasets": ["films.csv", "./films.csv"]}, ConfigError, "--datasets names films twice"),
            ({"seeds": 0}, ConfigError, "--seeds must be a positive integer, got 0"),
            ({"changes": {"epochs": 0}}, ConfigError, "epochs must be a positive integer, got 0"),
            ({"train_sizes": {"imdb": 9}}, ConfigError, "--train-size names imdb, which is not among --datasets"),
            ({"shared": Options(model="mini", max_length=440)}, ConfigError, "max_length can be at most 432")):
        with pytest.raises(error, match=message):
            comparing("ia3", **changes)
    with pytest.raises(ConfigError, match="unknown method 'lorra': use baseline, full"):
        comparing("ia3", "lorra")
    assert not Path("results").exists()


def test_all_methods_are_compared_on_texts_of_one_length_beside_which_virtual_tokens_fit(comparing):
    comparing("all", tuned=False)
    terms = read_json("results/cells/films/lora_seed0.json")["terms"]
    assert terms["budget"]["max_length"] == 128 - 80
    assert len({json.dumps(read_json(path)["terms"]) for path in Path("results/cells/films").glob("*.json")}) == 1


def test_the_estimate_of_what_is_left_follows_what_was_measured(comparing):
    first, second = (float(comparing(*methods, seeds=3)[2].partition("estimate   ")[2].split()[0])
                     for methods in (["ia3"], ["ia3", "bitfit"]))
    assert first < 0.05 and second == pytest.approx((5 * 36 + 3 * 90 + 3 * 20) / 3600, abs=0.01)
