"""Bottleneck adapters: small two-layer networks beside or after the sub-layers of each block.

An adapter narrows the hidden state to a few dimensions, applies a nonlinearity, widens it again and adds the result:
what a task needs is learned in the bottleneck, while attention and feed-forward layers stay frozen.

    adapter(h) = up( act( down( h ) ) )        down (m, C), up (C, m), with biases; optionally a LayerNorm on h first

    houlsby     h <- h + s * adapter(h)        h: what attention, and what the feed-forward layer, would add
    pfeiffer    the same, after the feed-forward layer only
    parallel    h <- h + s * adapter(x)        x: what went into the feed-forward layer (He et al.: s = 4)

`up` starts at zero: step 0 is the base model, exactly.

Papers: Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly (2019), "Parameter-Efficient
Transfer Learning for NLP", arXiv 1902.00751. Pfeiffer, Kamath, Rueckle, Cho, Gurevych (2020), "AdapterFusion:
Non-Destructive Task Composition for Transfer Learning", 2005.00247. He, Zhou, Ma, Berg-Kirkpatrick, Neubig (2021),
"Towards a Unified View of Parameter-Efficient Transfer Learning", 2110.04366.
Trained: the adapters and the classification head.
Costs: 2 C m + C + m parameters an adapter (2 C more with a LayerNorm), two adapters a block for houlsby and one for the
others. GPT-2, houlsby, m = 48: 1,789,056. Not a change of weights: it cannot be merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan, base_of
from minipeft.methods.layers import AddedLayer, to_dtype_of
from minipeft.methods.targets import base_modules, chosen_blocks
from minipeft.settings import FINITE, POSITIVE, POSITIVE_INTEGER, PROBABILITY, setting

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "swish": nn.SiLU, "tanh": nn.Tanh, "none": nn.Identity}
PLACES = {"houlsby": ("attn", "mlp"), "pfeiffer": ("mlp",), "parallel": ("mlp",)}


@dataclass
class BottleneckConfig(MethodConfig):
    """Shape and place of the adapters. Their files are this library's own: peft has no such method.

    Raises:
        ConfigError: a value of the wrong type or out of range, when injected.
    """

    method: ClassVar[str] = "adapter"
    peft_type: ClassVar[str] = "MINIPEFT_BOTTLENECK"

    architecture: str = setting("houlsby", "where adapters stand", choices=tuple(PLACES))
    bottleneck_size: int | None = setting(
        None, "inner dimensions m; default n_embd / reduction_factor", POSITIVE_INTEGER)
    reduction_factor: float = setting(16, "n_embd / m, where m is not given", POSITIVE)
    non_linearity: str = setting("relu", "inner activation", choices=tuple(ACTIVATIONS))
    scaling: float = setting(1.0, "s, the factor on what the adapter adds", FINITE)
    layer_norm: bool = setting(False, "normalise the adapter's input")
    adapter_dropout: float = setting(0.0, "dropout on what the adapter adds", PROBABILITY)
    layers_to_transform: int | list[int] | None = setting(None, "numbers of the blocks to adapt; default all")


class BottleneckAdapter(AddedLayer):
    """One adapter, added to an attention or a feed-forward module."""

    def __init__(self, width: int, bottleneck_size: int, config: BottleneckConfig, like: Tensor) -> None:
        super().__init__()
        self.parallel = config.architecture == "parallel"
        self.scaling = config.scaling
        self.activation = ACTIVATIONS[config.non_linearity]()
        self.layer_norm = nn.LayerNorm(width, device=like.device) if config.layer_norm else nn.Identity()
        self.down = nn.Linear(width, bottleneck_size, device=like.device)
        self.up = nn.Linear(bottleneck_size, width, device=like.device)
        self.dropout = nn.Dropout(config.adapter_dropout)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    @property
    def trained(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named_parameters())

    def forward(self, h: Tensor) -> Tensor:
        h = self.layer_norm(to_dtype_of(self.down.weight, h))
        inner = self.activation(self.down(h))                                 # (B, T, C) -> (B, T, m)
        return self.scaling * self.dropout(self.up(inner))                    # (B, T, m) -> (B, T, C)

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return (output + self(args[0] if self.parallel else output)).to(output.dtype)


def plan(model: nn.Module, config: BottleneckConfig) -> Plan:
    """Add a bottleneck adapter to the chosen sub-layers of each chosen block.

    Raises:
        ConfigError: a block that the model does not have, or a reduction factor beyond its width.
    """
    base, size = base_of(model), config.bottleneck_size
    if size is None:
        if config.reduction_factor > base.config.n_embd:
            raise ConfigError(f"reduction_factor must lie between 0 and the model's width {base.config.n_embd}, got "
                              f"{config.reduction_factor}")
        size = round(base.config.n_embd / config.reduction_factor)
    prefix = "transformer." if base is not model else ""
    layers = {}
    for number in chosen_blocks(list(base_modules(model)), config.layers_to_transform):
        for place in PLACES[config.architecture]:
            layers[f"{prefix}h.{number}.{place}.adapter"] = BottleneckAdapter(base.config.n_embd, size, config,
                                                                              like=base.wte.weight)
    return Plan(layers)
