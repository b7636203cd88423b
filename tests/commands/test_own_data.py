"""Texts of a user's own, as a new user would try them: what is told before training, what is refused, what is kept."""

from __future__ import annotations

import gzip

import pytest
from helpers import read_json, rows, write_csv

QUICK = ("--epochs", 1, "--precision", "fp32", "--batch-size", 8)
FRAUD = [(f"a bad film {i}" if i % 20 == 0 else f"a good film {i}", "fraud" if i % 20 == 0 else "ok")
         for i in range(200)]


@pytest.fixture
def train(script, tiny_model):
    """train(*options): a run of a second."""
    return lambda *options: script("train.py", "--model", tiny_model, *QUICK, *options)


@pytest.mark.kind("7: imbalanced labels, told before training; macro F1, each label's metrics, class weights")
def test_five_percent_fraud(train, script):
    write_csv("fraud.csv", FRAUD)
    outcome = train("--dataset", "fraud.csv", "--class-weights", "balanced", "--learning-rate", 1e-6)
    assert outcome.code == 0, outcome.err
    told, training = outcome.out.split("method ")
    assert "'ok' 154, 'fraud' 8 rows: always 'ok' would have accuracy 0.9506, so look at macro F1" in told
    assert "--class-weights balanced" in told and "weights    'fraud' 10.1, 'ok' 0.526" in told
    assert "best validation macro_f1" in training
    assert "macro f1" in training and "majority accuracy 0.9500" in training
    results = read_json("results/fine_tuned_lora_fraud_results.json")
    assert results["training_config"]["class_weights"] == "balanced"
    assert results["choices"]["weights"] == "'fraud' 10.1, 'ok' 0.526" and "macro F1" in results["choices"]["imbalance"]
    assert "validation_macro_f1" in results["curve"][0] and "macro_f1" in results["metrics"]["best_validation"]
    assert results["metrics"]["test"]["by_label"]["fraud"]["examples"] == 1
    tested = script("evaluate.py", "--dataset", "fraud.csv", "--precision", "fp32")
    assert tested.code == 0, tested.err
    assert [line.split()[0] for line in tested.out.splitlines() if " recall " in line] == ["fraud", "ok"]
    assert "f1 of ok " in tested.out and "macro_f1 " in tested.out


def test_the_majority_guess_is_among_the_baselines(train):
    write_csv("fraud.csv", FRAUD)
    outcome = train("--dataset", "fraud.csv", "--method", "baseline")
    assert "most frequent label: accuracy 0.9500" in outcome.out and "macro f1 0.4872" in outcome.out


def test_without_class_weights_and_with_balanced_labels_nothing_changes(train):
    outcome = train("--dataset", "films.csv")
    assert "imbalance" not in outcome.out and "weights" not in outcome.out and "macro_f1" not in outcome.out
    assert "best validation loss" in outcome.out  # films.csv has few rows
    assert read_json("results/fine_tuned_lora_films_results.json")["training_config"]["class_weights"] == "none"


@pytest.mark.parametrize(("options", "message"), [
    (("--class-weights", "heavy"), "class_weights must be one of none, balanced, got 'heavy'"),
    (("--similar-labels", "maybe"), "similar_labels must be one of None, merge, keep"),
    (("--delimiter", ";;"), "delimiter must be one character"), (("--encoding", "klingon"), "encoding must be one"),
    (("--test-file", "nowhere.csv"), "there is no file nowhere.csv"),
    (("--test-file", "nowhere.txt"), "unknown dataset 'nowhere.txt'")])
def test_what_is_no_choice_is_one_line(train, options, message):
    outcome = train("--dataset", "films.csv", *options)
    assert outcome.code == 2 and outcome.error_lines == [line for line in outcome.error_lines if message in line]


def test_class_weights_are_for_labels_of_whole_texts(train):
    write_csv("pairs.csv", [(f"a {i}", f"b {i}") for i in range(30)], ("source", "target"))
    outcome = train("--task", "translation", "--dataset", "pairs.csv", "--class-weights", "balanced")
    assert outcome.code == 2 and "class_weights means nothing to translation" in outcome.err


