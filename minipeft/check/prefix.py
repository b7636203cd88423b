"""What an answer to exercises/prefix.py is held against."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from minipeft.check.attention import softmax_attention, triangle
from minipeft.check.judging import (
    Refused,
    call,
    check_gradients,
    check_trained,
    close,
    expect,
    expect_same,
    expect_shape,
    given,
    pair,
    parameter,
    put,
    trained_count,
    whole,
)
from minipeft.check.references import reference_case

NAMES = {"Prefix": 4, "Prefix.keys_and_values": 2, "Prefix.positions": 1, "Prefix.attend": 5}
V, L, H, D = 2, 3, 2, 4
C = H * D
# Two heads of three tokens: (batch, H, T, D). With as many tokens as virtual ones, mistakes would look alike.
T = 3
Q = whole([[[1, 0, 2, 0], [0, 1, 0, 1], [1, 2, 0, 1]], [[1, 1, 0, 0], [2, 0, 0, 1], [0, 1, 1, 0]]])
K = whole([[[1, 1, 0, 0], [0, 2, 1, 1], [1, 0, 0, 2]], [[0, 1, 1, 0], [1, 0, 1, 2], [2, 1, 0, 0]]])
VALUES = whole([[[4, 0, 1, 2], [0, 8, 3, 1], [5, 1, 0, 7]], [[2, 6, 0, 1], [4, 0, 1, 5], [1, 3, 9, 0]]])
SEEN = torch.cat((torch.ones(T, V, dtype=torch.bool), triangle(T, T)), 1)     # (T, V + T)


def make(answer: ModuleType, table: Tensor | None = None) -> tuple[Any, Tensor]:
    """The answer's prefix with its table, of small whole numbers unless another is given."""
    prefix = answer.Prefix(V, L, H, C)
    own = parameter(prefix, "table", V, 2 * L * C, wrong={
        (V, L * C): "keys or values are missing: each block has both",
        (V, 2 * C): "each block has its own keys and values",
        (V, C): "that is a prompt: each block has its own keys and values"})
    put(own, torch.arange(V * 2 * L * C).view(V, -1) % 5 - 1.0 if table is None else table)
    return prefix, own


