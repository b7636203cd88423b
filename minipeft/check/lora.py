"""What an answer to exercises/lora.py is held against."""

from __future__ import annotations

import copy
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
    close,
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

NAMES = {"LoRALinear": 4, "LoRALinear.forward": 1, "LoRALinear.merged_weight": 0}
IN, OUT, R = 3, 5, 2                                 # all different: a matrix the wrong way round does not fit
X, W, BIAS = whole([1, 2]), whole([1, 2], [3, 4]), torch.tensor([1.0, -1.0])
A, B, ALPHA = whole([1, 0], [2, 1]), whole([1, 3], [0, 2]), 6
P, BOTH = 0.25, whole([0, 0], [0, 1], [1, 0], [1, 1])       # lora_dropout; what of x's two numbers may be kept


def make(answer: ModuleType, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0) -> tuple[Any, Tensor, Tensor]:
    """The answer's layer with its A and B."""
    layer = answer.LoRALinear(base, r, alpha, *([dropout] if dropout else []))   # by default there is none
    return (layer, parameter(layer, "lora_A", r, base.in_features), parameter(layer, "lora_B", base.out_features, r))


def shapes(answer: ModuleType) -> None:
    for dtype in (torch.float32, torch.float64):
        layer, _, _ = make(answer, nn.Linear(IN, OUT), R, ALPHA)
        layer = layer.to(dtype)
        x = torch.randn(2, 4, IN, dtype=dtype)
        expect_shape("layer(x)", call("layer(x)", layer, x), (2, 4, OUT), dtype, f"x {tuple(x.shape)}, {dtype}")


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
    check_random("lora_A", lora_A)
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
    expect("layer(x)", call("layer(x)", layer, X[None])[0], X @ W.T + BIAS + ALPHA / 2 * X @ A.T @ B.T,
           given(x=X, W=W, bias=BIAS, A=A, B=B, r=2, lora_alpha=ALPHA), _wrong(X))
    _dropout(answer)


def _dropout(answer: ModuleType) -> None:
    """In training each number of x is dropped by itself, or divided by 1 - p. Of x (8, 4, 2), 32 times."""
    layer, lora_A, lora_B = make(answer, linear(W, BIAS), 2, ALPHA, P)
    put(lora_A, A), put(lora_B, B)
    x = X.expand(8, 4, 2)
    base, update = X @ W.T + BIAS, ALPHA / 2 * X @ A.T @ B.T
    text = given(x=X, lora_dropout=P)
    trained, evaluated = (torch.stack([call("layer(x)", each, x) for _ in range(32)])
                          for each in (copy.deepcopy(layer).train(), copy.deepcopy(layer).eval()))
    is_unused, right = close(trained, (base + update).expand_as(trained)), (base + update).expand_as(evaluated)
    expect_shape("layer.train()(x)", trained, (32, 8, 4, 2), torch.float32, text)
    if not close(evaluated, right):
        because = ("dropout acts in eval mode alone: it acts in training" if is_unused else
                   "dropout acts in eval mode, too")
        for name, value in {"in eval mode the update is left out": base,
                            "in eval mode x is multiplied by 1 - p: instead the kept numbers are divided by it in "
                            "training": base + (1 - P) * update}.items():
            because = name if close(evaluated, value.expand_as(evaluated)) else because
        raise Refused("layer.eval()(x)", show_rows(evaluated), show_rows(right), text, because)
    rows = _dropped()
    if (kept := _which(trained, rows.pop(""))) is None:
        because = "lora_dropout is not used" if is_unused else next(
            (name for name, values in rows.items() if _which(trained, values) is not None), "")
        raise Refused("layer.train()(x)", show_rows(trained), show_rows(_dropped()[""]) + ", each number kept or "
                      "dropped by itself", text + ", many times", because)
    _chances(BOTH[kept], text)


