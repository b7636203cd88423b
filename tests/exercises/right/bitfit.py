"""A right answer to exercises/bitfit.py."""

import torch
import torch.nn as nn
from torch import Tensor


def trained_names(model: nn.Module, head: str) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if name.split(".")[-1] == "bias" or name.startswith(head + ".")]


def bitfit(model: nn.Module, head: str) -> None:
    model.requires_grad_(False)
    for name in trained_names(model, head):
        model.get_parameter(name).requires_grad_(True)


def bias_gradient(output_gradient: Tensor) -> Tensor:
    return output_gradient.sum(dim=(0, 1))


def to_save(model: nn.Module, head: str) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach().clone() for name in trained_names(model, head)}


def load(model: nn.Module, saved: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, values in saved.items():
            model.get_parameter(name).copy_(values)
