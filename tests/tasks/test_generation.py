"""Generation: what is read and what is learned of a pair, what is cut, what is written, and how it is judged."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from helpers import VOCAB_SIZE
from hypothesis import given
from hypothesis import strategies as st

from minipeft import GPT2Config, GPT2LMHeadModel
from minipeft.data.batches import IGNORED_LABEL, collate
from minipeft.data.examples import Examples
from minipeft.errors import ConfigError, DataError
from minipeft.tasks import generation
from minipeft.tasks.decoding import generate
from minipeft.tasks.generation import (
    Generation,
    Summarization,
    Translation,
    first_sentence,
    padded_left,
    source_text,
    word_dictionary,
)

CPU = torch.device("cpu")
EOS = VOCAB_SIZE - 1


@pytest.fixture
def translation(tokenizer):
    return lambda max_length=60, **more: Translation(tokenizer, [], max_length, **more)


@pytest.fixture
def model(make_model):
    return make_model(GPT2LMHeadModel, GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=16, n_layer=2, n_head=2,
                                                  resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


# --- reading ----------------------------------------------------------------------------------------------------------

def test_a_target_is_a_text_or_a_list_of_texts_and_a_source_may_be_a_list_of_sentences():
    found, names = Summarization.read(["a", ["b.", "c."]], ["x", ["y", "z"]], "here")
    assert found == Examples(["a", ["b.", "c."]], [["x"], ["y", "z"]]) and names == []
    assert source_text(["b.", "c."]) == "b. c."


@pytest.mark.parametrize(("sources", "targets", "message"), [
    ([], [], "there is no source at all"), (["a", " "], ["x", "y"], "row 2: the source is empty"),
    (["a", []], ["x", "y"], "row 2: the source is empty"), (["a"], [""], "row 1: the target is empty"),
    (["a"], [[]], "row 1: there is no target"), (["a"], [["x", None]], "row 1: the target is empty"),
    ([3], ["x"], "row 1: the source '3' is int, not text"), (["a"], [4], "the target '4' is int, not text"),
    ([["a", 1]], ["x"], "is list, not text"), (["x" * 200_000], ["y"], "200,000 characters")])
def test_unusable_pairs_are_refused_by_row(sources, targets, message):
    with pytest.raises(DataError, match=message) as refused:
        Translation.read(sources, targets, "pairs.csv")
    assert str(refused.value).startswith("pairs.csv")


# --- training sequences -----------------------------------------------------------------------------------------------

def test_only_the_target_and_the_end_are_labelled_each_at_the_token_before_it(translation):
    encoded = translation().encode(Examples(["ab"], [["cd", "never learned"]]))
    assert bytes(encoded.ids[0].tolist()) == b"ab = cd"
    assert encoded.labels[0].tolist() == [IGNORED_LABEL] * 3 + [*b" cd", EOS]
    assert len(encoded.ids[0]) == len(encoded.labels[0])


def test_a_summary_follows_tl_dr(tokenizer):
    encoded = Summarization(tokenizer, [], 48).encode(Examples([["A a.", "C c."]], [[" so "]]))
    assert bytes(encoded.ids[0].tolist()) == b"A a. C c.\nTL;DR: so"
    assert encoded.labels[0].tolist()[-4:] == [*b" so", EOS]


@given(source=st.text(min_size=1, max_size=60).filter(str.strip), target=st.text(min_size=1, max_size=60).filter(
    str.strip), max_length=st.integers(10, 40))
def test_a_sequence_never_exceeds_its_length_nor_a_target_its_room(tokenizer, source, target, max_length):
    task = Translation(tokenizer, [], max_length)
    ids, labels = (rows[0] for rows in (lambda e: (e.ids, e.labels))(task.encode(Examples([source], [[target]]))))
    assert len(ids) == len(labels) <= max_length
    learned = labels[labels != IGNORED_LABEL]
    assert 1 < len(learned) <= task.max_new_tokens and learned[-1] == EOS
    prompt = task.prompts([source])[0]
    assert len(prompt) + task.max_new_tokens <= max_length
    assert np.array_equal(ids[:len(prompt)], prompt)
    assert prompt[-len(task.separator_ids):].tolist() == task.separator_ids  # whatever is cut, the separator is not


def test_what_is_cut_is_counted_in_the_log(translation, caplog):
    task = translation(max_new_tokens=4)
    with caplog.at_level(logging.WARNING):
        encoded = task.encode(Examples(["a", "b"], [["x"], ["too long"]]))
    assert encoded.labels[1][-4:].tolist() == [*b" to", EOS]
    assert "1 of 2 targets have more than 3 tokens" in caplog.text
    caplog.clear()
    task.encode(Examples(["a" * 200, "b"], [["x"], ["y"]]))
    assert f"1 of 2 sources have more than {task.source_length} tokens" in caplog.text
    assert "targets" not in caplog.text


def test_a_summary_is_a_smaller_part_of_its_text_than_a_translation(tokenizer):
    for kind, length, new in ((Translation, 384, 128), (Summarization, 480, 80)):
        task = kind(tokenizer, [])
        assert (task.max_length, task.max_new_tokens) == (length, new)
        assert task.source_length == length - new - len(task.separator_ids)


@pytest.mark.parametrize(("values", "message"), [
    ({"max_length": 3}, "no room for a source"), ({"max_length": 20, "max_new_tokens": 18}, "no room for a source"),
    ({"max_new_tokens": 1}, "at least 2"), ({"max_new_tokens": -3}, "at least 2"),
    ({"max_new_tokens": 2.5}, "max_new_tokens must be int or None, got 2.5"),
    ({"max_length": 0}, "max_length must be a positive integer, got 0")])
def test_sizes_that_leave_no_room_are_refused(translation, values, message):
    with pytest.raises(ConfigError, match=message):
        translation(**values)


def test_loss_and_accuracy_are_of_target_tokens_whatever_the_batch(translation, model):
    task = translation()
    examples = Examples(["ab", "a longer source"], [["cd"], ["e"]])
    found = task.evaluate(model, task.encode(examples), CPU, torch.float32)
    losses, hits = [], []
    for source, target in (("ab", " cd"), ("a longer source", " e")):
        prompt, target = task.tokenizer.encode(source + " ="), [*task.tokenizer.encode(target), EOS]
        with torch.no_grad():
            scores = model(torch.tensor([prompt + target]))[0, len(prompt) - 1:-1].log_softmax(dim=1)
        losses += (-scores[range(len(target)), target]).tolist()
        hits += (scores.argmax(dim=1) == torch.tensor(target)).tolist()
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(hits), abs=1e-6)


# --- writing ----------------------------------------------------------------------------------------------------------

def test_padding_moves_to_the_left():
    batch = collate([np.array([5, 6, 7]), np.array([8])], [0, 0])
    ids, mask = padded_left(batch.input_ids, batch.attention_mask)
    assert ids[0].tolist() == [5, 6, 7] and ids[1, 2] == 8
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_what_is_written_for_many_sources_is_what_is_written_for_each_alone(translation, model, how):
    task = translation(max_new_tokens=12)
    sources = ["ab", "a much longer source than that", "x y", "good bad"]
    together = task.generate_texts(model, sources, CPU, torch.float32, **how)
    for source, written in zip(sources, together):
        prompt = torch.tensor([task.tokenizer.encode(source + " =")])
        alone = generate(model, prompt, max_new_tokens=12, eos_token_id=EOS, **how)[0, prompt.shape[1]:].tolist()
        assert written == task.tokenizer.decode(alone[:alone.index(EOS)] if EOS in alone else alone).strip()


@pytest.mark.parametrize(("how", "at_once"), [({}, 32), ({"num_beams": 4}, 8), ({"num_beams": 99}, 1)], ids=str)
def test_rows_computed_at_once_are_as_many_with_beams_as_without(translation, model, monkeypatch, how, at_once):
    """A beam is a row: 32 texts with 4 beams would need the memory of 128."""
    asked = []
    monkeypatch.setattr(generation, "predictions", lambda *arguments, **named: asked.append(arguments[6]) or [])
    translation().generate_texts(model, ["ab"], CPU, torch.float32, **how)
    assert asked == [at_once]


def test_a_prediction_is_streamed_in_pieces_that_make_the_whole(translation, model):
    task = translation(max_new_tokens=12)
    for source, written in zip(("ab", "good"), task.generate_texts(model, ["ab", "good"], CPU, torch.float32)):
        pieces = list(task.predict(model, [source], CPU, torch.float32))
        assert pieces[-1] == "\n" and "".join(pieces[:-1]).strip() == written.rstrip("\ufffd").strip()
    with pytest.raises(ConfigError, match="known only at the end: use generate_texts"):
        list(task.predict(model, ["ab"], CPU, torch.float32, num_beams=2))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_whoever_takes_a_prediction_piece_by_piece_computes_in_no_other_mode(translation, model, precision):
    for _ in translation(max_new_tokens=12).predict(model.train(), ["ab", "good"], CPU, precision):
        assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled() and not model.training


# --- metrics ----------------------------------------------------------------------------------------------------------

def test_rouge_worked_by_hand_and_best_over_references(tokenizer):
    task = Summarization(tokenizer, [], 48)
    # Against "the cat sat": 2 of 2 words found, 2 of 3 wanted: F1 0.8; one of two and one pair of words: F1 2/3.
    found = task.metrics(["the cat"], [["nothing alike", "the cat sat"]])
    assert found["rouge1"] == pytest.approx(80) and found["rougeL"] == pytest.approx(80)
    assert found["rouge2"] == pytest.approx(100 * 2 / 3, abs=1e-3)
    two = task.metrics(["the cat", "a"], [["the cat"], ["b"]])
    assert two["rouge1"] == 50 and two["rouge1_95_interval"] == [0, 100]  # either of the two drawn twice


def test_bleu_and_chrf_are_sacrebleus_with_their_signatures(translation):
    import sacrebleu

    written = ["Zwei Hunde spielen im Schnee .", "Ein Mann fährt Rad ."]
    references = [["Zwei Hunde spielen im tiefen Schnee .", "Zwei Hunde im Schnee ."], ["Ein Mann fährt Fahrrad ."]]
    found = translation().metrics(written, references)
    expected = sacrebleu.corpus_bleu(written, [[row[0] for row in references], [references[0][1], None]])
    assert found["bleu"] == pytest.approx(expected.score, abs=1e-4)
    assert found["chrf"] > found["bleu"] > 0
    assert "tok:13a" in found["bleu_signature"] and "nc:6" in found["chrf_signature"]
    low, high = found["bleu_95_interval"]
    assert low < found["bleu"] < high


def test_bleu_and_chrf_are_what_they_are_by_hand(translation):
    # Of "a b c d e" four of five words are there, three of four pairs, two of three triples, one of two fours.
    found = translation().metrics(["a b c d e"], [["a b c d f"]])
    assert found["bleu"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4), abs=1e-4)
    # Of "abc" two of three letters, one of two pairs, no triple: as precise as complete, so F is their mean.
    found = translation().metrics(["abc"], [["abd"]])
    assert found["chrf"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3, abs=1e-4)


def test_the_interval_of_bleu_surrounds_that_of_the_whole(translation):
    rng = np.random.default_rng(0)
    references = [[" ".join(rng.choice(list("abcde"), 8))] for _ in range(50)]
    written = [" ".join(word if rng.random() < 0.8 else "x" for word in row[0].split()) for row in references]
    found = translation().metrics(written, references)
    low, high = found["bleu_95_interval"]
    assert found["bleu"] - 15 < low < found["bleu"] < high < found["bleu"] + 15


def test_the_intervals_are_sacrebleus_whatever_seed_the_environment_has(translation, monkeypatch):
    from sacrebleu.metrics import BLEU

    rng = np.random.default_rng(1)
    references = [[" ".join(rng.choice(list("abcde"), 8))] for _ in range(30)]
    written = [" ".join(word if rng.random() < 0.7 else "x" for word in row[0].split()) for row in references]
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    found = translation().metrics(written, references)
    expected = BLEU().corpus_score(written, [[row[0] for row in references]], n_bootstrap=1000)
    assert found["bleu_95_interval"] == pytest.approx(
        [expected._mean - expected._ci, expected._mean + expected._ci], abs=1e-5)
    assert "SACREBLEU_SEED" not in os.environ
    for seed in ("7", "none"):
        monkeypatch.setenv("SACREBLEU_SEED", seed)
        assert translation().metrics(written, references) == found
        assert os.environ["SACREBLEU_SEED"] == seed
    low, high = found["chrf_95_interval"]
    assert low < found["chrf"] < high


def test_a_perfect_translation_scores_100_and_one_without_a_right_letter_0(translation):
    found = translation().metrics(["ein ganz kleiner Hund"] * 2, [["ein ganz kleiner Hund"]] * 2)
    assert found["bleu"] == pytest.approx(100) and found["chrf"] == pytest.approx(100)
    assert found["bleu_95_interval"] == found["chrf_95_interval"] == [pytest.approx(100)] * 2
    found = translation().metrics(["", ""], [["ein Hund"]] * 2)
    assert found["bleu_95_interval"] == found["chrf_95_interval"] == [0, 0]


def test_of_a_bad_translation_some_samples_score_0_and_its_interval_begins_there(translation):
    """sacrebleu's corpus_score fails here: it cannot take the mean of float and numpy.float32."""
    found = translation().metrics(["ein Hund im Schnee", "x"] + ["y"] * 20, [["ein Hund im Schnee"]] * 22)
    for name in ("bleu", "chrf"):
        low, high = found[f"{name}_95_interval"]
        assert low == 0 < high < 100


