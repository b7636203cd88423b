"""linear.py: torch's linear layer and its gradients, by oneDNN where operations are carried out at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from minipeft.model import linear as module
from minipeft.model.linear import Linear, autocast_dtype, carried_out_here, linear

SHAPES = [(1, 3, 5), (7, 8, 2), (2, 300, 40), (40, 4, 300)]  # rows, in, out


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("before", [(), (2,), (2, 3)], ids=["rows", "batch of rows", "two more dimensions"])
def test_values_and_gradients_are_torchs(shape, biased, before):
    rows, into, out = shape
    torch.manual_seed(0)
    layer = Linear(into, out, bias=biased)
    x = torch.randn(*before, rows, into, requires_grad=True)
    inputs = [x, *layer.parameters()]
    results = []
    for y in (layer(x), F.linear(x, layer.weight, layer.bias)):
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    for ours, theirs in zip(*results):
        assert ours.shape == theirs.shape and ours.is_contiguous()  # the fused AdamW takes gradients as they lie
        close(ours, theirs)


def test_second_derivatives_are_torchs():
    torch.manual_seed(0)
    layer, x = Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    inputs, results = [x, *layer.parameters()], []
    for function in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        first = torch.autograd.grad(function(x).pow(3).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_an_input_is_kept_only_for_a_weight_that_is_trained():
    layer, x = Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        layer(x)
        layer.requires_grad_(False)(x)
    assert [tuple(shape) for shape in kept] == [(5, 4), (3, 4), (3, 4)]


def test_it_is_a_torch_layer_with_torchs_start():
    torch.manual_seed(0)
    ours = Linear(4, 3)
    torch.manual_seed(0)
    theirs = nn.Linear(4, 3)
    assert isinstance(ours, nn.Linear) and repr(ours) == repr(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("x", [torch.randn(0, 4), torch.randn(4), torch.randn(2, 4).T.contiguous().T,
                               torch.randn(2, 8)[:, ::2]], ids=["no rows", "one row", "transposed", "with gaps"])
def test_odd_inputs(x):
    layer = Linear(4, 3)
    y = layer(x)
    close(y, F.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert layer.weight.grad.shape == (3, 4)


def test_a_weight_with_gaps_is_copied_first(monkeypatch):
    """oneDNN takes a thousand times as long for one; VeRA's matrices are columns of a wider one."""
    seen, product = [], module._product
    monkeypatch.setattr(module, "_product", lambda x, weight, *bias: seen.append(weight) or product(x, weight, *bias))
    wide, x = torch.randn(3, 10, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y = linear(x, wide[:, :4])
    y.sum().backward()
    close(y, x @ wide[:, :4].T)
    assert len(seen) >= 3 and all(weight.is_contiguous() or weight.T.is_contiguous() for weight in seen)
    assert wide.grad.shape == (3, 10) and not wide.grad[:, 4:].any() and wide.grad[:, :4].all()


def test_torch_sees_its_own_operations_where_it_records_or_changes_them():
    layer, x = Linear(4, 3).requires_grad_(False), torch.randn(5, 4)
    seen = {}

    def look(name):
        def forward(x):
            seen[name] = carried_out_here(x, layer.weight)
            return layer(x)
        return forward

    close(torch.func.vmap(look("vmap"))(x), layer(x))
    torch.jit.trace(look("trace"), (x,), check_trace=False)
    torch.func.jvp(look("jvp"), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        look("dual")(torch.autograd.forward_ad.make_dual(x, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert carried_out_here(x, layer.weight) and set(seen.values()) == {False} and len(seen) == 4
    assert not carried_out_here(x.to("meta"))


def test_autocasts_dtype_is_known_where_it_is_on_and_none_elsewhere():
    x = torch.randn(2, 4)
    assert autocast_dtype(x) is None
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert autocast_dtype(x) is dtype and autocast_dtype(x.to("meta")) is None
            with torch.autocast("cpu", enabled=False):
                assert autocast_dtype(x) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_onednn_cannot_multiply_here_is_left_to_torch(monkeypatch, dtype):
    """As on processors without AVX-512, whose oneDNN refuses bfloat16."""
    monkeypatch.setattr(module, "onednn_multiplies", lambda dtype: False)
    monkeypatch.setattr(module, "_product", lambda *a: pytest.fail("oneDNN was asked"))
    layer, x = Linear(4, 3).to(dtype), torch.randn(5, 4, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias)) and x.grad.dtype == dtype


@pytest.fixture
def no_bfloat16(monkeypatch):
    """A processor whose oneDNN multiplies float32 only."""
    monkeypatch.setattr(module, "onednn_multiplies", lambda dtype: dtype == torch.float32)


@pytest.mark.parametrize("autocast", [False, True])
def test_where_a_cpu_cannot_multiply_bfloat16_sums_are_float32s_rounded(no_bfloat16, autocast):
    torch.manual_seed(0)
    layer, x = Linear(40, 30), torch.randn(2, 50, 40)
    halves = [tensor.detach().bfloat16() for tensor in (x, layer.weight, layer.bias)]
    exact = [tensor.float().requires_grad_() for tensor in halves]
    inputs = [tensor.requires_grad_() for tensor in ([x, layer.weight, layer.bias] if autocast else halves)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = linear(*inputs)
    expected = F.linear(*exact)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=1e-5)  # one rounding, of 8 bits
    dy = torch.randn(y.shape).bfloat16()
    for ours, found in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, exact, dy.float())):
        torch.testing.assert_close(ours.float(), found, rtol=2**-6, atol=2**-6)
        assert ours.dtype == (torch.float32 if autocast else torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_product_adds_in_ys_own_memory(no_bfloat16, dtype):
    torch.manual_seed(0)
    y, a, b = (torch.randn(shape).to(dtype) for shape in ((5, 3), (5, 4), (4, 3)))
    expected, rows = y.double() + a.double() @ b.double(), y.view(5, 3)
    module.add_product(rows, a, b)
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-6)


def test_bfloat16_is_onednns_only_where_it_can_multiply_it():
    assert module.onednn_multiplies(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert not module.onednn_multiplies(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Linear(4, 3)(torch.randn(5, 4)).dtype == torch.bfloat16


def test_double_precision_is_torchs():
    layer, x = Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: linear(x, layer.weight, layer.bias), x)


def test_autocast_leaves_float64_alone_as_torchs_does():
    layer, x = Linear(4, 3).double(), torch.randn(2, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == F.linear(x, layer.weight, layer.bias).dtype == torch.float64
