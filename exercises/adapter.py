"""Exercise: bottleneck adapters. A small two-layer network behind each sub-layer of a frozen block.

    adapter(h) = h + s * (relu(h W_down^T + b_down) W_up^T + b_up)

    x   = x + first(attn(ln_1(x)))          one adapter behind attention, and another
    out = x + second(mlp(ln_2(x)))          behind the feed-forward layer, each before the block's own addition

    h, x (batch, seq, C)      W_down (m, C), b_down (m,), W_up (C, m), b_up (C,) trained, with m smaller than C

At the start W_down is random, W_up and b_up are zero. So an adapter gives back what it gets, and step 0 is the base.

Fill in the four holes. Then:  python -m minipeft.check adapter FILE
To read: docs/exercises.md, and afterwards minipeft/methods/adapter.py, where this is called houlsby.
"""

import torch.nn as nn
from torch import Tensor


class BottleneckAdapter(nn.Module):
    """Narrow, relu, widen, and add."""

    def __init__(self, width: int, bottleneck: int, scaling: float = 1.0) -> None:
        """Make the two layers.

        Args:
            width: C.
            bottleneck: m.
            scaling: s.

        To be set:
            self.down     nn.Linear from width to bottleneck, random
            self.up       nn.Linear from bottleneck to width, weight and bias zero
            and what forward needs besides
        """
        super().__init__()
        raise NotImplementedError("BottleneckAdapter.__init__")

    def forward(self, h: Tensor) -> Tensor:
        """h (batch, seq, C) -> (batch, seq, C)."""
        raise NotImplementedError("BottleneckAdapter.forward")


class AdaptedBlock(nn.Module):
    """A frozen Transformer block with two adapters."""

    def __init__(self, block: nn.Module, width: int, bottleneck: int, scaling: float = 1.0) -> None:
        """Keep and freeze the block, and make two adapters.

        Args:
            block: it has ln_1, attn, ln_2 and mlp, each of which is called with one tensor (batch, seq, C).

        To be set:
            self.block     the given block itself, frozen
            self.first     BottleneckAdapter, behind attn
            self.second    BottleneckAdapter, behind mlp
        """
        super().__init__()
        raise NotImplementedError("AdaptedBlock.__init__")

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, seq, C) -> (batch, seq, C)."""
        raise NotImplementedError("AdaptedBlock.forward")
