"""Reading a learner's file: it is run as a module, and whatever goes wrong becomes one line."""

from __future__ import annotations

import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "minipeft_answer"     # under this name the file is a module; dataclasses in it look themselves up by it
LONGEST_LINE = 200


class AnswerError(Exception):
    """The file cannot be graded at all: it is no Python, it stops, or a name of the template is missing."""


def load(path: Path) -> ModuleType:
    """The file, run as a module.

    Raises:
        AnswerError: saying in one line what stopped it, and in which line of the file.
    """
    try:
        source = path.read_text(encoding="utf-8-sig")             # some editors put a mark at the beginning
    except (OSError, UnicodeDecodeError) as error:
        because = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise AnswerError(f"{path} cannot be read: {because}") from None
    module = ModuleType(MODULE)
    module.__file__ = str(path)
    sys.modules[MODULE] = module
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except (SyntaxError, ValueError) as error:
        at = f"line {error.lineno}: " if getattr(error, "lineno", None) else ""
        raise AnswerError(f"{at}{type(error).__name__}: {_first_line(getattr(error, 'msg', error))}") from None
    except BaseException as error:
        raise_if_interrupted(error, path)
        raise AnswerError(describe(error, path)) from None
    return module


def check_names(module: ModuleType, names: dict[str, int]) -> None:
    """Hold the file's names against the template's.

    Args:
        names: "Class", "Class.method" or "function" -> how many arguments it is called with, self left out.

    Raises:
        AnswerError: the first one that is missing, or takes other arguments.
    """
    for name, count in names.items():
        value: Any = module
        for part in name.split("."):
            value = getattr(value, part, None)
        if not callable(value):
            raise AnswerError(f"{name} is missing: keep the names of the template")
        bound = ["self"] if "." in name else []
        try:
            inspect.signature(value).bind(*bound, *range(count))
        except TypeError:
            takes = ", ".join(inspect.signature(value).parameters)
            raise AnswerError(f"{name}({takes}) has to take {count} arguments{' beside self' * bool(bound)}: keep the "
                              "template's signatures") from None


def raise_if_interrupted(error: BaseException, path: Path) -> None:
    """Raise the KeyboardInterrupt that comes from the keyboard. One that the file raises itself is its error."""
    if isinstance(error, KeyboardInterrupt):
        frames = _frames(error, path)
        if not (frames and "KeyboardInterrupt" in (frames[-1].line or "")):
            raise error


def is_hole(error: BaseException) -> bool:
    """Whether it is a hole of the template that was reached."""
    return isinstance(error, NotImplementedError)


def describe(error: BaseException, path: Path) -> str:
    """An exception in one line: which, where in the file, and its message's first line."""
    frames = _frames(error, path)
    where = f"line {frames[-1].lineno}" + (f", {frames[-1].name}: " if frames[-1].name != "<module>" else ": ") \
        if frames else ""
    if is_hole(error):
        return f"{where}not written yet" + (f" ({message})" if (message := _first_line(error)) else "")
    if isinstance(error, SystemExit):
        return f"{where}the file ends the program"
    return f"{where}{type(error).__name__}: {_first_line(error)}"


def _frames(error: BaseException, path: Path) -> list[traceback.FrameSummary]:
    return [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]


def _first_line(message: Any) -> str:
    try:
        text = (str(message).strip().splitlines() or [""])[0]
    except BaseException as error:                             # an exception's __str__ may be the learner's, too
        text = f"its message cannot be shown ({type(error).__name__})"
    return text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE - 3] + "..."