def _dropped() -> dict[str, Tensor]:
    """Misconception -> all that it can make of X (n, 2); "" for the right rows, in the order of BOTH."""
    base, s, matrices = X @ W.T + BIAS, ALPHA / 2, torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).view(-1, 2, 2)

    def update(x: Tensor) -> Tensor:
        return s * x @ A.T @ B.T

    kept = X * BOTH / (1 - P)
    return {"": base + update(kept),
            "what is kept is not scaled up: it is divided by 1 - p": base + update(X * BOTH),
            "what is kept is multiplied by 1 - p: it is divided by it": base + update(X * BOTH * (1 - P)),
            "keep and drop are exchanged: lora_dropout is the share that is dropped": base + update(X * BOTH / P),
            "dropout falls on the base layer's path, too: only A's x is dropped": torch.cat(
                [kept @ W.T + BIAS + update(kept)] + [kept @ W.T + BIAS + update(kept * again / (1 - P))
                                                      for again in BOTH]),
            "dropout falls on the layer's output: only A's x is dropped": (base + update(X)) * BOTH / (1 - P),
            "dropout acts behind A or B: it belongs on x, before A": torch.cat((
                base + s * (X @ A.T * BOTH / (1 - P)) @ B.T, base + update(X) * BOTH / (1 - P))),
            "dropout falls on A's numbers: it belongs on x": torch.cat(
                [base + s * X @ (A * each).T @ B.T / (1 - P) for each in matrices]),
            "dropout falls on B's numbers: it belongs on x": torch.cat(
                [base + s * X @ A.T @ (B * each).T / (1 - P) for each in matrices])}


def _which(y: Tensor, rows: Tensor) -> Tensor | None:
    """For each of y's vectors (..., 2) the number of the row that it is; None if one is none of them."""
    distances = (y[..., None, :] - rows).abs().amax(-1)                       # (..., n)
    return None if (distances.amin(-1) > 1e-3).any() else distances.argmin(-1)


def _chances(kept: Tensor, text: str) -> None:
    """Of what was kept, 1 or 0 (calls, batch, seq, in): the share, and that no two numbers always fare alike."""
    share, expected = kept.mean().item(), f"{1 - P:g} of all numbers"
    if abs(share - (1 - P)) > 0.1:
        raise Refused("layer.train()(x)", f"{share:.2g} of all numbers of x are kept", expected, text, because=(
            "keep and drop are exchanged: lora_dropout is the share that is dropped" if abs(share - P) < 0.1 else
            "all is dropped" if not share else "lora_dropout is not the share that is dropped"))
    units = {3: "a token's numbers are kept or dropped together: each is by itself",
             2: "all tokens of a text get the same mask: each has its own",
             1: "all texts get the same mask: each has its own",
             0: "every call drops the same numbers: each time others are"}
    for dim, because in units.items():
        alike = (kept == kept.roll(1, dim)).float().mean().item()             # by chance P^2 + (1 - P)^2 = 0.625
        if alike > 0.8:
            raise Refused("layer.train()(x)", f"neighbours are alike in {alike:.2g} of all cases", "about 0.62", text,
                          because)


def show_rows(y: Tensor) -> str:
    """The different rows of y (..., out)."""
    rows = torch.unique((y.detach().flatten(0, -2) * 1e4).round() / 1e4, dim=0).tolist()
    return " or ".join(str([round(number, 4) for number in row]) for row in rows[:4]) + ", ..." * (len(rows) > 4)


def gradients(answer: ModuleType) -> None:
    layer, lora_A, lora_B = make(answer, nn.Linear(IN, OUT).double(), R, ALPHA)
    layer = layer.double()
    x = torch.randn(1, 2, IN, dtype=torch.float64, requires_grad=True)
    lora_A, lora_B = parameter(layer, "lora_A", R, IN), parameter(layer, "lora_B", OUT, R)
    randomize([lora_A, lora_B])
    check_gradients("layer(x)", lambda: layer(x), {"x": x, "A": lora_A, "B": lora_B})


def trained(answer: ModuleType) -> None:
    base = nn.Linear(IN, OUT)
    layer, lora_A, lora_B = make(answer, base, R, ALPHA)
    check_kept(layer, "base_layer", base)
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
    wide, lora_A, lora_B = make(answer, nn.Linear(IN, OUT), R, ALPHA)
    randomize([lora_A, lora_B])
    x = torch.randn(2, 4, IN)
    expect("F.linear(x, layer.merged_weight(), bias)", F.linear(x, wide.merged_weight(), wide.base_layer.bias),
           wide.eval()(x), "a 5 x 3 matrix")


def reference(answer: ModuleType) -> None:
    case = reference_case("lora")
    layer, lora_A, lora_B = make(answer, linear(case["W"], case["bias"]), case["r"], case["lora_alpha"])
    put(lora_A, case["A"]), put(lora_B, case["B"])
    expect("layer(x)", layer(case["x"]), case["y"], "peft's case lora in minipeft/check/references.json")
    expect("layer.merged_weight()", layer.merged_weight(), case["merged"], "peft's case lora")
