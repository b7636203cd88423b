"""Check a configuration's values against the types its class declares: one check, for a user and for a JSON file."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, ClassVar

from minipeft.errors import ConfigError

if TYPE_CHECKING:
    import torch.nn as nn
    from typing_extensions import Self

    from minipeft.methods.injection import AdapterLayer


class SavedConfig:
    """A configuration that an adapter_config.json can hold; what its class says here is how most methods are stored.

    Attributes:
        base_prefix: before the names of the base model's own tensors in an adapter file.
        harmless: keys of peft's that do not change what this method computes, whatever they say.
        more_fields: keys that `from_saved` reads beside the configuration's own fields.
        needs_task: whether a file that does not say its task_type has no meaning.
    """

    base_prefix: ClassVar[str] = "base_model.model."
    harmless: ClassVar[tuple[str, ...]] = ()
    more_fields: ClassVar[tuple[str, ...]] = ()
    needs_task: ClassVar[bool] = False

    def to_saved(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> dict[str, Any]:
        """What adapter_config.json says beyond, or other than, the configuration's fields."""
        return {}

    @classmethod
    def from_saved(cls, values: dict[str, Any], model: nn.Module) -> Self:
        """A configuration from adapter_config.json's values."""
        return cls(**values)


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
