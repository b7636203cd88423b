"""Bottleneck adapters against their formula: s * up(act(down(h))), in the three places they can stand."""

import math

import pytest
import torch
import torch.nn as nn

from minipeft import BottleneckConfig, GPT2Config, GPT2LMHeadModel, GPT2Model, inject, trainable_parameters
from minipeft.errors import ConfigError
from minipeft.methods import adapter as adapter_module
from minipeft.methods.adapter import BottleneckAdapter
from minipeft.methods.injection import active_injections
from minipeft.model.dropout import dropout

IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 60], [70, 2, 2, 33, 8, 95, 1]])
ACTIVATIONS = {  # written from their definitions
    "relu": lambda x: torch.where(x > 0, x, 0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
    "none": lambda x: x,
}


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def layer(width=6, size=4, **fields):
    torch.manual_seed(0)
    return randomise(BottleneckAdapter(width, size, BottleneckConfig(**fields), like=torch.zeros(1)))


def written_out(adapter, h, activation="relu", scaling=1.0, layer_norm=False):
    if layer_norm:
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        h = h * adapter.layer_norm.weight + adapter.layer_norm.bias
    inner = ACTIVATIONS[activation](h @ adapter.down.weight.T + adapter.down.bias)
    return scaling * (inner @ adapter.up.weight.T + adapter.up.bias)


def adapters(model):
    return {name.removeprefix("transformer."): layer for name, layer in active_injections(model)[0].layers.items()}


# --- the formula ------------------------------------------------------------------------------------------------------

def test_an_example_worked_out_by_hand():
    adapter = BottleneckAdapter(2, 1, BottleneckConfig(scaling=2.0), like=torch.zeros(1))
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[1, -1]]))
        adapter.down.bias.copy_(torch.tensor([1]))
        adapter.up.weight.copy_(torch.tensor([[2], [3]]))
        adapter.up.bias.copy_(torch.tensor([0.5, -0.5]))
    # down: 3 - 1 + 1 = 3 and 1 - 3 + 1 = -1, after relu 3 and 0.   up: [6.5, 8.5] and [0.5, -0.5], times 2.
    h = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    assert torch.equal(adapter(h), torch.tensor([[13.0, 17.0], [1.0, -1.0]]))
    module = nn.Identity()
    adapter.attach(nn.ModuleDict({"sub": module}), "sub.adapter")
    assert torch.equal(module(h), torch.tensor([[16.0, 18.0], [2.0, 2.0]]))


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_equals_the_written_out_formula_for_every_activation(activation, layer_norm):
    adapter = layer(non_linearity=activation, scaling=0.5, layer_norm=layer_norm).double()
    h = torch.randn(2, 7, 6, dtype=torch.double)
    torch.testing.assert_close(adapter(h), written_out(adapter, h, activation, 0.5, layer_norm), atol=1e-10, rtol=0)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_pass_gradcheck_in_float64(activation, layer_norm):
    adapter = layer(width=4, size=3, non_linearity=activation, layer_norm=layer_norm).double()
    h = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    values = {name: p.detach().clone().requires_grad_() for name, p in adapter.named_parameters()}

    def output(h, *tensors):
        return torch.func.functional_call(adapter, dict(zip(values, tensors)), (h,))

    assert torch.autograd.gradcheck(output, (h, *values.values()))


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("architecture", ["houlsby", "pfeiffer", "parallel"])
def test_an_adapted_block_equals_the_block_written_out(make_model, architecture, layer_norm):
    base, model = make_model(GPT2Model), make_model(GPT2Model)
    torch.manual_seed(0)
    inject(model, BottleneckConfig(architecture=architecture, bottleneck_size=5, scaling=4.0, layer_norm=layer_norm))
    for layer in adapters(model).values():
        randomise(layer)
    x, block = torch.randn(2, 7, 24), base.h[1]

    def added(place, h):
        return written_out(adapters(model)[f"h.1.{place}.adapter"], h, scaling=4.0, layer_norm=layer_norm)

    attended = block.attn(block.ln_1(x))
    if architecture == "houlsby":
        attended = attended + added("attn", attended)
    after_attention = x + attended
    before_mlp = block.ln_2(after_attention)
    fed = block.mlp(before_mlp)
    fed = fed + added("mlp", before_mlp if architecture == "parallel" else fed)
    torch.testing.assert_close(model.h[1](x), after_attention + fed, atol=1e-4, rtol=1e-5)
    assert (model.h[1](x) - block(x)).abs().max() > 1


def test_dropout_acts_on_what_the_adapter_adds_and_in_training_only():
    adapter = layer(adapter_dropout=0.5, scaling=2.0).train()
    h = torch.randn(400, 6)
    torch.manual_seed(3)
    actual = adapter(h)
    torch.manual_seed(3)
    torch.testing.assert_close(actual, 2.0 * dropout(written_out(adapter, h), 0.5), atol=1e-5, rtol=1e-5)
    assert 0.4 < (actual == 0).float().mean() < 0.6
    torch.testing.assert_close(adapter.eval()(h), written_out(adapter, h, scaling=2.0), atol=1e-5, rtol=1e-5)


