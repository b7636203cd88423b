"""Wrapped models: what torch.compile and the data-parallel classes put around a model, seen through or refused.

A wrapper has the model inside under a name of its own, so that every parameter's name begins with it. Functions that
look at a model, switch it or save it are for the model inside. What changes which parameters there are is refused on a
wrapper that has counted them already.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch.nn as nn

from minipeft.errors import InjectionError

# What a wrapper calls the model inside: torch.compile; DataParallel and DistributedDataParallel; FSDP1.
INSIDE = ("_orig_mod", "module", "_fsdp_wrapped_module")
_ANYWHERE = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module)\.|\.(_orig_mod|_fsdp_wrapped_module)$")
Function = TypeVar("Function", bound=Callable[..., Any])


def inside(model: nn.Module) -> nn.Module | None:
    """The model that one of torch's own wrappers has inside; None for a model that is no wrapper."""
    if not type(model).__module__.startswith("torch."):
        return None  # somebody's model may have a part called "module"
    return next((model._modules[name] for name in INSIDE if name in model._modules), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, whatever is around it."""
    while (found := inside(model)) is not None:
        model = found
    return model


def check_is_bare(model: nn.Module) -> None:
    """Refuse a wrapped model where parameters are to be added: the wrapper would not know them.

    Raises:
        InjectionError: saying what to do.
    """
    if inside(model) is not None:
        raise InjectionError(f"this model is wrapped in {type(model).__name__}: inject into the model itself, or load "
                             "the adapter into it, and wrap it then")


def check_not_data_parallel(model: nn.Module) -> None:
    """Refuse a wrapper that averages the gradients of certain parameters, where others are to be trained from now on.

    Raises:
        InjectionError: saying what to do.
    """
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise InjectionError(f"this model is wrapped in {type(model).__name__}, which knows the active adapter's "
                             "parameters only: switch on the model itself, and wrap it anew")


def seeing_through(function: Function) -> Function:
    """Let a function of a model, its first argument, work on the model itself; it returns the wrapper where it would
    return the model."""

    @functools.wraps(function)
    def call(model: nn.Module, *arguments: Any, **named: Any) -> Any:
        itself = unwrapped(model)
        found = function(itself, *arguments, **named)
        return model if found is itself else found

    return call


def bare_name(name: str) -> str:
    """A tensor's or a module's name without the words that torch.compile and FSDP put before and between."""
    return _ANYWHERE.sub("", name)


def without_wrappers(name: str) -> str:
    """A tensor's name in a file as the bare model has it: also without `module.` where a model's names begin."""
    return re.sub(r"^(base_model\.model\.)?module\.", r"\1", bare_name(name))
