"""What an answer to exercises/attention.py is held against."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from minipeft.check.judging import (
    Refused,
    call,
    check_gradients,
    expect,
    expect_same,
    expect_shape,
    given,
    put,
    randomize,
    trained_count,
    whole,
    with_bias,
)
from minipeft.check.references import reference_case

NAMES = {"split_heads": 2, "merge_heads": 1, "visible": 3, "attend": 4, "Attention": 2, "Attention.forward": 3}
C, H, D = 8, 2, 4
# Two heads of two tokens: (batch, H, T, D).
Q = whole([[[1, 0, 2, 0], [0, 1, 0, 1]], [[1, 1, 0, 0], [2, 0, 0, 1]]])
K = whole([[[1, 1, 0, 0], [0, 2, 1, 1]], [[0, 1, 1, 0], [1, 0, 1, 2]]])
V = whole([[[4, 0, 1, 2], [0, 8, 3, 1]], [[2, 6, 0, 1], [4, 0, 1, 5]]])
CAUSAL = torch.ones(2, 2, dtype=torch.bool).tril()


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """The equation itself."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1]**-0.5 if scale is None else scale)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def heads(x: Tensor, n_head: int = H) -> Tensor:
    """(batch, T, C) -> (batch, H, T, D)."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """(batch, H, T, D) -> (batch, T, C)."""
    return x.transpose(1, 2).flatten(2)


def triangle(T: int, S: int) -> Tensor:
    """(T, S): the last T of S tokens, each seeing itself and those before."""
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


def shapes(answer: ModuleType) -> None:
    expect_shape("split_heads(x, 2)", answer.split_heads(torch.randn(3, 5, C), H), (3, H, 5, D), torch.float32,
                 "x (3, 5, 8)")
    expect_shape("merge_heads(x)", answer.merge_heads(torch.randn(3, H, 5, D)), (3, 5, C), torch.float32,
                 "x (3, 2, 5, 4)")
    cast = "visible says True and False; what is added to the scores is attend's own business"
    expect_shape("visible(3, 5)", answer.visible(3, 5, None), (3, 5), torch.bool, cast=cast)
    expect_shape("visible(3, 5, attention_mask)", answer.visible(3, 5, torch.ones(2, 5, dtype=torch.long)),
                 (2, 1, 3, 5), torch.bool, "attention_mask (2, 5)", wrong={
                     (2, 3, 5): "the heads' axis is missing: (batch, T, S) would be taken for (heads, T, S)"},
                 cast=cast)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, 5, C, dtype=dtype)
        module = answer.Attention(C, H).to(dtype)
        with_bias(module, "c_attn", 3 * C, C), with_bias(module, "c_proj", C, C)
        expect_shape("Attention(8, 2)(x)", call("Attention(8, 2)(x)", module, x), (2, 5, C), dtype,
                     f"x (2, 5, 8), {dtype}")


def _wrong_attend() -> dict[str, Tensor]:
    """Misconception -> what it makes of Q, K, V and CAUSAL."""
    scores = Q @ K.transpose(-1, -2) / 2
    hidden = scores.masked_fill(~CAUSAL, -torch.inf)
    return {"not scaled: the scores are divided by sqrt(D)": softmax_attention(Q, K, V, CAUSAL, 1),
            "divided by D, not by its root": softmax_attention(Q, K, V, CAUSAL, 1 / D),
            "divided by sqrt(C): each head has D channels": softmax_attention(Q, K, V, CAUSAL, C**-0.5),
            "multiplied by sqrt(D)": softmax_attention(Q, K, V, CAUSAL, D**0.5),
            "divided by sqrt(T), the number of tokens": softmax_attention(Q, K, V, CAUSAL, 2**-0.5),
            "softmax over the queries: the shares of one query's keys add up to 1": hidden.softmax(-2) @ V,
            "softmax over the heads: each head is by itself": hidden.softmax(1) @ V,
            "the mask is not used": scores.softmax(-1) @ V,
            "the mask is upside down: True is where a query may look": softmax_attention(Q, K, V, ~CAUSAL),
            "hidden scores are set to 0: exp(0) is 1, so they take a share; they are -infinity":
                (scores * CAUSAL).softmax(-1) @ V,
            "the mask itself is added, 1 and 0: where nothing is seen, -infinity is added, and else 0":
                (scores + CAUSAL).softmax(-1) @ V,
            "the mask comes after the softmax: then the shares do not add up to 1": (scores.softmax(-1) * CAUSAL) @ V,
            "softmax is left out": (scores * CAUSAL) @ V,
            "the shares weigh the keys: they weigh the values": softmax_attention(Q, K, K, CAUSAL),
            "q and k are exchanged: a query's row is compared with all keys":
                scores.transpose(-1, -2).masked_fill(~CAUSAL, -torch.inf).softmax(-1) @ V}


def formula(answer: ModuleType) -> None:
    x = torch.arange(16.0).view(1, 2, C)
    got = call("split_heads(x, 2)", answer.split_heads, x, H)
    expect("split_heads(x, 2)", got, heads(x), "x 0, 1, 2, ... 15 in shape (1, 2, 8)", {
        "the heads are cut across tokens: split C into (H, D) first, then exchange T and H": x.view(1, H, 2, D),
        "the heads own every second channel: head 0 owns the first D": x.view(1, 2, D, H).permute(0, 3, 1, 2)})
    expect("merge_heads(split_heads(x, 2))", answer.merge_heads(heads(x)), x, "x 0, 1, 2, ... 15 in shape (1, 2, 8)", {
        "the heads are not exchanged back before they are joined": heads(x).reshape(1, 2, C),
        "the channels of the heads are interleaved": heads(x).permute(0, 2, 3, 1).reshape(1, 2, C)})
    for T, S in ((3, 3), (3, 5)):
        ones = torch.ones(T, S, dtype=torch.bool)
        wrong = {"a query does not see its own token": ones.tril(S - T - 1),
                 "a query sees only later tokens": ones.triu(S - T),
                 "there is no causal mask: a query sees later tokens": ones,
                 "the mask is upside down: True is where a query may look": ~triangle(T, S)}
        if S > T:
            wrong["the triangle begins at the upper left corner: the queries are the last T of the S"] = ones.tril()
        expect(f"visible({T}, {S})", answer.visible(T, S, None), triangle(T, S), wrong=wrong)
    got = call("attend(q, k, v, mask)", answer.attend, Q, K, V, CAUSAL)
    expect("attend(q, k, v, mask)", got, softmax_attention(Q, K, V, CAUSAL),
           given(q=Q[0], k=K[0], v=V[0]) + ", a causal mask", _wrong_attend())
    q, k, v = torch.randn(3, 1, 1, 2, 9, dtype=torch.float64)
    expect("attend(q, k, v, mask), D 9", answer.attend(q, k, v, CAUSAL), softmax_attention(q, k, v, CAUSAL),
           "random q, k and v", {"divided by D / 2, not by sqrt(D)": softmax_attention(q, k, v, CAUSAL, 2 / 9)})
    module, x = _random(answer), torch.randn(1, 5, C, dtype=torch.float64)
    expect("Attention(8, 2)(x)", module(x), _forward(module, x, triangle(5, 5)), "random x (1, 5, 8)",
           _wrong_forward(module, x, triangle(5, 5)))


def _forward(module: Any, x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None = None, order: str = "qkv",
             n_head: int = H) -> Tensor:
    """The whole module by its equation."""
    parts = dict(zip(order, (heads(part, n_head) for part in module.c_attn(x).chunk(3, -1))))
    k, v = parts["k"], parts["v"]
    if past is not None:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
    return module.c_proj(joined(softmax_attention(parts["q"], k, v, mask)))


def _wrong_forward(module: Any, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Misconception -> what it makes of x."""
    q, k, v = module.c_attn(x).unflatten(-1, (H, 3, D)).permute(3, 0, 2, 1, 4)                # each (batch, H, T, D)
    o = softmax_attention(*(heads(part) for part in module.c_attn(x).chunk(3, -1)), mask)
    orders = {f"c_attn's thirds are taken as {', '.join(order)}: they are q, k, v": _forward(module, x, mask, None,
                                                                                             order)
              for order in ("kqv", "vkq", "qvk", "kvq", "vqk")}
    return {**orders,
            "each head takes its own q, k and v out of c_attn: all q come first, then all k, then all v":
                module.c_proj(joined(softmax_attention(q, k, v, mask))),
            "c_proj is left out": joined(o),
            "there is one head: split q, k and v": _forward(module, x, mask, n_head=1),
            "x is added: that is the block's business": x + module.c_proj(joined(o)),
            "there is no causal mask: a query sees later tokens": _forward(module, x, torch.ones_like(mask)),
            "the heads are not exchanged back before they are joined": module.c_proj(o.reshape(x.shape)),
            "c_proj's bias is left out": joined(o) @ module.c_proj.weight.T}


