"""Labels of whole texts, in files of a user's own: which are the same, and which are too rare to be judged."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from minipeft.data.examples import Examples
from minipeft.data.tables import NUMBER
from minipeft.errors import DataError, first_few

MAX_CHARACTERS_OF_A_LABEL = 200


def by_name(labels: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Labels with names in the place of numbers, which count names from 0. A name that looks like a number is one."""
    if any(NUMBER.fullmatch(name) for name in names):
        return list(labels)
    named = {**dict(enumerate(names)), **{str(number): name for number, name in enumerate(names)}}
    return [named.get(label, label) if isinstance(label, (int, str)) else label for label in labels]


def in_order(names: Sequence[str]) -> list[str]:
    """Names in alphabetical order or, where all of them are numbers, in that of numbers."""
    numbers = all(NUMBER.fullmatch(name) for name in names)
    return sorted(names, key=lambda name: (float(name) if numbers else 0.0, name))


def reduced(label: str) -> str:
    """What labels have in common that a person would take for one: blanks, case, and a number's leading zeros and .0
    are left out."""
    text = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
    return re.sub(r"^(-?)0*(\d+)(\.0*)?$", r"\1\2", text)


def check_classes(labels: Sequence[Any], where: str) -> None:
    """Refuse what is no set of classes: a single label, or almost as many as there are rows.

    Raises:
        DataError: saying which.
    """
    counts = Counter(map(str, labels))
    values = set(counts)
    if len(values) == 1:
        raise DataError(f"{where}: there is one label only ({values.pop()[:40]!r}); there is nothing to learn")
    longest = max(values, key=len)
    if len(longest) > MAX_CHARACTERS_OF_A_LABEL:
        raise DataError(f"{where}: the label {longest[:40]!r}... has {len(longest):,} characters, which is no name of "
                        "a class: --label-column names the labels' column")
    mostly_once = 2 * sum(count == 1 for count in counts.values()) > len(values) > 20
    if len(values) > max(2, min(50, len(labels) // 2), len(labels) // 10) or mostly_once:
        raise DataError(f"{where}: the labels are {len(values):,} different values in {len(labels):,} rows, such as "
                        f"{min(values)[:40]!r}; that is not a set of classes: --label-column names their column")


def unified(labels: Mapping[str, Sequence[Any]], names: Sequence[str], similar: str | None,
            where: str) -> tuple[dict[str, list[Any]], str]:
    """Labels of which those that a person would take for one are one, or are several on purpose.

    Args:
        labels: those of each split.
        names: those that a model knows already; a group that has one is spelled as that one.
        similar: "merge" takes a group's most frequent spelling, "keep" keeps all, None refuses them.

    Returns:
        (the labels of each split, in words what was done).

    Raises:
        DataError: labels that differ in blanks, case, leading zeros or .0 alone, with their numbers.
    """
    counts = Counter({name: 0 for name in names})
    counts.update(str(label) for column in labels.values() for label in column)
    groups: dict[str, list[str]] = defaultdict(list)
    for label in sorted(counts, key=lambda label: (label not in names, -counts[label], label)):
        groups[reduced(label)].append(label)
    told = first_few([" and ".join(f"{label!r} ({rows(counts[label])})" for label in group)
                      for group in groups.values() if len(group) > 1], 10)
    if not told:
        return dict(labels), ""
    if similar is None:
        raise DataError(f"{where}: labels differ in blanks, case, leading zeros or .0 alone: {told}; say "
                        "--similar-labels merge to take the first of each for all, or --similar-labels keep to keep "
                        "them apart")
    if similar == "keep":
        return dict(labels), f"kept apart, as asked: {told}"
    first = {label: group[0] for group in groups.values() for label in group}
    return ({split: [first[str(label)] for label in column] for split, column in labels.items()},
            f"the first of each stands for all, as asked: {told}")


def untested(splits: Mapping[str, Examples], names: Sequence[str]) -> str:
    """In words which labels a split lacks that should teach or judge them; empty where each has all."""
    counts = {split: Counter(examples.labels) for split, examples in splits.items()}
    told, unlearned = [], False
    for number, name in enumerate(names):
        lacking = [split for split in ("train", "validation", "test") if not counts[split][number]]
        unlearned |= "train" in lacking
        if lacking:
            told.append(f"{name!r} ({rows(sum(found[number] for found in counts.values()))}) has none in "
                        f"{' and '.join(lacking)}")
    return f"too few rows to be {'learned or ' * unlearned}judged: {first_few(told, 10)}" if told else ""


def contradictory(splits: Mapping[str, Examples]) -> str:
    """In words how many equal texts have different labels, in one split or in several; empty where none has."""
    first: dict[str, Any] = {}
    found = dict.fromkeys(text for examples in splits.values() for text, label in zip(examples.texts, examples.labels)
                          if first.setdefault(text, label) != label)
    return f"{len(found):,} of the texts are there with different labels, such as {next(iter(found))[:40]!r}" if (
        found) else ""


def rows(number: int) -> str:
    """A number of rows in words."""
    return f"{number:,} row{'s' * (number != 1)}"
