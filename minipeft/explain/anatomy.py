"""What a method does to a model, as text: the module tree with what is trained, and counts for every method.

All of it is read off a model that was injected. Shapes are enough: on the meta device no weight exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch.nn as nn

from minipeft.methods import METHODS, inject
from minipeft.methods.injection import trainable_parameters
from minipeft.model.config import GPT2Config
from minipeft.model.gpt2 import GPT2ForSequenceClassification
from minipeft.model.hub import find, official
from minipeft.model.pretrained import on_paper
from minipeft.model.weights import read_config
from minipeft.runs.defaults import table
from minipeft.runs.results import markdown_table

GRAY, ORANGE, PLAIN = "\033[90m", "\033[1;33m", "\033[0m"


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


def config_of(name_or_folder: str) -> GPT2Config:
    """A model's sizes, without its weights.

    Raises:
        WeightsError: neither a folder nor a name of a model.
        ConfigError: a config.json that is no GPT-2's.
    """
    if name := official(name_or_folder):
        return GPT2Config.official(name)
    return GPT2Config.from_dict(read_config(find(name_or_folder)))


def shapes_only(config: GPT2Config) -> GPT2ForSequenceClassification:
    """A classifier without weights, on the meta device."""
    with on_paper():
        return GPT2ForSequenceClassification(config)


def injected(config: GPT2Config, method: str, **values: Any) -> GPT2ForSequenceClassification:
    """A classifier without weights that carries `method`, by default as the table of defaults has it.

    Raises:
        ConfigError: a field the method does not know, or a bad value.
    """
    model = shapes_only(config)
    chosen = {**table(method)["method"], **values}
    if chosen.get("prompt_tuning_init") == "TEXT":  # reading words needs weights; the shapes do not depend on them
        chosen["prompt_tuning_init"] = "RANDOM"
    return inject(model, METHODS[method].config(**chosen))


def tree(model: nn.Module) -> list[Line]:
    """The module tree, one line for each module and parameter; blocks that look like the one before are folded."""
    return _subtree("model", model, depth=0)


def _subtree(name: str, module: nn.Module, depth: int) -> list[Line]:
    """A module's line, its parameters' and its children's."""
    count, inside = trainable_parameters(module), "  " * (depth + 1)
    lines = [Line(f"{'  ' * depth}({name}) {type(module).__name__}", count.total, count.trainable)]
    for key, parameter in module.named_parameters(recurse=False):
        lines.append(Line(f"{inside}{key} {tuple(parameter.shape)}", parameter.numel(),
                          parameter.numel() if parameter.requires_grad else 0))

    def look(child: tuple[str, nn.Module]) -> Any:
        """Equal for blocks that look alike; every other child is one of a kind."""
        return _outline(child[1]) if isinstance(module, nn.ModuleList) else child[0]

    for _, alike in groupby(module.named_children(), look):
        (key, child), *others = alike
        lines += _subtree(key, child, depth + 1)
        if others:
            counts = [trainable_parameters(other) for _, other in others]
            label = f"{others[0][0]} to {others[-1][0]}" if len(others) > 1 else others[0][0]
            lines.append(Line(f"{inside}{label}: as {key}", sum(count.total for count in counts),
                              sum(count.trainable for count in counts)))
    return lines


def render(lines: list[Line], color: bool) -> str:
    """The tree as text: trained parts in color and with a star, frozen ones in gray, each with its parameters."""
    whole, width = lines[0].count, max(len(line.text) for line in lines) + 2
    rendered = []
    for line in lines:
        counts = f"{line.count:>14,}"
        if line.trained:
            counts += f"   * {line.trained:,} trained ({100 * line.trained / whole:.3f} % of the model)"
        text = f"{line.text:<{width}}{counts}" if line.count else line.text
        rendered.append(f"{ORANGE if line.trained else GRAY}{text}{PLAIN}" if color else text)
    return "\n".join(rendered)


def counts_table(configs: dict[str, GPT2Config]) -> str:
    """A Markdown table: the parameters each method trains, in the table's default configuration, for each size."""
    rows = []
    for method in METHODS:
        counts = [trainable_parameters(injected(config, method)) for config in configs.values()]
        rows.append([method, *(f"{count.trainable:,} ({100 * count.trainable / count.total:.3f} %)"
                               for count in counts)])
    return markdown_table(["method", *configs], rows, figures=True)


def _outline(module: nn.Module) -> list[tuple[str, tuple[int, ...], bool]]:
    """What makes a block look like another: names and shapes of its parameters, and which are trained."""
    return [(name, tuple(parameter.shape), parameter.requires_grad) for name, parameter in module.named_parameters()]
