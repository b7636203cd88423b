"""What an answer to exercises/adapter.py is held against."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
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
    put,
    randomize,
    randomized,
    trained_count,
    whole,
    with_bias,
)
from minipeft.check.references import reference_case
from minipeft.model.config import GPT2Config
from minipeft.model.gpt2 import Block

NAMES = {"BottleneckAdapter": 3, "BottleneckAdapter.forward": 1, "AdaptedBlock": 4, "AdaptedBlock.forward": 1}
C, M = 4, 3
H, DOWN, B_DOWN = whole([3, -1]), whole([1, 2], [-1, -1]), torch.tensor([1.0, 1.0])
UP, B_UP, S = whole([2, 1], [-3, 4]), torch.tensor([1.0, -2.0]), 3


def make(answer: ModuleType, width: int, bottleneck: int, *scaling: float) -> tuple[Any, dict[str, Tensor]]:
    """The answer's adapter with its four tensors."""
    adapter = answer.BottleneckAdapter(width, bottleneck, *scaling)
    return adapter, tensors_of(adapter, width, bottleneck)


def tensors_of(adapter: Any, width: int, bottleneck: int) -> dict[str, Tensor]:
    """An adapter's four tensors by name."""
    return {**with_bias(adapter, "down", bottleneck, width), **with_bias(adapter, "up", width, bottleneck)}


def plain_block(width: int = C, inner: int = 8) -> Block:
    """A block of this library without dropout, with random values."""
    config = GPT2Config(n_embd=width, n_head=2, n_layer=1, n_inner=inner, resid_pdrop=0.0, attn_pdrop=0.0)
    return randomized(Block(config, 0))


def shapes(answer: ModuleType) -> None:
    for dtype in (torch.float32, torch.float64):
        h = torch.randn(2, 5, C, dtype=dtype)
        adapter = make(answer, C, M)[0].to(dtype)
        expect_shape("adapter(h)", call("adapter(h)", adapter, h), h.shape, dtype, f"h {tuple(h.shape)}, {dtype}")
        block = answer.AdaptedBlock(plain_block(), C, M, 1.0).to(dtype)
        expect_shape("AdaptedBlock(...)(x)", call("AdaptedBlock(...)(x)", block, h), h.shape, dtype,
                     f"x {tuple(h.shape)}, {dtype}")


def start(answer: ModuleType) -> None:
    adapter, tensors = make(answer, C, M)
    if not tensors["down.weight"].any():
        raise Refused("self.down.weight at the start", "all zero", "random", because=(
            "W_down and W_up have changed places: W_down starts random, W_up at zero" if tensors["up.weight"].any() else
            "both matrices start at zero: then neither ever gets a gradient"))
    for name in ("up.weight", "up.bias"):
        if tensors[name].any():
            raise Refused(f"self.{name} at the start", "random", "all zero",
                          because=f"{name} starts random: it has to start at zero")
    check_random("down.weight", tensors["down.weight"])
    h = torch.randn(2, 5, C)
    expect("adapter(h) at the start", call("adapter(h)", adapter, h), h, "random h",
           {"h itself is not added: the adapter gives what it adds alone": torch.zeros_like(h),
            "h is added twice": 2 * h, "relu is applied to the sum, too": F.relu(h)})
    block, x = plain_block(), torch.randn(2, 5, C)
    adapted = answer.AdaptedBlock(block, C, M, 1.0)
    expect("AdaptedBlock(...)(x) at the start", call("AdaptedBlock(...)(x)", adapted, x), block(x), "random x",
           {name: value for name, value in _wrong_blocks(block, lambda h: h, lambda h: h, x).items()
            if not torch.allclose(value, block(x))})


def _wrong(s: float) -> dict[str, Tensor]:
    """Misconception -> what it makes of H."""
    z = H @ DOWN.T + B_DOWN
    up = F.relu(z) @ UP.T + B_UP
    return {"h itself is not added: the adapter gives what it adds alone": s * up,
            "h is added twice": 2 * H + s * up,
            "relu is left out": H + s * (z @ UP.T + B_UP),
            "relu stands behind W_up: it belongs between the two layers": H + s * F.relu(z @ UP.T + B_UP),
            "relu is applied to the sum, too": F.relu(H + s * up),
            "relu is applied to h: it belongs between the two layers": H + s * (F.relu(H) @ DOWN.T + B_DOWN) @ UP.T
                                                                       + s * B_UP,
            "gelu instead of relu": H + s * (F.gelu(z) @ UP.T + B_UP),
            "tanh instead of relu": H + s * (torch.tanh(z) @ UP.T + B_UP),
            "the scale is left out": H + up,
            "the scale falls on h, too: it belongs to what is added": s * (H + up),
            "the scale falls on h instead of what is added": s * H + up,
            "the scale stands before b_up: it belongs to all that is added": H + s * F.relu(z) @ UP.T + B_UP,
            "b_down is left out": H + s * (F.relu(H @ DOWN.T) @ UP.T + B_UP),
            "b_up is left out": H + s * F.relu(z) @ UP.T,
            "W_up reads h, and W_down what comes out: first narrow, then widen":
                H + s * (F.relu(H @ UP.T + B_UP) @ DOWN.T + B_DOWN)}


