"""The optimizer, and the learning rate's way through a fine-tuning.

AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) with decay on matrices only; the rate rises linearly, then falls
along half a cosine to zero (Loshchilov and Hutter 2016, arXiv 1608.03983, without restarts).

LoRA+ (Hayou et al. 2024, arXiv 2402.12354) multiplies the learning rate of LoRA's B, which starts at zero, and leaves
that of A, which starts at random. With one rate for both, B moves too slowly in a wide model; the paper advises a
factor of about 16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from inspect import unwrap

import torch
import torch.nn as nn


class AdamW(torch.optim.AdamW):
    """torch's AdamW without its compiler.

    Three of its methods import all of torch's compiler, only to tell it not to look at them. That takes memory, and
    most of a second. These are the same methods without it.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def warmup_cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    """The factor on the peak learning rate at `step` (counted from 0): linear up, then half a cosine down to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def adamw(parameters: Iterable[nn.Parameter], model: nn.Module, learning_rate: float, weight_decay: float = 0.0,
          betas: tuple[float, float] = (0.9, 0.999), loraplus_lr_ratio: float = 1.0) -> AdamW:
    """AdamW over the given parameters of a model, decaying the weight matrices of linear layers and nothing else.

    Biases, LayerNorms, embeddings, prompts and scaling vectors do not decay. Which is which is decided by the module
    that owns a parameter, never by a parameter's name.

    Args:
        loraplus_lr_ratio: LoRA+'s factor on the learning rate of what a layer lists in `raised_rate`: LoRA's B, and
            DoRA's magnitudes. A group keeps its factor as "rate_factor".
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - embeddings
    raised = {id(module.get_parameter(name)) for module in model.modules() for name in
              getattr(module, "raised_rate", ())} if loraplus_lr_ratio != 1 else set()
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        key = (weight_decay if id(parameter) in matrices else 0.0, loraplus_lr_ratio if id(parameter) in raised else 1)
        members.setdefault(key, []).append(parameter)
    groups = [{"params": members[key], "weight_decay": key[0], "rate_factor": key[1], "lr": learning_rate * key[1]}
              for key in sorted(members, reverse=True)]
    fused = all(parameter.device.type in ("cuda", "cpu") for group in groups for parameter in group["params"])
    return AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
