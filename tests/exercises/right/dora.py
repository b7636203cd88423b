"""A right answer to exercises/dora.py."""

import torch
import torch.nn as nn
from torch import Tensor


class DoRALinear(nn.Module):
    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.base_layer.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, base_layer.in_features) / r)
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r))
        self.scaling = lora_alpha / r
        self.magnitude = nn.Parameter(base_layer.weight.norm(dim=1))

    def stretch(self) -> Tensor:
        adapted = self.base_layer.weight + self.scaling * self.lora_B @ self.lora_A
        return self.magnitude / adapted.norm(dim=1).detach()

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.base_layer.weight.T
        update = self.scaling * (x @ self.lora_A.T @ self.lora_B.T)
        return self.stretch() * (product + update) + self.base_layer.bias

    def merged_weight(self) -> Tensor:
        adapted = self.base_layer.weight + self.scaling * self.lora_B @ self.lora_A
        return self.stretch()[:, None] * adapted
