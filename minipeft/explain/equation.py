"""The equations of the method files, computed as they stand there: every part of one beside its value.

What stands side by side is multiplied, as matrices, and binds tighter than * and /, which go number by number:

    y = x W^T + bias + s * dropout(x) A^T B^T

    A^T transposed      g^2 a power       sqrt(x) a function      ||W|| the length of each row
    [P; x] stacked along the sequence     wte[ids] rows chosen    y[V:] without the first V of the sequence
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minipeft.errors import ConfigError

TOKEN = re.compile(r"(?P<space>\s*)(?P<text>\|\||\^T(?!\w)|[A-Za-z_]\w*|\d+(?:\.\d+)?|[-+*/^()\[\];:])")
STARTS_A_FACTOR = re.compile(r"[A-Za-z_\d(\[]")


def _sqrt(x: Any) -> Any:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


# What any equation may say without explaining it to the computer.
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sqrt": _sqrt, "softmax": lambda x: x.softmax(dim=-1), "relu": torch.relu, "tanh": torch.tanh, "diag": torch.diag}


@dataclass(frozen=True)
class Term:
    """A part of an equation, and what it came to.

    Attributes:
        text: the part as it stands in the equation.
        start, end: where it stands there.
        value: a tensor or a number.
        symbol: whether it is one symbol, such as W, and not computed from others.
    """

    text: str
    start: int
    end: int
    value: Any
    symbol: bool


class Line(NamedTuple):
    """A line of a docstring's equation: left = right, and the remark beside it."""

    left: str
    right: str
    remark: str

    @property
    def text(self) -> str:
        return f"{self.left} = {self.right}"


def equation_text(docstring: str) -> str:
    """A method file's equation as it stands there, without the indentation: the first indented paragraph."""
    return textwrap.dedent(next(part for part in docstring.split("\n\n") if part.startswith("    ")))


def equation_of(docstring: str) -> list[Line]:
    """The lines of a method file's equation; a remark stands three spaces off."""
    lines = []
    for line in equation_text(docstring).split("\n"):
        equation, _, remark = line.strip().partition("   ")
        left, _, right = equation.partition(" = ")
        lines.append(Line(left, right, remark.strip()))
    return lines


def text_under(docstring: str, heading: str) -> str:
    """The text under a heading of a method file, in one line."""
    return " ".join(" ".join(heading_lines(docstring, heading)).split())


def heading_lines(docstring: str, heading: str) -> list[str]:
    """The lines under a heading of a method file, four spaces of indentation taken off; none without the heading."""
    below = dropwhile(lambda line: line != heading, docstring.split("\n"))
    return [line[4:] for line in takewhile(lambda line: line.startswith("    "), list(below)[1:])]


def symbols_in(expression: str) -> set[str]:
    """The names in an expression, those of functions too; ^T is no name."""
    return set(re.findall(r"[A-Za-z_]\w*", re.sub(r"\^T(?!\w)", "", expression))) - FUNCTIONS.keys()


def compute(expression: str, values: Mapping[str, Any]) -> list[Term]:
    """Every part of an expression with its value, in the order in which they are computed; the whole is the last.

    Args:
        values: what each symbol stands for: a tensor, a number or a function.

    Raises:
        ConfigError: the expression is not of this notation, or a symbol is unknown.
    """
    reader = _Reader(expression, {**FUNCTIONS, **values})
    value, start = reader.sum()
    if reader.word():
        reader.stop(f"{reader.word()!r} is not expected")
    reader.note(start, value)
    return list(reader.terms.values())


