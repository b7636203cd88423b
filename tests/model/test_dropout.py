"""dropout.py: torch's dropout in distribution, from fewer random numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn

from minipeft.model.dropout import LEVELS, Dropout, draw_kept, dropout, scale

PROBABILITIES = [0.02, 0.1, 0.5, 0.9]


@pytest.mark.parametrize("p", PROBABILITIES)
def test_as_many_are_dropped_as_p_says(p):
    """Of 4 million elements the share differs from p by less than five standard deviations."""
    torch.manual_seed(0)
    kept = draw_kept((4_000_000,), p)
    assert set(kept.unique().tolist()) == {0, 1} and kept.dtype == torch.int8
    assert abs(1 - kept.float().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / 4_000_000)


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 64, 1000])
def test_elements_are_dropped_independently(distance):
    """Four elements share a draw of 64 bits: neither they nor others may have anything to do with each other."""
    torch.manual_seed(1)
    centred = draw_kept((4_000_000,), 0.1).float() - 0.9
    correlation = (centred[distance:] * centred[:-distance]).mean() / (0.9 * 0.1)
    assert abs(correlation.item()) < 5 / math.sqrt(4_000_000)


def test_each_quarter_of_a_draw_drops_as_many():
    torch.manual_seed(2)
    shares = 1 - draw_kept((1_000_000, 4), 0.1).float().mean(dim=0)
    assert (shares - 0.1).abs().max() < 5 * math.sqrt(0.1 * 0.9 / 1_000_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", PROBABILITIES)
def test_kept_elements_grow_and_gradients_take_the_same_way(dtype, p):
    torch.manual_seed(0)
    x = torch.randn(3, 50, 7).to(dtype).requires_grad_()
    y = dropout(x, p)
    gradient, = torch.autograd.grad(y.sum(), x)
    kept = y != 0
    assert y.dtype == dtype and 0 < kept.sum() < x.numel()
    tolerance = {"rtol": 1e-2 if dtype == torch.bfloat16 else 1e-6, "atol": 0}
    torch.testing.assert_close(y, torch.where(kept, x * scale(p), 0), **tolerance)
    torch.testing.assert_close(gradient, kept.to(dtype) * scale(p), **tolerance)


@pytest.mark.parametrize("p", [*PROBABILITIES, 1e-9, 1 - 1e-9])
def test_the_mean_is_exact_though_p_is_rounded(p):
    dropped = LEVELS * (1 - 1 / scale(p))
    assert dropped == pytest.approx(round(dropped), abs=1e-6) and 1 <= round(dropped) < LEVELS
    assert abs(dropped / LEVELS - p) <= 1 / LEVELS


def test_the_seed_decides():
    x, results = torch.ones(1000), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(dropout(x, 0.5))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_none_and_all():
    x = torch.randn(5, requires_grad=True)
    assert torch.equal(dropout(x, 0.0), x) and not dropout(x, 1.0).any()
    assert torch.equal(Dropout(0.5).eval()(x), x) and isinstance(Dropout(0.5), nn.Dropout)
    assert dropout(torch.randn(0, 3), 0.5).shape == (0, 3)


def test_second_derivatives_go_through():
    x = torch.randn(64, requires_grad=True)
    y = dropout(x, 0.5)
    first, = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    second, = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * x * scale(0.5)**3 * (y != 0))
