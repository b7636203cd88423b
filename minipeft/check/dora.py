"""What an answer to exercises/dora.py is held against."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minipeft.check.judging import (
    Refused,
    call,
    check_gradients,
    check_kept,
    check_random,
    check_trained,
    expect,
    expect_same,
    expect_shape,
    given,
    linear,
    parameter,
    put,
    randomize,
    trained_count,
    unchanged,
    whole,
)
from minipeft.check.references import reference_case

NAMES = {"DoRALinear": 3, "DoRALinear.forward": 1, "DoRALinear.merged_weight": 0}
IN, OUT, R, ALPHA = 3, 5, 2, 4
# W + s B A is [[3, 4], [5, 12]], whose rows are 5 and 13 long: c is (2, 3).
X, W, BIAS = whole([1, 2]), whole([1, 2], [1, 4]), torch.tensor([1.0, -1.0])
A, B, M = whole([1, 1], [0, 1]), whole([1, 0], [2, 2]), torch.tensor([10.0, 39.0])


def make(answer: ModuleType, base: nn.Linear, r: int, alpha: float) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The answer's layer with its A, B and m."""
    layer = answer.DoRALinear(base, r, alpha)
    columns = "m has one number per input: it is the length of each row of W (out, in), not of each column"
    return (layer, parameter(layer, "lora_A", r, base.in_features), parameter(layer, "lora_B", base.out_features, r),
            parameter(layer, "magnitude", base.out_features, wrong={(base.in_features,): columns}))


def small(answer: ModuleType) -> Any:
    """The layer with the whole numbers of above."""
    layer, lora_A, lora_B, magnitude = make(answer, linear(W, BIAS), 2, ALPHA)
    put(lora_A, A), put(lora_B, B), put(magnitude, M)
    return layer


def shapes(answer: ModuleType) -> None:
    for dtype in (torch.float32, torch.float64):
        layer = make(answer, nn.Linear(IN, OUT), R, ALPHA)[0].to(dtype)
        x = torch.randn(2, 4, IN, dtype=dtype)
        expect_shape("layer(x)", call("layer(x)", layer, x), (2, 4, OUT), dtype, f"x {tuple(x.shape)}, {dtype}")


def start(answer: ModuleType) -> None:
    base = nn.Linear(IN, OUT)
    layer, lora_A, lora_B, magnitude = make(answer, base, R, ALPHA)
    if lora_B.any():
        raise Refused("self.lora_B at the start", "random", "all zero",
                      because="B starts random: it has to start at zero")
    if not lora_A.any():
        raise Refused("self.lora_A at the start", "all zero", "random",
                      because="A and B both start at zero: then neither ever gets a gradient")
    check_random("lora_A", lora_A)
    norms = base.weight.norm(dim=1)
    expect("self.magnitude at the start", magnitude, norms, "a random W",
           {"m starts at one: it has to start at the length of each row of W": torch.ones(OUT),
            "m starts at zero: it has to start at the length of each row of W": torch.zeros(OUT),
            "m starts at the squared length: the root is missing": norms**2,
            "m starts at the sum of absolute values, not at the Euclidean length": base.weight.abs().sum(1),
            "m starts at the length of the whole matrix in every row": base.weight.norm().expand(OUT)})
    x = torch.randn(2, 4, IN)
    expect("layer(x) at the start", layer(x), F.linear(x, base.weight, base.bias), "random x",
           {"the base layer's bias is left out": F.linear(x, base.weight)})


def _wrong_matrices() -> dict[str, Tensor]:
    """Misconception -> the matrix that the layer then multiplies with."""
    BA, s = B @ A, ALPHA / 2
    V = W + s * BA
    norm = V.norm(dim=1, keepdim=True)                                        # (out, 1)
    m = M[:, None]
    return {"not divided by the row's length: c = m / ||W + s B A||, not m": m * V,
            "the length is that of W alone, not of W + s B A": m / W.norm(dim=1, keepdim=True) * V,
            "the length is taken over the columns (dim=0): it is one per row, per output":
                (M / V.norm(dim=0))[:, None] * V,
            "one length for the whole matrix: there is one per row": m / V.norm() * V,
            "divided by the squared length: the root is missing": m / norm**2 * V,
            "divided by the sum of absolute values, not by the Euclidean length": m / V.abs().sum(1, keepdim=True) * V,
            "c is upside down": norm / m * V,
            "c stretches the update only": W + m / norm * s * BA,
            "c stretches W only, not the update": m / norm * W + s * BA,
            "c is applied to the columns, that is, to x: it belongs to the rows, to y": V * (M / norm[:, 0]),
            "the update is not scaled: s = lora_alpha / r is left out": m * F.normalize(W + BA, dim=1),
            "scaled by lora_alpha, not by lora_alpha / r": m * F.normalize(W + ALPHA * BA, dim=1),
            "scaled by lora_alpha * r, not by lora_alpha / r": m * F.normalize(W + ALPHA * 2 * BA, dim=1),
            "s is left out within the length": m * V / (W + BA).norm(dim=1, keepdim=True),
            "s is left out of the update, not of the length": m / norm * (W + BA),
            "A B instead of B A": m * F.normalize(W + s * A @ B, dim=1),
            "the update is left out": m / norm * W,
            "there is no magnitude: that is LoRA": V}


