"""budget.py: every method gets as many trials, around its default rate, and what is trained is the best of them."""

from __future__ import annotations

import pytest

from minipeft.data.datasets import KNOWN
from minipeft.methods import METHODS
from minipeft.runs import defaults
from minipeft.runs.budget import (
    ALL,
    BEST,
    BUDGETS,
    COMPARED,
    MOST_WIDENINGS,
    RATES,
    SIZES,
    VIRTUAL_TOKENS,
    Cell,
    Track,
    grid,
    tracks_of,
    wanted,
)
from minipeft.runs.plan import Options, check_method
from minipeft.runs.sweep import with_trial
from minipeft.tasks import TASKS
from minipeft.tasks.generation import Generation


def followed(track, score, fails=()):
    """All cells of a track, in the order in which they come up, where a trial is found as good as `score` says."""
    there: list[Cell] = []
    while new := [cell for cell in wanted(track, lambda cell: score(cell) if cell in there and cell not in fails else
                                          None, there.__contains__) if cell not in there]:
        there += new
    return there


def rate_of(cell):
    return dict(cell.values)["learning_rate"]


LORA = Track("films", "lora", 1e-3, 2)


def test_a_grid_has_five_rates_over_two_decades_around_the_default():
    assert grid(1.5e-3) == [1.5e-4, 4.74e-4, 1.5e-3, 4.74e-3, 1.5e-2]


def test_rates_come_first_then_sizes_at_the_best_rate_then_training_with_the_best_of_all():
    cells = followed(LORA, lambda cell: -abs(rate_of(cell) - 3.16e-3) - dict(cell.values).get("r", 8) / 100)
    assert [rate_of(cell) for cell in cells[:5]] == grid(1e-3)
    assert [dict(cell.values) for cell in cells[5:7]] == [
        {"learning_rate": 3.16e-3, "r": 2, "lora_alpha": 4}, {"learning_rate": 3.16e-3, "r": 32, "lora_alpha": 64}]
    assert [(cell.kind, cell.seed, dict(cell.values)["r"]) for cell in cells[7:]] == [("final", 0, 2), ("final", 1, 2)]
    assert len(cells) == LORA.trials + LORA.seeds


@pytest.mark.parametrize(("sign", "beyond"), [(1, [3.16e-2, 1e-1]), (-1, [3.16e-5, 1e-5])])
def test_the_grid_grows_where_the_best_is_at_an_end_up_to_a_limit(sign, beyond):
    cells = followed(Track("films", "ia3", 1e-3, 1), lambda cell: sign * rate_of(cell))
    assert [rate_of(cell) for cell in cells[RATES:-1]] == beyond and len(beyond) == MOST_WIDENINGS
    assert rate_of(cells[-1]) == beyond[-1] and cells[-1].kind == "final"


def test_a_failed_trial_is_not_chosen_and_if_all_fail_nothing_is_trained():
    best = Cell("films", "ia3", 0, "tuning", (("learning_rate", 3.16e-3),))
    cells = followed(Track("films", "ia3", 1e-3, 1), rate_of, fails=[best, *[
        Cell("films", "ia3", 0, "tuning", (("learning_rate", rate),)) for rate in (1e-2, 3.16e-2)]])
    assert rate_of(cells[-1]) == 1e-3
    assert len(followed(Track("films", "ia3", 1e-3, 1), lambda cell: None)) == RATES


def test_without_tuning_the_defaults_are_trained():
    assert followed(Track("films", "lora", 1e-3, 2, tuned=False), None) == [
        Cell("films", "lora", 0, "final"), Cell("films", "lora", 1, "final")]


def test_seeds_heads_baselines_and_the_best_are_as_the_budget_says():
    tracks = {track.method: track for track in tracks_of("scitldr", TASKS["summarization"], list(ALL), 3, True, False,
                                                         BUDGETS["scitldr"])}
    assert {method: track.seeds for method, track in tracks.items()} == {
        method: 3 if method in ("lora", "full") else 1 for method in ALL if method != "head"}
    assert tracks["bitfit"].rate == defaults.table("bitfit", "summarization")["training"]["learning_rate"]
    assert tracks["baseline"].trials == 0 and tracks["bitfit"].trials == 5 and tracks["lora"].trials == 7
    best = tracks_of("imdb", TASKS["classification"], ["lora", "ia3"], 1, True, True, BUDGETS["imdb"])
    assert best[0].best == tuple(BEST["imdb"]["lora"].items()) and best[1].best is None
    assert followed(best[0], rate_of)[5].kind == "best"


@pytest.mark.parametrize(("base", "has_head"), [(Generation, False), (TASKS["tagging"], True)])
def test_the_head_of_a_task_of_ones_own_is_trained_alone_only_if_it_is_new(base, has_head):
    class Mine(base):
        name = "mine"

    tracks = tracks_of("films", Mine, ["head", "lora"], 1, True, False, BUDGETS["sample"])
    assert [track.method for track in tracks] == ["head"] * has_head + ["lora"]


def test_the_tables_name_what_there_is():
    for method in COMPARED:
        check_method(method, also=("baseline",))
    assert BUDGETS.keys() == {*KNOWN, "sample"} and SIZES.keys() <= METHODS.keys()
    for method, sizes in SIZES.items():
        config = METHODS[method].config(**defaults.table(method)["method"])
        assert {key: getattr(config, key) for key in sizes[1]} == sizes[1], "the middle one is the default"
        for size in sizes:
            with_trial(Options(method=method), size).check()
            assert size.get("num_virtual_tokens", 0) <= VIRTUAL_TOKENS
    for trials in BEST.values():
        for method, trial in trials.items():
            with_trial(Options(method=method), trial).check()
