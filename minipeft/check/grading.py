"""Grading one file: its properties in a fixed order, up to the first that does not hold.

Each exercise is a module beside this one. It has NAMES, what the learner's file must define, and a function for each
property it is held against, called as in PROPERTIES. Such a function takes the learner's module and raises `Refused`.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from minipeft.check.answers import check_names, describe, is_hole, load, raise_if_interrupted
from minipeft.check.guard import guarded
from minipeft.check.judging import Refused, WrongDtype

PROPERTIES = {
    "shapes": "shapes and dtypes",
    "start": "step 0 is the base model",
    "formula": "the formula on small whole numbers",
    "gradients": "gradients in float64",
    "trained": "what is trained and what is frozen",
    "count": "the number of trained parameters",
    "merged": "merged gives what unmerged gives",
    "saved": "what is saved and loaded",
    "padding": "padding and positions",
    "causal": "the causal mask",
    "reference": "the stored reference outputs",
}


def exercise(method: str) -> ModuleType:
    """The module that knows one exercise."""
    return importlib.import_module(f"minipeft.check.{method}")


def grade(method: str, path: Path) -> Iterator[tuple[str, Refused | None]]:
    """Each property of the exercise with why it does not hold, or None where it holds. The first failure is the last.

    Raises:
        AnswerError: the file cannot be graded.
    """
    known = exercise(method)
    with guarded():
        answer = load(path)
    check_names(answer, known.NAMES)
    for key, title in PROPERTIES.items():
        if hasattr(known, key):
            refused = _hold(getattr(known, key), answer, path)
            if refused is not None and not refused.because and key != "formula" and not isinstance(refused, WrongDtype):
                # A shape says little; what the same file makes of small square matrices may name the mistake.
                by_values = _hold(known.formula, answer, path)
                if by_values is not None and by_values.because:
                    refused.because = f"with small square matrices: {by_values.because}"
            yield title, refused
            if refused is not None:
                return


def remaining(method: str, title: str) -> list[str]:
    """The titles of the properties that come after this one."""
    titles = [title for key, title in PROPERTIES.items() if hasattr(exercise(method), key)]
    return titles[titles.index(title) + 1:]


def _hold(check: Callable[[ModuleType], None], answer: ModuleType, path: Path) -> Refused | None:
    torch.manual_seed(0)
    with guarded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(answer)
        except Refused as refused:
            return refused
        except BaseException as error:
            raise_if_interrupted(error, path)
            hole = "there is a hole of the template left" if is_hole(error) else ""
            return Refused("", describe(error, path), "", because=hole)
    return None


@contextmanager
def time_limit(seconds: float, on_end: Callable[[], None]) -> Iterator[None]:
    """Call `on_end`, in another thread, if what is inside has not ended in time. It has to end the process.

    Time in which the whole process stands still does not count.
    """
    done = threading.Event()

    def wait() -> None:
        for _ in range(max(1, round(seconds / 0.1))):
            if done.wait(0.1):
                return
        on_end()

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        done.set()
