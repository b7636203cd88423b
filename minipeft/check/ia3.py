"""What an answer to exercises/ia3.py is held against."""

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
    check_trained,
    expect,
    expect_same,
    expect_shape,
    given,
    linear,
    pair,
    parameter,
    put,
    randomize,
    trained_count,
    unchanged,
    whole,
)
from minipeft.check.references import reference_case

NAMES = {"IA3Linear": 2, "IA3Linear.forward": 1, "IA3Linear.merged": 0, "places": 1}
IN, OUT = 3, 5
KINDS = {False: "an ordinary layer", True: "a feed-forward layer"}
X, W, BIAS, L = whole([1, 2]), whole([1, 2], [3, 4]), torch.tensor([1.0, -1.0]), torch.tensor([2.0, 5.0])


def make(answer: ModuleType, base: nn.Linear, feedforward: bool) -> tuple[Any, Tensor]:
    """The answer's layer with its l."""
    layer = answer.IA3Linear(base, feedforward)
    width, other = (base.in_features, base.out_features)[::1 if feedforward else -1]
    return layer, parameter(layer, "ia3_l", width, wrong={
        (other,): f"l has the width of the other side: in {KINDS[feedforward]} it rescales the "
                  f"{'input' if feedforward else 'output'}",
        (1,): "one number for all channels: l is a vector, one number per channel",
        (): "one number for all channels: l is a vector, one number per channel"})


def shapes(answer: ModuleType) -> None:
    for feedforward, kind in KINDS.items():
        for dtype in (torch.float32, torch.float64):
            layer = make(answer, nn.Linear(IN, OUT), feedforward)[0].to(dtype)
            x = torch.randn(2, 4, IN, dtype=dtype)
            expect_shape("layer(x)", call("layer(x)", layer, x), (2, 4, OUT), dtype,
                         f"x {tuple(x.shape)}, {dtype}, {kind}")


def start(answer: ModuleType) -> None:
    for feedforward, kind in KINDS.items():
        base = nn.Linear(IN, OUT)
        layer, scale = make(answer, base, feedforward)
        x = torch.randn(2, 4, IN)
        y = F.linear(x, base.weight, base.bias)
        expect("layer(x) at the start", call("layer(x)", layer, x), y, f"random x, {kind}",
               {"l starts at zero: it has to start at one": torch.zeros_like(y) if not feedforward
                else base.bias.expand_as(y), "l is added instead of multiplied": y + 1})
        expect("self.ia3_l at the start", scale, torch.ones_like(scale), kind,
               {"the layer multiplies by 1 + l: l itself is the factor, and starts at one": torch.zeros_like(scale)})


def _wrong(feedforward: bool) -> dict[str, Tensor]:
    """Misconception -> what it makes of X."""
    ordinary, inputs = L * (X @ W.T + BIAS), (L * X) @ W.T + BIAS
    common = {"the base layer's bias is left out": (L * X) @ W.T if feedforward else L * (X @ W.T),
              "l is added instead of multiplied": (X + L) @ W.T + BIAS if feedforward else X @ W.T + BIAS + L,
              "l has no effect": X @ W.T + BIAS,
              "the layer divides by l": (X / L) @ W.T + BIAS if feedforward else (X @ W.T + BIAS) / L,
              "the layer multiplies by 1 + l: l itself is the factor":
                  ((1 + L) * X) @ W.T + BIAS if feedforward else (1 + L) * (X @ W.T + BIAS),
              "l is applied twice": (L * L * X) @ W.T + BIAS if feedforward else L * L * (X @ W.T + BIAS)}
    if feedforward:
        return {**common, "the output is rescaled: in a feed-forward layer it is the input": ordinary,
                "the bias is rescaled, too: in a feed-forward layer it is added afterwards": (L * X) @ W.T + L * BIAS}
    return {**common, "the input is rescaled: in an ordinary layer it is the output": inputs,
            "the bias is not rescaled: in an ordinary layer l multiplies the whole output": L * (X @ W.T) + BIAS,
            "the input is rescaled as well as the output": L * ((L * X) @ W.T + BIAS)}


def formula(answer: ModuleType) -> None:
    for feedforward, kind in KINDS.items():
        layer, scale = make(answer, linear(W, BIAS), feedforward)
        put(scale, L)
        right = (L * X) @ W.T + BIAS if feedforward else L * (X @ W.T + BIAS)
        text = f"{given(x=X, W=W, bias=BIAS, l=L)}, {kind}"
        expect("layer(x)", call("layer(x)", layer, X[None]), right[None], text, {
            name: value[None] for name, value in _wrong(feedforward).items()})
        expect("layer.eval()(x)", call("layer(x)", layer.eval(), X[None]), right[None], text,
               {"in eval mode l has no effect": (X @ W.T + BIAS)[None]})
    _places(answer)


