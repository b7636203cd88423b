"""Full fine-tuning: every weight is trained. What parameter-efficient methods are compared with.

    theta = theta_0 - learning rate * gradient, for all of theta

Trained: everything. Costs: a gradient and two AdamW moments for each parameter, three times the model's own memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn as nn

from minipeft.methods.injection import begin, record


@dataclass
class FullConfig:
    """Full fine-tuning has nothing to choose."""


def inject(model: nn.Module, config: FullConfig, name: str = "default") -> nn.Module:
    """Declare every parameter as trained; no layer is replaced, and no copy of the base is kept."""
    injection = begin(model, "full", config, name)
    return record(model, injection, trained_base=[name for name, _ in model.named_parameters()], keep_values=False)
