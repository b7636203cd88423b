"""What an answer to exercises/merging.py is held against."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minipeft.check.judging import Refused, call, close, expect, expect_shape, given, linear, pair, whole
from minipeft.check.references import reference_case

NAMES = {"merged_lora": 5, "merged_dora": 6, "merged_ia3": 4, "merge": 3, "unmerge": 2}
ALPHA, S = 4, 2
# W + s B A is [[3, 4], [5, 12]], whose rows are 5 and 13 long.
W, BIAS = whole([1, 2], [1, 4]), torch.tensor([1.0, -1.0])
A, B, M, L = whole([1, 1], [0, 1]), whole([1, 0], [2, 2]), torch.tensor([10.0, 39.0]), torch.tensor([2.0, 5.0])
KINDS = {False: "an ordinary layer", True: "a feed-forward layer"}


def same(got: object, expected: Tensor) -> bool:
    """Whether an answer's value is a tensor with these numbers."""
    return isinstance(got, Tensor) and close(got, expected)


def shapes(answer: ModuleType) -> None:
    wide, lora_A, lora_B = torch.randn(5, 3), torch.randn(2, 3), torch.randn(5, 2)
    m, matrix = torch.randn(5), "the new matrix has not the dtype of W"
    text = "W (5, 3), A (2, 3), B (5, 2)"
    for dtype in (torch.float64, torch.bfloat16):
        half = wide.to(dtype)
        expect_shape("merged_lora(W, ...)", call("merged_lora(W, ...)", answer.merged_lora, half, lora_A, lora_B, 4, 2),
                     (5, 3), dtype, f"{text}, W {dtype}", cast=matrix)
        expect_shape("merged_dora(W, ...)", call("merged_dora(W, ...)", answer.merged_dora, half, lora_A, lora_B, m, 4,
                                                 2), (5, 3), dtype, f"{text}, W {dtype}", cast=matrix)
        for feedforward, kind in KINDS.items():
            for bias_dtype in (dtype, torch.float32):                         # W's, and another
                l = torch.randn(3 if feedforward else 5)  # noqa: E741
                weight, bias = _ia3(answer, half, half[:, 0].to(bias_dtype), l, feedforward)
                dtypes = f"W {dtype}, bias {bias_dtype}, {kind}"
                expect_shape("the weight of merged_ia3(...)", weight, (5, 3), dtype, dtypes, cast=matrix)
                expect_shape("the bias of merged_ia3(...)", bias, (5,), bias_dtype, dtypes, {
                    dtype: "the new bias has W's dtype: it keeps its own"} if bias_dtype != dtype else {},
                    "the new bias has not the dtype of bias")


def _ia3(answer: ModuleType, *arguments: object) -> tuple[Tensor, Tensor]:
    return pair("merged_ia3(...)", call("merged_ia3(...)", answer.merged_ia3, *arguments))


def start(answer: ModuleType) -> None:
    zero, ones = torch.zeros(2, 2), torch.ones(2)
    expect("merged_lora(W, A, B = 0, ...)", call("merged_lora(W, ...)", answer.merged_lora, W, A, zero, ALPHA, 2), W,
           given(W=W, A=A), {"the update alone is returned: W has to be added": zero})
    got = call("merged_dora(W, ...)", answer.merged_dora, W, A, zero, W.norm(dim=1), ALPHA, 2)
    expect("merged_dora(W, A, B = 0, m = ||W||, ...)", got, W, given(W=W, A=A),
           {f"DoRA: {name}": matrix for name, matrix in _wrong_dora(W, W.norm(dim=1), B * 0).items()})
    for feedforward, kind in KINDS.items():
        weight, bias = _ia3(answer, W, BIAS, ones, feedforward)
        wrong = {"1 + l instead of l": 2 * W}
        expect("the weight of merged_ia3(W, bias, l = 1, ...)", weight, W, f"{given(W=W)}, {kind}", wrong)
        expect("the bias of merged_ia3(W, bias, l = 1, ...)", bias, BIAS, f"{given(bias=BIAS)}, {kind}")