def layout(table: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """P_k and P_v, each (1, H, V, D), by the equation's order of columns."""
    key, value = table.unflatten(1, (L, 2, H, D))[:, layer].permute(1, 2, 0, 3).unsqueeze(1)
    return key, value


def shapes(answer: ModuleType) -> None:
    prefix, _ = make(answer)
    for name, tensor in zip(("P_k", "P_v"), pair("keys_and_values(1, 3)", prefix.keys_and_values(1, 3))):
        expect_shape(f"{name} of keys_and_values(1, 3)", tensor, (3, H, V, D), torch.float32, wrong={
            (H, V, D): "the batch is missing: expand P_k and P_v to it"})
    expect_shape("positions(3)", prefix.positions(3), (3,), torch.long,
                 wrong={(1, 3): "positions are the same for every text: (T,), without a batch",
                        torch.float32: "positions are rows of wpe: whole numbers",
                        (V + 3,): "virtual tokens get positions, too: they have none, only the text's tokens have"})
    prefix = prefix.double()
    text = torch.randn(3, 3, H, 5, D, dtype=torch.float64)
    expect_shape("attend(1, q, k, v)", prefix.attend(1, *text, None), (3, H, 5, D), torch.float64,
                 "q, k, v (3, 2, 5, 4)")


def _wrong_layouts(table: Tensor, layer: int) -> dict[str, Tensor]:
    """Misconception -> P_k and P_v of this block, (2, 1, H, V, D), as it takes them from the table."""
    per_block = table.unflatten(1, (L, 2, H, D))

    def both(view: Tensor) -> Tensor:                                         # (V, 2, H, D)
        return view.permute(1, 2, 0, 3).unsqueeze(1)

    return {"key and value are exchanged: the key comes first": both(per_block[:, layer].flip(1)),
            "the value is the key: the value is the C columns behind it":
                both(per_block[:, layer, :1].expand(-1, 2, -1, -1)),
            "all blocks' keys come first in your table: its columns are key and value, block after block":
                both(table.unflatten(1, (2, L, H, D))[:, :, layer]),
            "every block gets block 0's": both(per_block[:, 0]),
            "block i begins at column i C: each block has 2 C columns":
                both(table[:, layer * C:(layer + 2) * C].unflatten(1, (2, H, D))),
            "the heads own every second channel: head 0 owns the first D":
                both(table.unflatten(1, (L, 2, D, H))[:, layer].transpose(2, 3)),
            "the heads are cut across virtual tokens: split C into (H, D) first, then exchange V and H":
                per_block[:, layer].transpose(0, 1).reshape(2, 1, H, V, D)}


def _wrong_attend(p_k: Tensor, p_v: Tensor) -> dict[str, Tensor]:
    """Misconception -> what it makes of Q, K and VALUES."""
    k, v = torch.cat((p_k, K), 2), torch.cat((p_v, VALUES), 2)
    alone = softmax_attention(Q, K, VALUES, triangle(T, T))
    hidden = (Q @ k.transpose(-1, -2) / 2).masked_fill(~SEEN, -torch.inf)
    return {"the triangle begins at the upper left corner, as is_causal's does: it hides prefix and text":
                softmax_attention(Q, k, v, torch.ones(T, V + T, dtype=torch.bool).tril()),
            "the prefix has no effect: it is not put in, or hidden by the mask": alone,
            "the mask itself is added, 1 and 0: where nothing is seen, -infinity is added, and else 0":
                (Q @ k.transpose(-1, -2) / 2 + SEEN).softmax(-1) @ v,
            "hidden scores are set to 0: exp(0) is 1, so they take a share; they are -infinity":
                (Q @ k.transpose(-1, -2) / 2 * SEEN).softmax(-1) @ v,
            "softmax over the queries: the shares of one query's keys add up to 1": hidden.softmax(-2) @ v,
            "softmax over the heads: each head is by itself": hidden.softmax(1) @ v,
            "there is no causal mask within the text": softmax_attention(Q, k, v, torch.ones_like(SEEN)),
            "the prefix stands behind the text, with the mask of before":
                softmax_attention(Q, torch.cat((K, p_k), 2), torch.cat((VALUES, p_v), 2), SEEN),
            "P_k stands before the keys, and P_v behind the values":
                softmax_attention(Q, k, torch.cat((VALUES, p_v), 2), SEEN),
            "P_k and P_v are exchanged": softmax_attention(Q, torch.cat((p_v, K), 2), torch.cat((p_k, VALUES), 2),
                                                           SEEN),
            "not scaled: the scores are divided by sqrt(D)": softmax_attention(Q, k, v, SEEN, 1),
            "divided by D, not by its root": softmax_attention(Q, k, v, SEEN, 1 / D),
            "divided by sqrt(C): each head has D channels": softmax_attention(Q, k, v, SEEN, C**-0.5),
            "the prefix has a softmax of its own: one goes over prefix and text together":
                alone + softmax_attention(Q, p_k, p_v, SEEN[:, :V])}


def _start(answer: ModuleType) -> None:
    """The table as it starts: so many numbers that mean, deviation and range leave nothing to chance."""
    table = parameter(answer.Prefix(64, 4, 2, 64), "table", 64, 512).detach().double()      # 32,768 numbers
    mean, deviation, largest = table.mean().item(), table.std().item(), table.abs().max().item()
    if abs(mean) < 0.1 and 0.9 < deviation < 1.1 and 3 < largest < 8:
        return
    because = "the table's mean is not 0: torch.rand is uniform from 0 to 1, torch.randn is standard normal"
    if deviation < 1e-6:
        because = "the table's numbers are all the same: then so are the virtual tokens; they start standard normal"
    elif abs(mean) < 0.1 * deviation:
        because = ("the table's numbers are too small: standard normal has deviation 1" if deviation < 0.9 else
                   "the table's numbers are too large: standard normal has deviation 1" if deviation > 1.1 else
                   "the table has the deviation of a standard normal, but not its range: it is another distribution")
    raise Refused("self.table at the start", f"mean {mean:.2g}, deviation {deviation:.2g}, largest {largest:.2g}",
                  "a standard normal's: mean 0, deviation 1, largest about 4", "Prefix(64, 4, 2, 64), 32,768 numbers",
                  because)


def formula(answer: ModuleType) -> None:
    prefix, table = make(answer, torch.arange(float(V * 2 * L * C)).view(V, -1))
    for layer in range(L):
        got = torch.stack(pair(f"keys_and_values({layer}, 1)", prefix.keys_and_values(layer, 1)))
        expect(f"P_k and P_v, keys_and_values({layer}, 1)", got, torch.stack(layout(table, layer)),
               f"a table 0, 1, 2, ... in shape (2, {2 * L * C})", _wrong_layouts(table, layer))
    expect("positions(3)", prefix.positions(3), torch.arange(V, V + 3), "V 2", {
        "the text begins at position 0: the prefix takes V positions": torch.arange(3),
        "the text begins one position too late": torch.arange(V + 1, V + 4),
        "the text begins one position too early": torch.arange(V - 1, V + 2)})
    prefix, table = make(answer)
    p_k, p_v = layout(table, 1)
    got = call("attend(1, q, k, v)", prefix.attend, 1, Q, K, VALUES, None)
    expect("attend(1, q, k, v)", got, softmax_attention(Q, torch.cat((p_k, K), 2), torch.cat((p_v, VALUES), 2), SEEN),
           given(P_k=p_k[0], P_v=p_v[0], q=Q[0], k=K[0], v=VALUES[0]),
           {**_wrong_attend(p_k, p_v), "attend takes block 0's P_k and P_v, not those of its block":
               softmax_attention(Q, *(torch.cat(both, 2) for both in zip(layout(table, 0), (K, VALUES))), SEEN)})
    _start(answer)


def gradients(answer: ModuleType) -> None:
    prefix, _ = make(answer)
    prefix = prefix.double()
    text = [torch.randn(1, H, 2, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def both_blocks() -> Tensor:
        return prefix.attend(0, *text, None) + prefix.attend(1, *text, None)

    check_gradients("attend(0, q, k, v) + attend(1, q, k, v)", both_blocks,
                    {**dict(zip("qkv", text)), "the table": parameter(prefix, "table", V, 2 * L * C)})


def trained(answer: ModuleType) -> None:
    prefix, table = make(answer)
    check_trained(prefix, {"the table": table}, {})


def count(answer: ModuleType) -> None:
    expect_same("trained parameters: 2 V L C", trained_count(answer.Prefix(V, L, H, C).parameters()), 2 * V * L * C,
                given(V=V, L=L, C=C))


def padding(answer: ModuleType) -> None:
    prefix, table = make(answer)
    prefix, table = prefix.double(), table.detach().double()
    text, pads = torch.randn(3, 1, H, 3, D).double(), 5 * torch.randn(3, 1, H, 2, D).double()
    alone = prefix.attend(1, *text, None)
    key, value = layout(table, 1)
    _extended(prefix, text, alone)
    for side, mask in (("left", [0, 0, 1, 1, 1]), ("right", [1, 1, 1, 0, 0])):
        mask = torch.tensor([mask])
        q, k, v = torch.cat((pads, text) if side == "left" else (text, pads), dim=3)
        real = mask[0].bool()
        keys, values = torch.cat((key, k), 2), torch.cat((value, v), 2)

        seen = torch.cat((torch.ones(5, V, dtype=torch.bool), triangle(5, 5)), 1)     # (T, V + T)

        def by(*mask: Tensor) -> Tensor:
            return softmax_attention(q, keys, values, seen & torch.cat(mask, 1).bool())[0, :, real]

        ones = torch.ones(1, V, dtype=torch.long)
        scores, shown = q @ keys.transpose(-1, -2) / 2, torch.cat((ones, mask), 1)
        added = (scores + (seen & shown.bool())).softmax(-1) @ values
        past = scores.masked_fill(~seen, -torch.inf)                                  # the causal mask alone
        wrong = {"attention_mask has no effect: real tokens see pads": by(ones, torch.ones_like(mask)),
                 "the mask's V ones stand on its right: the prefix is on the left": by(mask, ones),
                 "the mask itself is added, 1 and 0: where nothing is seen, -infinity is added": added[0, :, real],
                 "attention_mask is added, 1 and 0: at a pad -infinity is added, and else 0":
                     ((past + shown).softmax(-1) @ values)[0, :, real],
                 "the scores are multiplied by attention_mask: exp(0) is 1, so pads take a share; they are -infinity":
                     ((scores * shown).masked_fill(~seen, -torch.inf).softmax(-1) @ values)[0, :, real],
                 "the mask hides the prefix, too: it gets ones for it, not zeros": by(1 - ones, mask)}
        expect("attend(...) at real tokens, and the text alone", prefix.attend(1, q, k, v, mask)[0, :, real], alone[0],
               f"{given(attention_mask=mask)}, random q, k and v",
               {name: value for name, value in wrong.items() if not torch.allclose(value, alone[0])})
    _batches(prefix, key, value)


def _extended(prefix: Any, text: Tensor, alone: Tensor) -> None:
    """Who forgets the prefix's ones finds a mask too short, and computes the right values where it has them already."""
    mask = torch.ones(1, 3, dtype=torch.long)
    try:
        prefix.attend(1, *text, mask)
    except RuntimeError as error:
        longer = prefix.attend(1, *text, torch.ones(1, V + 3, dtype=torch.long))
        if not close(longer, alone):
            raise
        raise Refused("attend(1, q, k, v, attention_mask)", f"{type(error).__name__}: {error}", "the text's output",
                      given(attention_mask=mask), "the mask's V ones for the prefix are missing: attention_mask knows "
                      "of the text's T tokens only, and the keys are V + T") from None


def _batches(prefix: Any, key: Tensor, value: Tensor) -> None:
    """Two texts, then three, each with its own pads. With H = 2 heads a batch of two can be mistaken for them."""
    masks = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    for batch in (2, 3):
        mask, text = masks[:batch], torch.randn(3, batch, H, 5, D).double()
        q, k, v = text
        keys, values = (torch.cat((own.expand(batch, -1, -1, -1), part), 2) for own, part in ((key, k), (value, v)))
        ones = torch.ones(batch, V, dtype=torch.bool)
        real, shown = mask.bool(), torch.cat((ones, mask.bool()), 1)[:, None, None]         # (batch, 1, 1, V + T)
        seen = torch.cat((torch.ones(5, V, dtype=torch.bool), triangle(5, 5)), 1)           # (T, V + T)

        def by(shown: Tensor) -> Tensor:
            return softmax_attention(q, keys, values, seen & shown).transpose(1, 2)[real]   # (real tokens, H, D)

        wrong = {"each text's mask is taken for a head's: attention_mask needs an axis for the heads and one for the "
                 "queries, (batch, 1, 1, V + T)": by(shown[:, 0])} if batch == H else {}
        wrong["every text gets the first one's mask"] = by(shown[:1])
        got = prefix.attend(1, q, k, v, mask)
        expect_shape("attend(...)", got, (batch, H, 5, D), torch.float64, given(attention_mask=mask))
        expect(f"attend(...) at the real tokens of {batch} texts", got.transpose(1, 2)[real], by(shown),
               f"{given(attention_mask=mask)}, random q, k and v", wrong)


def causal(answer: ModuleType) -> None:
    prefix = make(answer)[0].double()
    q, k, v = torch.randn(3, 1, H, 5, D).double()
    before, changed = prefix.attend(0, q, k, v, None), v.clone()
    changed[:, :, 3] += 1
    expect("attend(...)[:, :, :3], before and after v of token 3 changes",
           prefix.attend(0, q, k, changed, None)[:, :, :3], before[:, :, :3], "random q, k and v")


def reference(answer: ModuleType) -> None:
    case = reference_case("prefix")
    prefix = answer.Prefix(2, 2, 2, 4)
    put(parameter(prefix, "table", 2, 16), case["table"])
    for layer in range(2):
        for name, got in zip(("P_k", "P_v"), prefix.keys_and_values(layer, 1)):
            expect(f"{name} of keys_and_values({layer}, 1)", got, case[f"{name}.{layer}"],
                   "peft's case prefix in minipeft/check/references.json")
    expect("attend(1, q, k, v)", prefix.attend(1, case["q"], case["k"], case["v"], None), case["o"],
           "peft's prefix in transformers' attention, case prefix", tolerance=1e-4)