def _random(answer: ModuleType, channels: int = C) -> Any:
    """The answer's module in float64, with both layers random."""
    module = answer.Attention(channels, H).double()
    randomize([*with_bias(module, "c_attn", 3 * channels, channels).values(),
               *with_bias(module, "c_proj", channels, channels).values()])
    return module


def gradients(answer: ModuleType) -> None:
    module = _random(answer, 4)
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    check_gradients("Attention(4, 2)(x)", lambda: module(x),
                    {"x": x, **with_bias(module, "c_attn", 12, 4), **with_bias(module, "c_proj", 4, 4)})


def count(answer: ModuleType) -> None:
    expect_same("trained parameters: 4 C^2 + 4 C", trained_count(answer.Attention(C, H).parameters()),
                4 * C * C + 4 * C,
                given(C=C))


def padding(answer: ModuleType) -> None:
    module = _random(answer)
    x, pads = torch.randn(1, 3, C, dtype=torch.float64), 5 * torch.randn(1, 2, C, dtype=torch.float64)
    alone = module(x)
    for side, mask in (("left", [0, 0, 1, 1, 1]), ("right", [1, 1, 1, 0, 0])):
        mask = torch.tensor([mask])
        batch = torch.cat((pads, x) if side == "left" else (x, pads), dim=1)
        real, y = mask[0].bool(), module(batch, mask)
        text = f"{given(attention_mask=mask)}, random x"
        if y.isnan()[0, ~real].any():
            raise Refused("Attention(...)(x, attention_mask) at a pad", "NaN", "a number", text,
                          "a pad sees no key at all: let it see itself, or the next layer's values are NaN")
        unmasked = _forward(module, batch, triangle(5, 5))
        upside = _forward(module, batch, (triangle(5, 5) & (mask == 0)) | torch.eye(5, dtype=torch.bool))
        expect("Attention(...)(x, attention_mask) at real tokens, and the text alone", y[0, real], alone[0], text, {
            "real tokens see pads: attention_mask has to hide the keys there": unmasked[0, real],
            "attention_mask is upside down: 1 is at real tokens": upside[0, real]}
            if side == "left" else {})
    both = torch.cat((torch.cat((pads, x), 1), torch.cat((x, pads), 1)))
    y = module(both, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]))
    expect("a batch with pads on the left and on the right", torch.stack((y[0, 2:], y[1, :3])),
           alone.expand(2, -1, -1), "two texts, each with its own mask")


    _masked(answer)


