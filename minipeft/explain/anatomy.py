"""What a method does to a model, for the eye: the module tree with what is trained, and counts for every method.

All of it is read off a model that really was injected. Shapes are enough: on the meta device no weight exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
import torch.nn as nn

from minipeft.methods import METHODS, inject
from minipeft.methods.injection import ParameterCount, trainable_parameters
from minipeft.model.config import GPT2Config
from minipeft.model.gpt2 import GPT2ForSequenceClassification
from minipeft.runs.defaults import DEFAULTS
from minipeft.runs.results import markdown_table

GREY, ORANGE, PLAIN = "\033[90m", "\033[1;33m", "\033[0m"


@dataclass
class Line:
    """One line of a module tree.

    Attributes:
        text: indented name and class, or parameter name and shape.
        count: parameters in it.
        trained: how many of them are trained.
    """

    text: str
    count: int
    trained: int


def shapes_only(config: GPT2Config) -> GPT2ForSequenceClassification:
    """A classifier without weights, on the meta device."""
    with torch.device("meta"):
        return GPT2ForSequenceClassification(config)


def injected(config: GPT2Config, method: str, **values: Any) -> GPT2ForSequenceClassification:
    """A classifier without weights that carries `method`, by default as the table of defaults has it.

    Raises:
        ConfigError: a field the method does not know, or a bad value.
    """
    model = shapes_only(config)
    chosen = {**DEFAULTS[method]["method"], **values}
    if chosen.get("prompt_tuning_init") == "TEXT":  # reading words needs weights; the shapes do not depend on them
        chosen["prompt_tuning_init"] = "RANDOM"
    return inject(model, METHODS[method].config(**chosen))


def tree(model: nn.Module) -> list[Line]:
    """The module tree, one line for each module and parameter; blocks that look like the one before are folded."""
    lines: list[Line] = []

    def visit(name: str, module: nn.Module, depth: int) -> None:
        lines.append(_module_line(name, module, depth))
        for key, parameter in module.named_parameters(recurse=False):
            lines.append(Line(f"{'  ' * (depth + 1)}{key} {tuple(parameter.shape)}", parameter.numel(),
                              parameter.numel() if parameter.requires_grad else 0))
        children = list(module.named_children())
        position = 0
        while position < len(children):
            key, child = children[position]
            following = children[position + 1:] if isinstance(module, nn.ModuleList) else []
            alike = list(takewhile(lambda other: _outline(other[1]) == _outline(child), following))
            visit(key, child, depth + 1)
            if alike:
                total = ParameterCount(*map(sum, zip(*(trainable_parameters(other) for _, other in alike))))
                first, last = alike[0][0], alike[-1][0]
                label = f"{first} to {last}: as {key}" if first != last else f"{first}: as {key}"
                lines.append(Line(f"{'  ' * (depth + 1)}{label}", total.total, total.trainable))
            position += 1 + len(alike)

    visit("model", model, 0)
    return lines


def render(lines: list[Line], colour: bool) -> str:
    """The tree as text: trained parts in colour and with a star, frozen ones in grey, each with its parameters."""
    whole, width = lines[0].count, max(len(line.text) for line in lines) + 2
    rendered = []
    for line in lines:
        counts = f"{line.count:>14,}"
        if line.trained:
            counts += f"   * {line.trained:,} trained ({100 * line.trained / whole:.3f} % of the model)"
        text = f"{line.text:<{width}}{counts}" if line.count else line.text
        rendered.append(f"{ORANGE if line.trained else GREY}{text}{PLAIN}" if colour else text)
    return "\n".join(rendered)


def counts_table(configs: dict[str, GPT2Config]) -> str:
    """A Markdown table: the parameters each method trains, in the table's default configuration, for each size."""
    rows = []
    for method in METHODS:
        counts = [trainable_parameters(injected(config, method)) for config in configs.values()]
        rows.append([method, *(f"{count.trainable:,} ({100 * count.trainable / count.total:.3f} %)"
                               for count in counts)])
    return markdown_table(["method", *configs], rows, figures=True)


def _module_line(name: str, module: nn.Module, depth: int) -> Line:
    count = trainable_parameters(module)
    return Line(f"{'  ' * depth}({name}) {type(module).__name__}", count.total, count.trainable)


def _outline(module: nn.Module) -> list[tuple[str, tuple[int, ...], bool]]:
    return [(name, tuple(parameter.shape), parameter.requires_grad) for name, parameter in module.named_parameters()]
