"""VeRA against its formula: y = x W^T + bias + b * ((d * (dropout(x) A^T)) B^T), A and B shared, random and frozen."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import IDS

from minipeft import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    VeraConfig,
    inject,
    load_adapter,
    save_adapter,
    trainable_parameters,
)
from minipeft.methods import vera
from minipeft.methods.injection import active_injections
from minipeft.methods.vera import Projections, VeRALinear
from minipeft.model.dropout import dropout


def layer(in_features=6, out_features=10, r=4, largest=(6, 10), bias=True, **fields):
    """A layer beside matrices made for `largest`, its vectors away from where they start."""
    torch.manual_seed(0)
    projections = Projections(r, *largest, seed=3, device=torch.device("cpu"))
    result = VeRALinear(nn.Linear(in_features, out_features, bias=bias), projections, VeraConfig(r=r, **fields))
    nn.init.normal_(result.vera_lambda_d)
    nn.init.normal_(result.vera_lambda_b)
    return result


def parts(adapted):
    """Copies of (W, bias, A, B, d, b), the matrices whole."""
    base, shared = adapted.base_layer, adapted.projections
    return [tensor.detach().clone().requires_grad_() for tensor in (
        base.weight, base.bias if base.bias is not None else torch.zeros(1).to(base.weight), shared.vera_A,
        shared.vera_B, adapted.vera_lambda_d, adapted.vera_lambda_b)]


def vera_layers(model):
    return active_injections(model)[0].layers


# --- the formula ------------------------------------------------------------------------------------------------------

def test_an_example_worked_out_by_hand():
    base = nn.Linear(2, 3)
    adapted = VeRALinear(base, Projections(2, 2, 3, seed=0, device=torch.device("cpu")), VeraConfig(r=2))
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1, 0], [0, 1], [1, 1]]))
        base.bias.copy_(torch.tensor([0, 1, 0]))
        adapted.projections.vera_A.copy_(torch.tensor([[1, 0], [1, 1]]))
        adapted.projections.vera_B.copy_(torch.tensor([[1, 0], [0, 1], [1, 1]]))
        adapted.vera_lambda_d.copy_(torch.tensor([2, 3]))
        adapted.vera_lambda_b.copy_(torch.tensor([1, 2, -1]))
    # x = [1, 2]:   x A^T = [1, 3],   times d = [2, 9],   times B^T = [2, 9, 11],   times b = [2, 18, -11].
    assert torch.equal(adapted(torch.tensor([[1.0, 2.0]])), torch.tensor([[1 + 2.0, 3 + 18.0, 3 - 11.0]]))
    # diag(b) B diag(d) A = diag(1, 2, -1) [[2, 0], [3, 3], [5, 3]]:
    assert torch.equal(adapted.merged()["weight"], torch.tensor([[3.0, 0.0], [6.0, 7.0], [-4.0, -2.0]]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (2, 7, 6), (6,)], ids=["two dimensions", "three dimensions", "one vector"])
def test_output_and_gradients_equal_the_written_out_formula(shape, bias):
    adapted = layer(bias=bias).double()
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    towards = torch.randn(*shape[:-1], 10, dtype=torch.double)
    (adapted(x) * towards).sum().backward()

    W, bias, A, B, d, b = parts(adapted)
    x2 = x.detach().clone().requires_grad_()
    expected = x2 @ W.T + bias + x2 @ (torch.diag(b) @ B @ torch.diag(d) @ A).T
    (expected * towards).sum().backward()
    torch.testing.assert_close(adapted(x), expected, atol=1e-12, rtol=0)
    for actual, wanted in ((x.grad, x2.grad), (adapted.vera_lambda_d.grad, d.grad),
                           (adapted.vera_lambda_b.grad, b.grad)):
        torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=0)


def test_gradients_pass_gradcheck_in_float64():
    adapted = layer(in_features=4, out_features=5, r=3).double()
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    d, b = (p.detach().clone().requires_grad_() for p in (adapted.vera_lambda_d, adapted.vera_lambda_b))

    def output(x, d, b):
        return torch.func.functional_call(adapted, {"vera_lambda_d": d, "vera_lambda_b": b}, (x,))

    assert torch.autograd.gradcheck(output, (x, d, b))


def test_a_smaller_target_uses_the_first_columns_of_a_and_the_first_rows_of_b():
    adapted = layer(in_features=3, out_features=4, largest=(6, 10))
    W, bias, A, B, d, b = parts(adapted)
    x = torch.randn(7, 3)
    expected = x @ W.T + bias + b * ((d * (x @ A[:, :3].T)) @ B[:4].T)
    torch.testing.assert_close(adapted(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(F.linear(x, adapted.merged()["weight"], bias), expected, atol=1e-5, rtol=1e-5)


def test_dropout_acts_on_the_adapters_input_only_and_in_training_only():
    adapted = layer(vera_dropout=0.5).train()
    W, bias, A, B, d, b = parts(adapted)
    x = torch.randn(400, 6)
    torch.manual_seed(3)
    actual = adapted(x)
    torch.manual_seed(3)
    dropped = dropout(x, 0.5)
    torch.testing.assert_close(actual, x @ W.T + bias + b * ((d * (dropped @ A.T)) @ B.T), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(adapted.eval()(x), x @ W.T + bias + b * ((d * (x @ A.T)) @ B.T), atol=1e-4, rtol=1e-4)


# --- the shared matrices ----------------------------------------------------------------------------------------------

def test_the_matrices_are_uniform_up_to_the_root_of_six_over_fan_in():
    shared = Projections(200, 300, 400, seed=0, device=torch.device("cpu"))
    for matrix, shape, fan_in in ((shared.vera_A, (200, 300), 300), (shared.vera_B, (400, 200), 200)):
        bound = math.sqrt(6 / fan_in)
        assert matrix.shape == shape
        assert 0.999 * bound < matrix.abs().max() <= bound
        assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
        assert matrix.mean().item() == pytest.approx(0, abs=0.02 * bound)


def test_all_targets_share_one_pair_of_matrices_as_large_as_the_largest_needs(make_model):
    model = inject(make_model(GPT2LMHeadModel), VeraConfig(r=5, target_modules="all-linear"))
    layers = list(vera_layers(model).values())
    assert len(layers) == 8 and len({id(layer.projections) for layer in layers}) == 1
    assert layers[0].projections.vera_A.shape == (5, 96) and layers[0].projections.vera_B.shape == (96, 5)
    assert not any("vera_A" in name or "vera_B" in name for name, _ in model.named_parameters())


def test_the_key_alone_decides_the_matrices_and_the_global_generator_is_left_alone(make_model):
    def matrices(key, seed):
        model = make_model(GPT2LMHeadModel)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        inject(model, VeraConfig(r=4, projection_prng_key=key))
        assert torch.equal(torch.get_rng_state(), state)
        shared = next(iter(vera_layers(model).values())).projections
        return torch.cat((shared.vera_A.flatten(), shared.vera_B.flatten()))

    assert torch.equal(matrices(0, seed=1), matrices(0, seed=2))
    assert not torch.equal(matrices(0, seed=1), matrices(1, seed=1))


def test_matrices_in_the_file_count_and_without_them_the_key_does(make_model, tmp_path):
    logits = {}
    for stored in (True, False):
        model = inject(make_model(GPT2LMHeadModel), VeraConfig(r=4, save_projection=stored))
        with torch.no_grad():
            for adapted in vera_layers(model).values():
                adapted.vera_lambda_b.normal_(generator=torch.Generator().manual_seed(1))
            next(iter(vera_layers(model).values())).projections.vera_A.mul_(2.0)  # not what the key gives
        save_adapter(model, tmp_path / str(stored))
        logits[stored] = model(IDS)
    loaded = {stored: load_adapter(make_model(GPT2LMHeadModel), tmp_path / str(stored)) for stored in (True, False)}
    assert torch.equal(loaded[True](IDS), logits[True])
    with torch.no_grad():
        next(iter(vera_layers(model).values())).projections.vera_A.div_(2.0)
    assert torch.equal(loaded[False](IDS), model(IDS))
    assert not torch.allclose(loaded[False](IDS), loaded[True](IDS), atol=1e-3)


# --- the start and the fields -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("d_initial", [0.1, 1, -2.5, 0.0])
def test_d_starts_where_it_is_told_and_b_at_zero(make_model, d_initial):
    model = inject(make_model(GPT2LMHeadModel), VeraConfig(r=4, d_initial=d_initial, vera_dropout=0.25))
    for adapted in vera_layers(model).values():
        assert torch.equal(adapted.vera_lambda_d, torch.full((4,), float(d_initial)))
        assert torch.equal(adapted.vera_lambda_b, torch.zeros(72))
        assert adapted.vera_dropout.p == 0.25


@pytest.mark.parametrize(("fields", "expected"), [
    ({}, ["h.0.attn.c_attn", "h.1.attn.c_attn"]), ({"layers_to_transform": 1}, ["h.1.attn.c_attn"]),
    ({"target_modules": ["c_fc", "c_attn"], "layers_to_transform": [0], "layers_pattern": "h"},
     ["h.0.attn.c_attn", "h.0.mlp.c_fc"]),
    ({"target_modules": r".*\.1\.mlp\.c_.*"}, ["h.1.mlp.c_fc", "h.1.mlp.c_proj"]),
], ids=str)
def test_these_fields_choose_these_layers(make_model, fields, expected):
    model = inject(make_model(GPT2LMHeadModel), VeraConfig(r=4, **fields))
    assert [name.removeprefix("transformer.") for name in vera_layers(model)] == expected


BASE_BIASES = ["ln_1.bias", "attn.c_attn.bias", "attn.c_proj.bias", "ln_2.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"]


@pytest.mark.parametrize(("bias", "biases"), [
    ("none", set()), ("vera_only", {f"transformer.h.{i}.attn.c_attn.bias" for i in (0, 1)}),
    ("all", {f"transformer.h.{i}.{name}" for i in (0, 1) for name in BASE_BIASES} | {"transformer.ln_f.bias"})])
def test_bias_says_which_biases_are_trained_and_they_are_saved(make_model, tmp_path, bias, biases):
    model = inject(make_model(GPT2ForSequenceClassification), VeraConfig(r=4, bias=bias))
    vectors = {f"transformer.h.{i}.attn.c_attn.vera_lambda_{which}" for i in (0, 1) for which in "db"}
    trained = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == vectors | biases | {"score.weight"}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(make_model(GPT2ForSequenceClassification), tmp_path)(IDS), model(IDS))


# --- counts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("fields", "trained"), [
    ({"r": 4}, 2 * (4 + 72)), ({"r": 64, "target_modules": ["c_proj"]}, 2 * 2 * (64 + 24)),
    ({"r": 7, "target_modules": "all-linear"}, 2 * (4 * 7 + 72 + 24 + 96 + 24)),
    ({"r": 4, "bias": "vera_only"}, 2 * (4 + 72 + 72))], ids=str)
def test_a_target_trains_r_plus_out_parameters(make_model, fields, trained):
    assert trainable_parameters(inject(make_model(GPT2LMHeadModel), VeraConfig(**fields))).trainable == trained


@pytest.mark.parametrize(("name", "r", "trained"), [("gpt2", 256, 30_720), ("gpt2-xl", 1024, 48 * (1024 + 4800))])
def test_counts_at_the_official_sizes(name, r, trained):
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config.official(name))
    assert trainable_parameters(inject(model, VeraConfig(r=r))).trainable == trained
    assert "12 * 2,560 = 30,720" in vera.__doc__
