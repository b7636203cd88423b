"""(IA)^3: infused adapter by inhibiting and amplifying inner activations.

A learned vector rescales the keys, the values and the feed-forward layer's inner activations, element by element. It
is the smallest of the methods that touch every block, and folds into the weights without a trace.

    c_attn (keys, values; as in peft also queries)    y = l * (x W^T + bias)       l (out, 1)
    mlp.c_proj (a feed-forward module)                y = (l * x) W^T + bias       l (1, in)

l starts at one: step 0 is the base model, exactly.

Paper: Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel (2022), "Few-Shot Parameter-Efficient Fine-Tuning is Better and
Cheaper than In-Context Learning", arXiv 2205.05638.
Trained: one vector a target, and the classification head.
Costs: out parameters for an ordinary target, in for a feed-forward one: by default L (3 C + 4 C). For GPT-2: 64,512.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan
from minipeft.methods.layers import AdapterLayer, ReplacementLayer
from minipeft.methods.targets import compiled, find_targets
from minipeft.settings import setting


@dataclass
class IA3Config(MethodConfig):
    """peft's IA3Config.

    Raises:
        ConfigError: a value of the wrong type, or feed-forward modules that are no targets, when injected.
    """

    method: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"

    target_modules: str | list[str] | None = setting(
        None, "module names, one regular expression, or all-linear; default c_attn and mlp.c_proj")
    exclude_modules: str | list[str] | None = setting(None, "modules to leave out")
    feedforward_modules: str | list[str] | None = setting(
        None, "targets whose input is rescaled, not their output; default mlp.c_proj")
    init_ia3_weights: bool = setting(True, "start at one; false: at random")

    def check(self) -> None:
        """Also refuse feed-forward modules that are no targets."""
        super().check()
        targets, feedforward = self.target_modules, self.feedforward_modules
        if all(isinstance(names, (list, tuple)) for names in (targets, feedforward)) \
                and not set(feedforward) <= set(targets):
            raise ConfigError(f"feedforward_modules {feedforward} must be among the target_modules {targets}")

    def to_saved(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> dict[str, Any]:
        """What adapter_config.json says other than the fields above: peft wants each feed-forward entry among the
        targets, literally."""
        return {"target_modules": list(layers), "fan_in_fan_out": True,
                "feedforward_modules": [name for name, layer in layers.items() if layer.feedforward]}


class IA3Linear(ReplacementLayer):
    """A frozen linear layer whose output, or whose input if it is a feed-forward one, is rescaled."""

    trained = ("ia3_l",)

    def __init__(self, base_layer: nn.Linear, feedforward: bool, init_ia3_weights: bool) -> None:
        super().__init__(base_layer)
        self.feedforward = feedforward
        shape = (1, base_layer.in_features) if feedforward else (base_layer.out_features, 1)
        start = torch.ones if init_ia3_weights else torch.randn
        self.ia3_l = nn.Parameter(start(shape, device=base_layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.ia3_l.flatten()                                          # (in,) or (out,)
        if self.feedforward:
            return self.base_layer((x * scale).to(x.dtype))                   # (B, T, in) -> (B, T, out)
        y = self.base_layer(x)                                                # (B, T, out)
        return (y * scale).to(y.dtype)

    def merged(self) -> dict[str, Tensor]:
        """W with its rows (and the bias), or its columns, rescaled."""
        base, scale = self.base_layer, self.ia3_l                             # l broadcasts along (out, in) as stored
        tensors = {"weight": (base.weight * scale).to(base.weight.dtype)}
        if not self.feedforward and base.bias is not None:
            tensors["bias"] = (base.bias * scale.flatten()).to(base.bias.dtype)
        return tensors


def plan(model: nn.Module, config: IA3Config) -> Plan:
    """Rescale the activations of every targeted linear layer.

    Raises:
        InjectionError: nothing targeted, or a target that cannot be adapted.
    """
    feedforward = ["mlp.c_proj"] if config.feedforward_modules is None else config.feedforward_modules
    targets = find_targets(model, config, default=["c_attn", "mlp.c_proj"])
    return Plan({target: IA3Linear(model.get_submodule(target), _is_feedforward(target, feedforward),
                                   config.init_ia3_weights) for target in targets})


def _is_feedforward(name: str, feedforward: str | list[str]) -> bool:
    if isinstance(feedforward, str):
        return compiled(feedforward, "feedforward_modules").fullmatch(name) is not None
    return any(name.endswith(entry) for entry in feedforward)
