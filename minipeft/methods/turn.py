"""How a model may be changed: by one thread at a time, and outside of inference mode.

Several threads may run one model. One that injects, switches, merges or removes an adapter changes the model for all of
them: such threads need a lock of their own around their forward passes, or a copy of the model each. Two that change it
at once would leave it in pieces, so the second one is refused; so is a change while another thread has the adapters
disabled.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn as nn

from minipeft.errors import InjectionError
from minipeft.methods.wrappers import unwrapped

Function = TypeVar("Function", bound=Callable[..., Any])


class Turn:
    """A lock that lies on a model; a copy of the model has its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Turn], tuple]:
        return Turn, ()


@contextmanager
def check_turn(model: nn.Module) -> Iterator[None]:
    """Refuse a change of the model by any other thread within the block.

    Raises:
        InjectionError: another one is within such a block.
    """
    turn = vars(unwrapped(model)).setdefault("_turn", Turn())
    if not turn.lock.acquire(blocking=False):
        raise InjectionError("another thread is changing this model's adapters, or has them disabled: let threads take "
                             "turns by a lock, or give each a copy of the model")
    try:
        yield
    finally:
        turn.lock.release()


def without_autocast(function: Function) -> Function:
    """Let a function compute products in the number formats of their factors, whatever its caller has switched on."""
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        # New contexts for each call: one holds what was on before, and threads that share it would mix that up.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*arguments, **named)

    return call


@contextmanager
def making_plain_tensors() -> Iterator[None]:
    """Within the block it is neither inference mode, whose tensors can never be trained, nor autocast."""
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def surgery(function: Function) -> Function:
    """Let a function that changes a model, its first argument, do so in its thread's turn, and make plain tensors.

    Autocast would not only round what it computes: it keeps rounded copies of weights, also when these are replaced.
    """
    @functools.wraps(function)
    def call(model: nn.Module, *arguments: Any, **named: Any) -> Any:
        with check_turn(model), making_plain_tensors():
            return function(model, *arguments, **named)

    return call
