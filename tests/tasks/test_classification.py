"""tasks/classification.py: cutting texts, the loss, the metrics, and predictions that do not depend on the batch."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, precision_recall_fscore_support
from sklearn.utils.class_weight import compute_class_weight

from minipeft import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
from minipeft.data.examples import Examples
from minipeft.errors import ConfigError, DataError
from minipeft.tasks.classification import (
    Classification,
    encode,
    metrics,
    predict_logits,
    truncate,
    wilson_interval,
    zero_shot_logits,
)
from minipeft.tasks.tagging import Tagging

CPU = torch.device("cpu")


@pytest.fixture
def config(tokenizer):
    return GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=48, n_embd=16, n_layer=2, n_head=2)


# --- cutting ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("max_length", "how", "kept"), [
    (4, "head", [0, 1, 2, 3]), (4, "head_tail", [0, 7, 8, 9]), (8, "head_tail", [0, 1, 4, 5, 6, 7, 8, 9]),
    (7, "head_tail", [0, 4, 5, 6, 7, 8, 9]), (1, "head", [0]), (1, "head_tail", [9]),
    (10, "head", list(range(10))), (10, "head_tail", list(range(10))), (99, "head_tail", list(range(10)))])
def test_ten_tokens_cut_by_hand(max_length, how, kept):
    assert truncate(list(range(10)), max_length, how).tolist() == kept


@given(length=st.integers(0, 50), max_length=st.integers(1, 60), how=st.sampled_from(["head", "head_tail"]))
def test_a_cut_text_is_as_long_as_allowed_in_order_and_without_repetition(length, max_length, how):
    kept = truncate(list(range(length)), max_length, how).tolist()
    assert len(kept) == min(length, max_length)
    assert kept == sorted(set(kept))
    if length:
        assert (kept[0] == 0) if how == "head" else (kept[-1] == length - 1)


def test_encoding_gives_each_texts_tokens_cut_to_length(tokenizer):
    first, second = encode(["a good film", "b"], tokenizer, 6, "head")
    assert first.tolist() == tokenizer.encode("a good film")[:6]
    assert second.tolist() == [ord("b")]
    assert first.dtype == np.int32


def test_special_token_text_is_plain_text(tokenizer):
    ids, = encode(["<|endoftext|>"], tokenizer, 48, "head")
    assert bytes(ids.tolist()).decode() == "<|endoftext|>"


@pytest.mark.parametrize(("max_length", "how", "message"), [
    (8, "tail", "truncation must be one of head, head_tail, got 'tail'"),
    (0, "head", "max_length must be a positive integer, got 0"),
    (-3, "head", "max_length must be a positive integer, got -3"), (True, "head", "max_length must be int, got True"),
    (8.5, "head", "max_length must be int, got 8.5"), (None, "head", "max_length must be int, got None")])
def test_an_impossible_cut_is_refused(tokenizer, max_length, how, message):
    with pytest.raises(ConfigError, match=message):
        Classification(tokenizer, ["bad", "good"], max_length, how)


# --- loss and metrics -------------------------------------------------------------------------------------------------

def test_the_loss_is_the_sum_of_the_negative_log_probabilities():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    targets = torch.tensor([0, 1])
    assert Classification.loss_sum(logits, targets).item() == pytest.approx(math.log(2) + math.log(4))
    assert Classification.loss_sum(logits.bfloat16(), targets).dtype == torch.float32


def test_metrics_worked_by_hand():
    # true       0       0        1        1        1
    # predicted  0       1        1        1        0
    logits = torch.tensor([[2.0, 0], [0, 1], [0, 1], [-1, 0], [5, 0]])
    found = metrics(logits, [0, 0, 1, 1, 1])
    assert found["confusion_matrix"] == [[1, 1], [1, 2]]
    assert found["accuracy"] == 0.6
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1), abs=1e-6)
    assert found["examples"] == 5
    assert found["accuracy_95_interval"] == pytest.approx([0.2307, 0.8824], abs=1e-4)
    by_hand = [math.log(1 + math.exp(x)) for x in (-2, 1, -1, -1, 5)]
    assert found["loss"] == pytest.approx(sum(by_hand) / 5, abs=1e-6)


@pytest.mark.kind("7: metrics that see a rare label that is never found")
def test_a_model_that_finds_no_fraud_has_a_low_macro_f1_and_a_recall_of_zero_by_name():
    logits = torch.tensor([[0.0, 1.0]] * 100)
    found = metrics(logits, [0] * 5 + [1] * 95, ["fraud", "ok"])
    assert (found["accuracy"], found["majority_accuracy"], found["f1_label"]) == (0.95, 0.95, "ok")
    assert found["f1"] == pytest.approx(0.974359, abs=1e-6)
    assert found["macro_f1"] == pytest.approx(0.974359 / 2, abs=1e-6)
    assert found["by_label"] == {
        "fraud": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "examples": 5},
        "ok": {"precision": 0.95, "recall": 1.0, "f1": 0.974359, "examples": 95}}


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_by_label_and_macro_f1_equal_scikit_learns(K, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(2, K - 1), size=60).tolist()  # of three and more the last is never true
    logits = torch.from_numpy(rng.normal(size=(60, K))).float()
    logits[:, K - 1] -= 10 * (seed == 0 and K > 2)             # nor, once, predicted
    predicted = logits.argmax(dim=1).numpy()
    found = metrics(logits, labels)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"), abs=1e-6)
    expected = zip(*precision_recall_fscore_support(labels, predicted, labels=range(K), zero_division=0))
    for name, (precision, recall, f1, support) in zip(map(str, range(K)), expected, strict=True):
        assert found["by_label"][name] == pytest.approx(
            {"precision": precision, "recall": recall, "f1": f1, "examples": support}, abs=1e-6)
    assert found["majority_accuracy"] == pytest.approx(max(Counter(labels).values()) / 60, abs=1e-6)


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_scikit_learns(K, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, size=80).tolist()
    logits = torch.from_numpy(rng.normal(size=(80, K))).float()
    predicted = logits.argmax(dim=1).numpy()
    found = metrics(logits, labels)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-6)
    average = {"average": "binary"} if K == 2 else {"average": "macro"}
    assert found["f1"] == pytest.approx(f1_score(labels, predicted, **average), abs=1e-6)
    assert found["confusion_matrix"] == confusion_matrix(labels, predicted, labels=range(K)).tolist()
    assert found["loss"] == pytest.approx(log_loss(labels, logits.double().softmax(1), labels=range(K)), abs=1e-5)


@pytest.mark.parametrize("K", [2, 3])
def test_a_label_that_is_never_predicted_and_never_true_counts_as_zero(K):
    logits = torch.zeros(4, K)
    logits[:, 0] = 1
    found = metrics(logits, [0, 0, 0, 0])
    predicted = [0] * 4
    average = {"average": "binary"} if K == 2 else {"average": "macro", "labels": range(K)}
    assert found["f1"] == pytest.approx(f1_score(predicted, predicted, zero_division=0, **average), abs=1e-6)
    assert found["accuracy"] == 1


def test_a_95_percent_wilson_interval_worked_by_hand():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=5e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1), abs=5e-5)


@given(total=st.integers(1, 30_000), data=st.data())
def test_an_interval_holds_its_proportion_and_stays_between_zero_and_one(total, data):
    correct = data.draw(st.one_of(st.just(0), st.just(total), st.integers(0, total)))
    low, high = wilson_interval(correct, total)
    assert -1e-12 <= low <= correct / total + 1e-12
    assert correct / total - 1e-12 <= high <= 1 + 1e-12


@pytest.mark.parametrize("correct", [0, 7])
def test_the_interval_in_a_results_file_is_within_zero_and_one(correct):
    logits = torch.tensor([[1.0, 0.0]] * 7)
    low, high = metrics(logits, [int(i >= correct) for i in range(7)])["accuracy_95_interval"]
    assert 0 <= low < high <= 1
    assert not str(low).startswith("-")


# --- rare labels ------------------------------------------------------------------------------------------------------

RARE = Examples([""] * 100, [0] * 5 + [1] * 95)


def test_labels_of_very_different_frequency_are_told_with_their_numbers():
    told = Classification.imbalance(RARE, ["fraud", "ok"])
    assert "'ok' 95, 'fraud' 5 rows: always 'ok' would have accuracy 0.9500" in told
    assert Classification.imbalance(Examples([""] * 4, [0, 1, 1, 1]), ["a", "b"]) is not None
    assert Classification.imbalance(Examples([""] * 7, [0, 0, 0, 1, 1, 1, 1]), ["a", "b"]) is None


def test_the_majority_guess_is_the_label_most_frequent_in_training(tokenizer):
    test = Examples([""] * 4, [0, 0, 1, 1])
    found = Classification(tokenizer, ["fraud", "ok"]).baselines(RARE, test)["most_frequent_label"]
    assert found["confusion_matrix"] == [[0, 2], [0, 2]] and found["macro_f1"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["loss"] == pytest.approx(-math.log(6 / 102) / 2 - math.log(96 / 102) / 2, abs=1e-6)


@pytest.mark.kind("7: class weights")
def test_balanced_weights_are_scikit_learns_and_make_labels_count_the_same():
    labels = [0] * 5 + [1] * 80 + [3] * 15
    weights = Classification.balanced_weights(Examples([""] * 100, labels), ["a", "b", "c", "d"])
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    assert [weights[0], weights[1], weights[3]] == pytest.approx(expected.tolist()) and weights[2] == 0
    assert sum(weights[label] for label in labels) == pytest.approx(100)


def test_a_weighted_loss_is_the_weighted_sum_and_without_weights_the_same_bit_for_bit():
    logits, targets = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 1, 0])
    weights = torch.tensor([4.0, 1.0, 0.5])
    losses = -logits.log_softmax(dim=1)[torch.arange(6), targets]
    weighted = Classification.loss_sum(logits, targets, weights).item()
    assert weighted == pytest.approx((weights[targets] * losses).sum().item())
    assert torch.equal(Classification.loss_sum(logits, targets),
                       torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))


def test_a_task_without_labels_of_whole_texts_has_no_weights():
    with pytest.raises(ConfigError, match="class_weights means nothing to tagging"):
        Tagging.balanced_weights(Examples([["a"]], [[0]]), ["O", "B-a"])


# --- predictions ------------------------------------------------------------------------------------------------------

def test_predictions_come_in_the_given_order_and_equal_those_of_each_text_alone(tiny_config, make_model):
    model = make_model(GPT2ForSequenceClassification)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, tiny_config.vocab_size, size=length) for length in (3, 17, 1, 40, 8, 8, 25)]
    logits = predict_logits(model.train(), ids, CPU, torch.float32, batch_size=3)
    assert not model.training
    assert logits.shape == (7, 2)
    for row, alone in zip(logits, ids):
        torch.testing.assert_close(row, model(torch.from_numpy(alone)[None])[0], atol=1e-5, rtol=0)


def test_predictions_in_bfloat16_are_float32_numbers_close_to_those_in_float32(tiny_config, make_model):
    model = make_model(GPT2ForSequenceClassification)
    ids = [np.arange(1, 10), np.arange(20)]
    exact = predict_logits(model, ids, CPU, torch.float32)
    rounded = predict_logits(model, ids, CPU, torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=0.2, rtol=0.1)


def test_whoever_takes_a_prediction_line_by_line_computes_in_no_other_mode(tokenizer, config, make_model):
    model = make_model(GPT2ForSequenceClassification, config)
    task = Classification(tokenizer, ["bad", "good"], 48)
    lines = task.predict(model, ["so bad", "so  good\nfilm"], CPU, torch.bfloat16)
    for line, text in zip(lines, ("so bad", "so good film")):
        assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
        label, probability, shown = line.split("\t")
        assert label in ("bad", "good") and 0.5 <= float(probability) <= 1 and shown == text + "\n"


# --- zero-shot --------------------------------------------------------------------------------------------------------

WORDS = {"negative": (" bad", "b"), "positive": (" good", "g", "two tokens")}


def test_zero_shot_scores_are_each_labels_words_after_the_review_and_the_prompt(tokenizer, config, make_model):
    model = make_model(GPT2LMHeadModel, config)
    texts = ["short", "a longer review of a film", "x"]
    found = zero_shot_logits(model, tokenizer, texts, CPU, torch.float32, 48, prompt=" so", words=WORDS, batch_size=2)
    one_token_words = [[tokenizer.encode(" bad")[0], ord("b")], [tokenizer.encode(" good")[0], ord("g")]]
    for row, text in zip(found, texts):
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode(text) + tokenizer.encode(" so")]))[0, -1]
        probabilities = logits.double().softmax(dim=0)
        expected = torch.stack([probabilities[words].sum().log() for words in one_token_words]).float()
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


def test_zero_shot_cuts_the_review_and_keeps_the_prompt(tokenizer, config, make_model):
    model = make_model(GPT2LMHeadModel, config)
    text = "begin " + "x" * 100 + " end"
    found = zero_shot_logits(model, tokenizer, [text], CPU, torch.float32, 20, prompt=" so", words=WORDS)
    room = 20 - len(tokenizer.encode(" so"))
    cut = truncate(tokenizer.encode(text), room, "head_tail").tolist() + tokenizer.encode(" so")
    with torch.no_grad():
        scores = model(torch.tensor([cut]))[0, -1].log_softmax(dim=0)
    assert found[0, 0].item() == pytest.approx(
        scores[[tokenizer.encode(" bad")[0], ord("b")]].logsumexp(dim=0).item(), abs=1e-5)


def test_a_label_without_a_one_token_word_is_refused_by_name(tokenizer, config):
    with pytest.raises(DataError, match="'positive'"):
        zero_shot_logits(GPT2LMHeadModel(config), tokenizer, ["text"], CPU, torch.float32, 48,
                         words={"negative": (" bad",), "positive": (" wonderful", " great")})


def test_a_length_that_leaves_no_room_for_the_review_says_so(tokenizer, config):
    with pytest.raises(ConfigError, match=r"max_length.*prompt|prompt.*max_length"):
        zero_shot_logits(GPT2LMHeadModel(config), tokenizer, ["text"], CPU, torch.float32, 2, prompt=" so", words=WORDS)
