"""Settings that check themselves: what every configuration class shares, from GPT-2's sizes to a method's fields.

A configuration is a dataclass whose fields are made by `setting`: a default, a line of help, and what a value may be.
Types, choices and ranges are checked here and nowhere else, when a configuration is made; a text from a command line
becomes a value of a field's type here, too.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from minipeft.errors import ConfigError


class Range(NamedTuple):
    """Which numbers a field takes: in words, and as a function."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE_INTEGER = Range("a positive integer", lambda value: value >= 1)
PROBABILITY = Range("a probability in [0, 1)", lambda value: 0 <= value < 1)
_LARGEST = sys.float_info.max  # an integer may be beyond it, and then is no float
FINITE = Range("a finite number", lambda value: -_LARGEST <= value <= _LARGEST)
POSITIVE = Range("positive and finite", lambda value: 0 < value <= _LARGEST)
NOT_NEGATIVE = Range("finite and not negative", lambda value: 0 <= value <= _LARGEST)
SHARE = Range("a share in [0, 1]", lambda value: 0 <= value <= 1)
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")  # what a command line's words mean
SEED = Range("a number from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)


def setting(default: Any, help: str = "", within: Range | None = None, choices: tuple[Any, ...] | None = None,
            option: bool = True, init: bool = True) -> Any:
    """A field of a configuration class.

    Args:
        default: its value where none is given; a dict or a list is copied for each configuration.
        help: one line for the command line.
        within: which numbers it takes; of a dict, each of its values. None, where the type allows it, is always right.
        choices: the only values it takes.
        option: whether the command line offers it.
        init: whether a caller may set it; false for what a class fixes.
    """
    metadata = {"help": help, "within": within, "choices": choices, "option": option and init}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, init=init, metadata=metadata)


@dataclass
class Settings:
    """Base of every configuration class.

    Attributes:
        where: how the class's errors begin.

    Raises:
        ConfigError: a value of the wrong type, out of range, or not among a field's choices; the field is named.
    """

    where: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuse a value that its field does not take. A class adds here what concerns several fields.

        Raises:
            ConfigError: naming the field and what it may be.
        """
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            wrong = _complaint(field, kinds[field.name], getattr(self, field.name))
            if wrong:
                raise ConfigError(f"{self.where}{wrong}")


def option_fields(config_class: type[Settings]) -> list[dataclasses.Field]:
    """The fields of a configuration class that the command line offers."""
    return [field for field in dataclasses.fields(config_class) if field.metadata["option"]]


def _complaint(field: dataclasses.Field, kind: Any, value: Any) -> str | None:
    """What is wrong with a field's value, if anything."""
    choices, within = field.metadata.get("choices"), field.metadata.get("within")
    if choices is not None:
        known = any(type(value) is type(choice) and value == choice for choice in choices)
        return None if known else f"{field.name} must be one of {', '.join(map(str, choices))}, got {value!r}"
    if not is_a(value, kind):
        return f"{field.name} must be {in_words(kind)}, got {value!r}"
    if within is not None:
        numbers = value if isinstance(value, dict) else {"": value}
        for key, number in numbers.items():
            if number is not None and not within.holds(number):
                return f"{field.name}{f'[{key!r}]' if key else ''} must be {within.words}, got {number!r}"
    return None


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type; a bool is no number, an int is a float, a tuple is a list."""
    options = _options(kind)
    if len(options) > 1:
        return any(is_a(value, option) for option in options)
    outer, inner = typing.get_origin(kind), typing.get_args(kind)
    if outer is list:
        return isinstance(value, (list, tuple)) and all(is_a(item, inner[0]) for item in value)
    if outer is dict:
        return isinstance(value, dict) and all(is_a(key, inner[0]) and is_a(item, inner[1])
                                               for key, item in value.items())
    if kind in (int, float) and isinstance(value, bool):
        return False
    expected = (int, float) if kind is float else outer or kind
    # What else may be annotated (Any, Literal, Optional, in a user's own task) is not checked.
    return kind is Any or not isinstance(expected, (type, tuple)) or isinstance(value, expected)


def in_words(kind: Any) -> str:
    """An annotated type as an error names it: "int or list[int] or None"."""
    names = ("None" if option is types.NoneType else getattr(option, "__name__", str(option))
             if typing.get_origin(option) is None else str(option) for option in _options(kind))
    return " or ".join(names)


def parsed(text: str, kind: Any) -> Any:
    """The value that a text from the command line means, for a field of this type.

    Numbers and true or false (yes or no, 1 or 0) are taken as such first, {...} as JSON, a word or words with commas
    between as a list of names where the type has one, and anything else as a text.

    Raises:
        ValueError: the text means no value of this type.
    """
    options = _options(kind)
    for number in (int, float):
        if number in options:
            try:
                return number(text)
            except ValueError:
                continue
    if bool in options and text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    if kind is bool:
        raise ValueError(f"{text!r} is neither true nor false")
    if any(typing.get_origin(option) is dict for option in options):
        return _json_object(text)
    if list[int] in options and re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+)*\s*", text):
        return [int(part) for part in text.split(",")]
    # Names have letters, digits, dots and underscores; anything else is a regular expression.
    if list[str] in options and text.lower() != "all-linear" and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", text):
        return [part.strip() for part in text.split(",")]
    if str in options:
        return text
    raise ValueError(f"{text!r} is not {in_words(kind)}")


def _options(kind: Any) -> tuple[Any, ...]:
    """The types that a union is made of, or the one type."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _json_object(text: str) -> dict[str, Any]:
    with suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise ValueError(f"{text!r} is not a JSON object: write it like '{{\"c_attn\": 4}}', in single quotes")
