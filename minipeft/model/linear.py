"""Linear layers, whose float32 products take oneDNN on a CPU.

    y = x W^T + b          dx = dy W          dW = dy^T x          db = sum of dy's rows

torch brings two libraries for products of matrices on a CPU: MKL, which it asks for float32, and oneDNN, which it asks
for bfloat16. On processors not made by Intel, MKL leaves half of each vector unit idle, and oneDNN does not: how much
faster it is on one machine is in results/benchmark.md. Both sum in float32; results differ in the last digits.
On processors without AVX-512, oneDNN cannot multiply bfloat16, and torch's own product of it takes many times as long
as float32's: there, float32 copies are multiplied and the sums are rounded, as bfloat16 instructions do it.
Where oneDNN is not there, torch's own product is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


class Linear(nn.Linear):
    """torch's linear layer: x W^T + b, (..., in) -> (..., out), with W (out, in) and b (out,)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `torch.nn.functional.linear` gives, (..., in) -> (..., out), by the faster library."""
    if not carried_out_here(x, weight) or x.dim() < 2 or not x.numel():
        return F.linear(x, weight, bias)
    if dtype := autocast_dtype(x):
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype != weight.dtype or not (onednn_multiplies(x.dtype) or through_float32(x.dtype)):
        return F.linear(x, weight, bias)
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()  # columns of a wider matrix, say: oneDNN would take a thousand times as long
    if torch.is_grad_enabled():
        return _Product.apply(x, weight, bias)
    return _product(x, weight, bias)


@functools.cache  # asked at every product, and a processor does not change
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, and multiplies numbers of this type on this processor."""
    return torch.backends.mkldnn.is_available() and (dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def through_float32(dtype: torch.dtype) -> bool:
    """Whether products of this type are made of float32 copies: bfloat16, where oneDNN multiplies only float32."""
    return dtype == torch.bfloat16 and not onednn_multiplies(dtype) and onednn_multiplies(torch.float32)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes products with x in; None where it is off, as it always is on the meta device and for
    float64."""
    kind, spared = x.device.type, x.is_meta or x.dtype == torch.float64
    return torch.get_autocast_dtype(kind) if not spared and torch.is_autocast_enabled(kind) else None


def carried_out_here(*tensors: Tensor) -> bool:
    """Whether operations on these tensors are carried out at once and on a CPU, as they are written.

    They are not where they are recorded (compile, export, trace), vectorized (vmap), differentiated forwards or watched
    by a dispatch mode, unless that has an attribute `carried_out_here` which is True: there, torch must see operations
    that it knows.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not all(t.device.type == "cpu" for t in tensors):
        return False
    watcher = _get_current_dispatch_mode()
    return (not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0
            and (watcher is None or getattr(watcher, "carried_out_here", False)))


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch.compile leaves as it is. `torch.compiler.disable` does that, too, but imports the compiler
    at once, which takes as long as the rest of torch."""
    disabled = torch._disable_dynamo(function)  # imports it when it is called

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return (disabled if torch.compiler.is_compiling() else function)(*arguments, **named)

    return call


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN."""
    if through_float32(x.dtype):
        return _product(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a b^T for a (m, N) and b (n, N), both transposed in memory."""
    return a @ b.T if a.dtype == torch.bfloat16 and onednn_multiplies(a.dtype) else linear(a, b)


def add_product(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y + a b, in y's own memory: y (N, out), a (N, in), b (in, out)."""
    if through_float32(y.dtype):
        y += linear(a, b.T)
    else:
        y.addmm_(a, b)


class _Product(torch.autograd.Function):
    """x W^T + b, and its gradients by the same library. x is kept only for a W that is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x_counts, weight_counts, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if weight_counts else None, weight if x_counts else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if weight is not None:
            dx = linear(dy, weight.T)                                         # (..., out) -> (..., in)
        if x is not None:
            dy_rows, x_rows = dy.flatten(0, -2).T, x.flatten(0, -2).T         # (out, N), (in, N)
            # (out, in), the shorter side first: with LoRA's thin matrices that is up to ten times as fast.
            turned = len(x_rows) < len(dy_rows)
            dweight = outer(x_rows, dy_rows).T.contiguous() if turned else outer(dy_rows, x_rows)
        if ctx.needs_input_grad[2]:
            dbias = dy.flatten(0, -2).sum(dim=0)                              # (out,)
        return dx, dweight, dbias
