"""datasets.py: where a dataset is found, what is refused and how, and how it is split."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import ROOT, load, rows, write_csv, write_imdb, write_parquet
from huggingface_hub import constants as hub_constants
from hypothesis import given
from hypothesis import strategies as st

from minipeft.data import datasets as data
from minipeft.data.datasets import choose_dataset, stratified_split
from minipeft.data.examples import Examples, repeated
from minipeft.errors import DataError
from minipeft.model.hub import hub_is_reachable


@pytest.fixture(autouse=True)
def no_data_folder_set(monkeypatch):
    monkeypatch.delenv("MINIPEFT_DATA", raising=False)


def pairs(examples):
    """The (text, label) pairs of a split, in order."""
    return list(zip(examples.texts, examples.labels))


# --- split ------------------------------------------------------------------------------------------------------------

LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=80)


@given(labels=LABELS, fraction=st.floats(0, 1), seed=st.integers(0, 1000))
def test_a_stratified_split_holds_every_example_once_and_each_label_in_its_share(labels, fraction, seed):
    kept, held_out = stratified_split(labels, fraction, seed)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    for label, count in Counter(labels).items():
        assert abs(sum(labels[i] == label for i in held_out) - fraction * count) <= 0.5


def test_a_stratified_split_is_shuffled_and_depends_on_the_seed_alone():
    labels = [0] * 50 + [1] * 50
    kept, held_out = stratified_split(labels, 0.1, seed=3)
    again, other = stratified_split(labels, 0.1, seed=3), stratified_split(labels, 0.1, seed=4)
    assert np.array_equal(kept, again[0]) and np.array_equal(held_out, again[1])
    assert sorted(held_out) != sorted(other[1])
    assert list(kept) != sorted(kept)


# --- IMDb from a folder -----------------------------------------------------------------------------------------------

def test_imdb_is_read_from_a_folder_and_its_validation_split_is_a_tenth_of_train(tmp_path):
    found = load("imdb", write_imdb(tmp_path, train=100, test=20))
    assert found.name == "imdb" and found.label_names == ["negative", "positive"]
    assert (len(found.train), len(found.validation), len(found.test)) == (90, 10, 20)
    assert Counter(found.validation.labels) == {0: 5, 1: 5}
    together = sorted(pairs(found.train) + pairs(found.validation))
    assert together == sorted((f"a {'good' if i >= 50 else 'bad'} film,\n\nnumber {i} of train", int(i >= 50))
                              for i in range(100))


def test_imdbs_test_split_is_left_as_it_is(tmp_path):
    found = load("imdb", write_imdb(tmp_path, test=20))
    assert pairs(found.test) == [(f"a {'good' if i >= 10 else 'bad'} film,\n\nnumber {i} of test", int(i >= 10))
                                 for i in range(20)]


def test_imdb_in_several_files_is_one_dataset(tmp_path):
    write_imdb(tmp_path, train=40)
    write_parquet(tmp_path / "imdb" / "train-00001-of-00002.parquet", text=["more", "and more"], label=[0, 1])
    found = load("imdb", tmp_path)
    assert len(found.train) + len(found.validation) == 42


def test_the_environment_names_the_data_folder_unless_an_argument_does(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIPEFT_DATA", str(write_imdb(tmp_path / "a", train=40)))
    write_imdb(tmp_path / "b", train=60)
    assert len(load("imdb").train) == 36
    assert len(load("imdb", tmp_path / "b").train) == 54


def test_imdbs_validation_split_depends_on_the_seed_alone(tmp_path):
    write_imdb(tmp_path)
    first, again, other = (load("imdb", tmp_path, seed=seed).validation.texts for seed in (0, 0, 1))
    assert first == again
    assert sorted(first) != sorted(other)


def test_a_folder_without_imdb_is_refused_with_the_names_of_the_files_it_should_hold(tmp_path):
    with pytest.raises(DataError, match=r"imdb/train-\*\.parquet"):
        load("imdb", tmp_path)
    write_parquet(tmp_path / "imdb" / "train-00000-of-00001.parquet", text=["a", "b"], label=[0, 1])
    with pytest.raises(DataError, match=r"no test-\*\.parquet"):
        load("imdb", tmp_path)


def test_imdb_files_without_the_expected_columns_are_refused(tmp_path):
    write_imdb(tmp_path)
    write_parquet(tmp_path / "imdb" / "train-00000-of-00001.parquet", review=["a", "b"], sentiment=[0, 1])
    with pytest.raises(DataError, match="text"):
        load("imdb", tmp_path)


def test_imdb_files_without_rows_are_refused(tmp_path):
    write_imdb(tmp_path)
    write_parquet(tmp_path / "imdb" / "train-00000-of-00001.parquet", text=pa.array([], pa.string()),
                  label=pa.array([], pa.int64()))
    with pytest.raises(DataError):
        load("imdb", tmp_path)


def test_a_damaged_imdb_file_is_named(tmp_path):
    file = write_imdb(tmp_path) / "imdb" / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DataError, match=re.escape(str(file))):
        load("imdb", tmp_path)


# --- the bundled sample -----------------------------------------------------------------------------------------------

KIND = pytest.mark.kind("7: the bundled sample has plain reviews as well as tricky ones")


@pytest.fixture(scope="module")
def sample():
    return load("sample")


@pytest.fixture(scope="module")
def sample_rows():
    """The sample's files: rows {"text", "label", "kind"} by split."""
    return {split: [json.loads(line) for line in (data.SAMPLE_FOLDER / f"{split}.jsonl").read_text(
        encoding="utf-8").splitlines()] for split in data.SPLITS}


