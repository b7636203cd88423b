"""The tokenizers: any text comes back, special tokens are plain text, a damaged vocabulary is an error of one line."""

from __future__ import annotations

import base64

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import WeightsError
from minipeft.model.hub import HUB_NAMES, MINI_FOLDER
from minipeft.model.tokenizer import END_OF_TEXT, VOCABULARY_FILE, get_tokenizer

BYTES = [bytes([value]) for value in range(256)]
MERGES = [b"th", b"the", b"in", b"ing", b" a", b"<|"]                            # ranks 256 to 261
CORPUS = ["the cat sat on the mat, and the cat thought about the other cat.", "Don't let it run: 1234 5678, 1234!",
          "naïve café, naïve café — 猫は猫", "<|endoftext|> in a review"] * 20
TRICKY = ["", " ", "\n\n  x\t", "it's the thing", "naïve café — 猫 🐈‍⬛", "\x00\x7f\ufffd", "a" * 3000, "<|endoftext|>",
          "x<|endoftext|>y<|endoftext|>", "e\u0301", "\u202e\u200b"]


def rank_file(entries):
    """The bytes of a rank file from (token, rank) pairs."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in entries)


ENTRIES = [(token, rank) for rank, token in enumerate(BYTES + MERGES)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer of the 256 bytes and six merges."""
    folder = tmp_path_factory.mktemp("small")
    (folder / VOCABULARY_FILE).write_bytes(rank_file(ENTRIES))
    return get_tokenizer(folder)


@pytest.fixture(scope="module")
def mini():
    """The bundled vocabulary."""
    if not (MINI_FOLDER / VOCABULARY_FILE).is_file():
        pytest.skip("checkpoints/mini is not built")
    return get_tokenizer("mini")


@pytest.fixture(scope="module")
def gpt2(tiktoken_cache):
    """GPT-2's own vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(tiktoken_cache))
        return get_tokenizer("gpt2")


@pytest.fixture(scope="module", params=["small", "mini", "gpt2"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


# --- every vocabulary -------------------------------------------------------------------------------------------------

@given(text=st.text(max_size=200))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.eos_token_id for token in ids)


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts=st.lists(st.text(max_size=50), max_size=8))
def test_a_batch_is_encoded_as_each_text_alone(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("num_threads", [None, 1, 4])
def test_the_number_of_threads_changes_nothing(tokenizer, num_threads):
    assert tokenizer.encode_batch(CORPUS, num_threads) == [tokenizer.encode(text) for text in CORPUS]


@given(data=st.data())
def test_any_ids_decode_to_a_text(tokenizer, data):
    """Also ids whose bytes are no valid UTF-8, as a model may generate."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    assert len(tokenizer.decode(ids).encode()) >= len(ids)


def test_special_tokens_inside_a_text_are_plain_text(tokenizer):
    ids = tokenizer.encode(f"one {END_OF_TEXT} two")
    assert tokenizer.eos_token_id not in ids and len(ids) > 6
    assert tokenizer.encode_batch([END_OF_TEXT]) == [tokenizer.encode(END_OF_TEXT)]


def test_the_end_of_text_is_the_last_id(tokenizer):
    assert tokenizer.eos_token_id == tokenizer.vocab_size - 1
    assert tokenizer.decode([tokenizer.eos_token_id]) == END_OF_TEXT


# --- known ids --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, ids", [
    ("the", [257]), ("thin", [256, 258]), ("the thing", [257, 32, 256, 259]), (" a\n", [260, 10]),
    ("é", [0xC3, 0xA9]), (END_OF_TEXT, [261, *b"endoftext|>"])])
def test_bytes_are_merged_in_the_order_of_their_ranks(small, text, ids):
    assert small.encode(text) == ids


def test_bytes_that_are_no_text_decode_to_the_replacement_character(small):
    assert small.decode([0xC3]) == "\ufffd" and small.decode([0xFF, 65]) == "\ufffdA"


@pytest.mark.parametrize("text, ids", [
    ("Hello world", [15496, 995]), (" the", [262]), ("", []), (END_OF_TEXT, [27, 91, 437, 1659, 5239, 91, 29])])
def test_gpt2s_vocabulary_gives_gpt2s_ids(gpt2, text, ids):
    assert gpt2.encode(text) == ids
    assert (gpt2.vocab_size, gpt2.eos_token_id) == (50257, 50256)


