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
from minipeft.methods.wrappers import check_is_bare, unwrapped

Function = TypeVar("Function", bound=Callable[..., Any])


class Turn:
    """A lock that lies on a model; a copy of the model has its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Turn], tuple]:
        return Turn, ()


@contextmanager
def this_threads_turn(model: nn.Module) -> Iterator[None]:
    """Within the block no other thread changes the model.

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


def check_is_free(model: nn.Module) -> None:
    """Refuse to put something into a model that is wrapped, or that another thread is changing.

    Raises:
        InjectionError: saying what to do.
    """
    check_is_bare(model)
    with this_threads_turn(model):
        pass


def without_autocast(function: Function) -> Function:
    """Let a function compute products in the number formats of their factors, whatever its caller has switched on."""
    return torch.autocast("cpu", enabled=False)(torch.autocast("cuda", enabled=False)(function))


def making_plain_tensors(function: Function) -> Function:
    """Let a function work outside of inference mode, whose tensors can never be trained, and without autocast."""
    return torch.inference_mode(False)(without_autocast(function))


def surgery(function: Function) -> Function:
    """Let a function that changes a model, its first argument, do so in its thread's turn, and make plain tensors.

    Autocast would not only round what it computes: it keeps rounded copies of weights, also when these are replaced.
    """
    plain = making_plain_tensors(function)

    @functools.wraps(function)
    def call(model: nn.Module, *arguments: Any, **named: Any) -> Any:
        with this_threads_turn(model):
            return plain(model, *arguments, **named)

    return call
