"""comparison.py: what a report reads is made from the cells' files alone."""

from __future__ import annotations

import json
import re

import pytest
from cell_files import TERMS, baseline_content, costs_content, final_content, trial_content

from minipeft.errors import OutputError
from minipeft.files import read_json_file, write_json_file
from minipeft.runs.budget import NO_SIZE, Cell, Track, grid, wanted
from minipeft.runs.comparison import comparison, table_of, tuning, write_comparison

SCORES = {"lora": (0.90, 0.91, 0.92), "full": (0.89, 0.91, 0.93), "head": (0.7,)}


@pytest.fixture
def folder(tmp_path):
    """Cells of three methods, baselines, a run without the budget, and trials."""
    def write(cell, content):
        write_json_file(tmp_path / "cells" / "films" / f"{cell.name}.json", content)

    for method, shares in SCORES.items():
        for seed, share in enumerate(shares):
            cell = Cell("films", method, seed, "final", (("learning_rate", 1e-3), ("r", 2)) * (method == "lora"))
            write(cell, final_content(cell, TERMS, share, forgotten=0.1 * (1 + seed)))
    for turn in range(3):
        cell = Cell("films", "lora", turn, "costs", (("learning_rate", 1e-3), ("r", 2)))
        write(cell, costs_content(cell, TERMS))
    for cell, content in ((Cell("films", "baseline", 0, "final"), baseline_content),
                          (Cell("films", "lora", 0, "best", (("epochs", 9),)), None)):
        write(cell, content(cell, TERMS) if content else final_content(cell, TERMS, 0.95))
    for rate, score in ((1e-3, 0.8), (1e-4, 0.7), (1e-2, None)):
        for method in ("lora", "ia3"):
            cell = Cell("films", method, 0, "tuning", (("learning_rate", rate),))
            write(cell, trial_content(cell, TERMS, score))
    cell = Cell("films", "lora", 0, "tuning", (("learning_rate", 1e-3), ("r", 2), ("lora_alpha", 4)))
    write(cell, trial_content(cell, TERMS, 0.9))
    return tmp_path


def test_rows_have_means_deviations_intervals_and_costs(folder):
    films = comparison(folder)["datasets"]["films"]
    assert list(films["methods"]) == ["full", "head", "lora"] and films["baselines"] == {"zero_shot": {"accuracy": 0.6}}
    lora = films["methods"]["lora"]
    assert (lora["mean"], lora["deviation"], lora["seeds"]) == (0.91, 0.01, [0, 1, 2])
    low, high = lora["interval_95"]
    assert low < 0.91 < high and high - low < 0.1
    assert lora["settings"] == {"learning_rate": 1e-3, "r": 2} and lora["cells"][0] == "cells/films/lora_seed0.json"
    assert lora["core_seconds_per_1000_examples"] == {"mean": 6.0, "deviation": 1.0}
    assert lora["training_memory_bytes"] == {"mean": None, "deviation": None}
    assert lora["inference"] == {"extra": 0.25, "extra_merged": 0.0, "mergeable": "yes"}
    assert lora["forgetting"]["nats"] == pytest.approx(0.2) and lora["forgetting"]["deviation"] == pytest.approx(0.1)
    assert films["methods"]["head"]["deviation"] is None
    assert films["machine"]["cores"] and "machine" not in films["methods"]["lora"]


def test_costs_that_were_not_measured_are_not_known_and_shown_as_dashes(folder):
    content = comparison(folder)["datasets"]["films"]
    head = content["methods"]["head"]
    assert head["core_seconds_per_1000_examples"]["mean"] is None and head["adapter_bytes"]["mean"] == 40
    assert head["inference"] == {"extra": None, "extra_merged": None, "mergeable": None}
    assert content["best"]["lora"]["core_seconds_per_1000_examples"]["mean"] is None
    assert re.search(r"\| head \| .* \| - \| \+0\.100 \| - \|", table_of(content))
    for file in (folder / "cells/films/costs").iterdir():
        file.unlink()
    assert comparison(folder)["datasets"]["films"]["machine"] == {}


def test_costs_of_other_settings_are_not_known(folder):
    """As after trials that chose another size: what r 2 costs says nothing of r 8."""
    for path in (folder / "cells" / "films" / "costs").iterdir():
        content = read_json_file(path)
        content["cell"]["values"] = [["learning_rate", 1e-3], ["r", 8]]
        write_json_file(path, content)
    lora = comparison(folder)["datasets"]["films"]["methods"]["lora"]
    assert lora["core_seconds_per_1000_examples"]["mean"] is None and lora["inference"]["extra"] is None
    assert lora["forgetting"]["nats"] == pytest.approx(0.2)  # of the trained runs themselves


def test_only_what_is_significant_is_ranked(folder):
    films = comparison(folder)["datasets"]["films"]
    assert [test["significant"] for test in films["tests"]] == [True, True, False]
    assert {test["b"] for test in films["tests"][:2]} | {test["a"] for test in films["tests"][:2]} == {
        "full", "head", "lora"}
    assert {method: row["rank"] for method, row in films["methods"].items()} == {
        "full": [1, 2], "head": [3, 3], "lora": [1, 2]}


def test_what_had_another_budget_is_in_no_test(folder):
    films = comparison(folder)["datasets"]["films"]
    assert films["best"]["lora"]["mean"] == 0.95 and "rank" not in films["best"]["lora"]
    assert films["best"]["lora"]["interval_95"] and len(films["tests"]) == 3


