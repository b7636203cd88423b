"""The optimiser and the learning-rate schedule, shared by fine-tuning and pretraining.

AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with decay on matrices only; the rate rises linearly, then falls
along half a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn as nn


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, final: float = 0.0) -> float:
    """The factor on the peak learning rate at `step` (counted from 0): linear up, then a cosine down to `final`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def adamw(parameters: Iterable[tuple[str, nn.Parameter]], model: nn.Module, learning_rate: float,
          weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW over the given named parameters, without decay on biases, LayerNorms and embeddings.

    What may decay is decided by the module that owns a parameter, never by a parameter's name: the weight matrices of
    linear layers, and a method's own matrices.
    """
    undecayed = {id(parameter) for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.Embedding))
                 for parameter in module.parameters(recurse=False)}
    decayed_group, undecayed_group = [], []
    for _, parameter in parameters:
        matrix = parameter.ndim > 1 and id(parameter) not in undecayed
        (decayed_group if matrix else undecayed_group).append(parameter)
    groups = [{"params": decayed_group, "weight_decay": weight_decay},
              {"params": undecayed_group, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    fused = all(parameter.device.type in ("cuda", "cpu") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