def _wrong_blocks(block: Any, first: Any, second: Any, x: Tensor) -> dict[str, Tensor]:
    """Misconception -> what an adapted block makes of x."""
    def mlp(x: Tensor) -> Tensor:
        return block.mlp(block.ln_2(x))

    attn = block.attn(block.ln_1(x))
    right, behind = x + first(attn), first(x + attn)
    other = x + second(attn)
    before = x + block.attn(first(block.ln_1(x)))
    beside = x + attn + first(block.ln_1(x)) - block.ln_1(x)
    return {"the adapters stand behind the block's addition: they belong before it": second(behind + mlp(behind)),
            "the adapters stand before the sub-layers: they belong behind":
                before + block.mlp(second(block.ln_2(before))),
            "the adapters stand beside the sub-layers: they belong behind":
                beside + mlp(beside) + second(block.ln_2(beside)) - block.ln_2(beside),
            "there is no adapter behind the feed-forward layer": right + mlp(right),
            "there is no adapter behind attention": x + attn + second(mlp(x + attn)),
            "one adapter stands in both places: there are two": right + first(mlp(right)),
            "the two adapters have changed places": other + first(mlp(other)),
            "the block's own additions are left out": second(mlp(first(attn))),
            "the second addition is left out": second(mlp(right)),
            "the feed-forward layer reads the block's input, not what attention has added":
                right + second(mlp(x)),
            "ln_1 and ln_2 are left out": (y := x + first(block.attn(x))) + second(block.mlp(y)),
            "the adapters are not called": x + attn + mlp(x + attn)}


def formula(answer: ModuleType) -> None:
    for scaling in (S, 1):                                                    # 1 is the default
        adapter, tensors = make(answer, 2, 2, *([scaling] if scaling != 1 else []))
        for name, values in {"down.weight": DOWN, "down.bias": B_DOWN, "up.weight": UP, "up.bias": B_UP}.items():
            put(tensors[name], values)
        expect("adapter(h)", call("adapter(h)", adapter, H[None])[0],
               H + scaling * (F.relu(H @ DOWN.T + B_DOWN) @ UP.T + B_UP),
               given(h=H, W_down=DOWN, b_down=B_DOWN, W_up=UP, b_up=B_UP, s=scaling), _wrong(scaling))
    _block(answer)


def _block(answer: ModuleType) -> None:
    """Both adapters in a block of this library."""
    block = plain_block().double()
    adapted, x = answer.AdaptedBlock(block, C, M, float(S)).double(), torch.randn(1, 5, C, dtype=torch.float64)
    first, second = ([*tensors_of(each, C, M).values()] for each in (adapted.first, adapted.second))
    randomize(first, seed=1), randomize(second, seed=2)

    def by_equation(weights: list[Tensor]) -> Any:
        return lambda h: h + S * F.linear(F.relu(F.linear(h, *weights[:2])), *weights[2:])

    first, second = by_equation(first), by_equation(second)
    y = x + first(block.attn(block.ln_1(x)))
    unscaled = [lambda h, each=each: h + (each(h) - h) / S for each in (first, second)]
    y_unscaled = x + unscaled[0](block.attn(block.ln_1(x)))
    got = call("AdaptedBlock(...)(x)", adapted, x)
    expect("AdaptedBlock(...)(x)", got, y + second(block.mlp(block.ln_2(y))), f"random x and values, s {S}", {
        **_wrong_blocks(block, first, second, x),
        "scaling is not handed on to the adapters": y_unscaled + unscaled[1](block.mlp(block.ln_2(y_unscaled)))})


def gradients(answer: ModuleType) -> None:
    adapter = answer.BottleneckAdapter(C, M, 1.5).double()
    tensors = tensors_of(adapter, C, M)
    randomize(tensors.values())
    h = torch.randn(1, 2, C, dtype=torch.float64, requires_grad=True)
    check_gradients("adapter(h)", lambda: adapter(h), {"h": h, **tensors})
    adapted = answer.AdaptedBlock(plain_block().double(), C, M, 1.5).double()
    tensors = _both(adapted)
    randomize(tensors.values())
    check_gradients("AdaptedBlock(...)(x)", lambda: adapted(h), {"x": h, **tensors})


def _both(adapted: Any) -> dict[str, Tensor]:
    """The tensors of both adapters."""
    return {f"{place}.{name}": tensor for place in ("first", "second")
            for name, tensor in tensors_of(getattr(adapted, place), C, M).items()}


def trained(answer: ModuleType) -> None:
    block = plain_block()
    adapted = answer.AdaptedBlock(block, C, M, 1.0)
    check_kept(adapted, "block", block)
    check_trained(adapted, _both(adapted), {f"block.{name}": tensor for name, tensor in block.named_parameters()})


def count(answer: ModuleType) -> None:
    one = 2 * C * M + C + M
    expect_same("trained parameters: 2 adapters of 2 C m + C + m",
                trained_count(answer.AdaptedBlock(plain_block(), C, M, 1.0).parameters()), 2 * one, given(C=C, m=M),
                {"there is one adapter: first and second are the same": one})


def padding(answer: ModuleType) -> None:
    adapter, tensors = make(answer, C, M)
    randomize(tensors.values())
    h = torch.randn(2, 5, C)
    expect("adapter(h)[:, :3], and adapter(h[:, :3])", adapter(h)[:, :3], adapter(h[:, :3]), "random h (2, 5, 4)")
    expect("adapter(h)[:1], and adapter(h[:1])", adapter(h)[:1], adapter(h[:1]), "random h (2, 5, 4)")


def reference(answer: ModuleType) -> None:
    case = reference_case("adapter")
    block = plain_block(4, 4)
    adapted = answer.AdaptedBlock(block, 4, 2, case["scaling"])
    for name, tensor in block.named_parameters():
        put(tensor, case[name])
    for place in ("first", "second"):
        for name, tensor in tensors_of(getattr(adapted, place), 4, 2).items():
            put(tensor, case[f"{place}.{name}"])
    expect("AdaptedBlock(...)(x)", adapted(case["x"]), case["y"],
           "this library's case adapter in minipeft/check/references.json", tolerance=1e-4)