@KIND
def test_the_sample_is_large_enough_and_balanced(sample):
    assert sample.label_names == ["negative", "positive"]
    assert len(sample.train) + len(sample.validation) + len(sample.test) >= 1500
    for split, least in (("train", 1000), ("validation", 300), ("test", 600)):
        labels = getattr(sample, split).labels
        assert len(labels) >= least
        assert labels.count(0) == labels.count(1) == len(labels) / 2


@KIND
def test_seven_tenths_of_every_split_are_plain_and_both_kinds_are_balanced(sample_rows):
    for reviews in sample_rows.values():
        found = Counter((row["kind"], row["label"]) for row in reviews)
        assert found["plain", 0] == found["plain", 1] and found["tricky", 0] == found["tricky", 1]
        assert found["plain", 0] / len(reviews) == pytest.approx(0.35, abs=0.01)
        assert set(found) == {(kind, label) for kind in ("plain", "tricky") for label in (0, 1)}


@KIND
def test_no_two_reviews_of_the_sample_are_alike(sample_rows):
    texts = [re.findall(r"[a-z0-9']+", row["text"].lower()) for rows in sample_rows.values() for row in rows]
    assert len(set(map(tuple, texts))) == len(texts)
    runs = [{tuple(words[i:i + 5]) for i in range(len(words) - 4)} for words in texts]
    holding = defaultdict(set)  # the reviews that hold a sequence of five words
    for number, found in enumerate(runs):
        for run in found:
            holding[run].add(number)
    shared = Counter(pair for numbers in holding.values() for pair in combinations(sorted(numbers), 2))
    assert [pair for pair, count in shared.items()
            if count > 1 and count > min(len(runs[number]) for number in pair) / 2] == []


@KIND
def test_a_plain_reviews_split_follows_from_its_text(sample_rows):
    def rank(row):
        return hashlib.sha256(f"0 {row['text']}".encode()).hexdigest()

    for label in (0, 1):
        ranks = {split: [rank(row) for row in rows if (row["kind"], row["label"]) == ("plain", label)]
                 for split, rows in sample_rows.items()}
        assert max(ranks["test"]) < min(ranks["validation"]) <= max(ranks["validation"]) < min(ranks["train"])


