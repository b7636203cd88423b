"""A right answer to exercises/lora.py."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class LoRALinear(nn.Module):
    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.base_layer.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, base_layer.in_features) / r)
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r))
        self.scaling = lora_alpha / r
        self.dropout = nn.Dropout(lora_dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        inner = F.linear(self.dropout(x), self.lora_A)
        return y + self.scaling * F.linear(inner, self.lora_B)

    def merged_weight(self) -> Tensor:
        return self.base_layer.weight + self.scaling * self.lora_B @ self.lora_A
