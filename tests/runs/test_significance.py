"""significance.py: intervals, pairs, Holm's correction and ranks, on numbers whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from minipeft.runs.significance import compared, holm, interval, ranks, resampled
from minipeft.tasks.classification import Classification
from minipeft.tasks.tagging import Tagging

accuracy = Classification.headline_of


def hits(share, seed, examples=2000):
    return (np.random.default_rng(seed).random((examples, 1)) < share).astype(np.int64)


def test_the_interval_of_an_accuracy_is_that_of_the_binomial():
    counts = hits(0.8, 0)
    low, high = interval(resampled({"a": [counts]}, accuracy, samples=2000)["a"])
    half = 1.96 * np.sqrt(0.8 * 0.2 / 2000)
    assert (low, high) == pytest.approx((counts.mean() - half, counts.mean() + half), abs=0.003)


def test_seeds_that_differ_widen_the_interval():
    same, apart = [hits(0.8, 0)] * 3, [hits(0.7, 1), hits(0.8, 2), hits(0.9, 3)]
    alone = resampled({"same": same}, accuracy, samples=1000)["same"].std()
    apart_alone = resampled({"apart": apart}, accuracy, samples=1000)["apart"]
    assert apart_alone.std() > 3 * alone and apart_alone.mean() == pytest.approx(0.8, abs=0.02)


def test_seeds_that_agree_by_chance_and_one_seed_alone_are_taken_to_differ_as_those_of_other_methods_do():
    apart = [hits(0.7, 1), hits(0.8, 2), hits(0.9, 3)]
    alone = resampled({"one": [hits(0.8, 0)]}, accuracy, samples=1000)["one"].std()
    beside = resampled({"one": [hits(0.8, 0)], "same": [hits(0.8, 0)] * 3, "a": apart, "b": apart}, accuracy,
                       samples=1000)
    assert alone == pytest.approx(np.sqrt(0.8 * 0.2 / 2000), rel=0.1)
    assert beside["same"].std() > 3 * alone and beside["one"].std() > 1.5 * beside["same"].std()


UNLIKE = [0.0006, 0.0014, 0.002, 0.0022, 0.0029, 0.0034, 0.0041, 0.0053, 0.0063, 0.0077, 0.0162]  # as on SST-2


@pytest.mark.parametrize(("deviations", "seeds", "at_most"), [
    ([0.02] * 11, 3, 0.05), ([0.01] * 8 + [0.02, 0.04, 0.06], 3, 0.08), (UNLIKE, 3, 0.08), ([0.02] * 11, 2, 0.05),
    (UNLIKE, 2, 0.15)], ids=["alike", "some vary more", "unlike", "alike, two seeds", "unlike, two seeds"])
def test_methods_that_are_equal_are_rarely_told_apart_however_their_seeds_fall(deviations, seeds, at_most):
    """Three seeds lie all above another method's three once in ten pairs: that must not count as a difference. Here
    seeds are all that differs, as if there were endless test examples; fewer make it rarer."""
    rng, families = np.random.default_rng(0), 100
    told_apart = 0
    for _ in range(families):
        each = {str(number): [np.full((5, 1), 0.8 + deviation * rng.standard_normal()) for _ in range(seeds)]
                for number, deviation in enumerate(deviations)}
        means = {method: float(np.mean(runs)) for method, runs in each.items()}
        told_apart += any(test["significant"] for test in compared(means, resampled(each, accuracy, samples=4000)))
    assert told_apart <= at_most * families


def test_pairs_are_compared_on_the_same_examples():
    """A method that is right wherever another one is, and in 1 % of the examples more, is better: by chance alone the
    two accuracies could differ by as much."""
    base = hits(0.8, 0)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:20]] = 1
    samples = resampled({"base": [base], "better": [better]}, accuracy, samples=2000)
    (test,) = compared({"base": base.mean(), "better": better.mean()}, samples)
    assert test["difference"] == pytest.approx(-0.01) and test["significant"] and test["p"] < 0.01
    assert test["interval_95"][1] < 0
    independent = resampled({"base": [base], "better": [hits(0.81, 5)]}, accuracy, samples=2000)
    assert not compared({"base": 0.8, "better": 0.81}, independent)[0]["significant"]


def test_a_method_is_not_better_than_itself():
    counts = hits(0.8, 0)
    samples = resampled({"a": [counts], "b": [counts]}, accuracy, samples=200)
    assert compared({"a": 0.8, "b": 0.8}, samples)[0]["p"] == 1.0


def test_f1_is_resampled_by_sentences():
    counts = np.random.default_rng(0).integers(0, 3, (500, 3))
    counts[:, 0] = np.minimum(counts[:, 1], counts[:, 2])
    samples = resampled({"a": [counts]}, Tagging.headline_of, samples=500)["a"]
    assert samples.mean() == pytest.approx(float(Tagging.headline_of(counts.sum(axis=0), 500)), abs=0.01)


def test_holm_multiplies_the_smallest_p_by_their_number_and_never_falls():
    assert holm([0.01, 0.02, 0.03, 0.5]) == pytest.approx([0.04, 0.06, 0.06, 0.5])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8]) and holm([]) == []


def test_a_rank_is_one_number_only_where_all_others_differ_significantly():
    found = [{"a": "x", "b": "y", "difference": 0.1, "significant": True},
             {"a": "x", "b": "z", "difference": 0.2, "significant": True},
             {"a": "y", "b": "z", "difference": 0.1, "significant": False}]
    places = ranks(["x", "y", "z"], found)
    assert {method: place["rank"] for method, place in places.items()} == {"x": [1, 1], "y": [2, 3], "z": [2, 3]}
    assert places["x"]["better_than"] == ["y", "z"] and places["z"]["worse_than"] == ["x"]
