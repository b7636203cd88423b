"""Exercise: merging. A trained adapter is folded into the frozen weights, and taken out again.

    LoRA                             W' = W + s B A                             s = lora_alpha / r
    DoRA                             W' = m * (W + s B A) / ||W + s B A||       ||...|| (out,): each row's length
    (IA)^3, an ordinary layer        W' = l * W by rows, bias' = l * bias       l (out,)
    (IA)^3, a feed-forward layer     W' = l * W by columns, bias' = bias        l (in,)

    W (out, in), bias (out,) frozen      A (r, in), B (out, r), m (out,), l trained

A base model may be in half precision while the adapter is float32. Then the new matrix is computed in float32, rounded
once, at the end, and has the dtype of W. Merging is undone bit for bit: W' - s B A is W up to rounding only, so the old
values are kept aside.

Fill in the five holes. Then:  python -m minipeft.check merging FILE
To read: docs/exercises.md, and afterwards `merged` in minipeft/methods/lora.py and minipeft/methods/switch.py.
"""

import torch.nn as nn
from torch import Tensor


def merged_lora(W: Tensor, A: Tensor, B: Tensor, lora_alpha: float, r: int) -> Tensor:
    """W (out, in) with LoRA folded in: (out, in), in W's dtype. W itself stays as it is."""
    raise NotImplementedError("merged_lora")


def merged_dora(W: Tensor, A: Tensor, B: Tensor, m: Tensor, lora_alpha: float, r: int) -> Tensor:
    """W (out, in) with DoRA folded in: (out, in), in W's dtype. W itself stays as it is."""
    raise NotImplementedError("merged_dora")


def merged_ia3(W: Tensor, bias: Tensor, l: Tensor, feedforward: bool) -> tuple[Tensor, Tensor]:  # noqa: E741
    """W (out, in) and bias (out,) with (IA)^3 folded in, in their dtypes. W and bias themselves stay as they are."""
    raise NotImplementedError("merged_ia3")


def merge(layer: nn.Linear, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Put new values into a frozen linear layer, in place.

    layer.weight and layer.bias stay the same nn.Parameter objects, since other modules may share them, and stay frozen,
    also where weight and bias were computed from A and B, which require a gradient.

    Returns:
        What `unmerge` needs.
    """
    raise NotImplementedError("merge")


def unmerge(layer: nn.Linear, kept: dict[str, Tensor]) -> None:
    """Put the values from before `merge` back, bit for bit. `kept` is what `merge` returned."""
    raise NotImplementedError("unmerge")
