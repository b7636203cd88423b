"""Text to token ids and back: byte-level BPE through tiktoken.

Two vocabularies: "gpt2", OpenAI's own 50,257 entries, and the bundled "mini", 8,192 entries trained on film reviews. A
byte-level vocabulary has a token for each of the 256 bytes, so any text can be encoded and nothing is ever unknown.
"""

from __future__ import annotations

import base64
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from minipeft.errors import WeightsError
from minipeft.model.hub import HUB_NAMES, local, official
from minipeft.model.weights import CONFIG_FILE, VOCABULARY_FILE, read_config

GPT2_SIZE = 50257  # entries of GPT-2's own vocabulary
# What tiktoken's cache calls its two files, each by the SHA-1 of its address.
_GPT2_FILES = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
END_OF_TEXT = "<|endoftext|>"
# GPT-2's rule for cutting text into pieces before merging: contractions, words, numbers, punctuation, spaces.
GPT2_SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer:
    """A tiktoken encoding with the few calls this library needs.

    Special tokens inside a text are plain text: "<|endoftext|>" in a review is encoded letter by letter, and never
    raises. There is no pad token; padding is the business of the attention mask.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.eos_token_id = encoding.eot_token

    def encode(self, text: str) -> list[int]:
        """The token ids of one text."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """The token ids of many texts, encoded on `num_threads` threads (default: one per core)."""
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=num_threads or os.cpu_count() or 1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a list of token ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self.encoding.decode(list(ids))


def get_tokenizer(name_or_folder: str | Path = "gpt2") -> Tokenizer:
    """The tokenizer of a model.

    Args:
        name_or_folder: "mini", the name of an official GPT-2, or a model folder. A folder holding `vocab.tiktoken` uses
            it; any other, unless its config.json has a smaller vocab_size, means GPT-2's own vocabulary.

    Raises:
        WeightsError: an unknown name, a vocabulary that is damaged or not there, or GPT-2's vocabulary neither cached
            nor downloadable.
    """
    folder = local(name_or_folder)
    if (folder / VOCABULARY_FILE).is_file():
        return Tokenizer(_read_vocabulary(folder / VOCABULARY_FILE))
    words = read_config(folder).get("vocab_size", GPT2_SIZE) if (folder / CONFIG_FILE).is_file() else GPT2_SIZE
    if isinstance(words, int) and words < GPT2_SIZE:
        raise WeightsError(f"{folder} holds no {VOCABULARY_FILE}, and its model has {words:,} words, where GPT-2's "
                           f"vocabulary has {GPT2_SIZE:,}: put the model's own {VOCABULARY_FILE} beside its weights")
    if not folder.is_dir() and not official(name_or_folder):
        raise WeightsError(f"vocabulary {str(name_or_folder)!r} is neither a folder nor one of mini, "
                           f"{', '.join(HUB_NAMES)}")
    try:
        _check_no_download_offline()
        return Tokenizer(tiktoken.get_encoding("gpt2"))
    except Exception as error:  # whatever the HTTP client raises, or tiktoken's own hash check
        raise WeightsError(f"GPT-2's vocabulary is not cached and cannot be downloaded ({type(error).__name__}): set "
                           "TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's gpt2 files") from error


def _check_no_download_offline() -> None:
    """Refuse what would download GPT-2's vocabulary in offline mode, of which tiktoken knows nothing.

    Raises:
        OfflineModeIsEnabled: it is neither loaded nor cached.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    default = os.environ.get("DATA_GYM_CACHE_DIR", Path(tempfile.gettempdir()) / "data-gym-cache")
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR", default))
    at_hand = "gpt2" in tiktoken.registry.ENCODINGS or all((cache / file).is_file() for file in _GPT2_FILES)
    if constants.HF_HUB_OFFLINE and not at_hand:
        raise OfflineModeIsEnabled


def _read_vocabulary(path: Path) -> tiktoken.Encoding:
    """A rank file: one line per token, its bytes in base64 and its rank. The end-of-text token follows the last."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise WeightsError(f"{path} is not a tiktoken rank file: {error}") from error
    if sorted(ranks.values()) != list(range(len(lines))):
        raise WeightsError(f"{path} is not a tiktoken rank file: its ranks do not count up from 0")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise WeightsError(f"{path} is not a tiktoken rank file: it lacks some of the 256 bytes")
    return tiktoken.Encoding(name=path.parent.name, pat_str=GPT2_SPLIT_PATTERN, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: len(ranks)})
