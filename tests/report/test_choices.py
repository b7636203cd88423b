"""choices.py: which method for what, by rules that the tables bear out."""

from __future__ import annotations

import copy

import pytest

from minipeft.report.choices import choices, worth_it
from minipeft.report.tables import Comparison, block


@pytest.fixture
def found(comparison):
    return {choice.wish: choice for choice in choices(comparison)}


def test_every_wish_is_answered_if_a_comparison_has_everything(found):
    assert list(found) == [
        "the best result on films", "the fewest trained parameters among the best on films",
        "the best result on imdb", "the fewest trained parameters among the best on imdb",
        "no extra time once it is trained, among the best", "a small file for each of many tasks",
        "the least forgotten of the base's own language modelling", "the shortest training",
        "the least memory in training", *(f"to learn from {size} examples" for size in (16, 32, 64))]


def test_the_best_are_those_that_nothing_is_significantly_better_than(comparison, found):
    rows = comparison["datasets"]["imdb"]["methods"]
    best = found["the best result on imdb"].methods
    assert set(best) == {method for method, row in rows.items() if not row["worse_than"]} and best[0] == "full"
    smallest, = found["the fewest trained parameters among the best on imdb"].methods
    assert smallest in best and all(rows[smallest]["trained_parameters"] <= rows[other]["trained_parameters"]
                                    for other in best)


def test_less_than_nothing_forgotten_is_the_least(comparison):
    changed = copy.deepcopy(comparison)
    changed["datasets"]["imdb"]["methods"]["lora"]["forgetting"]["nats"] = -0.3
    found = {choice.wish: choice for choice in choices(changed)}
    least = found["the least forgotten of the base's own language modelling"]
    assert least.methods == ("lora",) and "-0.300 nats per token with the adapter in place, perplexity times 0.74" in (
        least.measured)


def test_one_method_alone_is_the_best_of_nothing(comparison):
    less = copy.deepcopy(comparison)
    rows = less["datasets"]["films"]["methods"]
    less["datasets"]["films"]["methods"] = {"lora": rows["lora"]}
    assert "films" not in " ".join(choice.wish for choice in choices(less))


def test_what_is_worth_training_lies_above_every_baseline(comparison):
    content = copy.deepcopy(comparison["datasets"]["imdb"])
    content["baselines"] = {"guess": {"accuracy": 0.5}, "zero_shot": {"accuracy": 0.85}}
    worth = worth_it(content)
    assert "lora" in worth and "head" not in worth
    assert all(row["interval_95"][0] > 0.85 for row in worth.values())
    content["methods"]["head"] |= {"interval_95": None, "mean": 0.86}  # of a task that counts nothing by example
    assert "head" in worth_it(content)
    content["methods"]["head"]["mean"] = 0.84
    assert "head" not in worth_it(content)


def test_savings_are_those_of_the_least_that_is_worth_it(comparison, found):
    rows = worth_it(comparison["datasets"]["imdb"])
    for wish, of in (("the shortest training", lambda row: row["core_seconds_per_1000_examples"]["mean"]),
                     ("the least memory in training", lambda row: row["training_memory_bytes"]["mean"]),
                     ("a small file for each of many tasks", lambda row: row["adapter_bytes"]["mean"])):
        assert of(rows[found[wish].methods[0]]) == min(map(of, rows.values()))


def test_savings_that_deviations_do_not_tell_apart_are_named_together(comparison):
    near = copy.deepcopy(comparison)
    rows = near["datasets"]["imdb"]["methods"]
    for row in rows.values():
        row["training_memory_bytes"]["deviation"] = 0.0
    assert {choice.wish: choice for choice in choices(near)}["the least memory in training"].methods == ("prefix",)
    rows["ptuning"]["training_memory_bytes"] = {"mean": 11.5 * 2**20, "deviation": 2.0 * 2**20}
    choice = {choice.wish: choice for choice in choices(near)}["the least memory in training"]
    assert choice.methods == ("prefix", "ptuning")
    assert choice.measured == "prefix: 10 MiB, 79.50 %; ptuning: 12 MiB, 74.50 %"


def test_no_extra_time_have_those_of_the_best_that_merge_or_add_nothing(comparison, found):
    content = comparison["datasets"]["imdb"]
    rows, best = content["methods"], found["the best result on imdb"].methods
    without = found["no extra time once it is trained, among the best"]
    assert set(without.methods) == {method for method in best if rows[method]["inference"]["mergeable"] != "no"}
    assert "adapter" in best and "adapter" not in without.methods, "it computes what no matrix can"
    assert "; to be merged, else slower: full +25 %" in without.measured


def test_where_none_of_the_best_merges_the_best_of_the_others_has_no_extra_time(comparison):
    less = copy.deepcopy(comparison)
    for method, row in less["datasets"]["imdb"]["methods"].items():
        row["rank"] = [1, 1] if method == "adapter" else [2, 11]
    found = {choice.wish: choice for choice in choices(less)}["no extra time once it is trained"]
    assert found.methods == ("full",) and found.measured.startswith("full 94.50 %; ")


def test_few_examples_name_who_was_compared(found):
    assert found["to learn from 16 examples"].methods == ("head",)
    assert found["to learn from 16 examples"].measured.startswith("66.60 %, the highest mean of head and lora; ")


def test_where_no_training_is_better_than_few_examples_that_is_the_advice(comparison):
    less = copy.deepcopy(comparison)
    less["datasets"]["imdb"]["baselines"] = {"zero_shot": {"accuracy": 0.68}}
    found = {choice.wish: choice for choice in choices(less)}
    assert found["to learn from 16 examples"].methods == ("zero-shot by prompt",)
    assert found["to learn from 16 examples"].measured.startswith("68.00 %; with head 66.60 %, the highest mean of ")
    assert found["to learn from 32 examples"].methods == ("lora",)


def test_what_was_not_measured_is_no_advice(comparison):
    less = copy.deepcopy(comparison)
    for content in less["datasets"].values():
        content["few_examples"] = {}
        for row in content["methods"].values():
            for key in ("rank", "better_than", "worse_than"):
                del row[key]
            row["core_seconds_per_1000_examples"]["mean"] = row["training_memory_bytes"]["mean"] = None
            row["inference"]["mergeable"] = None
    wishes = [choice.wish for choice in choices(less)]
    assert wishes[:2] == ["the best result on films", "the best result on imdb"]
    assert not [wish for wish in wishes if "time" in wish or "memory" in wish or "learn from" in wish]


def test_a_marker_asks_for_them(results):
    table = block("choices", Comparison(results))
    assert table.startswith("| you want | take | measured |")
    assert "| the shortest training |" in table