def test_the_bundled_vocabulary_has_8192_entries(mini):
    assert (mini.vocab_size, mini.eos_token_id) == (8192, 8191)
    assert len(mini.encode("This film was a great surprise.")) < 12


# --- which vocabulary -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*HUB_NAMES, "openai-community/gpt2-xl"])
def test_official_names_mean_gpt2s_vocabulary(gpt2, name):
    assert get_tokenizer(name).encode("Hello world") == [15496, 995]


def test_without_a_name_it_is_gpt2s(gpt2):
    assert get_tokenizer().vocab_size == 50257


def test_a_name_that_nobody_knows_does_not_mean_gpt2s():
    with pytest.raises(WeightsError, match=r"^vocabulary 'minni' is neither a folder nor one of mini, gpt2, "):
        get_tokenizer("minni")


@pytest.mark.parametrize(("words", "is_gpt2s"), [(8192, False), (50257, True), (50304, True)])
def test_a_model_with_fewer_words_than_gpt2_needs_a_vocabulary_of_its_own(gpt2, tmp_path, words, is_gpt2s):
    (tmp_path / "config.json").write_text(f'{{"vocab_size": {words}}}')
    if is_gpt2s:
        assert get_tokenizer(tmp_path).vocab_size == 50257
        return
    with pytest.raises(WeightsError, match=r"holds no vocab\.tiktoken, and its model has 8,192 words, where GPT-2's"):
        get_tokenizer(tmp_path)


def test_a_folder_without_a_vocabulary_of_its_own_means_gpt2s(gpt2, tmp_path):
    assert get_tokenizer(tmp_path).vocab_size == 50257


def test_gpt2s_vocabulary_neither_cached_nor_downloadable_says_what_to_set(monkeypatch):
    def no_network(name):
        raise ConnectionError("Max retries exceeded\nwith url: ...")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(WeightsError, match="TIKTOKEN_CACHE_DIR") as caught:
        get_tokenizer("gpt2")
    assert "\n" not in str(caught.value)


def test_in_offline_mode_gpt2s_vocabulary_is_not_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", lambda path: pytest.fail(f"asked for {path}"))
    with pytest.raises(WeightsError, match=r"cannot be downloaded \(OfflineModeIsEnabled\): set TIKTOKEN_CACHE_DIR"):
        get_tokenizer("gpt2")


def test_in_offline_mode_gpt2s_vocabulary_is_read_where_it_is_cached(monkeypatch, tiktoken_cache):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tiktoken_cache))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    assert get_tokenizer("openai-community/gpt2").vocab_size == 50257


# --- damaged files ----------------------------------------------------------------------------------------------------

DAMAGED = {
    "empty": b"",
    "garbage": bytes(range(256)) * 20,
    "a web page": b"<!doctype html>\n<title>404</title>\n",
    "not base64": rank_file(ENTRIES) + b"*** 262\n",
    "no rank": rank_file(ENTRIES) + b"eHl6\n",
    "a rank that is no number": rank_file(ENTRIES) + b"eHl6 many\n",
    "a third column": rank_file(ENTRIES) + b"eHl6 262 1\n",
    "a rank left out": rank_file([*ENTRIES, (b"xyz", 263)]),
    "a rank twice": rank_file([*ENTRIES, (b"xyz", 261)]),
    "a token twice": rank_file([*ENTRIES, (b"the", 262)]),
    "a negative rank": rank_file([*ENTRIES, (b"xyz", -1)]),
    "cut inside the last rank": rank_file(ENTRIES)[:-2],
    "cut inside the last token": rank_file(ENTRIES)[:-6],
    "too few for all bytes": rank_file(ENTRIES[:255]),
    # As many entries as there should be, but one byte cannot be encoded: tiktoken panics when it meets it.
    "a byte left out": rank_file([(token, rank) for rank, token in enumerate(BYTES[:97] + BYTES[98:] + MERGES)]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_rank_file_is_an_error_that_names_it(tmp_path, damage):
    (tmp_path / VOCABULARY_FILE).write_bytes(DAMAGED[damage])
    with pytest.raises(WeightsError, match="is not a tiktoken rank file") as caught:
        get_tokenizer(tmp_path)
    assert str(tmp_path / VOCABULARY_FILE) in str(caught.value) and "\n" not in str(caught.value)
