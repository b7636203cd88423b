"""What a method says, beside its equation, so that the equation can be computed by hand: what each symbol stands for.

Each method file has a function `symbols(seen)` that looks at one place of a model, such as h.0.attn.c_attn, while the
model reads a text, and names the tensors. `explain/trace.py` then computes the equation of the file's docstring as it
stands there, and compares what comes out with what the model computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.nn as nn
from torch import Tensor


class Step(NamedTuple):
    """One step of AdamW on one tensor: what went in and what came out.

    Attributes:
        number: 1 for the first.
        before, after: the tensor; gradient is of its own shape, and so are AdamW's two running means.
    """

    number: int
    rate: float
    decay: float
    eps: float
    gradient: Tensor
    before: Tensor
    means: tuple[Tensor, Tensor]
    after: Tensor
    next_means: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Seen:
    """A place in a model that carries the method, and what went through the model's modules while it read one text.

    Attributes:
        place: name of a layer that the method put there, or of a module whose own tensors it trains.
        block: name of the block that is looked at.
        ids: the text, (1, seq).
        inputs, outputs: module name -> what it was given and what it gave, such as (1, seq, C).
        step: takes a step of AdamW on a parameter, and puts the parameter back.
    """

    model: nn.Module
    place: str
    block: str
    ids: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    step: Callable[[nn.Parameter], Step]

    @property
    def layer(self) -> Any:
        """The layer or module at the place."""
        return self.model.get_submodule(self.place)

    @property
    def x(self) -> Tensor:
        """What the place was given."""
        return self.inputs[self.place]

    @property
    def y(self) -> Tensor:
        """What it gave."""
        return self.outputs[self.place]


@dataclass
class Symbols:
    """What the symbols of a method's equation stand for at one place.

    A line of the equation belongs to the place if all symbols on its right are there. The left one, where it is there,
    is what the model computed: the line must come to the same.

    Attributes:
        values: symbol -> a tensor, a number or a function.
        remark: of several lines that could belong to the place: how the remark beside the right one begins.
        merging: symbol -> how the formula under "Merging" has it, where that is another shape.
    """

    values: dict[str, Any]
    remark: str = ""
    merging: dict[str, Any] = field(default_factory=dict)