class _Reader:
    """Reads an expression from left to right, computes while reading, and notes each part that it has computed."""

    def __init__(self, expression: str, values: Mapping[str, Any]) -> None:
        self.expression, self.values = expression, values
        self.tokens = list(TOKEN.finditer(expression))
        self.at = 0
        self.terms: dict[str, Term] = {}
        if "".join(match[0] for match in self.tokens) != expression.rstrip():
            self.stop("it holds signs that are none of this notation")

    def stop(self, why: str) -> None:
        raise ConfigError(f"the equation {self.expression!r} cannot be computed: {why}")

    # --- reading ------------------------------------------------------------------------------------------------------

    def word(self, ahead: int = 0) -> str:
        """The next word, or the one after it; nothing at the end."""
        return self.tokens[self.at + ahead]["text"] if self.at + ahead < len(self.tokens) else ""

    def is_adjacent(self) -> bool:
        """Whether the next word stands directly behind the last: wte[ids] is a choice, q [P_k; k] a product."""
        return self.at < len(self.tokens) and not self.tokens[self.at]["space"]

    def take(self, expected: str | None = None) -> str:
        found = self.word()
        if expected is not None and found != expected:
            self.stop(f"{expected!r} is missing")
        self.at += 1
        return found

    def place(self) -> int:
        """Where the next word begins."""
        return self.tokens[self.at].start("text") if self.at < len(self.tokens) else len(self.expression)

    def note(self, start: int, value: Any, symbol: bool = False) -> Any:
        end = self.tokens[self.at - 1].end()
        text = self.expression[start:end]
        if not (callable(value) and not isinstance(value, Tensor)):
            self.terms.setdefault(text, Term(text, start, end, value, symbol))
        return value

    # --- the grammar, from what binds least -----------------------------------------------------------------------

    def sum(self) -> tuple[Any, int]:
        value, start = self.quotient()
        while self.word() in ("+", "-"):
            sign = self.take()
            other, _ = self.quotient()
            value = self.note(start, value + other if sign == "+" else value - other)
        return value, start

    def quotient(self) -> tuple[Any, int]:
        value, start = self.product()
        while self.word() in ("*", "/"):
            sign = self.take()
            other, _ = self.product()
            value = self.note(start, value * other if sign == "*" else value / other)
        return value, start

    def product(self) -> tuple[Any, int]:
        value, start = self.power()
        while STARTS_A_FACTOR.match(self.word()):
            other, _ = self.power()
            scales = any(not isinstance(factor, Tensor) or factor.ndim == 0 for factor in (value, other))
            value = self.note(start, value * other if scales else value @ other)
        return value, start

    def power(self) -> tuple[Any, int]:
        start = self.place()
        value = self.factor()
        while self.word() in ("^", "^T") or (self.word() == "[" and self.is_adjacent()):
            sign = self.take()
            if sign == "^T":
                value = value.transpose(-1, -2)
            elif sign == "^":
                value = self.note(start, value ** self.factor())
            else:
                value = self.chosen(value)
                self.note(start, value)
        return value, start

    def chosen(self, value: Any) -> Any:
        """value[ids] or value[V:], behind its bracket."""
        choice, _ = self.sum()
        rest = self.word() == ":"
        if rest:
            self.take()
        self.take("]")
        return value[..., choice:, :] if rest else value[choice]

    def factor(self) -> Any:
        start, word = self.place(), self.take()
        if word == "(":
            value, _ = self.sum()
            self.take(")")
            return value
        if word == "||":
            value, _ = self.sum()
            self.take("||")
            return self.note(start, value.norm(dim=-1))
        if word == "[":
            return self.stacked(start)
        if re.match(r"\d", word):
            return float(word) if "." in word else int(word)
        if word not in self.values:
            self.stop(f"nothing is known of {word!r}" if word else "it ends too early")
        value = self.values[word]
        if self.word() == "(" and self.is_adjacent():
            self.take()
            argument, _ = self.sum()
            self.take(")")
            return self.note(start, value(argument))
        return self.note(start, value, symbol=True)

    def stacked(self, start: int) -> Tensor:
        """[first; second], behind its bracket. What is the same for every text is put before each of them."""
        first, _ = self.sum()
        self.take(";")
        second, _ = self.sum()
        self.take("]")
        first = first.expand(*second.shape[:-2], *first.shape[-2:])
        return self.note(start, torch.cat((first, second), dim=-2))