@KIND
def test_no_review_of_the_sample_is_one_of_imdbs(sample_rows):
    imdb = ROOT.parent / "shared" / "data" / "imdb"
    if not imdb.is_dir():
        pytest.skip("no IMDb in ../shared")
    def plain(text):
        return " ".join(re.findall(r"[a-z0-9']+", text.lower().replace("<br />", " ")))

    ours = {plain(row["text"]) for rows in sample_rows.values() for row in rows}
    assert ours.isdisjoint(plain(text) for split in ("train", "test")
                           for text in data.read_parquet_split(imdb, split)["text"].to_pylist())


def test_the_examples_in_the_documentation_are_not_in_the_sample(sample_rows):
    texts = {row["text"] for rows in sample_rows.values() for row in rows}
    assert texts.isdisjoint({"A moving film with a wonderful cast.", "Dull, badly acted, and far too long.",
                             "A film I will not forget.", "Two hours I want back."})


def test_the_samples_reviews_are_short(sample_rows):
    for reviews in sample_rows.values():
        assert all(1 <= len(row["text"].split()) <= 120 for row in reviews)


def test_the_sample_says_what_it_is(sample, sample_rows):
    readme = (data.SAMPLE_FOLDER / "README.md").read_text(encoding="utf-8")
    total = sum(map(len, sample_rows.values()))
    assert sample.source == f"{total:,} reviews written for minipeft (minipeft/data/sample)"
    assert readme.startswith(f"# {total:,} film reviews written for this project") and "Not IMDb" in readme
    for split, reviews in sample_rows.items():
        plain = sum(row["kind"] == "plain" for row in reviews)
        positive = sum(row["label"] for row in reviews)
        assert f"| {split} | {len(reviews):,} | {positive} | {plain} | {len(reviews) - plain} |" in readme


# --- a file of one's own ----------------------------------------------------------------------------------------------

def write_file(path, content, text="text", label="label"):
    """Rows (text, label) as the kind of file that the path's ending names."""
    if path.suffix in (".csv", ".tsv"):
        write_csv(path, content, (text, label))
        if path.suffix == ".tsv":
            path.write_text(path.read_text(encoding="utf-8").replace('","', '"\t"'), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({text: t, label: value}) + "\n" for t, value in content), encoding="utf-8")
    else:
        write_parquet(path, **{text: [row[0] for row in content], label: [row[1] for row in content]})
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_dataset(tmp_path, suffix):
    content = rows(20)
    found = load(write_file(tmp_path / f"films{suffix}", content))
    assert found.name == "films" and found.source == str(tmp_path / f"films{suffix}")
    assert found.label_names == ["negative", "positive"]
    assert (len(found.train), len(found.validation), len(found.test)) == (32, 4, 4)
    together = pairs(found.train) + pairs(found.validation) + pairs(found.test)
    assert sorted(together) == sorted((text, found.label_names.index(label)) for text, label in content)
    for split in (found.train, found.validation, found.test):
        assert sum(split.labels) * 2 == len(split)
    reference = load(write_file(tmp_path / "reference.csv", content))
    assert (found.train, found.validation, found.test) == (reference.train, reference.validation, reference.test)


def test_a_files_split_depends_on_the_seed_alone(tmp_path):
    path = write_csv(tmp_path / "films.csv")
    first, again, other = (load(path, seed=seed).test.texts for seed in (0, 0, 1))
    assert first == again
    assert sorted(first) != sorted(other)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_labels_may_be_numbers_and_keep_their_numeric_order(tmp_path, suffix):
    found = load(write_file(tmp_path / f"stars{suffix}", [(f"text {i}", [10, 2, 1][i % 3]) for i in range(60)]))
    assert found.label_names == ["1", "2", "10"]
    assert set(found.train.labels) == {0, 1, 2}


def test_labels_may_be_truth_values(tmp_path):
    found = load(write_file(tmp_path / "liked.jsonl", [(f"text {i}", i % 2 == 0) for i in range(40)]))
    assert found.label_names == ["False", "True"]


def test_columns_may_have_other_names(tmp_path):
    path = write_file(tmp_path / "films.csv", rows(20), text="review", label="verdict")
    assert len(load(path, text_column="review", label_column="verdict").train) == 32


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_quoted_field_may_hold_line_breaks_and_quotes(tmp_path, suffix):
    content = [(f'line one\nline "two" of {i}, and more', i % 2) for i in range(40)]
    found = load(write_file(tmp_path / f"films{suffix}", content))
    texts = found.train.texts + found.validation.texts + found.test.texts
    assert sorted(texts) == sorted(text for text, _ in content)


