"""DoRA against its formula: y = m * x (W + s B A)^T / ||W + s B A|| + bias, the norm held constant in the gradient."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import IDS, train

from minipeft import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LoraConfig,
    inject,
    merge,
    trainable_parameters,
)
from minipeft.methods.dora import DoRALinear
from minipeft.methods.injection import active_injections
from minipeft.model.dropout import dropout
from minipeft.training.hardware import cast_frozen
from minipeft.training.optimizer import adamw


def layer(in_features=6, out_features=10, r=3, lora_alpha=6.0, bias=True, moved=True, **fields):
    """A DoRA layer; `moved` takes B and m away from where they start."""
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, bias=bias)
    result = DoRALinear(base, r, lora_alpha, LoraConfig(r=r, lora_alpha=lora_alpha, use_dora=True, **fields))
    if moved:
        nn.init.normal_(result.lora_B.weight)
        nn.init.uniform_(result.lora_magnitude_vector, 0.5, 2.0)
    return result


def parts(adapted):
    """Copies of (W, bias or 0, A, B, m)."""
    base = adapted.base_layer
    tensors = (base.weight, torch.zeros(1).to(base.weight) if base.bias is None else base.bias, adapted.lora_A.weight,
               adapted.lora_B.weight, adapted.lora_magnitude_vector)
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def written_out(x, W, bias, A, B, m, s, detached=True):
    V = W + s * B @ A
    norm = V.square().sum(dim=1).sqrt()                                        # of each row
    return x @ (m[:, None] * V / (norm.detach() if detached else norm)[:, None]).T + bias


# --- rows of zeros ----------------------------------------------------------------------------------------------------

@pytest.mark.kind("5: DoRA with a zero row")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_row_of_zeros_stays_zero_until_the_update_gives_it_a_direction(dropout):
    base = nn.Linear(6, 4)
    with torch.no_grad():
        base.weight[1] = 0
    adapted = DoRALinear(base, 2, 4.0, LoraConfig(r=2, lora_alpha=4, use_dora=True, lora_dropout=dropout)).eval()
    x = torch.randn(5, 6)
    assert torch.equal(adapted(x), base(x))                                # step 0 is the base
    assert torch.equal(adapted.merged()["weight"], base.weight)
    adapted.train()(x).square().sum().backward()
    for tensor in (adapted.lora_A.weight, adapted.lora_B.weight, adapted.lora_magnitude_vector):
        assert tensor.grad.isfinite().all()
    assert adapted.lora_magnitude_vector.grad[1] == 0                      # without a direction no length
    with torch.no_grad():
        adapted.lora_B.weight[1] = torch.tensor([1.0, -1.0])               # the row has a direction now, and length 0
    adapted.zero_grad()
    adapted.eval()(x).sum().backward()
    row = 2.0 * torch.tensor([1.0, -1.0]) @ adapted.lora_A.weight          # s B A of that row
    torch.testing.assert_close(adapted(x)[:, 1], base.bias[1].expand(5))
    torch.testing.assert_close(adapted.lora_magnitude_vector.grad[1], (x @ row / row.norm()).sum())
    with torch.no_grad():
        adapted.lora_magnitude_vector[1] = 3.0
    torch.testing.assert_close(adapted(x)[:, 1], 3 * x @ row / row.norm() + base.bias[1])
    torch.testing.assert_close(adapted.merged()["weight"][1], 3 * row / row.norm())


@pytest.mark.kind("5: DoRA with a zero row")
@pytest.mark.parametrize("row", [5, 60], ids=["query", "value"])
def test_a_model_with_a_row_of_zeros_starts_as_the_base_trains_and_merges(tiny_config, row):
    model = GPT2ForSequenceClassification(tiny_config).eval()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[row] = 0
    base = model(IDS)
    inject(model, LoraConfig(r=2, use_dora=True))
    assert torch.equal(model(IDS), base)
    train(model.train())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    adapted = model.eval()(IDS)
    torch.testing.assert_close(merge(model)(IDS), adapted, atol=1e-5, rtol=1e-5)


# --- the formula ------------------------------------------------------------------------------------------------------

def test_an_example_worked_out_by_hand():
    base = nn.Linear(2, 2)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[3, 4], [0, 5]]))                      # W (out 2, in 2)
        base.bias.copy_(torch.tensor([1, -1]))
    adapted = DoRALinear(base, 1, 2.0, LoraConfig(r=1, lora_alpha=2, use_dora=True))
    assert torch.equal(adapted.lora_magnitude_vector, torch.tensor([5.0, 5.0]))             # ||(3, 4)||, ||(0, 5)||
    with torch.no_grad():
        adapted.lora_A.weight.copy_(torch.tensor([[1, 0]]))
        adapted.lora_B.weight.copy_(torch.tensor([[0], [6]]))
        adapted.lora_magnitude_vector.copy_(torch.tensor([10, 13]))
    # s = 2.   W + 2 B A = [[3, 4], [12, 5]], rows of length 5 and 13.   m / length = [2, 1].   W' = [[6, 8], [12, 5]].
    torch.testing.assert_close(adapted(torch.tensor([[1.0, 1.0], [2.0, -1.0]])),
                               torch.tensor([[15.0, 16.0], [5.0, 18.0]]))
    torch.testing.assert_close(adapted.merged()["weight"], torch.tensor([[6.0, 8.0], [12.0, 5.0]]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (2, 7, 6)], ids=["two dimensions", "three dimensions"])
def test_output_and_gradients_equal_the_formula_with_the_norm_held_constant(shape, training, bias):
    adapted = layer(bias=bias).double().train(training)
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    towards = torch.randn(*shape[:-1], 10, dtype=torch.double)
    W, b, A, B, m = parts(adapted)
    x2 = x.detach().clone().requires_grad_()
    expected = written_out(x2, W, b, A, B, m, s=2.0)                           # s = 6 / 3
    torch.testing.assert_close(adapted(x), expected, atol=1e-12, rtol=0)
    (adapted(x) * towards).sum().backward()
    (expected * towards).sum().backward()
    for actual, wanted in ((x.grad, x2.grad), (adapted.lora_A.weight.grad, A.grad),
                           (adapted.lora_B.weight.grad, B.grad), (adapted.lora_magnitude_vector.grad, m.grad)):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=0)


def test_the_gradient_is_not_the_one_through_the_norm():
    adapted = layer().double()
    x, towards = torch.randn(5, 6, dtype=torch.double), torch.randn(5, 10, dtype=torch.double)
    W, b, A, B, m = parts(adapted)
    (written_out(x, W, b, A, B, m, s=2.0, detached=False) * towards).sum().backward()
    (adapted(x) * towards).sum().backward()
    torch.testing.assert_close(adapted.lora_magnitude_vector.grad, m.grad)
    for through_the_norm, actual in ((A.grad, adapted.lora_A.weight.grad), (B.grad, adapted.lora_B.weight.grad)):
        assert (through_the_norm - actual).abs().max() > 0.1


def test_gradients_pass_gradcheck_in_float64_where_the_norm_is_a_constant():
    adapted = layer(in_features=4, out_features=5, r=2).double()
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    norms = adapted.row_norms()
    adapted.row_norms = lambda: norms
    names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    values = [adapted.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def output(x, *values):
        return torch.func.functional_call(adapted, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(output, (x, *values))


def test_gradients_of_input_and_magnitude_pass_gradcheck_in_float64_as_they_are():
    adapted = layer(in_features=4, out_features=5, r=2).double()
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    m = adapted.lora_magnitude_vector.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, m: torch.func.functional_call(adapted, {"lora_magnitude_vector": m}, (x,)), (x, m))


@pytest.mark.parametrize("bias", [True, False])
def test_dropout_in_training_acts_on_everything_but_the_frozen_product(bias):
    adapted = layer(bias=bias, lora_dropout=0.5).train()
    W, _, A, B, m = parts(adapted)
    x = torch.randn(400, 6)
    torch.manual_seed(3)
    actual = adapted(x)
    torch.manual_seed(3)
    dropped = dropout(x, 0.5)
    c = m / (W + 2.0 * B @ A).norm(dim=1)
    expected = adapted.base_layer(x) + (c - 1) * (dropped @ W.T) + c * 2.0 * (dropped @ A.T @ B.T)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert (actual - adapted.eval()(x)).abs().max() > 0.1


def test_dropout_is_off_in_eval():
    adapted = layer(lora_dropout=0.5).eval()
    x = torch.randn(20, 6)
    torch.testing.assert_close(adapted(x), written_out(x, *parts(adapted), s=2.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("fields", "scaling"), [({}, 1.5), ({"use_rslora": True}, 3.0)], ids=str)
def test_the_scaling_is_loras(fields, scaling):
    adapted = layer(in_features=12, r=4, lora_alpha=6, **fields)
    x = torch.randn(20, 12)
    assert adapted.scaling == scaling
    torch.testing.assert_close(adapted(x), written_out(x, *parts(adapted), s=scaling), atol=1e-5, rtol=1e-5)


def test_the_merged_rows_are_as_long_as_the_magnitudes_say_and_point_where_the_update_turned_them():
    adapted = layer().double()
    W, _, A, B, m = parts(adapted)
    merged = adapted.merged()
    assert set(merged) == {"weight"}                                           # the bias is not stretched
    torch.testing.assert_close(merged["weight"].norm(dim=1), m)
    torch.testing.assert_close(F.cosine_similarity(merged["weight"], W + 2.0 * B @ A), torch.ones(10).double())


def test_a_bfloat16_base_keeps_its_type_and_what_is_trained_is_float32(make_model):
    model = inject(make_model(GPT2LMHeadModel).bfloat16(), LoraConfig(r=2, use_dora=True))
    adapted = model.transformer.h[0].attn.c_attn
    assert {adapted.get_parameter(name).dtype for name in adapted.trained} == {torch.float32}
    nn.init.normal_(adapted.lora_B.weight)
    W, b, A, B, m = (tensor.float() for tensor in parts(adapted))
    x = torch.randn(3, 24).bfloat16()
    assert adapted(x).dtype == torch.bfloat16
    torch.testing.assert_close(adapted(x).float(), written_out(x.float(), W, b, A, B, m, s=4.0), atol=0.1, rtol=0.05)
    merge(model)
    assert model.transformer.h[0].attn.c_attn.weight.dtype == torch.bfloat16


# --- the start --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("init", [True, "gaussian", "pissa"])
def test_the_magnitudes_start_as_the_lengths_of_the_rows_of_w(init):
    torch.manual_seed(0)
    base = nn.Linear(6, 10)
    W = base.weight.detach().clone()
    adapted = DoRALinear(base, 3, 6.0, LoraConfig(r=3, use_dora=True, init_lora_weights=init))
    torch.testing.assert_close(adapted.lora_magnitude_vector, W.norm(dim=1))
    assert adapted.lora_magnitude_vector.shape == (10,)
    x = torch.randn(4, 6)
    torch.testing.assert_close(adapted(x), F.linear(x, W, base.bias), atol=1e-6, rtol=1e-5)


def test_with_a_random_b_the_magnitudes_start_as_the_lengths_after_the_update():
    adapted = layer(moved=False, init_lora_weights=False)
    W, b, A, B, m = parts(adapted)
    torch.testing.assert_close(m, (W + 2.0 * B @ A).norm(dim=1))
    x = torch.randn(4, 6)
    torch.testing.assert_close(adapted(x), x @ (W + 2.0 * B @ A).T + b, atol=1e-6, rtol=1e-5)


# --- counts and fields ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("fields", "per_block"), [
    ({"r": 4}, 4 * (24 + 72) + 72), ({"r": 1, "target_modules": ["c_proj"]}, (24 + 24) + 24 + (96 + 24) + 24),
    ({"r": 3, "target_modules": "all-linear"}, 3 * (8 * 24 + 2 * 96) + 5 * 24 + 96),
    ({"r": 4, "bias": "lora_only"}, 4 * (24 + 72) + 72 + 72)], ids=str)
def test_a_target_trains_r_in_plus_out_and_out_parameters(make_model, fields, per_block):
    model = inject(make_model(GPT2LMHeadModel), LoraConfig(use_dora=True, **fields))
    assert trainable_parameters(model).trainable == 2 * per_block


def test_the_count_at_gpt2s_size():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config.official("gpt2"))
    inject(model, LoraConfig(r=8, use_dora=True))
    assert trainable_parameters(model).trainable == 12 * (8 * (768 + 2304) + 2304) == 322_560


def test_patterns_and_choices_of_layers_are_loras(make_model):
    model = inject(make_model(GPT2LMHeadModel), LoraConfig(
        r=2, lora_alpha=6, use_dora=True, target_modules=["c_attn", "c_fc"], layers_to_transform=1,
        rank_pattern={"c_fc": 3}, alpha_pattern={"c_attn": 8}, lora_dropout=0.25))
    layers = active_injections(model)[0].layers
    assert active_injections(model)[0].method == "dora"
    assert {name: (type(layer), layer.lora_A.out_features, layer.scaling, layer.lora_dropout.p)
            for name, layer in layers.items()} == {
        "transformer.h.1.attn.c_attn": (DoRALinear, 2, 4.0, 0.25),
        "transformer.h.1.mlp.c_fc": (DoRALinear, 3, 2.0, 0.25)}


def test_loraplus_raises_the_rate_of_b_and_of_the_magnitudes(make_model):
    model = inject(make_model(GPT2ForSequenceClassification), LoraConfig(r=2, use_dora=True))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rates = {id(p): group["lr"] for group in adamw(
        [p for _, p in trained], model, 1e-3, loraplus_lr_ratio=16.0).param_groups for p in group["params"]}
    for name, parameter in trained:
        raised = name.endswith(("lora_B.weight", "lora_magnitude_vector"))
        assert math.isclose(rates[id(parameter)], 16e-3 if raised else 1e-3), name


def test_training_turns_and_stretches_the_rows(make_model):
    model = inject(make_model(GPT2LMHeadModel), LoraConfig(r=2, use_dora=True))
    before = model.transformer.h[0].attn.c_attn.merged()["weight"].detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()
    after = model.transformer.h[0].attn.c_attn.merged()["weight"].detach()
    assert (after.norm(dim=1) / before.norm(dim=1) - 1).abs().max() > 1e-3
    assert F.cosine_similarity(after, before).min() < 0.9999


# --- under autocast ---------------------------------------------------------------------------------------------------

def test_under_autocast_the_norms_are_those_of_float32():
    dora = layer(in_features=300)
    expected, stretch = dora.row_norms(), dora.stretch()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dora.row_norms(), expected) and torch.equal(dora.stretch(), stretch)


def test_weights_that_are_kept_in_bfloat16_to_predict_have_the_norms_of_float32():
    """As when an adapter is loaded to predict: all is frozen, so all linear layers are cast."""
    dora = layer(in_features=300)
    halves = [part.weight.detach().bfloat16() for part in (dora.base_layer, dora.lora_B, dora.lora_A)]
    weight, B, A = (half.float() for half in halves)
    cast_frozen(dora.requires_grad_(False), torch.bfloat16)
    torch.testing.assert_close(dora.row_norms(), (weight + dora.scaling * B @ A).norm(dim=1), rtol=1e-6, atol=0)


def test_under_autocast_step_0_is_the_base_model_bit_for_bit(make_model):
    model = make_model(GPT2LMHeadModel)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(IDS)
        assert torch.equal(inject(model, LoraConfig(r=2, use_dora=True))(IDS), expected)
