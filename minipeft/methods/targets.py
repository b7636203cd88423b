"""Choosing modules: peft's rules for `target_modules`, `layers_to_transform` and the patterns, in one place."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from typing import Any, Protocol

import torch.nn as nn

from minipeft.errors import ConfigError, InjectionError
from minipeft.methods.layers import AdapterLayer, AddedLayer, ReplacementLayer
from minipeft.methods.wrappers import bare_name, unwrapped

logger = logging.getLogger(__name__)
Names = str | Sequence[str]


class Targeting(Protocol):
    """The configuration field that chooses modules, as in peft.

    `exclude_modules`, and `layers_to_transform` with `layers_pattern`, count too where a configuration has them.
    """

    target_modules: Names | None


def find_targets(model: nn.Module, config: Targeting, default: Sequence[str]) -> list[str]:
    """Names of the linear layers a configuration targets, by peft's rules.

    A list names modules by their full name or by its end at a dot ("c_proj" matches attention's and the MLP's,
    "attn.c_proj" attention's only). A string is a regular expression for the full name, or "all-linear".
    `layers_to_transform` keeps only the blocks of these numbers. The head is never a target.

    Args:
        default: the targets of a configuration that names none.

    Raises:
        ConfigError: contradictory fields, a block that the model does not have, or a bad regular expression.
        InjectionError: nothing matched, or a match is not a linear layer.
    """
    modules = base_modules(model)
    targets = default if config.target_modules is None else config.target_modules
    found = linear_names(modules) if means_all(targets) else [name for name in modules if matches(name, targets)]
    if getattr(config, "layers_to_transform", None) not in (None, []) or getattr(config, "layers_pattern", None):
        found = in_chosen_blocks(found, targets, config, modules)
    if excluded := getattr(config, "exclude_modules", None):
        found = [name for name in found if not matches(name, excluded)]
    return check_linear(found, targets, excluded, modules)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by name, without the head and without what is inside adapter layers."""
    inside = {id(part) for layer in model.modules() if isinstance(layer, AdapterLayer)
              for part in layer.modules() if part is not layer or isinstance(layer, AddedLayer)}
    return {bare_name(name): unwrapped(module) for name, module in model.named_modules()
            if name not in ("", getattr(model, "head", None)) and id(module) not in inside}


def linear_names(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the linear layers, those that carry a method among them."""
    return [name for name, module in modules.items() if isinstance(module, (nn.Linear, ReplacementLayer))]


def means_all(targets: Names) -> bool:
    """Whether the targets are the word "all-linear"."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def matches(name: str, wanted: Names) -> bool:
    """Whether a module's name fits: wholly a regular expression, or one of several names or its end at a dot."""
    return (compiled(wanted, "target").fullmatch(name) is not None if isinstance(wanted, str) else
            any(name == entry or name.endswith(f".{entry}") for entry in wanted))


def compiled(pattern: str, what: str) -> re.Pattern[str]:
    """A regular expression from a user.

    Raises:
        ConfigError: it does not compile.
    """
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{what} {pattern[:100]!r} is not a regular expression: {error}") from error


def pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as peft reads rank_pattern."""
    return next((value for pattern, value in patterns.items()
                 if compiled(rf"(.*\.)?({pattern})$", "pattern").match(name)), default)


# --- blocks -----------------------------------------------------------------------------------------------------------

def chosen_blocks(names: Sequence[str], layers_to_transform: int | Sequence[int] | None,
                  layers_pattern: Names | None = None) -> list[int]:
    """The block numbers that `layers_to_transform` means: those given, each once; all that there are without any.

    Args:
        names: of the model's modules, which say what blocks there are.
        layers_pattern: what stands before the number in a name; None takes the first number.

    Raises:
        ConfigError: a number that no block has, with the range.
    """
    existing = sorted({block_of(name, layers_pattern) for name in names} - {None})
    if layers_to_transform is None or layers_to_transform == []:
        return existing
    chosen = [layers_to_transform] if isinstance(layers_to_transform, int) else list(dict.fromkeys(layers_to_transform))
    if existing and not set(chosen) <= set(existing):
        raise ConfigError(f"layers_to_transform={chosen}: this model has the blocks {existing[0]} to {existing[-1]}")
    return chosen


def block_of(name: str, layers_pattern: Names | None = None) -> int | None:
    """The number of the block that a module is in, or None."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    before = "|".join(patterns) if patterns else "[^.]*"
    found = compiled(rf".*?\.(?:{before})\.(?P<block_number>\d+)\.", "layers_pattern").match(f".{name}")
    return int(found["block_number"]) if found else None


def in_chosen_blocks(found: list[str], targets: Names, config: Any, modules: dict[str, nn.Module]) -> list[str]:
    """Those of the found modules that `layers_to_transform` keeps; a full name is meant as it stands.

    Raises:
        ConfigError: a pattern without block numbers, an expression for target_modules, or a block that is not there.
    """
    layers, pattern = config.layers_to_transform, config.layers_pattern
    if layers is None or layers == []:
        raise ConfigError("layers_pattern needs layers_to_transform")
    if isinstance(targets, str) and not means_all(targets):
        raise ConfigError("layers_to_transform needs target_modules as a list of names, not as an expression")
    chosen = chosen_blocks(list(modules), layers, pattern)
    full_names = [] if means_all(targets) else targets
    return [name for name in found if name in full_names or block_of(name, pattern) in chosen]


# --- errors, and what is saved ----------------------------------------------------------------------------------------

def check_linear(found: list[str], targets: Names, excluded: Names | None, modules: dict[str, nn.Module]) -> list[str]:
    """What was found, but refuse to target nothing, or what is not a plain linear layer.

    Raises:
        InjectionError: naming what the model does offer.
    """
    linear = linear_names(modules)
    if excluded and not any(matches(name, excluded) for name in modules):
        logger.warning("exclude_modules %r match nothing", excluded)
    if not found:
        wanted = targets if isinstance(targets, str) else ", ".join(targets)
        if excluded:
            raise InjectionError(f"exclude_modules {excluded!r} leave nothing of what target_modules {wanted!r} match")
        raise InjectionError(f"target_modules {wanted!r} match nothing; nearest names: "
                             f"{', '.join(_nearest(wanted, linear))}")
    for name in found:
        if isinstance(modules[name], AdapterLayer):
            raise InjectionError(f"{name} already carries a {type(modules[name]).__name__}: remove it first")
        if not isinstance(modules[name], nn.Linear):
            raise InjectionError(f"target {name} is of class {type(modules[name]).__name__}; only linear layers can be "
                                 f"targeted: {', '.join(sorted({n.split('.', 3)[-1] for n in linear}))}")
    return found


def _nearest(wanted: str, names: list[str]) -> list[str]:
    endings = sorted({".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2)})
    words = [word for word in re.split(r"[^\w]+", wanted) if word]
    close = [match for word in words for match in difflib.get_close_matches(word, endings, n=3, cutoff=0.4)]
    return list(dict.fromkeys(close)) or endings


def saved_targets(target_modules: Names | None, layers: dict[str, AdapterLayer]) -> Names:
    """target_modules as an adapter file should say it: "all-linear" and None do not mean the same everywhere."""
    if target_modules is None:
        return sorted({name.split(".")[-1] for name in layers})
    if means_all(target_modules):
        return list(layers)
    return target_modules if isinstance(target_modules, str) else list(target_modules)


def bias_names(model: nn.Module, among: Sequence[str] | None = None) -> list[str]:
    """Names of the base model's bias vectors, the head's left out; `among` keeps only those of certain modules."""
    names = []
    for name, module in base_modules(model).items():
        module = module.base_layer if isinstance(module, ReplacementLayer) else module
        if isinstance(getattr(module, "bias", None), nn.Parameter) and (among is None or name in among):
            names.append(f"{name}.bias")
    return names
