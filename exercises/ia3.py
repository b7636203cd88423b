"""Exercise: (IA)^3. A learned vector rescales activations, number by number.

    y = l * (x W^T + bias)    an ordinary layer: the output is rescaled, l (out,)
    y = (l * x) W^T + bias    a feed-forward layer: the input is rescaled, l (in,)

    x (batch, seq, in)      W (out, in), bias (out,) frozen      l trained, ones at the start      y (batch, seq, out)

In GPT-2 two linear layers of each block get a vector: c_attn an ordinary one, mlp.c_proj a feed-forward one. The vector
can be folded into the layer's weight and, where it has to be, into its bias.

Fill in the four holes. Then:  python -m minipeft.check ia3 FILE
To read: docs/exercises.md, and afterwards minipeft/methods/ia3.py.
"""

import torch.nn as nn
from torch import Tensor


class IA3Linear(nn.Module):
    """A frozen linear layer whose output, or whose input if it is a feed-forward one, is rescaled."""

    def __init__(self, base_layer: nn.Linear, feedforward: bool) -> None:
        """Keep and freeze base_layer, with its bias, and make l.

        To be set:
            self.base_layer     the given layer itself, frozen
            self.ia3_l          nn.Parameter, all ones: (in,) if feedforward, otherwise (out,)
            and what forward needs besides
        """
        super().__init__()
        raise NotImplementedError("IA3Linear.__init__")

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seq, in) -> y (batch, seq, out)."""
        raise NotImplementedError("IA3Linear.forward")

    def merged(self) -> tuple[Tensor, Tensor]:
        """The weight (out, in) and the bias (out,) with which a plain linear layer computes the same.

        Nothing in this layer changes.
        """
        raise NotImplementedError("IA3Linear.merged")


def places(names: list[str]) -> dict[str, bool]:
    """Which of GPT-2's linear layers get a vector.

    Args:
        names: all of them, such as "h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj".

    Returns:
        The name of each layer that gets a vector -> whether it is a feed-forward one.
    """
    raise NotImplementedError("places")
