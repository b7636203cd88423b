"""Dropout whose random numbers are cheap on a CPU: one draw of 64 bits decides over four elements.

    y = x * kept / (1 - p)          kept is 1 with probability 1 - p, else 0          dx = dy * kept / (1 - p)

torch draws a number per element, which takes longer than the matrix products around it. Here each element has 16 bits
of its own, drawn by torch's generator, and is dropped if they are among the 65,536 p smallest numbers. So p is rounded
to a multiple of 1 / 65,536. Kept elements are scaled by the rounded one: the mean is exact. `kept` takes one byte per
element, and torch's own four.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minipeft.model.linear import carried_out_here

LEVELS = 2**16


class Dropout(nn.Dropout):
    """torch's dropout layer: in training, elements become 0 with probability p and the others grow by 1 / (1 - p)."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p if self.training else 0.0)


def dropout(x: Tensor, p: float) -> Tensor:
    """x with its elements set to 0 with probability p, the others multiplied by 1 / (1 - p); same shape and dtype."""
    if p in (0.0, 1.0) or not carried_out_here(x) or not x.is_floating_point():
        return F.dropout(x, p)
    kept = draw_kept(x.shape, p)
    return _Dropped.apply(x, kept, scale(p))


def scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), p being rounded as `draw_kept` does."""
    return LEVELS / (LEVELS - _dropped_levels(p)) if p else 1.0


def draw_kept(shape: tuple[int, ...], p: float) -> Tensor:
    """Which elements are kept: int8, 0 with probability p, else 1."""
    size = torch.Size(shape).numel()
    draws = torch.empty(-(-size // 4), dtype=torch.int64).random_(-2**63, None)       # 64 random bits each
    levels = draws.view(torch.int16)[:size].view(shape)                               # from -32,768 to 32,767
    first_kept = _dropped_levels(p) - LEVELS // 2
    # A comparison would do; clamping to two neighbours and subtracting the lower one is five times as fast.
    return levels.clamp_(first_kept - 1, first_kept).sub_(first_kept - 1).to(torch.int8)


def _dropped_levels(p: float) -> int:
    """How many of the 65,536 levels mean that an element is dropped: at least one, and not all."""
    return min(max(round(p * LEVELS), 1), LEVELS - 1)


class _Dropped(torch.autograd.Function):
    """x * kept * factor, remembering `kept` in its bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.factor = factor
        return (x * kept.to(x.dtype)).mul_(factor)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        kept, = ctx.saved_tensors
        return dy * kept.to(dy.dtype) * ctx.factor, None, None
