"""The answers that the grader is tried on, for each exercise: right ones, and wrong ones as patches of the right one.

`python tests/exercises/answers.py` prints every wrong one with what the grader says of it. Names of exercises behind it
print theirs only.

    right/METHOD.py        a right answer          otherwise/METHOD.py     another, written differently
    mistakes/METHOD.py     MISTAKES: what is done, what stands there in the right answer, what instead, and a part of
                           what the grader has to say; several patches at once are a dictionary, with None beside it
"""

from __future__ import annotations

import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minipeft.check.__main__ import EXERCISES
from minipeft.check.answers import AnswerError
from minipeft.check.grading import grade

HERE = Path(__file__).parent


class Mistake(NamedTuple):
    """One wrong answer.

    Attributes:
        title: what is done wrong.
        source: the whole file.
        says: a part of the grader's message.
    """

    title: str
    source: str
    says: str


def mistakes(method: str) -> Iterator[Mistake]:
    """All wrong answers of an exercise."""
    right = (HERE / "right" / f"{method}.py").read_text(encoding="utf-8")
    for title, old, new, says in runpy.run_path(str(HERE / "mistakes" / f"{method}.py"))["MISTAKES"]:
        source = right
        for before, after in (old if isinstance(old, dict) else {old: new}).items():
            if source.count(before) != 1:
                raise ValueError(f"{method}, {title}: {before!r} stands there {source.count(before)} times, not once")
            source = source.replace(before, after)
        yield Mistake(title, source, says)


def verdict(method: str, path: Path) -> str:
    """Why the grader refuses a file, in one line, or nothing if it does not."""
    try:
        for title, refused in grade(method, path):
            if refused is not None:
                return f"{title}: {refused.because or refused.got}"
    except AnswerError as error:
        return str(error)
    return ""


def print_table(methods: list[str]) -> None:
    """Every mistake of these exercises beside what the grader says of it, as a Markdown table."""
    print("| exercise | mistake | the grader says |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.py"
        for method in methods:
            for mistake in mistakes(method):
                path.write_text(mistake.source, encoding="utf-8")
                says = verdict(method, path).replace("|", "\\|")                  # ||W|| is no cell
                print(f"| {method} | {mistake.title} | {says} |")


if __name__ == "__main__":
    print_table(sys.argv[1:] or list(EXERCISES))
