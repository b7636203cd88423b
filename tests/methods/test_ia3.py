"""(IA)^3 against its formulas: l * (x W^T + bias) for keys and values, (l * x) W^T + bias for feed-forward layers."""

import pytest
import torch
import torch.nn as nn
from models import IDS

from minipeft import GPT2Config, GPT2LMHeadModel, GPT2Model, IA3Config, inject, trainable_parameters
from minipeft.methods import ia3
from minipeft.methods.ia3 import IA3Linear
from minipeft.methods.injection import active_injections


def layer(feedforward, in_features=6, out_features=10, bias=True):
    torch.manual_seed(0)
    result = IA3Linear(nn.Linear(in_features, out_features, bias=bias), feedforward, init_ia3_weights=True)
    nn.init.normal_(result.ia3_l)
    return result


def kinds(model):
    """Module name -> whether it rescales its input."""
    (injection,) = active_injections(model)
    return {name.removeprefix("transformer."): layer.feedforward for name, layer in injection.layers.items()}


# --- the formula ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("feedforward", "scale", "expected", "weight", "bias"), [
    # x W^T + bias = [4, 6] for x = [1, 1], and [7, 9] for x = [2, 2] minus one bias; times l = [2, -1].
    (False, [[2.0], [-1.0]], [[8.0, -6.0], [14.0, -13.0]], [[2.0, 4.0], [-3.0, -4.0]], [2.0, 1.0]),
    # l * x = [2, -1] and [4, -2]: [0, 2] and [0, 4], plus the bias as it is.
    (True, [[2.0, -1.0]], [[1.0, 1.0], [1.0, 3.0]], [[2.0, -2.0], [6.0, -4.0]], [1.0, -1.0])],
    ids=["keys and values", "feed-forward"])
def test_an_example_worked_out_by_hand(feedforward, scale, expected, weight, bias):
    base = nn.Linear(2, 2)
    adapted = IA3Linear(base, feedforward, init_ia3_weights=True)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1, 2], [3, 4]]))
        base.bias.copy_(torch.tensor([1, -1]))
        adapted.ia3_l.copy_(torch.tensor(scale))
    assert torch.equal(adapted(torch.tensor([[1.0, 1.0], [2.0, 2.0]])), torch.tensor(expected))
    merged = {"bias": base.bias} | adapted.merged()
    assert torch.equal(merged["weight"], torch.tensor(weight)) and torch.equal(merged["bias"], torch.tensor(bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (2, 7, 6), (6,)], ids=["two dimensions", "three dimensions", "one vector"])
@pytest.mark.parametrize("feedforward", [False, True])
def test_output_and_gradients_equal_the_written_out_formula(feedforward, shape, bias):
    adapted = layer(feedforward, bias=bias).double()
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    towards = torch.randn(*shape[:-1], 10, dtype=torch.double)
    (adapted(x) * towards).sum().backward()

    W, b = adapted.base_layer.weight.detach(), adapted.base_layer.bias.detach() if bias else 0
    x2, scale = (tensor.detach().clone().requires_grad_() for tensor in (x, adapted.ia3_l))
    expected = (scale[0] * x2) @ W.T + b if feedforward else scale[:, 0] * (x2 @ W.T + b)
    (expected * towards).sum().backward()
    torch.testing.assert_close(adapted(x), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(x.grad, x2.grad, atol=1e-12, rtol=0)
    torch.testing.assert_close(adapted.ia3_l.grad, scale.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("feedforward", [False, True])
def test_gradients_pass_gradcheck_in_float64(feedforward):
    adapted = layer(feedforward, in_features=4, out_features=5).double()
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    scale = adapted.ia3_l.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, scale: torch.func.functional_call(adapted, {"ia3_l": scale}, (x,)), (x, scale))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("feedforward", [False, True])
def test_the_merged_layer_is_a_linear_layer_with_the_same_output(feedforward, bias):
    adapted = layer(feedforward, bias=bias)
    merged, x = adapted.merged(), torch.randn(9, 6)
    assert set(merged) == ({"weight", "bias"} if bias and not feedforward else {"weight"})
    expected = nn.functional.linear(x, merged["weight"], merged.get("bias", adapted.base_layer.bias))
    torch.testing.assert_close(adapted(x), expected, atol=1e-6, rtol=1e-5)


def test_in_attention_each_query_key_and_value_has_its_own_factor(make_model):
    model = make_model(GPT2Model)
    expected = model(IDS)
    inject(model, IA3Config(target_modules=["c_attn"], feedforward_modules=[]))
    with torch.no_grad():  # queries and keys rescaled against each other leave every score as it was
        for block in model.h:
            block.attn.c_attn.ia3_l.view(3, 24)[0] *= 4.0
            block.attn.c_attn.ia3_l.view(3, 24)[1] /= 4.0
        torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-5)
        for block in model.h:
            block.attn.c_attn.ia3_l.view(3, 24)[2] *= 0.0  # no values: attention adds its output bias alone
            block.attn.c_proj.weight.fill_(100.0)
    fresh = make_model(GPT2Model)
    with torch.no_grad():
        for block in fresh.h:
            block.attn.c_proj.weight.zero_()
    torch.testing.assert_close(model(IDS), fresh(IDS), atol=1e-5, rtol=1e-5)


