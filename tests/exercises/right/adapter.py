"""A right answer to exercises/adapter.py."""

import torch
import torch.nn as nn
from torch import Tensor


class BottleneckAdapter(nn.Module):
    def __init__(self, width: int, bottleneck: int, scaling: float = 1.0) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.scaling = scaling

    def forward(self, h: Tensor) -> Tensor:
        inner = torch.relu(self.down(h))
        return h + self.scaling * self.up(inner)


class AdaptedBlock(nn.Module):
    def __init__(self, block: nn.Module, width: int, bottleneck: int, scaling: float = 1.0) -> None:
        super().__init__()
        self.block = block.requires_grad_(False)
        self.first = BottleneckAdapter(width, bottleneck, scaling)
        self.second = BottleneckAdapter(width, bottleneck, scaling)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.block.attn(self.block.ln_1(x)))
        return x + self.second(self.block.mlp(self.block.ln_2(x)))
