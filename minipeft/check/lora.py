"""What an answer to exercises/lora.py is held against."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minipeft.check.judging import (
    Refused,
    check_gradients,
    check_trained,
    close,
    expect,
    expect_same,
    expect_shape,
    given,
    linear,
    parameter,
    put,
    randomized,
    trained_count,
    unchanged,
    whole,
)
from minipeft.check.references import reference_case

NAMES = {"LoRALinear": 4, "LoRALinear.forward": 1, "LoRALinear.merged_weight": 0}
IN, OUT, R = 3, 5, 2                                 # all different: a matrix the wrong way round does not fit
X, W, BIAS = whole([1, 2]), whole([1, 2], [3, 4]), torch.tensor([1.0, -1.0])
A, B, ALPHA = whole([1, 0], [2, 1]), whole([1, 3], [0, 2]), 6


def make(answer: ModuleType, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0) -> tuple[Any, Tensor, Tensor]:
    """The answer's layer with its A and B."""
    layer = answer.LoRALinear(base, r, alpha, *([dropout] if dropout else []))   # by default there is none
    return (layer, parameter(layer, "lora_A", r, base.in_features), parameter(layer, "lora_B", base.out_features, r))


def shapes(answer: ModuleType) -> None:
    for dtype in (torch.float32, torch.float64):
        layer, _, _ = make(answer, nn.Linear(IN, OUT), R, ALPHA)
        layer = layer.to(dtype)
        x = torch.randn(2, 4, IN, dtype=dtype)
        expect_shape("layer(x)", layer(x), (2, 4, OUT), dtype, f"x {tuple(x.shape)}, {dtype}")


def start(answer: ModuleType) -> None:
    base = nn.Linear(IN, OUT)
    layer, lora_A, lora_B = make(answer, base, R, ALPHA)
    a_is_zero, b_is_zero = not lora_A.any(), not lora_B.any()
    if a_is_zero:
        because = ("A and B both start at zero: then neither ever gets a gradient" if b_is_zero
                   else "A and B have changed places: A starts random, B at zero")
        raise Refused("self.lora_A at the start", "all zero", "random", because=because)
    if not b_is_zero:
        raise Refused("self.lora_B at the start", "random", "all zero",
                      because="B starts random: it has to start at zero")
    x = torch.randn(2, 4, IN)
    product = F.linear(x, base.weight)
    expect("layer(x) at the start", layer(x), product + base.bias, "random x",
           {"the base layer's bias is left out": product,
            "the update takes the place of x W^T instead of being added to it": torch.zeros_like(product),
            "the base layer's output is scaled, too": ALPHA / R * (product + base.bias)})


def _wrong(x: Tensor) -> dict[str, Tensor]:
    """Misconception -> what it makes of x."""
    base, s = x @ W.T + BIAS, ALPHA / 2
    update = x @ A.T @ B.T
    return {"scaled by lora_alpha, not by lora_alpha / r": base + ALPHA * update,
            "not scaled: s = lora_alpha / r is left out": base + update,
            "scaled by lora_alpha * r, not by lora_alpha / r": base + ALPHA * 2 * update,
            "scaled by lora_alpha / sqrt(r): that is rsLoRA": base + ALPHA / 2**0.5 * update,
            "scaled by r / lora_alpha: upside down": base + update / s,
            "scaled twice": base + s * s * update,
            "the update takes the place of x W^T instead of being added to it": s * update,
            "the base layer's bias is left out": x @ W.T + s * update,
            "the bias is scaled along with the update": x @ W.T + s * (update + BIAS),
            "x goes through B and then A: first A narrows, then B widens": base + s * x @ B.T @ A.T,
            "A and B are not transposed: x A B instead of x A^T B^T": base + s * x @ A @ B,
            "A is not transposed": base + s * x @ A @ B.T,
            "B is not transposed": base + s * x @ A.T @ B,
            "W is not transposed": x @ W + BIAS + s * update,
            "the update is subtracted": base - s * update,
            "A reads the base layer's output instead of x": base + s * base @ A.T @ B.T,
            "the base layer's output is scaled, too": s * (base + update)}


def formula(answer: ModuleType) -> None:
    layer, lora_A, lora_B = make(answer, linear(W, BIAS), 2, ALPHA)
    put(lora_A, A), put(lora_B, B)
    expect("layer(x)", layer(X[None])[0], X @ W.T + BIAS + ALPHA / 2 * X @ A.T @ B.T,
           given(x=X, W=W, bias=BIAS, A=A, B=B, r=2, lora_alpha=ALPHA), _wrong(X))
    _dropout(answer)


