"""Exercise: merging. A trained adapter is folded into the frozen weights, and taken out again.

    LoRA                             W' = W + s B A                                         s = lora_alpha / r
    DoRA                             W' = W + s B A, its row i times m_i / ||row i||       ||...||: the Euclidean length
    (IA)^3, an ordinary layer        W' = W, its row i times l_i; bias' = l * bias         l (out,)
    (IA)^3, a feed-forward layer     W' = W, its column j times l_j; bias' = bias          l (in,)

    W (out, in), bias (out,) frozen      A (r, in), B (out, r), m (out,), l trained

Step 0 is B = 0 for LoRA, B = 0 and m = ||W|| for DoRA, l = 1 for (IA)^3: then W' is W.

A base model may be in half precision while the adapter is float32. Then the new matrix and the new bias are computed
in float32, rounded once, at the end, and have the dtypes of W and bias. Merging is undone bit for bit: W' - s B A is W
up to rounding only, so the old values are kept aside.

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
    """Copy the values from before `merge` back into the layer, bit for bit. `kept` is what `merge` returned."""
    raise NotImplementedError("unmerge")
