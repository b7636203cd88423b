"""low_rank.py: LoRA's gradients, written out, are those that autograd finds for the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from minipeft.methods import low_rank
from minipeft.methods.lora import LoraConfig, LoRALinear
from minipeft.model.dropout import scale
from minipeft.model.linear import Linear

EVERY_DROPOUT = [0.0, 0.4]


def layer(into=6, out=9, r=3, bias=True, dropout=0.0, trained_bias=False):
    """A LoRALinear away from the identity."""
    torch.manual_seed(0)
    base = Linear(into, out, bias=bias).requires_grad_(False)
    adapted = LoRALinear(base, r, 4, LoraConfig(lora_dropout=dropout)).train()
    nn.init.normal_(adapted.lora_B.weight)
    if trained_bias:
        base.bias.requires_grad_()
    return adapted


def value_and_gradients(adapted, x, value):
    inputs = [x, *(p for p in adapted.parameters() if p.requires_grad)]
    return [value, *torch.autograd.grad(value.float().square().sum(), inputs)]


@pytest.fixture
def kept(monkeypatch):
    """A mask known to the test: every third element is dropped."""
    def draw(shape, p):
        return (torch.arange(shape.numel()) % 3 > 0).view(shape).char()

    monkeypatch.setattr(low_rank, "draw_kept", draw)
    return lambda x, p: x * draw(x.shape, p) * scale(p) if p else x


@pytest.mark.parametrize("dropout", EVERY_DROPOUT)
@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)], ids=["rows", "batch"])
def test_values_and_gradients_are_the_formulas(dropout, bias, shape, kept):
    adapted = layer(bias=bias != "none", dropout=dropout, trained_bias=bias == "trained")
    x = torch.randn(shape, requires_grad=True)
    y = adapted(x)
    assert "LowRank" in str(y.grad_fn)
    A, B, base = adapted.lora_A.weight, adapted.lora_B.weight, adapted.base_layer
    expected = F.linear(x, base.weight, base.bias) + adapted.scaling * (kept(x, dropout) @ A.T @ B.T)
    for ours, theirs in zip(value_and_gradients(adapted, x, y), value_and_gradients(adapted, x, expected)):
        assert ours.shape == theirs.shape and ours.is_contiguous()  # the fused AdamW takes gradients as they lie
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", EVERY_DROPOUT)
@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_gradients_stay_float32(dropout, frozen, kept):
    adapted = layer(dropout=dropout)
    adapted.base_layer.to(frozen)
    x = torch.randn(2, 5, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapted(x)
    exact = layer(dropout=dropout)
    for ours, theirs in zip(value_and_gradients(adapted, x, y), value_and_gradients(exact, x, exact(x))):
        assert ours is y or ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 0.03 * theirs.abs().max()
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("dropout", EVERY_DROPOUT)
def test_second_derivatives_are_the_formulas(dropout, kept):
    adapted, x = layer(dropout=dropout), torch.randn(4, 6, requires_grad=True)
    A, B, base = adapted.lora_A.weight, adapted.lora_B.weight, adapted.base_layer
    second = []
    for value in (adapted(x), F.linear(x, base.weight, base.bias) + adapted.scaling * (kept(x, dropout) @ A.T @ B.T)):
        first = torch.autograd.grad(value.pow(3).sum(), (x, A, B), create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, A, B)))
    for ours, theirs in zip(*second):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)


def test_dropout_draws_anew_each_time():
    adapted, x = layer(dropout=0.5), torch.randn(50, 6, requires_grad=True)
    assert not torch.equal(adapted(x), adapted(x))


def test_no_output_of_a_product_is_kept():
    adapted, x, kept = layer(), torch.randn(50, 6, requires_grad=True), []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapted(x)
    assert sorted(kept) == sorted([(50, 6), (50, 3), (9, 6), (9,), (3, 6), (9, 3)])


def hooked(adapted):
    adapted.base_layer.register_forward_hook(lambda module, args, output: None)


def replaced(adapted):
    adapted.lora_A.forward = lambda x: F.linear(x, adapted.lora_A.weight)


def another_class(adapted):
    adapted.lora_B = nn.Linear(3, 9, bias=False)


def trained_weight(adapted):
    adapted.base_layer.weight.requires_grad_()


def half(adapted):
    adapted.base_layer.bfloat16()


@pytest.mark.parametrize("change", [hooked, replaced, another_class, trained_weight, half])
def test_where_more_is_to_be_seen_the_formula_computes(change):
    adapted, x = layer(), torch.randn(5, 6)
    assert low_rank.applies(x, adapted)
    change(adapted)
    x = x.to(adapted.base_layer.weight.dtype)
    assert not low_rank.applies(x, adapted) and adapted(x).shape == (5, 9)
    assert not low_rank.applies(x[0], adapted)
    with torch.no_grad():
        assert not low_rank.applies(x, layer())


def test_the_dropout_layer_says_whether_it_acts():
    """Its own mode counts, not the layer's, and what somebody puts in its place is called."""
    adapted, x = layer(dropout=0.4), torch.randn(4, 6)
    adapted.lora_dropout.eval()
    assert low_rank.applies(x, adapted) and torch.equal(adapted(x), adapted(x))
    expected = adapted(x)
    adapted.lora_dropout = nn.Identity()
    assert not low_rank.applies(x, adapted)
    torch.testing.assert_close(adapted(x), expected)