def test_generation_alone_has_no_metric():
    with pytest.raises(TypeError, match="abstract"):
        Generation(None, [])


# --- baselines --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("source", "first"), [
    (["One. Two.", "Three."], "One. Two."), ("One is 1.5. Two?", "One is 1.5."), ("Is it? Yes.", "Is it?"),
    ("no end", "no end")])
def test_the_first_sentence(source, first):
    assert first_sentence(source) == first


def test_lead_1_is_a_baseline_of_summaries(tokenizer):
    found = Summarization(tokenizer, [], 48).baselines(Examples([], []), Examples([["a b", "c"]], [["a b"]]))
    assert found["lead_1"]["rouge1"] == 100


def test_the_dictionary_pairs_words_that_stand_together_more_than_apart():
    pairs = Examples(["a dog", "a cat", "the dog", "a dog."], [["ein Hund"], ["eine Katze"], ["der Hund"],
                                                               ["ein Hund."]])
    dictionary = word_dictionary(pairs)
    assert dictionary["dog"] == "Hund" and dictionary["the"] == "der" and dictionary["."] == "."


def test_copying_and_the_dictionary_are_baselines_of_translations(translation):
    train = Examples(["a dog", "a cat", "the dog"], [["ein Hund"], ["ein Tier"], ["der Hund"]])
    found = translation().baselines(train, Examples(["the dog", "a bird"], [["der Hund"], ["ein bird"]]))
    assert found["word_dictionary"]["chrf"] == pytest.approx(100)
    assert found["copy_source"]["chrf"] < 60
