"""DoRA: weight-decomposed low-rank adaptation.

LoRA, with the length of each row of the weight matrix trained apart from its direction: the low-rank update turns the
rows, and a magnitude vector says how long each of them is. Full fine-tuning changes the two independently of each
other; LoRA alone tends to change them together.

    W' = m * (W + s B A) / ||W + s B A||         norms over each row;  y = x W'^T + bias

                x (batch, seq, in)
                |         \\
         W (out, in)     A (r, in), B (out, r)       W is frozen, A and B are LoRA's
                |         /  * s
                +--------+
                | * c,  c = m / ||W + s B A||        m (out,) starts as ||W||: step 0 is the base model
                y (batch, seq, out)                  the norm is detached: no gradient flows through it

Paper: Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen (2024), "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv
2402.09353 (section 4.3 for the detached norm).
Trained: A, B and m of each target, and the classification head.
Costs: r (in + out) + out parameters a target, and one (out, in) product B A in every forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.methods import lora
from minipeft.methods.injection import Plan
from minipeft.methods.layers import ReplacementLayer, to_dtype_of
from minipeft.methods.lora import LoraConfig, low_rank_pair
from minipeft.settings import setting


@dataclass
class DoraConfig(LoraConfig):
    """LoRA's settings, which are all DoRA has; peft writes it as LoraConfig(use_dora=True), which means the same here.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    use_dora: bool = setting(True, init=False)


class DoRALinear(ReplacementLayer):
    """A frozen linear layer whose rows are turned by a low-rank update and stretched by a magnitude vector."""

    trained = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    raised_rate = ("lora_B.weight", "lora_magnitude_vector")

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float, config: LoraConfig) -> None:
        super().__init__(base_layer)
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        self.scaling = config.scaling(r, lora_alpha)
        self.lora_A, self.lora_B = low_rank_pair(base_layer, r, config.init_lora_weights)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())           # (out,)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """||W + s B A|| over each row, (out,), outside the gradient."""
        update = self.scaling * self.lora_B.weight @ self.lora_A.weight       # (out, r) (r, in) -> (out, in)
        return (self.base_layer.weight.to(update.dtype) + update).norm(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)                                                # (batch, seq, out)
        stretch = self.lora_magnitude_vector / self.row_norms()               # (out,)
        dropped = self.lora_dropout(to_dtype_of(self.lora_A.weight, x))
        update = self.lora_B(self.lora_A(dropped) * self.scaling)             # -> (batch, seq, r) -> (batch, seq, out)
        if self.training and self.lora_dropout.p > 0:
            product = nn.functional.linear(dropped, self.base_layer.weight.to(dropped.dtype))     # (batch, seq, out)
        else:
            product = y if self.base_layer.bias is None else y - self.base_layer.bias
        return (y + (stretch - 1) * product + stretch * update).to(y.dtype)

    def merged(self) -> dict[str, Tensor]:
        """m (W + s B A) / ||W + s B A||."""
        update = self.scaling * self.lora_B.weight @ self.lora_A.weight       # (out, in)
        stretch = (self.lora_magnitude_vector / self.row_norms())[:, None]    # (out, 1)
        return {"weight": (stretch * (self.base_layer.weight + update)).to(self.base_layer.weight.dtype)}


def plan(model: nn.Module, config: LoraConfig) -> Plan:
    """Give every targeted linear layer a low-rank companion and a magnitude vector; raises as `lora.plan`."""
    return lora.plan(model, config, DoRALinear)
