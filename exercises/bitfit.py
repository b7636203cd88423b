"""Exercise: BitFit. Only the bias vectors of a model are trained, and a new head.

    y = x W^T + b                                     linear layers: W frozen, b trained
    y = g * (x - mean(x)) / sqrt(var(x) + eps) + b    LayerNorms: g frozen, b trained

    x (batch, seq, in)      W (out, in)      b (out,)      y (batch, seq, out)

No layer is added, and every bias starts where pretraining left it. So step 0 is the base model. The head is a module
that pretraining did not make; it starts random, so all of it is trained, its weight too.

Fill in the five holes. Then:  python -m minipeft.check bitfit FILE
To read: docs/exercises.md, and afterwards minipeft/methods/bitfit.py.
"""

import torch.nn as nn
from torch import Tensor


def trained_names(model: nn.Module, head: str) -> list[str]:
    """The names, as in model.named_parameters(), of what is trained.

    That is each parameter whose own name, behind the last dot if there is one, is "bias", and each parameter of the
    module called `head`: with "score" that is "score.weight", but not "score_norm.weight".
    """
    raise NotImplementedError("trained_names")


def bitfit(model: nn.Module, head: str) -> None:
    """Train these and freeze all else, in place."""
    raise NotImplementedError("bitfit")


def bias_gradient(output_gradient: Tensor) -> Tensor:
    """The loss's gradient with respect to b (out,), from that with respect to y (batch, seq, out): no x is needed."""
    raise NotImplementedError("bias_gradient")


def to_save(model: nn.Module, head: str) -> dict[str, Tensor]:
    """What is trained, name -> a copy of its values that does not change when training goes on."""
    raise NotImplementedError("to_save")


def load(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Put saved values into a model, in place: an optimizer that holds its parameters goes on working."""
    raise NotImplementedError("load")