def _places(answer: ModuleType) -> None:
    sub_layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = [f"h.{number}.{name}" for number in range(2) for name in sub_layers]

    def chosen(**kinds: bool) -> dict[str, bool]:
        wanted = {key.replace("_", ".", 1): value for key, value in kinds.items()}
        return {name: wanted[name[4:]] for name in names if name[4:] in wanted}

    right = chosen(attn_c_attn=False, mlp_c_proj=True)
    got = answer.places(list(names))
    if not isinstance(got, dict):
        raise Refused("places(names)", type(got).__name__, "a dictionary", because=
                      "nothing is returned: is a return missing?" if got is None else
                      "each name has to come with whether it is a feed-forward layer")
    expect_same("places(names)", got, right, "the 8 linear layers of two blocks", {
        "all linear layers get a vector: two of each block's four do": got if got.keys() == set(names) else None,
        "attn.c_proj gets a vector, too: of the two layers called c_proj only mlp's is meant":
            got if got.keys() == right.keys() | {name for name in names if name.endswith("attn.c_proj")} else None,
        "attn.c_proj gets a vector instead of mlp.c_proj":
            got if got.keys() == chosen(attn_c_attn=False, attn_c_proj=True).keys() else None,
        "the kinds are exchanged: c_attn is an ordinary layer, mlp.c_proj a feed-forward one":
            chosen(attn_c_attn=True, mlp_c_proj=False),
        "mlp.c_fc is rescaled: it is the input of mlp.c_proj that is": chosen(attn_c_attn=False, mlp_c_fc=False),
        "mlp.c_proj is not said to be a feed-forward one": chosen(attn_c_attn=False, mlp_c_proj=False),
        "both are said to be feed-forward ones: c_attn's output is rescaled": chosen(attn_c_attn=True, mlp_c_proj=True),
        "the feed-forward layer is missing": chosen(attn_c_attn=False),
        "the attention layer is missing": chosen(mlp_c_proj=True),
        "only the first block gets vectors: each block does":
            {name: kind for name, kind in right.items() if name.startswith("h.0.")}})


def gradients(answer: ModuleType) -> None:
    for feedforward, kind in KINDS.items():
        layer = make(answer, nn.Linear(IN, OUT).double(), feedforward)[0].double()
        scale = parameter(layer, "ia3_l", IN if feedforward else OUT)
        randomize([scale])
        x = torch.randn(1, 2, IN, dtype=torch.float64, requires_grad=True)
        check_gradients(f"layer(x), {kind}", lambda: layer(x), {"x": x, "l": scale})


def trained(answer: ModuleType) -> None:
    for feedforward, kind in KINDS.items():
        base = nn.Linear(IN, OUT)
        layer, scale = make(answer, base, feedforward)
        check_kept(layer, "base_layer", base)
        check_trained(layer, {"l": scale}, {"W": base.weight, "the base layer's bias": base.bias}, kind)


def count(answer: ModuleType) -> None:
    got = [trained_count(make(answer, nn.Linear(IN, OUT), feedforward)[0].parameters()) for feedforward in KINDS]
    expect_same("trained parameters: out of an ordinary layer, in of a feed-forward one", got, [OUT, IN],
                given(**{"in": IN, "out": OUT}))


def merged(answer: ModuleType) -> None:
    for feedforward, kind in KINDS.items():
        layer, scale = make(answer, linear(W, BIAS), feedforward)
        put(scale, L)
        rows, columns, text = L[:, None] * W, W * L, f"{given(W=W, bias=BIAS, l=L)}, {kind}"
        with unchanged(layer, X[None], "layer.merged()", kind):
            weight, bias = pair("layer.merged()", layer.merged())
            expect("the weight of layer.merged()", weight, columns if feedforward else rows, text,
                   {"in merging the columns are scaled: an output is a row of W": columns,
                    "in merging the rows are scaled: an input is a column of W": rows,
                    "the merged weight is W as it was": W})
            expect("the bias of layer.merged()", bias, BIAS if feedforward else L * BIAS, text,
                   {"in merging the bias is not scaled: l multiplies the whole output of an ordinary layer": BIAS,
                    "in merging the bias is scaled: a feed-forward layer adds it after l": L * BIAS})
        (wide, scale), x = make(answer, nn.Linear(IN, OUT), feedforward), torch.randn(2, 4, IN)
        randomize([scale])
        expect("F.linear(x, *layer.merged())", F.linear(x, *wide.merged()), wide(x), f"a 5 x 3 matrix, {kind}")


def reference(answer: ModuleType) -> None:
    for feedforward, name in ((False, "ia3"), (True, "ia3_feedforward")):
        case = reference_case(name)
        layer, scale = make(answer, linear(case["W"], case["bias"]), feedforward)
        put(scale, case["l"])
        expect("layer(x)", layer(case["x"]), case["y"], f"peft's case {name} in minipeft/check/references.json")
        weight, bias = layer.merged()
        expect("the weight of layer.merged()", weight, case["merged"], f"peft's case {name}")
        expect("the bias of layer.merged()", bias, case["merged_bias"], f"peft's case {name}")
