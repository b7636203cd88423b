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
Meng, Wang, Zhang (2024), "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
2404.02948. Hayou, Ghosh, Yu (2024), "LoRA+: Efficient Low Rank Adaptation of Large Models", 2402.12354.
Trained: A and B of each target, the classification head, and biases if asked for.
Costs: r (in + out) parameters a target. GPT-2's c_attn maps 768 -> 2304: at r = 8, 24,576 of them beside 1,771,776.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.methods.config import SavedConfig, check_fields
from minipeft.methods.injection import (
    AdapterLayer,
    ReplacementLayer,
    begin,
    bias_names,
    find_targets,
    insert,
    pattern_value,
    record,
    saved_targets,
    to_dtype_of,
)


@dataclass
class LoraConfig(SavedConfig):
    """peft's LoraConfig, as far as it changes GPT-2's numbers. `use_dora=True` makes it DoRA (see dora.py).

    Raises:
        ConfigError: a value of the wrong type or out of range, when injected.
    """

    peft_type: ClassVar[str] = "LORA"
    harmless: ClassVar[tuple[str, ...]] = ("megatron_core", "qalora_group_size", "loftq_config", "eva_config",
                                           "use_qalora")

    r: int = field(default=8, metadata={"help": "rank of the update"})
    lora_alpha: float = field(default=8, metadata={"help": "scale of the update, divided by r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "module names, one regular expression, or all-linear; default c_attn"})
    exclude_modules: str | list[str] | None = field(default=None, metadata={"help": "modules to leave out"})
    layers_to_transform: int | list[int] | None = field(
        default=None, metadata={"help": "numbers of the blocks to adapt; default all"})
    layers_pattern: str | list[str] | None = field(
        default=None, metadata={"help": "name before the block number, GPT-2: h"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "JSON: module name -> its own r"})
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "JSON: module name -> its own lora_alpha"})
    bias: str = field(default="none", metadata={"help": "biases to train too", "choices": ("none", "lora_only", "all")})
    use_rslora: bool = field(default=False, metadata={"help": "divide lora_alpha by sqrt(r) instead of r"})
    use_dora: bool = field(default=False, metadata={"help": "train each row's magnitude apart from its direction"})
    init_lora_weights: bool | str = field(
        default=True, metadata={"help": "true: A uniform, B zero; gaussian: A normal, B zero; pissa: the matrix's own "
                                        "largest singular values; false: both random",
                                "choices": (True, False, "gaussian", "pissa")})

    def to_saved(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> dict[str, Any]:
        """What adapter_config.json says beyond, or other than, the fields above."""
        # One exact key a module: JSON readers may reorder keys, and then another of two matching ones would count.
        patterns = {pattern: {name: value for name in layers
                              if (value := pattern_value(getattr(self, pattern), name, default)) != default}
                    for pattern, default in (("rank_pattern", self.r), ("alpha_pattern", self.lora_alpha))}
        return {**patterns, "target_modules": saved_targets(self.target_modules, layers), "fan_in_fan_out": True,
                "lora_bias": False}

    @classmethod
    def from_saved(cls, values: dict[str, Any], model: nn.Module) -> LoraConfig:
        """A configuration from adapter_config.json's values."""
        if values.get("init_lora_weights") in ("eva", "orthogonal", "mica"):
            values["init_lora_weights"] = True  # these say how training began, and nothing about what was saved
        return cls(**values)


class LoRALinear(ReplacementLayer):
    """A frozen linear layer with its low-rank companion."""

    trained = ("lora_A.weight", "lora_B.weight")
    raised_rate = ("lora_B.weight",)

    def __init__(self, base_layer: nn.Linear, r: int, lora_alpha: float, config: LoraConfig) -> None:
        super().__init__(base_layer)
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        self.scaling = scaling(r, lora_alpha, config.use_rslora)
        self.lora_A, self.lora_B = low_rank_pair(base_layer, r, self.scaling, config.init_lora_weights)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)                                                # (B, T, out)
        x = self.lora_dropout(to_dtype_of(self.lora_A.weight, x))
        # Scaled while it is r wide: that is out / r times less work than scaling the result.
        update = self.lora_B(self.lora_A(x) * self.scaling)                   # (B, T, in) -> (B, T, r) -> (B, T, out)
        return y.add_(update)  # in place: nothing else needs y, and no third tensor of its size comes to be

    def merged(self) -> dict[str, Tensor]:
        """W + s B A."""
        update = self.scaling * self.lora_B.weight @ self.lora_A.weight       # (out, r) (r, in) -> (out, in)
        return {"weight": (self.base_layer.weight + update).to(self.base_layer.weight.dtype)}


def scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """s, the factor on the update."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def low_rank_pair(base_layer: nn.Linear, r: int, scaling: float, init: bool | str) -> tuple[nn.Linear, nn.Linear]:
    """A (r, in) and B (out, r) as they start. "pissa" takes its share out of the base layer's weight, too."""
    device = base_layer.weight.device
    lora_A = nn.Linear(base_layer.in_features, r, bias=False, device=device)
    lora_B = nn.Linear(r, base_layer.out_features, bias=False, device=device)
    # nn.Linear's own start is U(-1/sqrt(in), 1/sqrt(in)): what peft gives A, and B when nothing is to be zero.
    if init == "gaussian":
        nn.init.normal_(lora_A.weight, std=1 / r)
    if init == "pissa":
        principal_singular_values_(base_layer, lora_A, lora_B, scaling)
    elif init is not False:
        nn.init.zeros_(lora_B.weight)
    return lora_A, lora_B


@torch.no_grad()
def principal_singular_values_(base_layer: nn.Linear, lora_A: nn.Linear, lora_B: nn.Linear, scaling: float) -> None:
    """PiSSA: A and B take over W's r largest singular values, and W keeps the rest.

        W = U S V^T        A = sqrt(S_r / s) V_r^T        B = U_r sqrt(S_r / s)        W <- W - s B A
    """
    weight, r = base_layer.weight, lora_A.out_features
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)          # (out, k), (k,), (k, in)
    root = (S[:r] / scaling).sqrt()                                           # (r,)
    lora_A.weight.copy_(root[:, None] * Vh[:r])
    lora_B.weight.copy_(U[:, :r] * root)
    weight.data = (weight.float() - scaling * lora_B.weight @ lora_A.weight).to(weight.dtype)


def inject(model: nn.Module, config: LoraConfig, name: str = "default", method: str = "lora",
           layer_class: type[ReplacementLayer] = LoRALinear) -> nn.Module:
    """Give every targeted linear layer a low-rank companion, in place.

    Args:
        name: of the adapter, for `set_adapter`.
        method: its name in METHODS.
        layer_class: what to put around a linear layer: DoRA's differs.

    Raises:
        ConfigError: a bad value, or an r larger than a targeted matrix.
        InjectionError: nothing targeted, or a target that cannot be adapted.
    """
    check(config)
    plan = {}
    for target in find_targets(model, config, default=["c_attn"]):
        linear = model.get_submodule(target)
        r = pattern_value(config.rank_pattern, target, config.r)
        if r > min(linear.in_features, linear.out_features):
            raise ConfigError(f"r={r} is larger than {target}, a {linear.out_features} x {linear.in_features} matrix")
        plan[target] = (linear, r, pattern_value(config.alpha_pattern, target, config.lora_alpha))
    biases = {"none": [], "lora_only": bias_names(model, among=plan), "all": bias_names(model)}[config.bias]
    injection, before_pissa = begin(model, method, config, name), {}
    for target, (linear, r, lora_alpha) in plan.items():
        if config.init_lora_weights == "pissa":
            before_pissa[f"{target}.weight"] = linear.weight.data
        insert(model, injection, target, layer_class(linear, r, lora_alpha, config))
    return record(model, injection, trained_base=biases, replaced_values=before_pissa)


def check(config: LoraConfig) -> None:
    """Refuse values that make no LoRA, before anything is touched."""
    check_fields(config)
    for name, r in {"r": config.r, **config.rank_pattern}.items():
        if r < 1:
            raise ConfigError(f"the rank {name} must be a positive integer, got {r!r}")
    for name, alpha in {"lora_alpha": config.lora_alpha, **config.alpha_pattern}.items():
        if not math.isfinite(alpha):
            raise ConfigError(f"{name} must be a finite number, got {alpha!r}")
        if alpha <= 0 and config.init_lora_weights == "pissa":
            raise ConfigError(f"PiSSA divides by the scale: {name} must be positive, got {alpha!r}")
    if not 0 <= config.lora_dropout < 1:
        raise ConfigError(f"lora_dropout must be a probability in [0, 1), got {config.lora_dropout!r}")
