"""Tagging: every word keeps its tag, through sub-words and windows, and entities are counted as seqeval counts them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from helpers import VOCAB_SIZE
from hypothesis import given
from hypothesis import strategies as st

from minipeft import GPT2Config, GPT2ForTokenClassification
from minipeft.data.batches import IGNORED_LABEL
from minipeft.data.examples import Examples
from minipeft.errors import ConfigError, DataError
from minipeft.tasks.tagging import Tagging

CPU = torch.device("cpu")
NAMES = ["O", "B-person", "I-person", "B-place", "I-place"]


@pytest.fixture
def tagging(tokenizer):
    return lambda max_length=48: Tagging(tokenizer, NAMES, max_length)


# --- reading ----------------------------------------------------------------------------------------------------------

def test_words_and_tags_are_lists_or_texts_with_spaces_between():
    lists = Tagging.read([["Ada", "in", "Rome"]], [["B-person", "O", "B-place"]], "here")
    assert lists == Tagging.read(["Ada in  Rome"], ["B-person O B-place"], "here")
    assert lists == (Examples([["Ada", "in", "Rome"]], [[1, 0, 2]]), ["O", "B-person", "B-place"])


def test_with_known_names_tags_may_be_numbers_or_names():
    by_number, names = Tagging.read([["a", "b"]], [[3, 0]], "here", NAMES)
    by_name, _ = Tagging.read([["a", "b"]], [["B-place", "O"]], "here", NAMES)
    assert by_number == by_name == Examples([["a", "b"]], [[3, 0]]) and names == NAMES


@pytest.mark.parametrize(("words", "tags", "names", "message"), [
    ([], [], None, "no sentence at all"),
    ([["a", "b"]], [["O"]], None, "row 1: 2 words have 1 tags"),
    ([["a"], []], [["B-x"], []], None, "row 2: there is no word"),
    ([["a"], None], [["B-x"], ["O"]], None, "row 2: words and tags should be lists"),
    ([["a", " "]], [["B-x", "O"]], None, "row 1: the word is empty"),
    ([["a", 7]], [["B-x", "O"]], None, "the word '7' is int, not text"),
    ([["a"]], [["person"]], None, "row 1: tag 'person' is neither O nor of the form B-type or I-type"),
    ([["a"]], [["B-"]], None, "tag 'B-' is neither"), ([["a"]], [[None]], None, "tag None is neither"),
    ([["a"]], [["O"]], None, "all words have the tag O"),
    ([["a"]], [[5]], NAMES, "row 1: tag 5 is none of O, B-person"),
    ([["a"]], [["B-animal"]], NAMES, "tag 'B-animal' is none of"), ([["a"]], [[[0]]], NAMES, r"tag \[0\] is none of")])
def test_unusable_rows_are_refused_by_number(words, tags, names, message):
    with pytest.raises(DataError, match=message) as refused:
        Tagging.read(words, tags, "names.jsonl", names)
    assert str(refused.value).startswith("names.jsonl") and "\n" not in str(refused.value)


# --- alignment --------------------------------------------------------------------------------------------------------

def test_a_words_first_token_has_its_tag_and_the_others_none(tagging):
    encoded = tagging().encode(Examples([["good", "Bo"]], [[0, 1]]))
    # " good" is one token of this vocabulary; " Bo" is three bytes.
    assert encoded.ids[0].tolist() == [259, *b" Bo"]
    assert encoded.labels[0].tolist() == [0, 1, IGNORED_LABEL, IGNORED_LABEL]


def test_a_long_sentence_is_cut_between_words_and_all_are_kept(tagging):
    encoded = tagging(max_length=5).encode(Examples([["aa", "ee", "good", "c"], ["d"]], [[1, 2, 3, 4], [0]]))
    assert [bytes(row.tolist()).decode() if max(row) < 256 else row.tolist() for row in encoded.ids] == [
        " aa", [*b" ee", 259], " c", " d"]
    assert encoded.owners == [0, 0, 0, 1]
    assert [row[row != IGNORED_LABEL].tolist() for row in encoded.labels] == [[1], [2, 3], [4], [0]]


def test_a_word_longer_than_a_window_is_cut_and_counted_but_keeps_its_tag(tagging, caplog):
    with caplog.at_level(logging.WARNING):
        encoded = tagging(max_length=4).encode(Examples([["abcdefgh", "x"]], [[1, 0]]))
    assert [len(row) for row in encoded.ids] == [4, 2]
    assert [row[0] for row in encoded.labels] == [1, 0]
    assert "1 words have more than max_length=4 tokens" in caplog.text


SENTENCES = st.lists(st.lists(st.text("ab gé", min_size=1).filter(str.strip), min_size=1, max_size=9), min_size=1,
                     max_size=5)


@given(sentences=SENTENCES, max_length=st.integers(1, 12), seed=st.integers(0, 9))
def test_no_word_is_dropped_whatever_the_length(tokenizer, sentences, max_length, seed):
    rng = np.random.default_rng(seed)
    tags = [rng.integers(0, 5, len(words)).tolist() for words in sentences]
    encoded = Tagging(tokenizer, NAMES, max_length).encode(Examples(sentences, tags))
    assert all(1 <= len(row) <= max_length for row in encoded.ids)
    kept = [[] for _ in sentences]
    for owner, row in zip(encoded.owners, encoded.labels):
        kept[owner] += row[row != IGNORED_LABEL].tolist()
    assert kept == tags


# --- predictions ------------------------------------------------------------------------------------------------------

def test_each_words_logits_are_those_of_its_first_token_in_its_window(tagging, make_model):
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=16, n_layer=2, n_head=2, num_labels=5)
    model = make_model(GPT2ForTokenClassification, config)
    task = tagging(max_length=8)
    examples = Examples([["aa", "good", "bb", "cc"], ["bad"]], [[0, 0, 0, 0], [0]])
    found = task.word_logits(model.train(), task.encode(examples), CPU, torch.float32)
    assert [rows.shape for rows in found] == [(4, 5), (1, 5)]
    first, second = task.tokenizer.encode(" aa good bb"), task.tokenizer.encode(" cc")
    with torch.no_grad():
        expected = torch.cat((model(torch.tensor([first]))[0, [0, 3, 4]], model(torch.tensor([second]))[0, [0]]))
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


# --- the metric -------------------------------------------------------------------------------------------------------

def test_metrics_worked_by_hand(tagging):
    #        Ada       Byron     went  to  New        York       Rome
    true = [[1, 2, 0, 0, 3, 4], [3]]
    found = [[1, 2, 0, 0, 3, 0], [1]]
    # Right: the person. Wrong: "New" alone, and Rome as a person. Missed: New York, Rome.
    metrics = tagging().metrics(found, true)
    assert metrics["precision"] == pytest.approx(1 / 3, abs=1e-6)
    assert metrics["recall"] == pytest.approx(1 / 3, abs=1e-6)
    assert metrics["f1"] == pytest.approx(1 / 3, abs=1e-6)
    assert metrics["accuracy"] == pytest.approx(5 / 7, abs=1e-6)
    assert metrics["by_type"] == {
        "person": {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3, abs=1e-6), "entities": 1},
        "place": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "entities": 2}}
    assert (metrics["examples"], metrics["words"]) == (2, 7)
    low, high = metrics["f1_95_interval"]
    assert low == 0.0 and high == pytest.approx(0.5)  # only the first sentence drawn: 2 * 1 / (2 + 2)


def test_perfect_tags_have_f1_1_and_none_at_all_0(tagging):
    true = [[1, 2, 0], [3, 0, 1]]
    assert tagging().metrics(true, true)["f1_95_interval"] == [1, 1]
    nothing = tagging().metrics([[0, 0, 0], [0, 0, 0]], true)
    assert (nothing["f1"], nothing["precision"], nothing["f1_95_interval"]) == (0, 0, [0, 0])


def test_the_most_frequent_tag_of_each_word_is_a_baseline(tagging):
    train = Examples([["Rome", "is", "Rome"], ["Rome", "is", "it"]], [[3, 0, 3], [1, 0, 0]])
    test = Examples([["Rome", "is", "new"]], [[3, 0, 0]])
    assert tagging().baselines(train, test)["most_frequent_tag"]["f1"] == 1


def test_a_prediction_shows_the_tags_behind_their_words(tagging, make_model):
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=16, n_layer=1, n_head=2, num_labels=5)
    model = make_model(GPT2ForTokenClassification, config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 0, 9, 0, 0]))
    assert list(tagging().predict(model, ["so  good", "x"], CPU, torch.float32)) == [
        "so/I-person good/I-person\n", "x/I-person\n"]


def test_a_list_of_words_gets_as_many_tags_as_it_has_words(tagging, make_model):
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=16, n_layer=1, n_head=2, num_labels=5)
    model = make_model(GPT2ForTokenClassification, config)
    texts = [["so", "New York", "10\u00a0000"], "so  good"]
    assert [len(tags) for tags in tagging().table(model, texts, CPU, torch.float32)["prediction"]] == [3, 2]


def test_a_window_needs_a_token(tagging):
    with pytest.raises(ConfigError, match="max_length must be a positive integer, got 0"):
        tagging(max_length=0)
