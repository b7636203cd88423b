"""Examples: texts and their labels, and which texts are refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipeft.errors import DataError

# A text this long is a book or a mistake: a model that reads a few hundred tokens of it would judge something else.
MAX_CHARACTERS = 100_000
_LINE_BREAK = re.compile(r"<br\s*/?>")


@dataclass
class Examples:
    """Texts and their labels, in the same order.

    Attributes:
        texts: a text each or, where words are labeled, a list of words.
        labels: a label's number, a list with a tag's number for each word, or a list of target texts.
    """

    texts: list[Any]
    labels: list[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at `indices`, in that order."""
        return Examples([self.texts[i] for i in indices], [self.labels[i] for i in indices])

    def fingerprint(self) -> str:
        """A short name for the content, 16 hexadecimal digits, in whatever order: the sum of the examples' own hashes.

        So that of two sets together is the sum of theirs, modulo 2**64. IMDb's 50,000 reviews take half a second.
        """
        hashes = (hashlib.sha256(json.dumps(example, default=str).encode()).digest()[:8]
                  for example in zip(self.texts, self.labels))
        return f"{sum(int.from_bytes(digits, 'big') for digits in hashes) % 2**64:016x}"

    def classes(self) -> np.ndarray:
        """A class for each example, (N,), so that a split can hold its share of each; all 0 where labels are lists."""
        one_number_each = all(isinstance(label, int) for label in self.labels)
        return np.asarray(self.labels) if one_number_each else np.zeros(len(self), dtype=np.int64)

    def subset(self, size: int | None, seed: int) -> Examples:
        """`size` examples, each label in its own share; all of them where there are no more."""
        if size is None or size >= len(self):
            return self
        labels, rng = self.classes(), np.random.default_rng(seed)
        place = np.empty(len(labels))  # each label's examples evenly spaced in [0, 1), in random order
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
        return self.take(rng.permutation(np.argsort(place, kind="stable")[:size]).tolist())


def together(fingerprints: Iterable[str]) -> str:
    """The fingerprint that sets of examples have together."""
    return f"{sum(int(digits, 16) for digits in fingerprints) % 2**64:016x}"


def repeated(splits: Mapping[str, Examples]) -> str:
    """In words how many texts of validation and test are in train, too, or in both of them; empty where none is."""
    texts = {split: set(map(str, examples.texts)) for split, examples in splits.items()}
    told = []
    for split, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        if count := sum(str(text) in texts[other] for text in splits[split].texts):
            told.append(f"{count:,} of {len(splits[split]):,} {split} texts are also in {other}")
    return "; ".join(told)


def clean(text: str) -> str:
    """IMDb's reviews mark line breaks as HTML; a language model should see a line break."""
    return _LINE_BREAK.sub("\n", text)


def check_texts(texts: Sequence[Any], where: str, what: str = "text") -> None:
    """Refuse an empty column, and every text that `check_text` refuses.

    Args:
        where: what to call the file in an error.
        what: what to call a text in an error.

    Raises:
        DataError: naming the first such text's row, counted from 1.
    """
    if not texts:
        raise DataError(f"{where}: there is no {what} at all")
    for row, text in enumerate(texts, start=1):
        check_text(text, f"{where}, row {row}", what)


def check_text(text: Any, where: str, what: str = "text") -> None:
    """Refuse what is no text, is empty, is not valid UTF-8, or has more than MAX_CHARACTERS characters.

    Raises:
        DataError: saying where, and what is wrong.
    """
    if wrong := complaint(text):
        raise DataError(f"{where}: the {what} {wrong}")


def complaint(text: Any) -> str | None:
    """What is wrong with a text, as words that follow "the text": see `check_text`."""
    if text is not None and not isinstance(text, str):
        return (f"{str(text)[:40]!r} is {type(text).__name__}, not text"
                + ("; is the file encoded in UTF-8?" if isinstance(text, bytes) else ""))
    if text is None or not text.strip():
        return "is empty"
    if len(text) > MAX_CHARACTERS:
        return f"has {len(text):,} characters, the limit is {MAX_CHARACTERS:,}; cut it into parts"
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a character: how Python reads a byte that is not UTF-8
        return f"is not valid UTF-8: {error.reason}"
    return None
