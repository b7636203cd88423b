"""labels.py: which labels of a file are the same, and which cannot be judged."""

from __future__ import annotations

from collections import Counter

import pytest
from helpers import load, rows, write_csv

from minipeft.data.labels import by_name, in_order, reduced
from minipeft.errors import DataError


def labeled(**counts):
    """Rows with so many of each label."""
    return [(f"text {label} {i}", label) for label, count in counts.items() for i in range(count)]


# --- the same label ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("one", "other"), [
    ("pos", "pos "), ("pos", " Pos"), ("not sure", "Not\u00a0 sure"), ("1", "01"), ("0", "00"), ("1", "1.0"),
    ("-1", "-1.00"),
    ("caf\u00e9", "cafe\u0301"), ("STRASSE", "straße")])
def test_labels_that_a_person_takes_for_one_are_alike(one, other):
    assert reduced(one) == reduced(other)


@pytest.mark.parametrize(("one", "other"), [
    ("1", "10"), ("0", ""), ("pos", "positive"), ("1", "1.05"), ("1", "-1"), ("a b", "ab")])
def test_other_labels_are_not(one, other):
    assert reduced(one) != reduced(other)


SPELLINGS = labeled(**{"pos": 30, "pos ": 3, "Pos": 2, "neg": 30})


@pytest.mark.kind("7: labels that differ in blanks or case are told with their numbers")
def test_labels_that_differ_in_blanks_or_case_are_refused_with_their_numbers(tmp_path):
    path = write_csv(tmp_path / "x.csv", SPELLINGS)
    with pytest.raises(DataError, match=r"'pos' \(30 rows\) and 'pos ' \(3 rows\) and 'Pos' \(2 rows\).*"
                                        "--similar-labels merge .*--similar-labels keep"):
        load(path)
    merged = load(path, similar_labels="merge")
    assert merged.label_names == ["neg", "pos"]
    assert Counter(merged.train.labels + merged.validation.labels + merged.test.labels) == {0: 30, 1: 35}
    assert "'Pos' (2 rows)" in merged.remarks["labels"]
    kept = load(path, similar_labels="keep")
    assert kept.label_names == ["Pos", "neg", "pos", "pos "] and "kept apart" in kept.remarks["labels"]


@pytest.mark.kind("7: labels 01 and 1 are told with their numbers")
def test_leading_zeros_are_kept_and_told(tmp_path):
    path = write_csv(tmp_path / "x.csv", labeled(**{"01": 30, "1": 4, "2": 30}))
    with pytest.raises(DataError, match=r"'01' \(30 rows\) and '1' \(4 rows\)"):
        load(path)
    assert load(path, similar_labels="merge").label_names == ["01", "2"]
    assert load(path, similar_labels="keep").label_names == ["01", "1", "2"]
    alone = load(write_csv(tmp_path / "y.csv", labeled(**{"01": 30, "02": 30})))
    assert alone.label_names == ["01", "02"] and "labels" not in alone.remarks


def test_labels_of_a_trained_model_are_the_spelling_that_others_are_merged_into(tmp_path):
    path = write_csv(tmp_path / "x.csv", labeled(Negative=30, Positive=30))
    with pytest.raises(DataError, match=r"'positive' \(0 rows\) and 'Positive' \(30 rows\)"):
        load(path, label_names=["positive", "negative"])
    found = load(path, label_names=["positive", "negative"], similar_labels="merge")
    assert found.label_names == ["positive", "negative"]
    assert all((label == 0) == ("Positive" in text) for text, label in zip(found.test.texts, found.test.labels))


def test_similar_labels_mean_nothing_to_a_task_without_labels_of_whole_texts(tmp_path):
    path = write_csv(tmp_path / "x.csv", [(f"a {i}", f"b {i}") for i in range(30)], ("source", "target"))
    with pytest.raises(DataError, match="--similar-labels"):
        load(path, task="translation", similar_labels="merge")


# --- numbers and order ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("labels", "names", "expected"), [
    ([0, 1, "1"], ["no", "yes"], ["no", "yes", "yes"]), ([1, 2], ["1", "2"], [1, 2]), ([2, -1], ["a", "b"], [2, -1]),
    ([[0], None], ["a"], [[0], None]), (["b"], ["a", "b"], ["b"])])
def test_a_number_stands_for_a_name_unless_names_are_numbers(labels, names, expected):
    assert by_name(labels, names) == expected


@pytest.mark.parametrize(("names", "expected"), [
    (["10", "9", "-1", "2.5"], ["-1", "2.5", "9", "10"]), (["b", "10", "a", "9"], ["10", "9", "a", "b"]),
    (["1", "01"], ["01", "1"])])
def test_labels_are_in_the_order_of_numbers_where_all_are_numbers(names, expected):
    assert in_order(names) == expected


# --- no labels, or too few --------------------------------------------------------------------------------------------

@pytest.mark.kind("7: a column of texts given as the column of labels")
def test_a_column_of_texts_is_not_taken_for_labels(tmp_path):
    path = write_csv(tmp_path / "x.csv", rows(20))
    with pytest.raises(DataError, match=r"the column 'text' cannot hold both texts and labels: see --text-column"):
        load(path, label_column="text")
    with pytest.raises(DataError, match=r"40 different values in 40 rows, .* --label-column"):
        load(path, text_column="label", label_column="text")
    often = [(f"t {i}", f"comment {i}" if i < 300 else "thanks") for i in range(5000)]
    with pytest.raises(DataError, match="301 different values in 5,000 rows"):
        load(write_csv(tmp_path / "z.csv", often))
    essays = write_csv(tmp_path / "y.csv", [(f"t {i}", ["good " * 50, "bad " * 50][i % 2]) for i in range(40)])
    with pytest.raises(DataError, match=r"has 250 characters, which is no name of a class: --label-column"):
        load(essays)


@pytest.mark.kind("7: a class with 2 rows is told before training")
def test_a_label_with_too_few_rows_to_be_judged_is_told(tmp_path):
    found = load(write_csv(tmp_path / "x.csv", [*rows(20), *labeled(rare=2)]))
    assert found.label_names == ["negative", "positive", "rare"]
    assert found.remarks == {"rare": "too few rows to be judged: 'rare' (2 rows) has none in validation and test"}
    assert load(write_csv(tmp_path / "y.csv", rows(20))).remarks == {}


def test_equal_texts_with_different_labels_are_told(tmp_path):
    found = load(write_csv(tmp_path / "x.csv", [*rows(20), ("a", "negative"), ("a", "positive"), ("b", "negative")]))
    assert found.remarks["conflicts"] == "1 of the texts are there with different labels, such as 'a'"
