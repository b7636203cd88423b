"""The methods, one file each: METHODS says which there are, `inject` puts one into a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn

from minipeft.errors import ConfigError, InjectionError
from minipeft.methods import adapter, bitfit, dora, full, head, ia3, lora, prefix, prompt, ptuning, vera
from minipeft.methods.injection import injections


@dataclass(frozen=True)
class Method:
    """A method's configuration class and the function that puts it into a model.

    Attributes:
        fixed: configuration fields that make it this method and not another one with the same class.
        alone: cannot be combined with any other method.
    """

    config_class: type
    inject: Callable[..., nn.Module]
    summary: str
    fixed: dict[str, Any] = field(default_factory=dict)
    alone: bool = False

    def config(self, **values: Any) -> Any:
        """A configuration from keyword arguments.

        Raises:
            ConfigError: a name the method does not know.
        """
        known = [field.name for field in dataclasses.fields(self.config_class) if field.name not in self.fixed]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"{self.config_class.__name__} has no field {', '.join(unknown)}; it has "
                              f"{', '.join(known) or 'none'}")
        return self.config_class(**values, **self.fixed)


METHODS: dict[str, Method] = {
    "full": Method(full.FullConfig, full.inject, "train every weight", alone=True),
    "head": Method(head.HeadConfig, head.inject, "train the classification head alone", alone=True),
    "bitfit": Method(bitfit.BitFitConfig, bitfit.inject, "train biases or LayerNorms (Ben Zaken et al. 2021)"),
    "lora": Method(lora.LoraConfig, lora.inject, "low-rank updates beside frozen matrices (Hu et al. 2021)",
                   {"use_dora": False}),
    "dora": Method(lora.LoraConfig, dora.inject, "LoRA with magnitudes apart from directions (Liu et al. 2024)",
                   {"use_dora": True}),
    "vera": Method(vera.VeraConfig, vera.inject, "vectors between shared random matrices (Kopiczko et al. 2023)"),
    "ia3": Method(ia3.IA3Config, ia3.inject, "rescaled activations (Liu et al. 2022)"),
    "adapter": Method(adapter.BottleneckConfig, adapter.inject, "bottleneck networks (Houlsby et al. 2019)"),
    "prompt": Method(prompt.PromptTuningConfig, prompt.inject, "vectors before the text (Lester et al. 2021)"),
    "ptuning": Method(ptuning.PromptEncoderConfig, ptuning.inject,
                      "such vectors, made by a network (Liu et al. 2021)"),
    "prefix": Method(prefix.PrefixTuningConfig, prefix.inject,
                     "keys and values before the text (Li and Liang 2021)"),
}
VIRTUAL_TOKENS = ("prompt", "ptuning", "prefix")


def inject(model: nn.Module, config: Any, name: str = "default") -> nn.Module:
    """Put a method into a model, in place: its layers are put in, everything else is frozen.

    All checks come first: a refused injection leaves the model as it was. The configuration is never edited.

    Args:
        model: a GPT-2, with or without a head.
        config: LoraConfig, FullConfig, ...; its class says which method is meant.
        name: of the adapter. Methods injected under one name work together; see `set_adapter` for several names.

    Returns:
        The same model.

    Raises:
        ConfigError: a configuration with a bad value, or of an unknown class.
        InjectionError: nothing matches, or the method cannot be combined with one the model carries.
    """
    method = method_of(config)
    _check_combination(model, method, name)
    return METHODS[method].inject(model, config, name)


def method_of(config: Any) -> str:
    """The name of the method a configuration means.

    Raises:
        ConfigError: it is no method's.
    """
    for name, method in METHODS.items():
        if type(config) is method.config_class and all(getattr(config, key) == value
                                                       for key, value in method.fixed.items()):
            return name
    classes = dict.fromkeys(method.config_class.__name__ for method in METHODS.values())
    raise ConfigError(f"{type(config).__name__} is not a method's configuration; there are {', '.join(classes)}")


def _check_combination(model: nn.Module, method: str, name: str) -> None:
    present = injections(model)
    if any(injection.merged for injection in present):
        raise InjectionError(f"this model carries {present[-1].method}, merged into its weights: unmerge or remove it")
    if present and present[0].name != name:
        raise InjectionError(f"the adapter {present[0].name!r} is in force: methods that work together share a name")
    for injection in present:
        both_virtual = method in VIRTUAL_TOKENS and injection.method in VIRTUAL_TOKENS
        if injection.method == method or METHODS[method].alone or METHODS[injection.method].alone or both_virtual:
            raise InjectionError(f"this model already carries {injection.method}, which does not combine with "
                                 f"{method}: remove it, or start from a fresh model")