# --- the start and the fields -----------------------------------------------------------------------------------------

def test_the_factors_start_at_one_or_at_random(make_model):
    for layer in active_injections(inject(make_model(GPT2Model), IA3Config()))[0].layers.values():
        assert torch.equal(layer.ia3_l, torch.ones_like(layer.ia3_l))
    torch.manual_seed(0)
    drawn = torch.cat([layer.ia3_l.detach().flatten() for layer in active_injections(inject(
        make_model(GPT2Model), IA3Config(init_ia3_weights=False)))[0].layers.values()])
    assert drawn.mean().abs() < 0.2 and 0.85 < drawn.std() < 1.15               # N(0, 1), 336 of them


@pytest.mark.parametrize(("fields", "expected"), [
    pytest.param({}, {"attn.c_attn": False, "mlp.c_proj": True}, id="keys, values and the feed-forward layer"),
    pytest.param({"target_modules": ["c_attn"]}, {"attn.c_attn": False}, id="keys and values"),
    pytest.param({"target_modules": ["c_proj"]}, {"attn.c_proj": False, "mlp.c_proj": True},
                 id="the default feed-forward module is the MLP's c_proj"),
    pytest.param({"feedforward_modules": []}, {"attn.c_attn": False, "mlp.c_proj": False}, id="no feed-forward one"),
    pytest.param({"target_modules": ["c_fc", "mlp.c_proj"], "feedforward_modules": ["c_fc"]},
                 {"mlp.c_fc": True, "mlp.c_proj": False}, id="a feed-forward list names endings"),
    pytest.param({"target_modules": ["c_fc", "c_attn"], "feedforward_modules": r".*\.mlp\..*"},
                 {"attn.c_attn": False, "mlp.c_fc": True}, id="a feed-forward string is an expression"),
    pytest.param({"target_modules": ["c_fc", "c_attn"], "feedforward_modules": "c_fc"},
                 {"attn.c_attn": False, "mlp.c_fc": False}, id="an expression must match the whole name"),
    pytest.param({"target_modules": "all-linear", "exclude_modules": ["attn.c_proj"]},
                 {"attn.c_attn": False, "mlp.c_fc": False, "mlp.c_proj": True}, id="all but one"),
])
def test_these_fields_choose_these_layers_and_what_is_rescaled(make_model, fields, expected):
    model = inject(make_model(GPT2LMHeadModel), IA3Config(**fields))
    assert kinds(model) == {f"h.{i}.{name}": feedforward for i in (0, 1) for name, feedforward in expected.items()}
    for layer in active_injections(model)[0].layers.values():
        base = layer.base_layer
        assert layer.ia3_l.shape == ((1, base.in_features) if layer.feedforward else (base.out_features, 1))


# --- counts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("fields", "per_block"), [
    ({}, 3 * 24 + 96), ({"target_modules": ["c_attn"]}, 72), ({"target_modules": ["mlp.c_proj"]}, 96),
    ({"target_modules": "all-linear"}, 72 + 24 + 96 + 96), ({"feedforward_modules": []}, 72 + 24)], ids=str)
def test_a_target_trains_one_factor_an_output_or_an_input(make_model, fields, per_block):
    assert trainable_parameters(inject(make_model(GPT2Model), IA3Config(**fields))).trainable == 2 * per_block


@pytest.mark.parametrize(("name", "trained"), [("gpt2", 64_512), ("gpt2-medium", 24 * 7 * 1024)])
def test_counts_at_the_official_sizes(name, trained):
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config.official(name))
    assert trainable_parameters(inject(model, IA3Config())).trainable == trained
    assert "12 * 5,376 = 64,512" in ia3.__doc__
