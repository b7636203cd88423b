"""attention.py: blocks of queries give what torch's fused kernels give, and drop out what a mask says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minipeft.model import attention
from minipeft.model.attention import attend
from minipeft.model.dropout import scale

MASKS = ["causal", "after a cache", "padded"]


def inputs(T, S, dtype=torch.float32):
    """q (2, 3, T, 8), k and v (2, 3, S, 8)."""
    torch.manual_seed(0)
    return [torch.randn(2, 3, length, 8).to(dtype).requires_grad_() for length in (T, S, S)]


def mask_of(kind, T, S):
    """None, (T, S) or (2, 1, T, S)."""
    if kind == "causal":
        return None
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return seen if kind == "after a cache" else seen & (torch.rand(2, 1, T, S) < 0.7) | torch.eye(T, S).bool()


def results_of(q, k, v, *more, by=attend):
    y = by(q, k, v, *more)
    return [y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))]


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Blocks of 8 queries, or 16, so that short texts have several, the last one shorter."""
    monkeypatch.setattr(attention, "BYTES_PER_BLOCK", 32)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("T", [1, 8, 21])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_values_and_gradients_are_the_fused_kernels(kind, T, dtype, tolerance):
    S = T if kind == "causal" else T + 3
    q, k, v = inputs(T, S, dtype)
    mask = mask_of(kind, T, S)
    blocks = results_of(q, k, v, mask, 0.0, by=attention._InBlocks.apply)
    fused = results_of(q, k, v, mask, 0.0, False)
    assert "InBlocks" in str(blocks[0].grad_fn) and "InBlocks" not in str(fused[0].grad_fn)
    for ours, theirs in zip(blocks, fused):
        assert ours.dtype == dtype
        size = max(theirs.abs().max(), 1)  # of one token alone, the gradients of q and k are 0 but for rounding
        assert (ours - theirs).abs().max() <= tolerance * size


@pytest.mark.parametrize("kind", MASKS)
def test_dropout_thins_the_shares_and_gradients_follow(kind, monkeypatch):
    """With the mask known, values and gradients are those of the formula written with it, by autograd."""
    T, S = 21, 21 if kind == "causal" else 24
    q, k, v = inputs(T, S)
    mask = mask_of(kind, T, S)
    kept = torch.rand(2, 3, T, S) < 0.6                                                     # (2, 3, T, S)
    starts = iter(range(0, T, 8)[::-1])

    def draw(shape, p):
        start = next(starts)
        return kept.flatten(0, 1)[:, start:start + shape[1], :shape[2]].to(torch.int8)

    monkeypatch.setattr(attention, "draw_kept", draw)
    ours = results_of(q, k, v, mask, 0.4, True)
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T) if mask is None else mask
    shares = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~seen, -torch.inf).softmax(dim=3)
    y = shares * kept * scale(0.4) @ v
    for actual, expected in zip(ours, [y, *torch.autograd.grad(y.square().sum(), (q, k, v))]):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_mean_over_many_masks_is_the_value_without():
    q, k, v = inputs(5, 5)
    torch.manual_seed(3)
    mean = sum(attend(q, k, v, None, 0.3, True).detach() for _ in range(4000)) / 4000
    assert (mean - attend(q, k, v)).abs().max() < 0.1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_second_derivatives_are_those_of_the_formula(dropout, monkeypatch):
    q, k, v = inputs(21, 21)
    monkeypatch.setattr(attention, "draw_kept", lambda shape, p: (torch.arange(shape.numel()) % 3 > 0).view(shape))
    y = attention._InBlocks.apply(q, k, v, None, dropout)
    parts = [block.thinned(block.shares) @ v.flatten(0, 1)[:, :block.shares.shape[2]] * scale(dropout)
             for block in attention.in_blocks(q, k, v, None, dropout)]
    second = []
    for value in (y, torch.cat(parts[::-1], dim=1).view(y.shape)):
        first = torch.autograd.grad(value.square().sum(), (q, k, v), create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v)))
    for ours, theirs in zip(*second):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("trained", ["q", "k", "v", "qk", "qv", "kv"])
def test_second_derivatives_may_be_of_some_alone(trained):
    """As those of a prefix are, in the first block of a frozen base: its queries need no gradient."""
    tensors = dict(zip("qkv", inputs(21, 21)))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
    q, k, v = tensors.values()
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(torch.ones(21, 21, dtype=torch.bool).triu(1), -torch.inf)
    second = []
    for y in (attention._InBlocks.apply(q, k, v, None, 0.0), scores.softmax(dim=3) @ v):
        wanted = [tensors[name] for name in trained]
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))
    for ours, theirs in zip(*second):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype, dropout, blocks", [
    (torch.float32, 0.0, False), (torch.float32, 0.1, True), (torch.bfloat16, 0.0, True), (torch.bfloat16, 0.1, True)])
def test_training_goes_in_blocks_where_that_is_faster(dtype, dropout, blocks, monkeypatch):
    monkeypatch.setattr(attention, "through_float32", lambda dtype: False)
    y = attend(*inputs(21, 21, dtype), None, dropout, True)
    assert ("InBlocks" in str(y.grad_fn)) == blocks


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_where_a_cpu_cannot_multiply_bfloat16_it_is_float32s_attention_rounded(monkeypatch, autocast, grad):
    monkeypatch.setattr(attention, "through_float32", lambda dtype: dtype == torch.bfloat16)
    q, k, v = inputs(21, 21, torch.bfloat16)
    wide = [tensor.detach().float().requires_grad_() for tensor in (q, k, v)]
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = attend(q, k, v, None, 0.0, True)
    expected = attend(*wide, None, 0.0, True)
    assert torch.equal(y, expected.bfloat16()) and y.requires_grad == grad
    if grad:
        dy = torch.randn(y.shape).bfloat16()
        for ours, exact in zip(torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(expected, wide, dy.float())):
            assert torch.equal(ours, exact.bfloat16())


def test_without_gradients_the_fused_kernel_computes(monkeypatch):
    q, k, v = inputs(21, 21)
    monkeypatch.setattr(attention, "_InBlocks", None)  # using it would be an error
    with torch.no_grad():
        attend(q, k, v, None, 0.0, True)
        fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(attend(q, k, v, None, 0.3, False), fused)
