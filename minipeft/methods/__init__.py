"""The methods, one file each: METHODS says which there are, `inject` puts one into a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from minipeft.errors import ConfigError, InjectionError
from minipeft.methods import adapter, bitfit, dora, full, head, ia3, lora, prefix, prompt, ptuning, vera
from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan, active_injections, all_injections, carry_out
from minipeft.methods.symbols import Seen, Symbols
from minipeft.methods.turn import check_turn, making_plain_tensors
from minipeft.methods.wrappers import check_is_bare
from minipeft.settings import option_fields


@dataclass(frozen=True)
class Method:
    """A method: its configuration class, the function that plans what it does to a model, and the one that says what
    the symbols of its equation stand for.

    Attributes:
        alone: cannot be combined with any other method.
        virtual: puts virtual tokens before the text; of such methods a model carries one at most.
    """

    config_class: type[MethodConfig]
    plan: Callable[[nn.Module, Any], Plan]
    symbols: Callable[[Seen], Symbols]
    summary: str
    alone: bool = False
    virtual: bool = False

    def config(self, **values: Any) -> Any:
        """A configuration from keyword arguments.

        Raises:
            ConfigError: a name the method does not know, or a bad value.
        """
        known = [field.name for field in option_fields(self.config_class)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"{self.config_class.__name__} has no field {', '.join(unknown)}; it has "
                              f"{', '.join(known) or 'none'}")
        return self.config_class(**values)


METHODS: dict[str, Method] = {
    "full": Method(full.FullConfig, full.plan, full.symbols,
                   "train every weight", alone=True),
    "head": Method(head.HeadConfig, head.plan, head.symbols,
                   "train the classification head alone", alone=True),
    "bitfit": Method(bitfit.BitFitConfig, bitfit.plan, bitfit.symbols,
                     "train biases or LayerNorms (Ben Zaken et al. 2021)"),
    "lora": Method(lora.LoraConfig, lora.plan, lora.symbols,
                   "low-rank updates beside frozen matrices (Hu et al. 2021)"),
    "dora": Method(dora.DoraConfig, dora.plan, dora.symbols,
                   "LoRA with magnitudes apart from directions (Liu et al. 2024)"),
    "vera": Method(vera.VeraConfig, vera.plan, vera.symbols,
                   "vectors between shared random matrices (Kopiczko et al. 2023)"),
    "ia3": Method(ia3.IA3Config, ia3.plan, ia3.symbols,
                  "rescaled activations (Liu et al. 2022)"),
    "adapter": Method(adapter.BottleneckConfig, adapter.plan, adapter.symbols,
                      "bottleneck networks (Houlsby et al. 2019)"),
    "prompt": Method(prompt.PromptTuningConfig, prompt.plan, prompt.symbols,
                     "vectors before the text (Lester et al. 2021)", virtual=True),
    "ptuning": Method(ptuning.PromptEncoderConfig, ptuning.plan, ptuning.symbols,
                      "vectors before the text, made by a network (Liu et al. 2021)", virtual=True),
    "prefix": Method(prefix.PrefixTuningConfig, prefix.plan, prefix.symbols,
                     "keys and values before the text (Li and Liang 2021)", virtual=True),
}


def inject(model: nn.Module, config: Any, name: str = "default") -> nn.Module:
    """Put a method into a model, in place: its layers are attached, everything else is frozen.

    The method plans first, and whatever is wrong is found there: a refused injection leaves the model as it was. The
    configuration is never edited.

    Args:
        model: a GPT-2, with or without a head.
        config: LoraConfig, FullConfig, ...; its class says which method is meant.
        name: of the adapter. Methods injected under one name work together; see `set_adapter` for several names.

    Returns:
        The same model.

    Raises:
        ConfigError: a configuration with a bad value, or of an unknown class.
        InjectionError: nothing matches, the method cannot be combined with one the model carries, or the model is
            wrapped already, by torch.compile or for several processes, or another thread is changing it.
    """
    with check_turn(model), making_plain_tensors():
        check_config(config)
        check_combination(model, config.method, name)
        return carry_out(METHODS[config.method].plan(model, config), model, config, name)


def check_config(config: Any) -> None:
    """Refuse what is no method's configuration, and a field that was set to a bad value after the object was made.

    Raises:
        ConfigError: saying which.
    """
    if not isinstance(config, MethodConfig):
        classes = ", ".join(method.config_class.__name__ for method in METHODS.values())
        raise ConfigError(f"{type(config).__name__} is not a method's configuration; there are {classes}")
    config.check()


def check_combination(model: nn.Module, method: str, name: str) -> None:
    """Refuse a method that does not go together with what the model carries, or with what is around it.

    Raises:
        InjectionError: saying which two, and why.
    """
    check_is_bare(model)
    if any(waiting.name == name and not waiting.active for waiting in all_injections(model)):
        raise InjectionError(f"this model already carries an adapter {name!r}, which is inactive: remove it, make it "
                             "active by set_adapter, or take another name")
    for present in active_injections(model):
        if present.merged:
            raise InjectionError(f"this model carries {present.method}, merged into its weights: unmerge or remove it")
        if present.name != name:
            raise InjectionError(f"the adapter {present.name!r} is active: methods that work together share a name")
        new, old = METHODS[method], METHODS[present.method]
        if new is old or new.alone or old.alone or (new.virtual and old.virtual):
            raise InjectionError(f"this model already carries {present.method}, which does not combine with {method}: "
                                 "remove it, or start from a fresh model")