def _masked(answer: ModuleType) -> None:
    """`visible` with a past and pads, for the queries that are real tokens. What a pad sees means nothing."""
    T, S, mask = 3, 5, torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    shown, real, ones = mask.bool()[:, None], mask.bool()[:, S - T:], torch.ones(T, S, dtype=torch.bool)
    seen = triangle(T, S)
    wrong = {"a query's own token is looked for without the offset: query i is token S - T + i":
                 (seen & shown) | torch.eye(T, S, dtype=torch.bool),
             "with a past attention_mask has no effect: cached pads are hidden, too": seen.expand(2, -1, -1),
             "with an attention_mask and a past there is no causal mask: a query sees later tokens": ones & shown,
             "with an attention_mask the triangle begins at the upper left corner: the queries are the last T of the S":
                 (ones.tril() & shown) | torch.eye(S, dtype=torch.bool)[S - T:],
             "every text gets the first one's mask": (seen & shown[:1]).expand(2, -1, -1)}
    got = call("visible(3, 5, attention_mask)", answer.visible, T, S, mask)
    expect("visible(3, 5, attention_mask) for the queries that are real tokens", got[:, 0][real],
           (seen & shown)[real], given(attention_mask=mask), {name: value[real] for name, value in wrong.items()})


def causal(answer: ModuleType) -> None:
    module, x = _random(answer), torch.randn(1, 5, C, dtype=torch.float64)
    y, changed = module(x), x.clone()
    changed[:, 3] += 1
    expect("Attention(...)(x)[:, :3], before and after token 3 changes", module(changed)[:, :3], y[:, :3], "random x")
    past = tuple(heads(part) for part in module.c_attn(x[:, :2]).chunk(3, -1)[1:])
    rest = x[:, 2:]
    k, v = (heads(part) for part in module.c_attn(rest).chunk(3, -1)[1:])
    q = heads(module.c_attn(rest)[..., :C])

    def by(keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        return module.c_proj(joined(softmax_attention(q, torch.cat(keys, 2), torch.cat(values, 2), mask)))

    expect("Attention(...)(x[:, 2:], past=...), and the whole text's", module(rest, None, past), y[:, 2:],
           "random x (1, 5, 8), two tokens cached", {
        "past has no effect": _forward(module, rest, triangle(3, 3)),
        "past stands behind the new keys: it comes before": by((k, past[0]), (v, past[1]), triangle(3, 5)),
        "past's values stand behind the new ones, its keys before": by((past[0], k), (v, past[1]), triangle(3, 5)),
        "the triangle begins at the upper left corner: the queries are the last T of the S tokens":
            by((past[0], k), (past[1], v), torch.ones(3, 5, dtype=torch.bool).tril()),
        "with a past there is no causal mask: a query sees later tokens":
            by((past[0], k), (past[1], v), torch.ones(3, 5, dtype=torch.bool)),
        "past's keys and values are exchanged": by((past[1], k), (past[0], v), triangle(3, 5))})


def reference(answer: ModuleType) -> None:
    case = reference_case("attention")
    module = answer.Attention(4, 2)
    for name in ("c_attn", "c_proj"):
        put(getattr(module, name).weight, case[f"{name}.weight"]), put(getattr(module, name).bias, case[f"{name}.bias"])
    expect("Attention(4, 2)(x)", module(case["x"]), case["y"],
           "transformers' case attention in minipeft/check/references.json", tolerance=1e-4)