def _wrong_lora() -> dict[str, Tensor]:
    BA = B @ A
    return {"not scaled: s = lora_alpha / r is left out": W + BA,
            "scaled by lora_alpha, not by lora_alpha / r": W + ALPHA * BA,
            "scaled by lora_alpha * r, not by lora_alpha / r": W + ALPHA * 2 * BA,
            "scaled by r / lora_alpha: upside down": W + BA / S,
            "the update alone is returned: W has to be added": S * BA,
            "the update is subtracted": W - S * BA,
            "A B instead of B A": W + S * A @ B,
            "B and A are multiplied number by number: B A is a matrix product": W + S * B * A,
            "the update is transposed: W is (out, in), and so is B A": W + S * BA.T,
            "W is scaled, too": S * (W + BA)}


def _wrong_dora(V: Tensor, m: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Misconception -> the matrix, with V = W + s B A."""
    norm = V.norm(dim=1, keepdim=True)
    wrong = {"the length is taken over the columns (dim=0)": m[:, None] * V / V.norm(dim=0),
             "the columns are stretched: m belongs to the rows": V / norm * m,
             "m and the lengths meet the columns: they belong to the rows, so as (out, 1)": V * (m / norm[:, 0]),
             "the lengths meet the columns: they belong to the rows, so as (out, 1)": m[:, None] * V / norm[:, 0],
             "one length for the whole matrix: there is one per row": m[:, None] * V / V.norm(),
             "not divided by the row's length": m[:, None] * V,
             "divided by the squared length": m[:, None] * V / norm**2}
    if up.any():
        wrong |= {"the length is that of W alone, not of W + s B A": m[:, None] * V / W.norm(dim=1, keepdim=True),
                  "m is left out": F.normalize(V, dim=1),
                  "the magnitude is left out altogether: that is LoRA": V,
                  "not scaled: s = lora_alpha / r is left out": m[:, None] * F.normalize(W + B @ A, dim=1),
                  "scaled by lora_alpha, not by lora_alpha / r": m[:, None] * F.normalize(W + ALPHA * B @ A, dim=1)}
    return wrong


def formula(answer: ModuleType) -> None:
    expect("merged_lora(W, A, B, lora_alpha, r)",
           call("merged_lora(W, ...)", answer.merged_lora, W, A, B, ALPHA, 2), W + S * B @ A,
           given(W=W, A=A, B=B, lora_alpha=ALPHA, r=2),
           {f"LoRA: {name}": value for name, value in _wrong_lora().items()})
    V = W + S * B @ A
    expect("merged_dora(W, A, B, m, lora_alpha, r)",
           call("merged_dora(W, ...)", answer.merged_dora, W, A, B, M, ALPHA, 2),
           torch.tensor([[2.0], [3.0]]) * V, given(W=W, A=A, B=B, m=M, lora_alpha=ALPHA, r=2),
           {f"DoRA: {name}": value for name, value in _wrong_dora(V, M, B).items()})
    rows, columns = L[:, None] * W, W * L
    found = {feedforward: _ia3(answer, W, BIAS, L, feedforward) for feedforward in KINDS}
    exchanged = same(found[False][0], columns) and same(found[True][0], rows)
    for feedforward, kind in KINDS.items():
        (weight, bias), text = found[feedforward], f"{given(W=W, bias=BIAS, l=L)}, {kind}"
        expect("the weight of merged_ia3(W, bias, l, feedforward)", weight, columns if feedforward else rows, text, {
            "(IA)^3: the two kinds of layer are exchanged: a feed-forward layer's columns are scaled, an ordinary "
            "layer's rows": columns} if exchanged else {
            "(IA)^3: the columns are scaled: an output is a row of W": columns,
            "(IA)^3: the rows are scaled: an input is a column of W": rows,
            "(IA)^3: W is not scaled": W})
        expect("the bias of merged_ia3(W, bias, l, feedforward)", bias, BIAS if feedforward else L * BIAS, text, {
            "(IA)^3: the bias is not scaled: l multiplies the whole output of an ordinary layer": BIAS,
            "(IA)^3: the bias is scaled: a feed-forward layer adds it after l": L * BIAS})
    _rounding(answer)


def _rounding(answer: ModuleType) -> None:
    """Computed in float32 and rounded once. With these numbers who rounds to bfloat16 too early gets others.

    LoRA: 257 lies between 256 and 258, and 1 + 1/1024 is 1. DoRA: W + s B A is 257 times [3, 4], and 425 lies between
    424 and 426. (IA)^3: 1.0039 is 1, and 254 times 1.0039 is 255.
    """
    half = torch.tensor([[256.0]], dtype=torch.bfloat16)
    down, up = torch.ones(2, 1), torch.tensor([[1.0, 2.0**-10]])
    expect("merged_lora(W, A, B, 2, 2), W in bfloat16", answer.merged_lora(half, down, up, 2, 2),
           half + 2, given(W=half, A=down, B=up), {
               "the update is rounded to W's dtype before it is added: compute in float32 and round once": half},
           tolerance=0)
    half, down, up, m = whole([768, 1024]).bfloat16(), whole([3, 4], [3, 4]), whole([1, 0]), torch.tensor([425.0])
    right = whole([255, 340]).bfloat16()
    expect("merged_dora(W, A, B, m, 2, 2), W in bfloat16", answer.merged_dora(half, down, up, m, 2, 2), right,
           given(W=half, A=down, B=up, m=m), {
               "DoRA: W + s B A, or its direction, is rounded to W's dtype first: compute in float32 and round once":
                   whole([256, 340]).bfloat16(),
               "DoRA: m is rounded to W's dtype first: compute in float32 and round once":
                   whole([254, 340]).bfloat16()}, tolerance=0)
    half, l = torch.tensor([[254.0]], dtype=torch.bfloat16), torch.tensor([1.0039])  # noqa: E741
    for feedforward, kind in KINDS.items():
        weight, bias = _ia3(answer, half, half[0], l, feedforward)
        text = f"{given(W=half, bias=half[0], l=l)}, {kind}"
        for name, got, old in (("weight", weight, half), ("bias", bias, half[0])):
            right = old if feedforward and name == "bias" else old + 1
            expect(f"the {name} of merged_ia3(...), in bfloat16", got, right, text,
                   {f"(IA)^3: l is rounded to the {name}'s dtype first: compute in float32 and round once": old}, 0)


def _frozen_layer() -> tuple[nn.Linear, dict[str, Tensor]]:
    layer = linear(torch.randn(5, 3), torch.randn(5)).requires_grad_(False)
    return layer, {"weight": layer.weight.clone(), "bias": layer.bias.clone()}


def _merge(answer: ModuleType, layer: nn.Linear, weight: Tensor, bias: Tensor) -> object:
    kept = answer.merge(layer, weight, bias)
    if kept is None:
        raise Refused("merge(layer, weight, bias)", "nothing", "what unmerge needs", because="merge returns nothing")
    return kept


def trained(answer: ModuleType) -> None:
    layer, _ = _frozen_layer()
    lora_A, lora_B = (torch.randn(2, 3, requires_grad=True), torch.randn(5, 2, requires_grad=True))
    l = torch.randn(5, requires_grad=True)  # noqa: E741
    objects = (layer.weight, layer.bias)
    kept = _merge(answer, layer, layer.weight + lora_B @ lora_A, layer.bias * l)
    for name, tensor, before in zip(("weight", "bias"), (layer.weight, layer.bias), objects):
        if tensor is not before:
            raise Refused(f"layer.{name} after merge", "another object", "the same nn.Parameter", because=
                          "merge puts a new Parameter in place of the old: whoever shares the old one does not see it")
        if tensor.grad_fn is not None:
            raise Refused(f"layer.{name} after merge", "a part of the adapter's graph", "a leaf", because=
                          f"the merged {name} hangs on the adapter: copy it without a gradient")
        if tensor.requires_grad:
            raise Refused(f"layer.{name}.requires_grad after merge", "True", "False",
                          because="merge unfreezes the layer")
    answer.unmerge(layer, kept)
    for name, before in zip(("weight", "bias"), objects):
        if getattr(layer, name) is not before:
            raise Refused(f"layer.{name} after unmerge", "another object", "the same nn.Parameter",
                          because=f"unmerge has to put the {name}'s values back, not a new Parameter")
        if before.requires_grad:
            raise Refused(f"layer.{name}.requires_grad after unmerge", "True", "False",
                          because=f"unmerge unfreezes the {name}")


def merged(answer: ModuleType) -> None:
    layer, before = _frozen_layer()
    weight, bias = 1000 * torch.randn(5, 3), 1000 * torch.randn(5)
    given_weight, x = weight.clone(), torch.randn(2, 4, 3)
    kept = _merge(answer, layer, weight, bias)
    expect("layer(x) after merge", layer(x), F.linear(x, weight, bias), "random x", {
        "merge changes nothing": F.linear(x, before["weight"], before["bias"]),
        "merge puts the weight in, and forgets the bias": F.linear(x, weight, before["bias"]),
        "merge adds the new weight to the old": F.linear(x, before["weight"] + weight, bias)})
    parts = list(kept.values()) if isinstance(kept, dict) else []
    answer.unmerge(layer, kept)
    for name, values in before.items():
        got = getattr(layer, name)
        if not torch.equal(got, values):
            because = ""
            if torch.equal(got, {"weight": weight, "bias": bias}[name]):
                because = f"after unmerge the merged {name} is still there: keep a copy, no reference, and put it back"
            elif torch.allclose(got, values, rtol=0.01, atol=0.01):
                because = ("unmerge gives the old values up to rounding only, as subtracting what was added does, or a "
                           "copy in another dtype: keep a copy of the bits")
            raise Refused(f"layer.{name} after unmerge", "other bits", "the bits from before merge", "random values",
                          because)
    if not torch.equal(weight, given_weight):
        raise Refused("the weight given to merge, after unmerge", "other values", "those that were given",
                      because="the layer took over the given tensor itself: copy its values")
    for name in before:
        if any(isinstance(part, Tensor) and part.data_ptr() == getattr(layer, name).data_ptr() for part in parts):
            raise Refused(f"layer.{name} after unmerge", "the kept tensor's memory", "its own memory",
                          because=f"unmerge makes the kept tensor the layer's own: copy the values into the {name}")
    _two_layers(answer)


def _two_layers(answer: ModuleType) -> None:
    """Both are merged, and then both undone, in either order."""
    for order in ((0, 1), (1, 0)):
        layers, befores = zip(*(_frozen_layer() for _ in range(2)))
        kept = [_merge(answer, layer, torch.randn(5, 3), torch.randn(5)) for layer in layers]
        for number in order:
            answer.unmerge(layers[number], kept[number])
        for number in order:
            if not torch.equal(layers[number].weight, befores[number]["weight"]):
                other = torch.equal(layers[number].weight, befores[1 - number]["weight"])
                raise Refused("layer.weight after two layers are merged and then undone", "other bits",
                              "the bits from before merge", because="one layer gets the other's old values: merge "
                              "keeps those of all layers in one place; return new ones for each" if other else "")


def reference(answer: ModuleType) -> None:
    for name in ("lora", "dora", "ia3", "ia3_feedforward"):
        case, text = reference_case(name), f"peft's case {name} in minipeft/check/references.json"
        if name.startswith("ia3"):
            weight, bias = answer.merged_ia3(case["W"], case["bias"], case["l"], name == "ia3_feedforward")
            expect("the bias of merged_ia3(...)", bias, case["merged_bias"], text)
        else:
            magnitude = [case["m"]] if name == "dora" else []
            weight = getattr(answer, f"merged_{name}")(case["W"], case["A"], case["B"], *magnitude, case["lora_alpha"],
                                                       case["r"])
        expect(f"the matrix merged as in {name}", weight, case["merged"], text)
