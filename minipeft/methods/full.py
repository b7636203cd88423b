"""Full fine-tuning: every weight is trained. What parameter-efficient methods are compared with.

    theta = theta_0 - learning rate * gradient, for all of theta

Trained: everything. Costs: a gradient and two AdamW moments for each parameter, three times the model's own memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn as nn

from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan


@dataclass
class FullConfig(MethodConfig):
    """Full fine-tuning has nothing to choose."""

    method: ClassVar[str] = "full"
    saves_adapter: ClassVar[bool] = False


def plan(model: nn.Module, config: FullConfig) -> Plan:
    """Train every parameter; no layer is replaced, and no copy of the base is kept."""
    return Plan(trained=[name for name, _ in model.named_parameters()], keeps_base=False)
