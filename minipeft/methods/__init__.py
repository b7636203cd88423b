"""The methods, one file each: METHODS says which there are, `inject` puts one into a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from minipeft.errors import ConfigError, InjectionError
from minipeft.methods import full, lora
from minipeft.methods.surgery import injections


@dataclass(frozen=True)
class Method:
    """A method's configuration class and the function that puts it into a model."""

    config_class: type
    inject: Callable[[nn.Module, Any], nn.Module]
    summary: str

    def config(self, **values: Any) -> Any:
        """A configuration from keyword arguments.

        Raises:
            ConfigError: a name the method does not know.
        """
        known = [field.name for field in dataclasses.fields(self.config_class)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"{self.config_class.__name__} has no field {', '.join(unknown)}; it has "
                              f"{', '.join(known) or 'none'}")
        return self.config_class(**values)


METHODS: dict[str, Method] = {
    "full": Method(full.FullConfig, full.inject, "train every weight"),
    "lora": Method(lora.LoraConfig, lora.inject, "low-rank updates beside frozen matrices (Hu et al. 2021)"),
}


def inject(model: nn.Module, config: Any) -> nn.Module:
    """Put a method into a model, in place: its layers are swapped in, everything else is frozen.

    All checks come first: a refused injection leaves the model as it was. The configuration is never edited.

    Args:
        model: a GPT-2, with or without a head.
        config: LoraConfig, FullConfig, ...; its class says which method is meant.

    Returns:
        The same model.

    Raises:
        ConfigError: a configuration with a bad value, or of an unknown class.
        InjectionError: nothing matches, or the model carries a method already.
    """
    for method in METHODS.values():
        if type(config) is method.config_class:
            if injections(model):
                raise InjectionError(f"this model already carries {injections(model)[-1].method}: remove or merge it, "
                                     "or start from a fresh model")
            return method.inject(model, config)
    raise ConfigError(f"{type(config).__name__} is not a method's configuration; there are "
                      f"{', '.join(m.config_class.__name__ for m in METHODS.values())}")
