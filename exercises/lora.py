"""Exercise: LoRA. A frozen linear layer gets a trained low-rank companion.

    y = x W^T + bias + s * dropout(x) A^T B^T          s = lora_alpha / r

    x (batch, seq, in)      W (out, in), bias (out,) frozen      A (r, in), B (out, r) trained      y (batch, seq, out)

At the start A is random and B is zero. So step 0 is the base layer, exactly. dropout acts in training only, and only on
the x that goes into A. After training the update can be folded into the matrix: W + s B A.

Fill in the three holes. Then:  python -m minipeft.check lora FILE
To read: docs/exercises.md, and afterwards minipeft/methods/lora.py.
"""

import torch.nn as nn
from torch import Tensor


class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank companion."""

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0) -> None:
        """Keep and freeze base_layer, with its bias, and make A and B.

        To be set:
            self.base_layer     the given layer itself, frozen
            self.lora_A         nn.Parameter (r, in), random
            self.lora_B         nn.Parameter (out, r), zero
            and what forward needs besides
        base_layer.weight is (out, in); there are base_layer.in_features and base_layer.out_features.
        """
        super().__init__()
        raise NotImplementedError("LoRALinear.__init__")

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seq, in) -> y (batch, seq, out)."""
        raise NotImplementedError("LoRALinear.forward")

    def merged_weight(self) -> Tensor:
        """The matrix (out, in) with which a plain linear layer computes the same. It changes nothing in this layer."""
        raise NotImplementedError("LoRALinear.merged_weight")
