"""pictures.py: one picture for each question, as PNG and SVG, 800 pixels wide, names readable."""

from __future__ import annotations

import copy
import re

import pytest
from matplotlib.image import imread

from minipeft.methods import METHODS
from minipeft.report.families import FAMILIES, family_of
from minipeft.report.pictures import costs, draw_comparison, parameters, rates, sizes

OF_IMDB = ["parameters", "forgetting", "few_examples", "curves", "costs", "tuning", "sizes"]
OF_FILMS = ["parameters_films", "forgetting_films", "curves_films", "costs_films"]
NAMES = OF_IMDB + OF_FILMS


@pytest.fixture(scope="module")
def drawn(comparison, tuning, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "comparison"
    assert draw_comparison(comparison, tuning, folder) == NAMES
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_each_is_800_pixels_wide_and_an_svg(drawn, name):
    assert imread(drawn / f"{name}.png").shape[1] == 800
    assert "<svg" in (drawn / f"{name}.svg").read_text(encoding="utf-8")


def test_findings_point_at_pictures_that_are_drawn(drawn, comparison, tuning):
    from minipeft.report.findings import findings
    found = [name for part in findings(comparison, tuning) for finding in part for name in finding.pictures]
    assert found and set(found) <= set(NAMES)


def test_the_front_holds_what_no_other_method_beats_with_fewer_parameters(comparison):
    figure = parameters("imdb", comparison["datasets"]["imdb"])
    front, = (line for line in figure.axes[0].get_lines() if line.get_label() == "highest mean so far")
    rows = comparison["datasets"]["imdb"]["methods"].values()
    expected = sorted((row["trained_parameters"], round(100 * row["mean"], 6)) for row in rows if not any(
        other["mean"] >= row["mean"] and other["trained_parameters"] < row["trained_parameters"] for other in rows))
    assert [(x, round(y, 6)) for x, y in zip(*front.get_data())] == expected


def test_one_method_alone_is_no_picture(comparison, tuning, tmp_path):
    less = copy.deepcopy(comparison)
    less["datasets"]["films"]["methods"] = {"lora": less["datasets"]["films"]["methods"]["lora"]}
    assert draw_comparison(less, tuning, tmp_path / "p") == OF_IMDB


def test_each_seed_is_seen_beside_its_mean(comparison):
    figure = parameters("imdb", comparison["datasets"]["imdb"])
    drawn = [tuple(point) for seeds in figure.axes[0].collections for point in seeds.get_offsets()]
    rows = comparison["datasets"]["imdb"]["methods"].values()
    assert sorted(drawn) == sorted((row["trained_parameters"], 100 * score) for row in rows for score in row["scores"])


def test_the_name_of_a_dataset_may_hold_dollar_signs(comparison):
    content = comparison["datasets"]["imdb"]
    parameters("prices_$_and_$_x", content).draw_without_rendering()
    costs("prices_$_and_$_x", content).draw_without_rendering()


def test_sizes_are_drawn_at_the_best_rate_with_the_default_among_them(comparison, tuning):
    figure = sizes("imdb", comparison["datasets"]["imdb"], tuning["datasets"]["imdb"]["methods"])
    shown = {axes.get_title(loc="left"): [list(values) for values in axes.get_lines()[0].get_data()]
             for axes in figure.axes if axes.get_lines()}
    assert shown == {"adapter: reduction": [[8, 32], [75, 70]], "lora: r": [[2, 8], [79, 80]]}


def test_no_name_covers_another_one(comparison):
    figure = parameters("imdb", comparison["datasets"]["imdb"])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(METHODS)
    assert not [(a, b) for number, a in enumerate(boxes) for b in boxes[:number]
                if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 3]


@pytest.mark.parametrize(("best_by", "label"), [
    ("accuracy", "validation accuracy in %"), ("macro_f1", "validation macro f1 in %"), ("loss", "validation loss")])
def test_an_axis_of_trials_is_called_by_what_they_were_judged_by(comparison, tuning, best_by, label):
    tuned = copy.deepcopy(tuning["datasets"]["imdb"]["methods"])
    for method in tuned.values():
        method["best_by"], sign = best_by, -1 if best_by == "loss" else 1  # a score by loss is its negative
        method["trials"] = [{**trial, "score": sign * trial["score"]} for trial in method["trials"]]
    assert rates("imdb", comparison["datasets"]["imdb"], tuned).get_supylabel() == label


def test_what_was_not_measured_is_not_drawn(comparison, tmp_path):
    less = copy.deepcopy(comparison)
    less["datasets"]["imdb"]["few_examples"] = {}
    assert draw_comparison(less, {"datasets": {}}, tmp_path / "p") == [
        "parameters", "forgetting", "curves", "costs", *OF_FILMS]


def test_families_hold_each_method_once_and_differ_in_color_and_marker():
    assert sorted(name for family in FAMILIES for name in family.methods) == sorted(METHODS)
    assert len({family.color for family in FAMILIES}) == len({family.marker for family in FAMILIES}) == len(FAMILIES)
    assert all(re.fullmatch(r"#[0-9a-f]{6}", family.color) for family in FAMILIES)
    assert family_of("dora").name == "low-rank updates"
