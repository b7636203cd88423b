"""LoRA: low-rank adaptation.

A frozen weight matrix W is given a trained low-rank companion: the update to W is the product of two thin matrices, so
that a task is learned in r (in + out) numbers instead of in * out. After training it can be folded into W.

    y = x W^T + bias + s * dropout(x) A^T B^T        s = lora_alpha / r        (rsLoRA: s = lora_alpha / sqrt(r))

                x (B, T, in)
                |         \\
         W (out, in)     A (r, in)         W is frozen
          frozen            |              A starts random, B at zero: step 0 is the base model, exactly
                |        B (out, r)
                |         /  * s
                +--------+
                |
                y (B, T, out)

Papers: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen (2021), "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv 2106.09685. Kalajdzievski (2023), "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2312.03732.
Trained: A and B of each target, the classification head, and biases if asked for.
Costs: r (in + out) parameters a target. GPT-2's c_attn maps 768 -> 2304: at r = 8, 24,576 of them beside 1,771,776.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn as nn
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.methods.fields import check_fields
from minipeft.methods.surgery import AdapterLayer, begin, find_targets, insert, pattern_value, record, to_dtype_of


@dataclass
class LoraConfig:
    """peft's LoraConfig, as far as it changes GPT-2's numbers.

    Raises:
        ConfigError: a value of the wrong type or out of range, when injected.
    """

    peft_type: ClassVar[str] = "LORA"

    r: int = field(default=8, metadata={"help": "rank of the update"})
    lora_alpha: float = field(default=8, metadata={"help": "scale of the update, divided by r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "module names, one regular expression, or all-linear; default c_attn"})
    exclude_modules: str | list[str] | None = field(default=None, metadata={"help": "modules to leave out"})
    layers_to_transform: int | list[int] | None = field(
        default=None, metadata={"help": "numbers of the blocks to adapt; default all"})
    layers_pattern: str | None = field(default=None, metadata={"help": "name before the block number, GPT-2: h"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "JSON: module name -> its own r"})
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "JSON: module name -> its own lora_alpha"})
    bias: str = field(default="none", metadata={"help": "biases to train too", "choices": ("none", "lora_only", "all")})
    use_rslora: bool = field(default=False, metadata={"help": "divide lora_alpha by sqrt(r) instead of r"})
    init_lora_weights: bool | str = field(
        default=True, metadata={"help": "true: A uniform, B zero; gaussian: A normal, B zero; false: both random",
                                "choices": (True, False, "gaussian")})


class LoRALinear(AdapterLayer):
    """A frozen linear layer with its low-rank companion."""

    trained = ("lora_A.weight", "lora_B.weight")

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool,
                 init_lora_weights: bool | str) -> None:
        super().__init__(base_layer)
        device = base_layer.weight.device
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False, device=device)      # weight (r, in)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False, device=device)     # weight (out, r)
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        # nn.Linear's own start is U(-1/sqrt(in), 1/sqrt(in)): what peft gives A, and B when nothing is to be zero.
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / r)
        if init_lora_weights is not False:
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)                                                # (B, T, out)
        if not self.enabled:
            return y
        x = self.lora_dropout(to_dtype_of(self.lora_A.weight, x))
        # Scaled while it is r wide: that is out / r times less work than scaling the result.
        update = self.lora_B(self.lora_A(x) * self.scaling)                   # (B, T, in) -> (B, T, r) -> (B, T, out)
        return (y + update).to(y.dtype)

    def merged_weight(self) -> Tensor:
        """W + s B A."""
        update = self.scaling * self.lora_B.weight @ self.lora_A.weight       # (out, r) (r, in) -> (out, in)
        return (self.base_layer.weight + update).to(self.base_layer.weight.dtype)


def inject(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Give every targeted linear layer a low-rank companion, in place.

    Raises:
        ConfigError: a bad value, or an r larger than a targeted matrix.
        InjectionError: nothing targeted, or a target that cannot be adapted.
    """
    check(config)
    plan = {}
    for name in find_targets(model, config, default=["c_attn"]):
        linear = model.get_submodule(name)
        r = pattern_value(config.rank_pattern, name, config.r)
        if r > min(linear.in_features, linear.out_features):
            raise ConfigError(f"r={r} is larger than {name}, a {linear.out_features} x {linear.in_features} matrix")
        plan[name] = (linear, r, pattern_value(config.alpha_pattern, name, config.lora_alpha))
    injection = begin(model, "lora", config)
    for name, (linear, r, lora_alpha) in plan.items():
        layer = LoRALinear(linear, r, lora_alpha, config.lora_dropout, config.use_rslora, config.init_lora_weights)
        insert(model, injection, name, layer)
    return record(model, injection, trained_base=_trained_biases(model, config.bias, injection.layers))


def _trained_biases(model: nn.Module, bias: str, layers: dict[str, LoRALinear]) -> list[str]:
    if bias == "lora_only":
        return [f"{name}.base_layer.bias" for name, layer in layers.items() if layer.base_layer.bias is not None]
    if bias == "all":
        return [f"{name}.bias" for name, module in model.named_modules()
                if isinstance(getattr(module, "bias", None), nn.Parameter)]
    return []


def check(config: LoraConfig) -> None:
    """Refuse values that make no LoRA, before anything is touched."""
    check_fields(config)
    for name, r in {"r": config.r, **config.rank_pattern}.items():
        if r < 1:
            raise ConfigError(f"the rank {name} must be a positive integer, got {r!r}")
    for name, alpha in {"lora_alpha": config.lora_alpha, **config.alpha_pattern}.items():
        if not math.isfinite(alpha):
            raise ConfigError(f"{name} must be a finite number, got {alpha!r}")
    if not 0 <= config.lora_dropout < 1:
        raise ConfigError(f"lora_dropout must be a probability in [0, 1), got {config.lora_dropout!r}")
