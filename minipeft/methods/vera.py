"""VeRA: vector-based random matrix adaptation.

LoRA with its two matrices drawn at random once, frozen and shared by all targets: what is trained are two vectors a
target, one between the matrices and one after them. The matrices follow from a seed and need not be stored.

    y = x W^T + bias + b * ((d * (dropout(x) A^T)) B^T)        A (r, max in), B (max out, r): shared, frozen, random

d (r,) starts at d_initial, b (out,) at zero: step 0 is the base model, exactly. A target smaller than the largest one
uses the first of the matrices' columns and rows.

Paper: Kopiczko, Blankevoort, Asano (2023), "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454.
Trained: d and b of each target, and the classification head.
Costs: r + out parameters a target: GPT-2's twelve c_attn at r = 256, 30,720. Its products cost as LoRA's at that r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan
from minipeft.methods.layers import AdapterLayer, ReplacementLayer, to_dtype_of
from minipeft.methods.targets import bias_names, find_targets, saved_targets
from minipeft.settings import FINITE, POSITIVE_INTEGER, PROBABILITY, SEED, setting


@dataclass
class VeraConfig(MethodConfig):
    """peft's VeraConfig, as far as it changes GPT-2's numbers.

    Raises:
        ConfigError: a value of the wrong type or out of range, when injected.
    """

    method: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"
    harmless: ClassVar[tuple[str, ...]] = ("init_weights",)

    r: int = setting(256, "rank of the shared matrices", POSITIVE_INTEGER)
    vera_dropout: float = setting(0.0, "dropout on the adapter's input", PROBABILITY)
    target_modules: str | list[str] | None = setting(
        None, "module names, one regular expression, or all-linear; default c_attn")
    layers_to_transform: int | list[int] | None = setting(None, "numbers of the blocks to adapt; default all")
    layers_pattern: str | list[str] | None = setting(None, "name before the block number, GPT-2: h")
    projection_prng_key: int = setting(0, "seed of the shared matrices", SEED)
    save_projection: bool = setting(True, "store the shared matrices in the adapter file too")
    d_initial: float = setting(0.1, "where d starts", FINITE)
    bias: str = setting("none", "biases to train too", choices=("none", "vera_only", "all"))

    def to_saved(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> dict[str, Any]:
        """What adapter_config.json says beyond, or other than, the fields above."""
        return {"target_modules": saved_targets(self.target_modules, layers), "fan_in_fan_out": True,
                "init_weights": True}


class Projections(nn.Module):
    """The pair of frozen random matrices that all targets share: U(-sqrt(6 / fan in), sqrt(6 / fan in))."""

    def __init__(self, r: int, in_features: int, out_features: int, seed: int, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(6 / in_features), math.sqrt(6 / r)
        vera_A = torch.empty(r, in_features).uniform_(-bound[0], bound[0], generator=generator)
        vera_B = torch.empty(out_features, r).uniform_(-bound[1], bound[1], generator=generator)
        self.register_buffer("vera_A", vera_A.to(device), persistent=False)
        self.register_buffer("vera_B", vera_B.to(device), persistent=False)


class VeRALinear(ReplacementLayer):
    """A frozen linear layer with two trained vectors around the shared random matrices."""

    trained = ("vera_lambda_d", "vera_lambda_b")

    def __init__(self, base_layer: nn.Linear, projections: Projections, config: VeraConfig) -> None:
        super().__init__(base_layer)
        device, self.save_projection = base_layer.weight.device, config.save_projection
        self.projections = projections
        self.vera_dropout = nn.Dropout(config.vera_dropout)
        self.vera_lambda_d = nn.Parameter(torch.full((config.r,), float(config.d_initial), device=device))
        self.vera_lambda_b = nn.Parameter(torch.zeros(base_layer.out_features, device=device))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """This target's part of A, (r, in), and of B, (out, r)."""
        base = self.base_layer
        return self.projections.vera_A[:, :base.in_features], self.projections.vera_B[:base.out_features]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)                                                # (B, T, out)
        A, B = self.matrices()
        x = self.vera_dropout(to_dtype_of(self.vera_lambda_d, x))
        inner = self.vera_lambda_d * nn.functional.linear(x, A)               # (B, T, r)
        update = self.vera_lambda_b * nn.functional.linear(inner, B)          # (B, T, out)
        return (y + update).to(y.dtype)

    def merged(self) -> dict[str, Tensor]:
        """W + diag(b) B diag(d) A."""
        A, B = self.matrices()
        update = (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)       # (out, in)
        return {"weight": (self.base_layer.weight + update).to(self.base_layer.weight.dtype)}

    def stored(self, name: str) -> dict[str, Tensor]:
        shared = {f"base_model.{key}": buffer for key, buffer in self.projections.named_buffers()}
        return super().stored(name) | (shared if self.save_projection else {})


def plan(model: nn.Module, config: VeraConfig) -> Plan:
    """Put two trained vectors and the shared matrices beside every targeted linear layer.

    Raises:
        ConfigError: a block that the model does not have.
        InjectionError: nothing targeted, or a target that cannot be adapted.
    """
    targets = {target: model.get_submodule(target) for target in find_targets(model, config, default=["c_attn"])}
    projections = Projections(config.r, max(linear.in_features for linear in targets.values()),
                              max(linear.out_features for linear in targets.values()), config.projection_prng_key,
                              next(iter(targets.values())).weight.device)
    layers = {target: VeRALinear(linear, projections, config) for target, linear in targets.items()}
    biases = [] if config.bias == "none" else bias_names(model, among=None if config.bias == "all" else layers)
    return Plan(layers, biases)