def formula(answer: ModuleType) -> None:
    stretch, V = torch.tensor([2.0, 3.0]), W + ALPHA / 2 * B @ A
    wrong = {name: X @ matrix.T + BIAS for name, matrix in _wrong_matrices().items()}
    wrong["c stretches the bias, too: it is added afterwards"] = stretch * (X @ V.T + BIAS)
    wrong["the base layer's bias is left out"] = stretch * (X @ V.T)
    wrong["the base layer's bias is added twice"] = stretch * (X @ V.T) + 2 * BIAS
    expect("layer(x)", call("layer(x)", small(answer), X[None])[0], stretch * (X @ V.T) + BIAS,
           given(x=X, W=W, bias=BIAS, A=A, B=B, m=M, r=2, lora_alpha=ALPHA), wrong)


def gradients(answer: ModuleType) -> None:
    layer, _, _, _ = make(answer, nn.Linear(IN, OUT).double(), R, ALPHA)
    layer = layer.double()
    lora_A, lora_B = parameter(layer, "lora_A", R, IN), parameter(layer, "lora_B", OUT, R)
    magnitude = parameter(layer, "magnitude", OUT)
    randomize([lora_A, lora_B, magnitude])
    x = torch.randn(1, 2, IN, dtype=torch.float64, requires_grad=True)
    check_gradients("layer(x)", lambda: layer(x), {"x": x, "m": magnitude})
    found = torch.autograd.grad(layer(x).square().sum(), (lora_A, lora_B), allow_unused=True)
    for name, got, constant, flowing in zip("AB", found, _slopes(layer, x, lora_A, lora_B, magnitude, False),
                                            _slopes(layer, x, lora_A, lora_B, magnitude, True)):
        if got is None:
            raise Refused(f"the gradient of {name}", "none", "one",
                          because=f"no gradient reaches {name}: the whole update is cut off, not the length alone")
        expect(f"the gradient of {name}", got, constant, "layer(x).square().sum(), random numbers",
               {"a gradient flows through the length: ||W + s B A|| has to be detached": flowing})


def _slopes(layer: Any, x: Tensor, A: Tensor, B: Tensor, m: Tensor, through_norm: bool) -> tuple[Tensor, ...]:
    """The gradients of A and B by the equation itself."""
    V = layer.base_layer.weight + ALPHA / R * B @ A
    norm = V.norm(dim=1) if through_norm else V.norm(dim=1).detach()
    y = m / norm * (x @ V.T) + layer.base_layer.bias
    return torch.autograd.grad(y.square().sum(), (A, B))


def trained(answer: ModuleType) -> None:
    base = nn.Linear(IN, OUT)
    layer, lora_A, lora_B, magnitude = make(answer, base, R, ALPHA)
    check_kept(layer, "base_layer", base)
    check_trained(layer, {"A": lora_A, "B": lora_B, "m": magnitude},
                  {"W": base.weight, "the base layer's bias": base.bias})


def count(answer: ModuleType) -> None:
    layer = make(answer, nn.Linear(IN, OUT), R, ALPHA)[0]
    expect_same("trained parameters: r (in + out) + out", trained_count(layer.parameters()), R * (IN + OUT) + OUT,
                given(r=R, **{"in": IN, "out": OUT}))


def merged(answer: ModuleType) -> None:
    layer, stretch = small(answer), torch.tensor([[2.0], [3.0]])
    with unchanged(layer, X[None], "layer.merged_weight()"):
        expect("layer.merged_weight()", layer.merged_weight(), stretch * (W + ALPHA / 2 * B @ A),
               given(W=W, A=A, B=B, m=M, r=2, lora_alpha=ALPHA),
               {f"in merging: {name}": matrix for name, matrix in _wrong_matrices().items()})
    (wide, *tensors), x = make(answer, nn.Linear(IN, OUT), R, ALPHA), torch.randn(2, 4, IN)
    randomize(tensors)
    expect("F.linear(x, layer.merged_weight(), bias)", F.linear(x, wide.merged_weight(), wide.base_layer.bias),
           wide(x), "a 5 x 3 matrix")


def reference(answer: ModuleType) -> None:
    case = reference_case("dora")
    layer, lora_A, lora_B, magnitude = make(answer, linear(case["W"], case["bias"]), case["r"], case["lora_alpha"])
    put(lora_A, case["A"]), put(lora_B, case["B"]), put(magnitude, case["m"])
    expect("layer(x)", layer(case["x"]), case["y"], "peft's case dora in minipeft/check/references.json")
    expect("layer.merged_weight()", layer.merged_weight(), case["merged"], "peft's case dora")
