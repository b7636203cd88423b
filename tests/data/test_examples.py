"""examples.py: texts as they are read, texts that are refused, and parts of a split."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.data.examples import Examples, check_texts, clean, together
from minipeft.errors import DataError

# --- text -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "cleaned"), [
    ("one<br />two", "one\ntwo"), ("one<br/>two", "one\ntwo"), ("one<br>two", "one\ntwo"),
    ("<br /><br />twice", "\n\ntwice"), ("a < b, <brand> and <b>", "a < b, <brand> and <b>"), ("", "")])
def test_html_line_breaks_become_line_breaks_and_nothing_else_changes(text, cleaned):
    assert clean(text) == cleaned


def test_texts_that_can_be_classified_are_accepted():
    check_texts(["one", " two ", "3"], "here")


@pytest.mark.parametrize(("texts", "message"), [
    ([], "there is no text"), (["fine", ""], "row 2: the text is empty"), (["fine", "fine", " \n\t"], "row 3"),
    ([None], "row 1: the text is empty"), (["x" * 1_000_000], "row 1: the text has 1,000,000 characters")])
def test_a_text_that_cannot_be_classified_is_named_by_its_row(texts, message):
    with pytest.raises(DataError, match=message) as refused:
        check_texts(texts, "reviews.csv")
    assert str(refused.value).startswith("reviews.csv")


# --- parts ------------------------------------------------------------------------------------------------------------

LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=80)


@given(labels=LABELS, size=st.integers(1, 100), seed=st.integers(0, 100))
def test_a_subset_has_the_size_asked_for_as_far_as_there_are_examples(labels, size, seed):
    examples = Examples([f"text {i}" for i in range(len(labels))], labels)
    chosen = examples.subset(size, seed)
    assert len(chosen) == min(size, len(labels))
    assert len(chosen.texts) == len(set(chosen.texts)) == len(chosen)
    assert all(labels[int(text.split()[1])] == label for text, label in zip(chosen.texts, chosen.labels))


def test_a_subset_keeps_the_shares_of_the_labels_and_none_means_all():
    examples = Examples([str(i) for i in range(100)], [0] * 75 + [1] * 25)
    assert Counter(examples.subset(20, seed=0).labels) == {0: 15, 1: 5}
    assert examples.subset(20, seed=0).texts == examples.subset(20, seed=0).texts
    assert examples.subset(20, seed=0).texts != examples.subset(20, seed=1).texts
    assert examples.subset(None, seed=0) is examples
    assert len(examples.subset(1000, seed=0)) == 100


# --- fingerprints -----------------------------------------------------------------------------------------------------

def test_a_fingerprint_names_the_content_in_whatever_order_and_sets_add_up():
    one, two = Examples(["good", "bad"], [1, 0]), Examples(["dull"], [0])
    assert re.fullmatch("[0-9a-f]{16}", one.fingerprint())
    assert Examples(["bad", "good"], [0, 1]).fingerprint() == one.fingerprint()
    assert Examples(["bad", "good", "dull"], [0, 1, 0]).fingerprint() == together(
        [one.fingerprint(), two.fingerprint()])
    for texts, labels in ((["good", "bad"], [0, 1]), (["good", "bad "], [1, 0]), (["good", "bad", "bad"], [1, 0, 0])):
        assert Examples(texts, labels).fingerprint() != one.fingerprint()
    words = Examples([["a", "b"]], [[0, 1]])
    assert words.fingerprint() != Examples([["a b"]], [[0, 1]]).fingerprint()