def test_a_bfloat16_base_keeps_its_type_and_the_adapters_are_float32(make_model):
    model = inject(make_model(GPT2LMHeadModel).bfloat16(), BottleneckConfig(bottleneck_size=5, layer_norm=True))
    for layer in adapters(model).values():
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
        randomise(layer)
    assert model(IDS).dtype == torch.bfloat16


# --- the start --------------------------------------------------------------------------------------------------------

def test_down_starts_uniform_up_to_one_over_root_in_and_everything_else_neutral():
    adapter = BottleneckAdapter(400, 50, BottleneckConfig(layer_norm=True), like=torch.zeros(1))
    assert 0.99 / 20 < adapter.down.weight.abs().max() <= 1 / 20
    assert adapter.down.weight.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.03)
    for tensor in (adapter.down.bias, adapter.up.weight, adapter.up.bias, adapter.layer_norm.bias):
        assert torch.equal(tensor, torch.zeros_like(tensor))
    assert torch.equal(adapter.layer_norm.weight, torch.ones(400))


# --- places and sizes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("fields", "places"), [
    ({}, ["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"]), ({"architecture": "pfeiffer"}, ["h.0.mlp", "h.1.mlp"]),
    ({"architecture": "parallel"}, ["h.0.mlp", "h.1.mlp"]), ({"layers_to_transform": 1}, ["h.1.attn", "h.1.mlp"]),
    ({"layers_to_transform": [0], "architecture": "pfeiffer"}, ["h.0.mlp"]),
    ({"layers_to_transform": [1, 0], "architecture": "parallel"}, ["h.1.mlp", "h.0.mlp"]),
    ({"layers_to_transform": []}, ["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"])], ids=str)
@pytest.mark.parametrize("model_class", [GPT2Model, GPT2LMHeadModel])
def test_adapters_stand_in_these_places(make_model, model_class, fields, places):
    model = inject(make_model(model_class), BottleneckConfig(**fields))
    assert list(adapters(model)) == [f"{place}.adapter" for place in places]


def test_a_block_named_twice_is_adapted_once_or_refused(make_model):
    once = inject(make_model(GPT2LMHeadModel), BottleneckConfig(layers_to_transform=[1]))
    twice = make_model(GPT2LMHeadModel)
    try:
        inject(twice, BottleneckConfig(layers_to_transform=[1, 1]))
    except ConfigError:
        return
    assert trainable_parameters(twice) == trainable_parameters(once)
    for place in (twice.transformer.h[1].attn, twice.transformer.h[1].mlp):
        assert place.forward.args[1] == type(place).forward.__get__(place)  # around the module's own, and no other


@pytest.mark.parametrize(("fields", "size"), [
    ({"bottleneck_size": 7}, 7), ({"bottleneck_size": 100}, 100), ({"reduction_factor": 4}, 6),
    ({"reduction_factor": 24}, 1), ({"reduction_factor": 0.5}, 48), ({"reduction_factor": 5}, 5), ({}, 2),
    ({"bottleneck_size": 3, "reduction_factor": 2}, 3)], ids=str)
def test_the_bottleneck_is_given_or_the_width_over_the_reduction_factor(make_model, fields, size):
    for layer in adapters(inject(make_model(GPT2LMHeadModel), BottleneckConfig(**fields))).values():
        assert layer.down.weight.shape == (size, 24) and layer.up.weight.shape == (24, size)


# --- counts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("architecture", "each_block"), [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(("C", "m"), [(24, 5), (12, 7)])
def test_trained_parameters_equal_the_closed_form(architecture, each_block, layer_norm, C, m):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=40, n_embd=C, n_layer=3, n_head=3))
    inject(model, BottleneckConfig(architecture=architecture, bottleneck_size=m, layer_norm=layer_norm))
    one = 2 * C * m + C + m + (2 * C if layer_norm else 0)
    assert trainable_parameters(model).trainable == 3 * each_block * one


@pytest.mark.parametrize(("fields", "trained"), [
    ({"bottleneck_size": 48}, 1_789_056), ({}, 1_789_056), ({"architecture": "pfeiffer"}, 894_528),
    ({"layer_norm": True}, 24 * (74_544 + 1_536)),
    ({"bottleneck_size": 64, "layer_norm": True}, 24 * (2 * 768 * 64 + 768 + 64 + 1536))], ids=str)
def test_counts_at_gpt2s_size(fields, trained):
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config.official("gpt2"))
    assert trainable_parameters(inject(model, BottleneckConfig(**fields))).trainable == trained
    for text in ("24 * 74,544 = 1,789,056", "12 * 74,544 + 1,536 = 896,064", "24 * (74,544 + 1,536) + 1,536"):
        assert text in adapter_module.__doc__
