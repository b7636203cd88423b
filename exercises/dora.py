"""Exercise: DoRA. LoRA with the length of each row of the matrix trained apart from its direction.

    y = c * (x W^T + s * x A^T B^T) + bias             s = lora_alpha / r
    c = m / ||W + s B A||                              ||...|| (out,): the Euclidean length of each row, so that
                                                       c_i = m_i / ||row i||

    x (batch, seq, in)      W (out, in), bias (out,) frozen      A (r, in), B (out, r), m (out,) trained

At the start A is random, B is zero and m is ||W||. So c is 1, and step 0 is the base layer. The length ||W + s B A|| is
computed anew in every forward pass, but counts as a constant in the backward pass: no gradient flows through it.

Fill in the three holes. Then:  python -m minipeft.check dora FILE
To read: docs/exercises.md, and afterwards minipeft/methods/dora.py.
"""

import torch.nn as nn
from torch import Tensor


class DoRALinear(nn.Module):
    """A frozen linear layer, its low-rank companion, and the length of each row."""

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float) -> None:
        """Keep and freeze base_layer, with its bias, and make A, B and m.

        To be set:
            self.base_layer     the given layer itself, frozen
            self.lora_A         nn.Parameter (r, in), random
            self.lora_B         nn.Parameter (out, r), zero
            self.magnitude      nn.Parameter (out,), m: the length of each row of W
            and what forward needs besides
        """
        super().__init__()
        raise NotImplementedError("DoRALinear.__init__")

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seq, in) -> y (batch, seq, out)."""
        raise NotImplementedError("DoRALinear.forward")

    def merged_weight(self) -> Tensor:
        """The matrix (out, in) with which a plain linear layer computes the same. It changes nothing in this layer."""
        raise NotImplementedError("DoRALinear.merged_weight")
