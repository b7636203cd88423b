"""Training a vocabulary: byte-level BPE by the `tokenizers` package, written in tiktoken's rank-file format."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from minipeft.errors import WeightsError


def train_vocabulary(texts: Sequence[str], size: int, path: Path) -> None:
    """Train a byte-level BPE on `texts` and write it as a rank file.

    Args:
        size: entries, without the end-of-text token, which takes the id after the last.
        path: the file to write; its folder is created.

    Raises:
        WeightsError: the `tokenizers` package is missing.
    """
    try:
        from tokenizers import Tokenizer as Trainable
        from tokenizers import models, pre_tokenizers, trainers
    except ImportError as error:
        raise WeightsError("training a vocabulary needs the tokenizers package: "
                           "pip install minipeft[pretrain]") from error
    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainable.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=[], show_progress=False))
    byte_of = {character: bytes([value]) for value, character in _byte_characters().items()}
    entries = sorted(trainable.get_vocab().items(), key=lambda entry: entry[1])
    lines = [base64.b64encode(b"".join(byte_of[c] for c in token)) + b" %d\n" % rank for token, rank in entries]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(lines))
    temporary.replace(path)


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest for U+0100 upward."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
