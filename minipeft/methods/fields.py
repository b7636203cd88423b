"""Check a configuration's values against the types its class declares: one check, for a user and for a JSON file."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from minipeft.errors import ConfigError


def check_fields(config: Any) -> None:
    """Refuse values whose type is not the declared one, or that are not among a field's choices.

    Raises:
        ConfigError: naming the field and what it may be.
    """
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata.get("choices")
        if choices is not None:
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                raise ConfigError(f"{field.name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        elif not any(_is(value, kind.strip()) for kind in _alternatives(str(field.type))):
            raise ConfigError(f"{field.name} must be {str(field.type).replace(' | ', ' or ')}, got {value!r}")


def compiled(pattern: str, what: str) -> re.Pattern[str]:
    """A regular expression from a user.

    Raises:
        ConfigError: it does not compile.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{what} {pattern!r} is not a regular expression: {error}") from error


def _alternatives(annotation: str) -> list[str]:
    return annotation.split("|")


def _is(value: Any, kind: str) -> bool:
    """Whether a value has the type an annotation names; a bool is no number, an int is a float."""
    if kind.startswith("list["):
        return isinstance(value, (list, tuple)) and all(_is(item, kind[5:-1]) for item in value)
    if kind.startswith("dict["):
        return isinstance(value, dict) and all(_is(item, kind[10:-1].strip()) for item in value.values()) \
            and all(isinstance(key, str) for key in value)
    if kind in ("int", "float") and isinstance(value, bool):
        return False
    types = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}
    return isinstance(value, types[kind])