def _dropout(answer: ModuleType) -> None:
    """x has one number that is not zero: dropout leaves the update out, or doubles it, and never a part of it."""
    layer, lora_A, lora_B = make(answer, linear(W, BIAS), 2, ALPHA, 0.5)
    put(lora_A, A), put(lora_B, B)
    x = whole([1, 0]).expand(64, 1, 2)
    base, update = x @ W.T + BIAS, ALPHA / 2 * x @ A.T @ B.T
    text = given(x=[[1, 0]], lora_dropout=0.5)
    y = layer.eval()(x)
    expect("layer.eval()(x)", y[:1], (base + update)[:1], text,
           {} if close(y, y[:1].expand_as(y)) else {"dropout acts in eval mode, too": y[:1]})
    y = layer.train()(x)
    shares = ((y - base) / update)[:, 0]                                      # (64, 2): of each number of the update
    because = ("lora_dropout is not used" if torch.allclose(shares, torch.ones(2)) else
               "dropout falls on the base layer's path, too: only A's x is dropped"
               if not ((y - base).abs() < 1e-5).all(-1).any() else
               "dropout acts behind A or B: it belongs on x, before A")
    if not all(any(torch.allclose(row, row.new_full((2,), share), atol=1e-4) for share in (0, 2)) for row in shares):
        wanted = torch.stack((base[0], (base + 2 * update)[0]))
        raise Refused("layer.train()(x)", show_rows(y), f"{show_rows(wanted)}, about half each", text + ", 64 times",
                      because)


def show_rows(y: Tensor) -> str:
    """The different rows of y (n, 1, out)."""
    rows = torch.unique((y[:, 0] * 1e4).round() / 1e4, dim=0).tolist()
    return " or ".join(str([round(number, 4) for number in row]) for row in rows[:4])


def gradients(answer: ModuleType) -> None:
    layer, lora_A, lora_B = make(answer, nn.Linear(IN, OUT).double(), R, ALPHA)
    layer = randomized(layer.double())
    x = torch.randn(1, 2, IN, dtype=torch.float64, requires_grad=True)
    lora_A, lora_B = parameter(layer, "lora_A", R, IN), parameter(layer, "lora_B", OUT, R)
    check_gradients("layer(x)", lambda: layer(x), {"x": x, "A": lora_A, "B": lora_B})


def trained(answer: ModuleType) -> None:
    base = nn.Linear(IN, OUT)
    layer, lora_A, lora_B = make(answer, base, R, ALPHA)
    check_trained(layer, {"A": lora_A, "B": lora_B}, {"W": base.weight, "the base layer's bias": base.bias})


def count(answer: ModuleType) -> None:
    layer, _, _ = make(answer, nn.Linear(IN, OUT), R, ALPHA)
    expect_same("trained parameters: r (in + out)", trained_count(layer.parameters()), R * (IN + OUT),
                given(r=R, **{"in": IN, "out": OUT}))


def merged(answer: ModuleType) -> None:
    layer, lora_A, lora_B = make(answer, linear(W, BIAS), 2, ALPHA)
    put(lora_A, A), put(lora_B, B)
    BA, s = B @ A, ALPHA / 2
    with unchanged(layer, X[None], "layer.merged_weight()"):
        expect("layer.merged_weight()", layer.merged_weight(), W + s * BA,
               given(W=W, A=A, B=B, r=2, lora_alpha=ALPHA),
               {"the update alone is returned: W has to be added": s * BA,
                "the update is not scaled in merging": W + BA,
                "in merging scaled by lora_alpha, not by lora_alpha / r": W + ALPHA * BA,
                "A B instead of B A": W + s * A @ B,
                "the update is transposed in merging: W is (out, in), and so is B A": W + s * BA.T,
                "A^T B^T instead of B A": W.T + s * BA.T,
                "W as it was: the update is not added": W})
    wide, _, _ = make(answer, nn.Linear(IN, OUT), R, ALPHA)
    randomized(wide)
    x = torch.randn(2, 4, IN)
    expect("F.linear(x, layer.merged_weight(), bias)", F.linear(x, wide.merged_weight(), wide.base_layer.bias),
           wide.eval()(x), "a 5 x 3 matrix")


def reference(answer: ModuleType) -> None:
    case = reference_case("lora")
    layer, lora_A, lora_B = make(answer, linear(case["W"], case["bias"]), case["r"], case["lora_alpha"])
    put(lora_A, case["A"]), put(lora_B, case["B"])
    expect("layer(x)", layer(case["x"]), case["y"], "peft's case lora in minipeft/check/references.json")
    expect("layer.merged_weight()", layer.merged_weight(), case["merged"], "peft's case lora")
