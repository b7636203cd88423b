"""findings.py: sentences that a comparison supports, and none that it does not."""

from __future__ import annotations

import copy
import json
import re

from minipeft.report.findings import SEEN_ONCE, SENTENCES, findings, listed
from minipeft.report.tables import SEEN_ONCE_HEADING, Comparison, block


def texts_of(comparison, tuning):
    return [finding.text for found in findings(comparison, tuning) for finding in found]


def said(comparison, tuning, word):
    return [text for text in texts_of(comparison, tuning) if word in text]


def test_every_sentence_is_there_if_a_comparison_has_everything(comparison, tuning):
    assert [len(found) for found in findings(comparison, tuning)] == [len(SENTENCES), len(SEEN_ONCE)] == [10, 3]


def test_the_top_is_what_nothing_is_significantly_better_than(comparison, tuning):
    text, = said(comparison, tuning, "On imdb no method is significantly better than any of ")
    top = [method for method, row in comparison["datasets"]["imdb"]["methods"].items() if row["rank"][0] == 1]
    assert "full" in top and "head" not in top
    assert all(method in text.partition(";")[0] for method in top) and "head" in text.partition(";")[2]


def test_a_method_alone_at_the_top_is_better_than_all(comparison, tuning):
    alone = copy.deepcopy(comparison)
    for method, row in alone["datasets"]["imdb"]["methods"].items():
        row["rank"] = [1, 1] if method == "full" else [2, 11]
    assert not said(alone, tuning, "full is significantly better than all others"), "which no test has shown"
    rows = alone["datasets"]["imdb"]["methods"]
    rows["full"]["better_than"] = [method for method in rows if method != "full"]
    assert said(alone, tuning, "full is significantly better than all others (94.50 %).")


def test_without_tests_nothing_is_said_of_ranks(comparison, tuning):
    untested = copy.deepcopy(comparison)
    for content in untested["datasets"].values():
        content["tests"] = []
        for row in content["methods"].values():
            for key in ("rank", "better_than", "worse_than"):
                del row[key]
    texts = texts_of(untested, tuning)
    assert texts and not [text for text in texts if "significant" in text and "pairs of methods" not in text]


def test_costs_are_held_against_full_fine_tuning(comparison, tuning):
    text, = said(comparison, tuning, "core seconds per 1,000 examples")
    less, equal, more = text.partition(". ")[2].split("; ")
    assert "takes 31.0 ± 1.0 core seconds" in text and "prefix (20 tokens) 0.68" in less
    assert equal.startswith("not told apart from it: ") and "lora (r 8) 0.97" in equal and more.startswith("more: none")


def test_costs_less_apart_than_their_deviations_are_named_together(comparison, tuning):
    text, = said(comparison, tuning, "Of the base's own language modelling")
    assert "on imdb full (+0.500) forgot the most, prefix (+0.045) the least" in text and "on films full" in text
    near = copy.deepcopy(comparison)
    near["datasets"]["imdb"]["methods"]["lora"]["forgetting"] |= {"nats": 0.4, "deviation": 0.11}
    near["datasets"]["imdb"]["methods"]["ptuning"]["forgetting"] |= {"nats": 0.1, "deviation": 0.01}
    assert said(near, tuning, "on imdb full (+0.500) and lora (+0.400) forgot the most, prefix (+0.045) the least")


def test_merged_is_slower_by_a_percent_or_by_less_than_one(comparison, tuning):
    for extra, words in ((0.004, "by less than 1 % once it is merged"), (-0.02, "by less than 1 % once it is merged"),
                         (0.016, "by 2 % at most once it is merged")):
        merged = copy.deepcopy(comparison)
        for row in merged["datasets"]["imdb"]["methods"].values():
            row["inference"]["extra_merged"] = extra
        text, = said(merged, tuning, "On imdb, what can merge makes the base slower while it is apart (")
        assert words in text and "lora" in text.partition(words)[0] and "adapter" in text.partition(words)[2]


def test_few_examples_name_all_that_deviations_do_not_tell_from_the_best(comparison, tuning):
    assert said(comparison, tuning, "number of training examples of imdb: 16 and 64: head; 32: lora.")
    near = copy.deepcopy(comparison)
    near["datasets"]["imdb"]["few_examples"]["lora"][0]["deviation"] = 0.06
    assert said(near, tuning, "number of training examples of imdb: 16: all; 32: lora; 64: head.")


def test_a_missed_rate_costs_the_worse_of_its_two_neighbors(comparison, tuning):
    assert said(comparison, tuning, "half a decade beside the best one costs 10.00 percentage points")


def test_what_a_comparison_lacks_is_not_spoken_of(comparison):
    less = json.loads(json.dumps(comparison))
    less["datasets"]["imdb"] |= {"few_examples": {}, "best": {}, "baselines": {}}
    texts = " ".join(texts_of(less, {"datasets": {}}))
    assert not [word for word in ("prompt, without", "half a decade", "size mattered", "number of training examples",
                                  "without the common budget") if word in texts]


def test_in_markdown_each_points_at_its_picture(results):
    supported, heading, seen = (part.splitlines() for part in block("findings", Comparison(results)).split("\n\n"))
    assert all(re.search(r"\(\[\w+\]\(comparison/\w+\.png\)", line) for line in supported + seen)
    assert [line.partition(".")[0] for line in supported] == [str(number) for number in range(1, 11)]
    assert heading == [SEEN_ONCE_HEADING] and all(line.startswith("- ") for line in seen)
    assert "[parameters_films](comparison/parameters_films.png)" in supported[1]


def test_names_are_listed_with_an_and():
    assert [listed(names) for names in (["a"], ["a", "b"], "abc", [])] == ["a", "a and b", "a, b and c", "none"]


def test_one_seed_each_is_said_and_no_deviation_is_spoken_of(comparison, tuning):
    single = copy.deepcopy(comparison)
    for content in single["datasets"].values():
        for row in content["methods"].values():
            row["deviation"] = None
    assert said(single, tuning, "the tests speak of these runs, and not of what another seed would give")
    assert not said(single, tuning, "standard deviation")


def test_what_was_not_tested_is_neither_better_nor_worse(comparison, tuning):
    partly = copy.deepcopy(comparison)
    for key in ("rank", "better_than", "worse_than"):
        del partly["datasets"]["imdb"]["methods"]["head"][key]
    assert not [text for text in said(partly, tuning, "significantly") if re.search(r"\bhead\b", text.partition(
        "on imdb")[2] or text)]


def test_a_rate_at_the_end_of_the_grid_has_one_side_and_says_nothing(comparison, tuning):
    ends = copy.deepcopy(tuning)
    for row in ends["datasets"]["imdb"]["methods"].values():
        row["trials"] = [trial for trial in row["trials"] if trial["learning_rate"] <= 1e-3]
    assert not said(comparison, ends, "half a decade")


def test_one_size_alone_is_neither_most_nor_least(comparison, tuning):
    one = copy.deepcopy(tuning)
    methods = one["datasets"]["imdb"]["methods"]
    methods["adapter"]["trials"] = [trial for trial in methods["adapter"]["trials"] if trial["size"] is None]
    assert said(comparison, tuning, "size mattered most for adapter") and not said(comparison, one, "size mattered")