def test_html_line_breaks_in_a_file_become_line_breaks(tmp_path):
    found = load(write_csv(tmp_path / "films.csv", [(f"one<br />two {i}", i % 2) for i in range(40)]))
    assert found.test.texts[0].startswith("one\ntwo")


FEW = [("a", 0), ("b", 1)]
BAD_FILES = {
    "empty csv": ("x.csv", lambda path: path.write_bytes(b""), "is empty or not a readable .csv"),
    "empty jsonl": ("x.jsonl", lambda path: path.write_bytes(b""), "is empty or not a readable .jsonl"),
    "empty parquet": ("x.parquet", lambda path: path.write_bytes(b""), "is empty or not a readable .parquet"),
    "corrupt parquet": ("x.parquet", lambda path: path.write_bytes(b"PAR1 not really PAR1"), "not a readable .parquet"),
    "broken jsonl": ("x.jsonl", lambda path: path.write_text('{"text": "a", "label"\n'), "not a readable .jsonl"),
    "ragged csv": ("x.csv", lambda path: path.write_text("text,label\na,0\nb,1,2\n"), "not a readable .csv"),
    "header only": ("x.csv", lambda path: path.write_text("text,label\n"), "there is no text"),
    "empty text": ("x.csv", lambda path: write_csv(path, [*rows(20), ("", "positive")]), "row 41: the text is empty"),
    "blank text": ("x.csv", lambda path: write_csv(path, [("  ", 0), *rows(20)]), "row 1: the text is empty"),
    "missing text": ("x.jsonl", lambda path: path.write_text('{"text": "a", "label": 0}\n{"label": 1}\n'), "row 2"),
    "endless text": ("x.parquet", lambda path: write_file(path, [("a", 0), ("x" * 1_000_000, 1)]),
                     "row 2: the text has 1,000,000 characters"),
    "one label": ("x.csv", lambda path: write_csv(path, [(f"t {i}", "good") for i in range(40)]),
                  "one label only .*'good'"),
    "a label each": ("x.csv", lambda path: write_csv(path, [(f"t {i}", f"label {i}") for i in range(80)]),
                     "80 different values in 80 rows"),
    "missing label": ("x.jsonl", lambda path: path.write_text('{"text": "a", "label": 0}\n{"text": "b"}\n'),
                      "row 2: the label is empty"),
    "empty label": ("x.csv", lambda path: write_csv(path, [*rows(20), ("a text", "")]), "row 41: the label is empty"),
    "too few rows": ("x.csv", lambda path: write_csv(path, rows(4)), "8 rows are too few"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_an_unusable_file_is_refused_with_its_path_and_the_reason(tmp_path, case):
    name, write, message = BAD_FILES[case]
    write(tmp_path / name)
    with pytest.raises(DataError, match=message) as refused:
        load(str(tmp_path / name))
    assert str(tmp_path / name) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_text_of_a_million_characters_is_refused_as_too_long_whatever_the_file(tmp_path, suffix):
    with pytest.raises(DataError, match=r"row 2.*1,000,000 characters"):
        load(write_file(tmp_path / f"x{suffix}", [("a", 0), ("é" * 1_000_000, 1)]))


def test_a_missing_column_is_refused_with_those_there_are(tmp_path):
    path = write_csv(tmp_path / "x.csv", FEW, header=("review", "stars"))
    with pytest.raises(DataError, match=r"no column 'text'; --text-column can be one of review, stars"):
        load(path)
    with pytest.raises(DataError, match=r"no column 'label'; --label-column can be one of review, stars"):
        load(path, text_column="review")
    with pytest.raises(DataError, match="and --task, now tagging, one of classification, tagging"):
        load(path, task="tagging")


@pytest.mark.parametrize("name", ["sample", "multi30k"])
def test_columns_are_not_chosen_in_a_dataset_whose_columns_are_known(name):
    for column in ("text_column", "label_column"):
        with pytest.raises(DataError, match=f"{name}'s are known"):
            load(name, **{column: "de"})


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("text,text,label\na,b,0\nc,d,1\n")
    with pytest.raises(DataError, match="text"):
        load(str(tmp_path / "x.csv"))


def test_a_column_of_lists_is_not_a_column_of_labels(tmp_path):
    with pytest.raises(DataError, match="label"):
        load(write_file(tmp_path / "x.jsonl", [(f"text {i}", [i % 2]) for i in range(40)]))


def test_a_file_that_is_not_utf_8_is_not_called_empty(tmp_path):
    text = "text,label\n" + "".join(f"un caf\u00e9 {i},{i % 2}\n" for i in range(40))
    (tmp_path / "x.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"(?i)utf-?8"):
        load(str(tmp_path / "x.csv"))


def test_a_column_of_numbers_is_not_called_empty(tmp_path):
    with pytest.raises(DataError) as refused:
        load(write_file(tmp_path / "x.jsonl", [(i, i % 2) for i in range(40)]))
    assert "empty" not in str(refused.value)


@pytest.mark.parametrize("name", ["imdbb", "sst3", "reviews.txt", ""])
def test_an_unknown_dataset_is_refused_with_what_there_is(name):
    with pytest.raises(DataError, match=r"imdb, .*, sample, or the path of a \.csv, \.tsv, \.jsonl, \.parquet"):
        load(name)


def test_how_many_rows_are_enough_is_said_per_label(tmp_path):
    for split, count in (("test", 5), ("validation", 6)):
        with pytest.raises(DataError, match=rf"{2 * count} rows are too few to hold out a {split} split; there should "
                                            "be at least ten of each label$"):
            load(write_csv(tmp_path / "x.csv", rows(count)))
    assert len(load(write_csv(tmp_path / "x.csv", rows(10))).test) == 2
    with pytest.raises(DataError, match=r"3 rows are too few to hold out a test split; there should be at least ten$"):
        load(write_csv(tmp_path / "y.csv", rows(2)[:3], ("source", "target")), task="translation")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no file .*films\.csv"):
        load(str(tmp_path / "films.csv"))


# --- splits of one's own ----------------------------------------------------------------------------------------------

def split_files(folder, suffix=".csv", **content):
    """A file for each split that is given, in this folder."""
    folder.mkdir(exist_ok=True)
    return {split: write_file(folder / f"{split}{suffix}", rows_of_it) for split, rows_of_it in content.items()}


def marked(split, count, labels=("negative", "positive")):
    """Rows whose text says which split they are of."""
    return [(f"{split} {i}", labels[i % len(labels)]) for i in range(count)]


@pytest.mark.kind("7: own train, validation and test files")
def test_each_split_may_have_a_file_of_its_own_and_is_the_whole_file_in_its_order(tmp_path):
    files = split_files(tmp_path, train=marked("train", 30), validation=marked("validation", 8), test=marked("test", 6))
    found = load(files["train"], validation_file=files["validation"], test_file=files["test"])
    assert found.validation.texts == [f"validation {i}" for i in range(8)]
    assert found.test.texts == [f"test {i}" for i in range(6)] and found.test.labels == [0, 1] * 3
    assert found.train.texts == [f"train {i}" for i in range(30)]
    assert found.name == "train" and all(file in found.source for file in files.values())


@pytest.mark.kind("7: a folder with train, validation and test files")
@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_folder_of_split_files_is_a_dataset_by_its_name(tmp_path, name, suffix):
    split_files(tmp_path / "films", suffix, **{"train": marked("train", 30), name: marked("validation", 8),
                                               "test": marked("test", 6)})
    (tmp_path / "films" / "README.md").write_text("films")
    found = load(str(tmp_path / "films"))
    assert found.name == "films"
    assert (len(found.train), len(found.validation), len(found.test)) == (30, 8, 6)


def test_a_split_without_a_file_is_carved_from_train(tmp_path):
    files = split_files(tmp_path, train=marked("train", 60), test=marked("test", 6))
    found = load(files["train"], test_file=files["test"])
    assert (len(found.train), len(found.validation), len(found.test)) == (54, 6, 6)
    assert all(text.startswith("train") for text in found.validation.texts)
    carved, given = load(files["train"]), load(files["train"], validation_file=files["test"])
    assert given.test == carved.test and (len(given.train), len(given.validation)) == (54, 6)


@pytest.mark.kind("7: a label of the test file that train lacks")
@pytest.mark.parametrize(("labels", "shown"), [(("negative", "neutral"), "'neutral'"), ((0, 1), "0")])
def test_a_label_that_train_lacks_is_named(tmp_path, labels, shown):
    files = split_files(tmp_path, train=marked("train", 30), test=marked("test", 6, labels))
    with pytest.raises(DataError, match=rf"test.csv: label {shown} is none of negative, positive \(.* rows have"):
        load(files["train"], test_file=files["test"])


@pytest.mark.parametrize("task", [None, "translation"])
def test_texts_that_are_in_two_splits_are_told(tmp_path, task):
    columns = dict(zip(("text_column", "label_column"), ("text", "label")))
    files = split_files(tmp_path, train=marked("train", 30), test=[*marked("train", 5), *marked("test", 3)])
    found = load(files["train"], task=task, test_file=files["test"], validation_file=files["test"], **columns)
    assert found.remarks == {"repeated": "5 of 8 validation texts are also in train; 5 of 8 test texts are also in "
                                         "train; 8 of 8 test texts are also in validation"}
    found = load(files["train"], task=task, test_file=files["train"], **columns)
    assert "of 30 test texts are also in train" in found.remarks["repeated"]


def test_texts_that_are_lists_of_words_are_compared_too():
    splits = dict.fromkeys(("train", "validation", "test"), Examples([["a", "b"]], [[0, 0]]))
    assert repeated(splits).startswith("1 of 1 validation texts are also in train; 1 of 1 test")
    splits["train"] = Examples([["a b"]], [[0]])
    assert repeated(splits) == "1 of 1 test texts are also in validation"


def test_labels_are_compared_over_all_files(tmp_path):
    files = split_files(tmp_path, train=marked("train", 30), test=marked("test", 6, ("Negative", "positive")))
    with pytest.raises(DataError, match=r"'negative' \(15 rows\) and 'Negative' \(3 rows\)"):
        load(files["train"], test_file=files["test"])
    assert load(files["train"], test_file=files["test"], similar_labels="merge").test.labels == [0, 1] * 3


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is a folder without a file train.csv, train.tsv"):
        load(str(tmp_path / "empty"))
    folder = tmp_path / "two"
    files = split_files(folder, train=marked("train", 30), validation=marked("v", 6), dev=marked("d", 6))
    with pytest.raises(DataError, match="two has 2 files for the validation split"):
        load(str(folder))
    (folder / "dev.csv").unlink()
    with pytest.raises(DataError, match="and --validation-file names one"):
        load(str(folder), validation_file=files["train"])


@pytest.mark.parametrize(("path", "name"), [
    ("films.csv", "films"), ("a/films.csv.gz", "films"), ("a/films.v2.jsonl", "films.v2"), ("films/", "films"),
    ("imdb", "imdb"), ("a/imdb.csv", "imdb.csv"), ("a/imdb", "imdb_folder"), ("sample.csv.gz", "sample.csv.gz")])
def test_results_call_a_file_by_its_name_and_never_by_a_known_datasets(path, name):
    assert data.name_of(path) == name


def test_a_folder_above_is_called_by_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "films" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "films" / "below")
    assert [data.name_of(path) for path in ("..", "../", ".", "../below", "../below/..", "../..")] == [
        "films", "films", "below", "below", "films", tmp_path.name]


@pytest.mark.parametrize("path", ["/", ".csv", "a/.csv.gz", "..csv", "...jsonl"])
def test_a_dataset_without_a_name_is_refused(path):
    with pytest.raises(DataError, match="has no name by which results could call it: rename it"):
        data.name_of(path)


# --- which dataset, when none is named --------------------------------------------------------------------------------

@pytest.fixture
def hub(monkeypatch):
    """hub(cached=..., reachable=...): what the machine is pretended to have."""

    def pretend(cached, reachable):
        monkeypatch.setattr(data, "_in_hub_cache", lambda repository: cached)
        monkeypatch.setattr(data, "hub_is_reachable", lambda: reachable)

    return pretend


def test_imdb_is_chosen_where_the_data_folder_holds_it(tmp_path, hub, monkeypatch):
    hub(cached=False, reachable=False)
    write_imdb(tmp_path, train=20, test=20)
    assert choose_dataset(tmp_path) == ("imdb", f"found in {tmp_path}")
    monkeypatch.setenv("MINIPEFT_DATA", str(tmp_path))
    assert choose_dataset() == ("imdb", f"found in {tmp_path}")


def test_imdb_is_chosen_from_the_hubs_cache_without_asking_the_network(hub, monkeypatch):
    hub(cached=True, reachable=False)
    monkeypatch.setattr(data, "hub_is_reachable", lambda: pytest.fail("asked the network"))
    name, why = choose_dataset()
    assert name == "imdb" and "cache" in why


def test_imdb_is_chosen_where_the_hub_can_be_reached(hub):
    hub(cached=False, reachable=True)
    name, why = choose_dataset()
    assert name == "imdb" and "download" in why


def test_the_sample_is_chosen_where_imdb_cannot_be_had_and_the_reason_says_how_to_get_it(hub):
    hub(cached=False, reachable=False)
    name, why = choose_dataset()
    assert name == "sample"
    assert "--data-dir" in why and "MINIPEFT_DATA" in why


def test_what_is_chosen_can_be_loaded_also_with_a_data_folder_that_lacks_imdb(tmp_path, hub, monkeypatch):
    import datasets

    hub(cached=False, reachable=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, split, **k: datasets.Dataset.from_dict(
        {"text": [f"{split} {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}))
    name, _ = choose_dataset(tmp_path)
    load(name, tmp_path)


# --- the hub ----------------------------------------------------------------------------------------------------------

def test_imdb_comes_from_the_hub_through_datasets(hub, monkeypatch):
    import datasets

    hub(cached=False, reachable=True)
    asked = []

    def load_from_hub(repository, *, data_dir, revision, split):
        assert data_dir is None and revision is None
        asked.append((repository, split))
        return datasets.Dataset.from_dict({"text": [f"{split}<br />{i}" for i in range(40)],
                                           "label": [i // 20 for i in range(40)]})

    monkeypatch.setattr(datasets, "load_dataset", load_from_hub)
    found = load("imdb")
    assert asked == [("stanfordnlp/imdb", "train"), ("stanfordnlp/imdb", "test")]
    assert (len(found.train), len(found.validation), len(found.test)) == (36, 4, 40)
    assert found.test.texts[7] == "test\n7"
    assert "stanfordnlp/imdb" in found.source


def test_without_network_the_error_says_which_files_to_put_where(hub):
    hub(cached=False, reachable=False)
    with pytest.raises(DataError) as refused:
        load("imdb")
    files = ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet")
    for part in (*files, "/imdb", "--data-dir", "--dataset sample"):
        assert part in str(refused.value)


@pytest.mark.parametrize(("name", "asked"), [
    ("scitldr", {"data_dir": "Abstract", "revision": "refs/convert/parquet"}),
    ("multi30k", {"data_dir": None, "revision": None})])
def test_other_datasets_come_from_the_hub_with_their_own_validation_split(hub, monkeypatch, name, asked):
    import datasets

    hub(cached=False, reachable=True)
    seen = []

    def load_from_hub(repository, *, split, **more):
        seen.append((repository, split, more))
        texts = [f"{split} {i}" for i in range(4)]
        return datasets.Dataset.from_dict({"source": texts, "target": texts, "en": texts, "de": texts})

    monkeypatch.setattr(datasets, "load_dataset", load_from_hub)
    found = load(name)
    assert seen == [(data.KNOWN[name].hub, split, asked) for split in ("train", "validation", "test")]
    assert found.validation.texts[1] == "validation 1" and found.test.labels[2] == ["test 2"]


def test_labels_that_a_model_knows_may_be_names_or_numbers_and_keep_their_order(tmp_path):
    names = ["positive", "negative"]
    by_name = load(write_csv(tmp_path / "a.csv"), label_names=names)
    assert by_name.label_names == names and set(by_name.train.labels) == {0, 1}
    assert all((label == 0) == ("good" in text) for text, label in pairs(by_name.train))
    by_number = load(write_csv(tmp_path / "b.csv", [(text, 0 if label == "positive" else 1)
                                                            for text, label in rows()]), label_names=names)
    assert by_number.train == by_name.train
    with pytest.raises(DataError, match="label 'negative' is none of good, bad"):
        load(str(tmp_path / "a.csv"), label_names=["good", "bad"])


def test_whatever_the_hubs_client_raises_becomes_a_data_error(hub, monkeypatch):
    import datasets

    hub(cached=False, reachable=True)

    def fail(*arguments, **options):
        raise ConnectionResetError("the line broke")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="ConnectionResetError: the line broke"):
        load("imdb")


@pytest.fixture
def online(monkeypatch):
    """online(endpoint): the session may look for the hub, at this address."""

    def endpoint(url):
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "ENDPOINT", url)

    return endpoint


@pytest.fixture
def listener():
    """A socket on this machine that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def black_hole():
    """A port of this machine on which a connection is neither accepted nor refused: its queue is full."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(server.getsockname())
            waiting.append(client)
        yield server.getsockname()[1]
        for client in waiting:
            client.close()


def seconds_until_unreachable():
    started = time.perf_counter()
    assert hub_is_reachable() is False
    return time.perf_counter() - started


@pytest.fixture
def web_server():
    """A server that answers every request, with 404: that much any hub does."""
    handler = type("Handler", (BaseHTTPRequestHandler,), {"log_message": lambda *arguments: None})
    handler.do_GET = handler.do_HEAD = lambda self: self.send_error(404)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_the_hub_is_reachable_where_a_server_answers(online, web_server):
    online(f"http://127.0.0.1:{web_server}")
    assert hub_is_reachable() is True


def test_the_hub_is_unreachable_when_offline_is_asked_for(online, web_server, monkeypatch):
    online(f"http://127.0.0.1:{web_server}")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert hub_is_reachable() is False


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://", "http://127.0.0.1:port", "http://[::1"])
def test_an_address_that_refuses_or_is_none_is_unreachable_at_once(online, endpoint):
    online(endpoint)
    assert seconds_until_unreachable() < 1


def test_an_address_that_never_answers_is_given_up_within_five_seconds(online, black_hole):
    online(f"http://127.0.0.1:{black_hole}")
    assert 1 < seconds_until_unreachable() < 5


def test_a_name_with_many_addresses_that_never_answer_is_given_up_within_five_seconds(online, black_hole, monkeypatch):
    online("http://hub.invalid")
    address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", black_hole))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [address] * 4)
    assert seconds_until_unreachable() < 5


def test_a_name_that_cannot_be_looked_up_is_unreachable(online, monkeypatch):
    """How long a look-up takes is the system's affair: the hub client's time-out begins after it."""
    online("http://hub.invalid")

    def look_up(*arguments, **options):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert seconds_until_unreachable() < 1


def test_a_hub_that_accepts_and_never_answers_is_given_up_within_five_seconds(listener, tmp_path):
    code = ("import time, datasets; from minipeft.data.datasets import choose_dataset, load_dataset\n"
            "from minipeft.errors import DataError\n"
            "from minipeft.tasks.classification import Classification\n"
            "started = time.perf_counter()\n"
            "try:\n    load_dataset(choose_dataset()[0], Classification)\n"
            "except DataError as error:\n    assert '--data-dir' in str(error), error\n"
            "print(time.perf_counter() - started)")
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "MINIPEFT_DATA")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{listener}", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 6  # five for the network, and one for reading the sample
