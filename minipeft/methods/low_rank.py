"""LoRA's forward and backward pass, written out: what autograd makes of its formula, in fewer passes over memory.

With z the layer's input after dropout, h what A makes of it, and dy the gradient of the output:

    y  = x W^T + bias + h B^T             h = s z A^T                  z = x m, m being dropout's mask / (1 - p)
    dh = dy B                             dB = dy^T h                  dA = s dh^T z
    dx = dy W + (s dh A) m                dbias = sum of dy's rows     W has no gradient: it is frozen

    x (N, in)      y (N, out)     W (out, in)     A (r, in)     B (out, r)     h (N, r)     N = batch * seq

For the backward pass x, m (in bytes) and h are kept, and no (N, out) matrix. Both sums of a large and a thin product
are one operation: the thin one is added where the large one lies. dB is computed as (h^T dy)^T, since a product is
faster with its short side first.
`LoRALinear.forward` has the formula; this is used in its place where operations are carried out one by one on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.model.dropout import Dropout, draw_kept, scale
from minipeft.model.linear import Linear, add_product, autocast_dtype, carried_out_here, linear, outer


def applies(x: Tensor, layer: nn.Module) -> bool:
    """Whether this file may compute what a LoRALinear's formula says: nothing else looks at its three products."""
    parts, dtype = (layer.base_layer, layer.lora_A, layer.lora_B), autocast_dtype(x) or x.dtype
    return (torch.is_grad_enabled() and carried_out_here(x, *(part.weight for part in parts))
            and x.dim() > 1 and x.numel() > 0 and dtype in (torch.float32, torch.bfloat16)
            and (autocast_dtype(x) or all(part.weight.dtype == dtype for part in parts))
            and not layer.base_layer.weight.requires_grad and all(_is_plain(part) for part in parts)
            and _is_plain(layer.lora_dropout, Dropout))


def _is_plain(module: nn.Module, kind: type[nn.Module] = Linear) -> bool:
    """Whether a call of the module is what its class says and nothing more: no hook, no other forward."""
    return (type(module) is kind and "forward" not in module.__dict__ and not module._forward_hooks
            and not module._forward_pre_hooks and not module._backward_hooks and not module._backward_pre_hooks)


def low_rank(x: Tensor, layer: nn.Module) -> Tensor:
    """What a LoRALinear gives for x: (batch, seq, in) -> (batch, seq, out)."""
    dropout, base = layer.lora_dropout.p if layer.lora_dropout.training else 0.0, layer.base_layer
    kept = draw_kept(x.shape, dropout) if dropout else None
    tensors = (x, base.weight, base.bias, layer.lora_A.weight, layer.lora_B.weight)
    cast = [None if tensor is None else tensor.to(autocast_dtype(x) or x.dtype) for tensor in tensors]
    with torch.autocast("cpu", enabled=False):
        return _LowRank.apply(*cast, layer.scaling, kept, scale(dropout))


def formula(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, s: float,
            kept: Tensor | None, factor: float) -> Tensor:
    """The first line of the equations above, for autograd to differentiate."""
    return linear(x, weight, bias) + linear(linear(_thinned(x, kept, factor), lora_A) * s, lora_B)


def _thinned(x: Tensor, kept: Tensor | None, factor: float) -> Tensor:
    """x m."""
    return x if kept is None else x * kept.to(x.dtype) * factor


class _LowRank(torch.autograd.Function):
    """The equations at the top of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, s: float,
                kept: Tensor | None, factor: float) -> Tensor:
        h = linear(_thinned(x, kept, factor), lora_A).mul_(s)                 # (batch, seq, r)
        y = linear(x, weight, bias)                                           # (batch, seq, out)
        add_product(y.flatten(0, -2), h.flatten(0, -2), lora_B.T)
        ctx.save_for_backward(x, weight, bias, lora_A, lora_B, kept, h)
        ctx.s, ctx.factor = s, factor
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, lora_A, lora_B, kept, h = ctx.saved_tensors
        if torch.is_grad_enabled():  # these gradients are to be differentiated, too: let torch write them down
            trained = [tensor for tensor in (x, bias, lora_A, lora_B) if tensor is not None and tensor.requires_grad]
            y = formula(x, weight, bias, lora_A, lora_B, ctx.s, kept, ctx.factor)
            found = iter(torch.autograd.grad(y, trained, dy, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        z = _thinned(x, kept, ctx.factor).flatten(0, -2)                      # (N, in)
        dy, h = dy.flatten(0, -2), h.flatten(0, -2)                           # (N, out), (N, r)
        s_dh = linear(dy, lora_B.T).mul_(ctx.s)                               # (N, r)
        dA = outer(s_dh.T, z.T)                                               # (r, in)
        dB = outer(h.T, dy.T).T.contiguous()                                  # (r, out) -> (out, r)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = linear(dy, weight.T)                                         # (N, in)
            if kept is None:
                add_product(dx, s_dh, lora_A)
            else:
                dx += _thinned(linear(s_dh, lora_A.T), kept.flatten(0, -2), ctx.factor)
            dx = dx.view(x.shape)
        dbias = dy.sum(dim=0) if ctx.needs_input_grad[2] else None            # (out,)
        return dx, None, dbias, dA, dB, None, None, None