def test_the_grid_and_its_scores_are_kept(folder):
    methods = tuning(folder)["datasets"]["films"]["methods"]
    assert [(trial["learning_rate"], trial["size"], trial["score"]) for trial in methods["lora"]["trials"]] == [
        (1e-4, None, 0.7), (1e-3, None, 0.8), (1e-2, None, None), (1e-3, 2, 0.9)]
    assert (methods["lora"]["size"], methods["lora"]["default_size"]) == ("r", 8)
    assert (methods["ia3"]["size"], methods["ia3"]["default_size"]) == (NO_SIZE, None)


def test_what_is_chosen_is_what_is_trained_and_nothing_before_all_trials_have_ended(tmp_path):
    """Of equals the lower rate, though its file's name comes later; a trial that failed has ended, too."""
    place, track = tmp_path / "cells" / "films", Track("films", "full", 3e-4, 1)
    score = {3e-4: 0.8, 9.49e-5: 0.8, 9.49e-4: 0.5, 3e-5: 0.7}.get

    def rate_of(cell):
        return dict(cell.values)["learning_rate"]

    *trials, trained = wanted(track, lambda cell: score(rate_of(cell)), lambda cell: True)
    assert sorted(map(rate_of, trials)) == grid(3e-4) and rate_of(trained) == 9.49e-5
    for cell in trials:
        assert not place.exists() or tuning(tmp_path)["datasets"]["films"]["methods"]["full"]["chosen"] is None
        if score(rate_of(cell)) is None:
            (place / f"{cell.name}-abc.error").write_text("killed by signal 9")
        else:
            write_json_file(place / f"{cell.name}.json", trial_content(cell, TERMS, score(rate_of(cell))))
    assert tuning(tmp_path)["datasets"]["films"]["methods"]["full"]["chosen"] == dict(trained.values)


def test_both_files_are_strict_json_and_the_same_each_time(folder):
    found = write_comparison(folder)
    assert read_json_file(folder / "comparison.json") == found == json.loads(json.dumps(write_comparison(folder)))
    text = (folder / "comparison_tuning.json").read_text()
    assert "NaN" not in text and json.loads(text) == tuning(folder)


def test_cells_of_different_terms_are_never_in_one_table(folder):
    cell = Cell("films", "ia3", 0, "final")
    write_json_file(folder / "cells" / "films" / "ia3_seed0.json", final_content(cell, {**TERMS, "budget": 1}, 0.5))
    with pytest.raises(OutputError, match=r"ia3_seed0\.json and .* are of different data, base models or budgets"):
        comparison(folder)


def test_seeds_with_different_settings_are_never_in_one_mean(folder):
    path = folder / "cells" / "films" / "lora_seed1.json"
    content = read_json_file(path)
    content["cell"]["values"][0][1] = 5e-3
    write_json_file(path, content)
    with pytest.raises(OutputError, match=r"the seeds of lora below .*films were trained with different settings"):
        comparison(folder)


@pytest.mark.parametrize("name", ["method_config", "training_config"])
def test_seeds_of_different_configurations_are_never_in_one_mean(folder, name):
    """What a change of the defaults between two starts leaves behind: the cells' own values are the same."""
    for seed in range(3):
        path = folder / "cells" / "films" / f"lora_seed{seed}.json"
        content = read_json_file(path)
        content["training_config"]["seed"] = seed
        content["method_config"] = {"r": 2}
        write_json_file(path, content)
    comparison(folder)
    content[name]["another"] = 1
    write_json_file(path, content)
    with pytest.raises(OutputError, match=r"the seeds of lora below .*films were trained with different settings"):
        comparison(folder)


def test_of_few_examples_too_a_mean_is_of_one_setting(folder):
    for seed in range(2):
        cell = Cell("films", "lora", seed, "size", (("learning_rate", 1e-3),), size=16)
        write_json_file(folder / "cells" / "films" / f"{cell.name}.json", final_content(cell, TERMS, 0.6 + seed / 10))
    (few, whole) = comparison(folder)["datasets"]["films"]["few_examples"]["lora"]
    assert (few["train_size"], few["mean"], few["seeds"]) == (16, 0.65, [0, 1])
    assert (whole["train_size"], whole["mean"]) == (32, 0.91)
    content = read_json_file(folder / "cells" / "films" / f"{cell.name}.json")
    content["cell"]["values"][0][1] = 5e-3
    write_json_file(folder / "cells" / "films" / f"{cell.name}.json", content)
    with pytest.raises(OutputError, match=r"the seeds of lora below .*size were trained with different settings"):
        comparison(folder)


def test_trials_that_failed_are_named(folder):
    (folder / "cells/films/tuning/lora_0.0001-abc.error").write_text("killed by signal 9")
    assert tuning(folder)["datasets"]["films"]["failed"] == ["lora_0.0001-abc"]


def test_the_table_for_people_goes_from_worse_to_better(folder):
    lines = table_of(comparison(folder)["datasets"]["films"]).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "zero-shot by prompt", "head", "full", "lora", "lora, best without the budget"]
    assert "| 91.00 % ± 1.00 % |" in lines[5] and "| 1 to 2 | 6.0 ± 1.0 | +0.200 ± 0.100 | +25 % |" in lines[5]
    assert "| 3 |" in lines[3]