@pytest.mark.kind("7: bad rows are skipped by one option, and their number is told and kept")
def test_bad_rows_are_told_or_skipped(train):
    write_csv("films.csv", [*rows(20), ("a film", "NaN"), ("", "positive")])
    refused = train("--dataset", "films.csv")
    assert refused.code == 2
    assert "films.csv, row 41: the label is empty ('NaN') (2 of 42 rows cannot be used: mend them, or leave them out " \
           "with --skip-bad-rows)" in refused.err
    outcome = train("--dataset", "films.csv", "--skip-bad-rows")
    assert outcome.code == 0, outcome.err
    shown = "2 of 42 rows of films.csv (the first is row 41: the label is empty ('NaN'))"
    assert f"skipped    {shown}\n" in outcome.out
    assert read_json("results/fine_tuned_lora_films_results.json")["choices"]["skipped"] == shown


def test_labels_that_are_spelled_in_two_ways_and_rare_ones_are_told_before_training(train):
    write_csv("films.csv", [*rows(20), ("a good film", "Positive"), *[(f"so so {i}", "neutral") for i in range(2)]])
    refused = train("--dataset", "films.csv")
    assert refused.code == 2 and "'positive' (20 rows) and 'Positive' (1 row)" in refused.err
    outcome = train("--dataset", "films.csv", "--similar-labels", "merge")
    assert outcome.code == 0, outcome.err
    assert "labels     the first of each stands for all, as asked: 'positive' (20 rows)" in outcome.out
    assert "rare       too few rows to be judged: 'neutral' (2 rows) has none in validation and test" in outcome.out


def test_columns_that_were_named_in_training_are_found_again_in_other_files(train, script):
    write_csv("named.csv", rows(), ("review", "sentiment"))
    assert train("--dataset", "named.csv", "--text-column", "review", "--label-column", "sentiment", "--output", "nm"
                 ).code == 0
    write_csv("more.csv", rows(3), ("review", "sentiment"))
    predicted = script("predict.py", "--adapter", "nm", "--input", "more.csv")
    assert predicted.code == 0 and len(predicted.out.splitlines()) == 6, predicted.err
    for file, count in (("named.csv", 4), ("more.csv", 6)):
        tested = script("evaluate.py", "--adapter", "nm", "--dataset", file)
        assert "columns    review, sentiment (as in training)\n" in tested.out, tested.err
        assert f"{count} of {count} test examples" in tested.out
    given = script("evaluate.py", "--adapter", "nm", "--dataset", "more.csv", "--text-column", "sentiment")
    assert given.code == 2 and "columns    sentiment (as in training)" in given.out
    write_csv("other.csv", rows(3))  # whose columns are the task's
    assert script("predict.py", "--adapter", "nm", "--input", "other.csv").code == 0
    assert "6 of 6 test examples" in script("evaluate.py", "--adapter", "nm", "--dataset", "other.csv").out


def test_files_of_splits_compressed_and_with_semicolons(train, script, folder):
    (folder / "own").mkdir()
    for split, size in (("train", 20), ("validation", 3), ("test", 4)):
        lines = ["text;label", *(f"{text};{label}" for text, label in rows(size))]
        (folder / "own" / f"{split}.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    outcome = train("--dataset", "own")
    assert outcome.code == 0, outcome.err
    assert "40 train, 6 validation, 8 test" in outcome.out and "semicolons between columns" in outcome.out
    tested = script("evaluate.py", "--dataset", "own/train.csv.gz", "--test-file", "own/test.csv.gz")
    assert "8 of 8 test examples" in tested.out, tested.err


def test_options_for_own_files_are_refused_for_a_known_dataset(train):
    outcome = train("--dataset", "sample", "--skip-bad-rows")
    assert outcome.code == 2 and "--skip-bad-rows" in outcome.err and "sample's are known" in outcome.err
