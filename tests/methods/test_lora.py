"""LoRA against its formula: y = x W^T + bias + s * dropout(x) A^T B^T."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import IDS, assert_unchanged, build, snapshot, trained_names

from minipeft import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LoraConfig,
    inject,
    trainable_parameters,
)
from minipeft.errors import ConfigError
from minipeft.methods import lora
from minipeft.methods.injection import active_injections
from minipeft.methods.lora import LoRALinear
from minipeft.model.dropout import dropout
from minipeft.model.linear import linear


def layer(in_features=6, out_features=10, r=3, lora_alpha=6.0, dropout=0.0, rslora=False, init=True, bias=True,
          random_b=True):
    torch.manual_seed(0)
    config = LoraConfig(lora_dropout=dropout, use_rslora=rslora, init_lora_weights=init)
    result = LoRALinear(nn.Linear(in_features, out_features, bias=bias), r, lora_alpha, config)
    if random_b:
        nn.init.normal_(result.lora_B.weight)
    return result


def lora_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


# --- the formula ------------------------------------------------------------------------------------------------------

def test_an_example_worked_out_by_hand():
    base = nn.Linear(3, 2)
    adapted = LoRALinear(base, r=2, lora_alpha=4, config=LoraConfig())
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1, 0, 2], [0, 1, -1]]))               # W (out 2, in 3)
        base.bias.copy_(torch.tensor([1, -1]))
        adapted.lora_A.weight.copy_(torch.tensor([[1, 2, 0], [0, 1, 1]]))      # A (r 2, in 3)
        adapted.lora_B.weight.copy_(torch.tensor([[1, 0], [2, 1]]))            # B (out 2, r 2)
    x = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, -1.0]])
    # s = 4 / 2 = 2.   x W^T + bias = [[4, -1], [1, 0]].   x A^T = [[3, 2], [2, -1]].   x A^T B^T = [[3, 8], [2, 3]].
    assert torch.equal(adapted(x), torch.tensor([[10.0, 15.0], [5.0, 6.0]]))
    # B A = [[1, 2, 0], [2, 5, 1]].   W + 2 B A:
    assert list(adapted.merged()) == ["weight"]
    assert torch.equal(adapted.merged()["weight"], torch.tensor([[3.0, 4.0, 2.0], [4.0, 11.0, 1.0]]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (2, 7, 6), (6,)], ids=["two dimensions", "three dimensions", "one vector"])
def test_output_and_gradients_equal_the_written_out_formula(shape, bias):
    adapted = layer(bias=bias).double()
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    towards = torch.randn(*shape[:-1], 10, dtype=torch.double)
    (adapted(x) * towards).sum().backward()

    W, b = adapted.base_layer.weight.detach(), adapted.base_layer.bias
    x2, A, B = (t.detach().clone().requires_grad_() for t in (x, adapted.lora_A.weight, adapted.lora_B.weight))
    expected = x2 @ W.T + (0 if b is None else b.detach()) + 2.0 * (x2 @ A.T @ B.T)        # s = 6 / 3
    (expected * towards).sum().backward()

    torch.testing.assert_close(adapted(x), expected, atol=1e-12, rtol=0)
    for actual, wanted in ((x.grad, x2.grad), (adapted.lora_A.weight.grad, A.grad),
                           (adapted.lora_B.weight.grad, B.grad)):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=0)


def test_gradients_pass_gradcheck_in_float64():
    adapted = layer(in_features=4, out_features=5, r=2).double()
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)

    def output(x, A, B):
        return torch.func.functional_call(adapted, {"lora_A.weight": A, "lora_B.weight": B}, (x,))

    A, B = (p.detach().clone().requires_grad_() for p in (adapted.lora_A.weight, adapted.lora_B.weight))
    assert torch.autograd.gradcheck(output, (x, A, B))


@pytest.mark.parametrize(("r", "alpha", "rslora", "scaling"), [
    (8, 8, False, 1.0), (8, 16, False, 2.0), (4, 6, False, 1.5), (4, 6, True, 3.0), (9, 1, True, 1 / 3),
    (2, 2, True, math.sqrt(2)), (1, 5, True, 5.0), (4, -2.0, False, -0.5), (4, 0, False, 0.0)])
def test_scaling_is_alpha_over_r_and_over_its_root_in_rslora(r, alpha, rslora, scaling):
    adapted = layer(in_features=12, out_features=10, r=r, lora_alpha=alpha, rslora=rslora)
    assert adapted.scaling == pytest.approx(scaling)
    x = torch.randn(4, 12)
    update = x @ adapted.lora_A.weight.T @ adapted.lora_B.weight.T
    torch.testing.assert_close(adapted(x) - adapted.base_layer(x), scaling * update, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(F.linear(x, adapted.merged()["weight"], adapted.base_layer.bias), adapted(x),
                               atol=1e-5, rtol=1e-5)


def test_dropout_acts_on_the_adapters_input_only():
    adapted = layer(dropout=0.5).train()
    x = torch.randn(400, 6)
    torch.manual_seed(3)
    actual = adapted(x)
    torch.manual_seed(3)
    dropped = dropout(x, 0.5)
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    expected = adapted.base_layer(x) + 2.0 * (dropped @ adapted.lora_A.weight.T @ adapted.lora_B.weight.T)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    nn.init.zeros_(adapted.lora_B.weight)  # without the adapter branch nothing random is left
    assert torch.equal(adapted(x), adapted.base_layer(x))


def test_dropout_is_off_in_eval():
    adapted = layer(dropout=0.5).eval()
    x = torch.randn(20, 6)
    expected = adapted.base_layer(x) + 2.0 * (x @ adapted.lora_A.weight.T @ adapted.lora_B.weight.T)
    torch.testing.assert_close(adapted(x), expected, atol=1e-5, rtol=1e-5)


def test_a_bfloat16_base_keeps_its_type_and_its_adapter_is_float32(tiny_config):
    model = inject(build(GPT2LMHeadModel, tiny_config).bfloat16(), LoraConfig(r=2))
    adapted = model.transformer.h[0].attn.c_attn
    assert adapted.lora_A.weight.dtype == adapted.lora_B.weight.dtype == torch.float32
    nn.init.normal_(adapted.lora_B.weight)
    x = torch.randn(3, 24).bfloat16()
    update = linear(adapted.scaling * linear(x.float(), adapted.lora_A.weight), adapted.lora_B.weight)
    assert adapted(x).dtype == torch.bfloat16
    assert torch.equal(adapted(x), (adapted.base_layer(x).float() + update).bfloat16())  # one rounding, at the end
    assert model(IDS).dtype == torch.bfloat16


def test_under_autocast_the_products_are_bfloat16_and_parameters_and_gradients_float32():
    adapted = layer()
    x = torch.randn(20, 6)
    expected = adapted(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = adapted(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.1, rtol=0.05)
    actual.float().square().sum().backward()
    for parameter in (adapted.lora_A.weight, adapted.lora_B.weight):
        assert parameter.dtype == parameter.grad.dtype == torch.float32


# --- the start --------------------------------------------------------------------------------------------------------

def test_default_start_is_uniform_a_up_to_one_over_root_in_and_zero_b():
    adapted = layer(in_features=400, out_features=50, r=20, random_b=False)
    A, bound = adapted.lora_A.weight.detach(), 1 / math.sqrt(400)
    assert A.abs().max() <= bound                                # not 1 / sqrt(r), whatever A's layout suggests
    assert A.max() > 0.99 * bound and A.min() < -0.99 * bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert torch.equal(adapted.lora_B.weight, torch.zeros(50, 20))


def test_gaussian_start_is_normal_a_of_deviation_one_over_r_and_zero_b():
    adapted = layer(in_features=400, out_features=50, r=20, init="gaussian", random_b=False)
    A = adapted.lora_A.weight.detach()
    assert A.std().item() == pytest.approx(1 / 20, rel=0.03)
    assert A.mean().item() == pytest.approx(0, abs=0.003)
    assert A.abs().max() > 3 / 20                                # tails: not uniform
    assert torch.equal(adapted.lora_B.weight, torch.zeros(50, 20))


def test_false_start_is_uniform_a_and_uniform_b_up_to_one_over_root_r():
    adapted = layer(in_features=400, out_features=500, r=16, init=False, random_b=False)
    A, B = adapted.lora_A.weight.detach(), adapted.lora_B.weight.detach()
    assert 0.99 / 20 < A.abs().max() <= 1 / 20
    assert 0.99 / 4 < B.abs().max() <= 1 / 4
    assert B.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.03)


def test_pissa_moves_the_largest_singular_values_from_the_matrix_into_the_pair():
    torch.manual_seed(0)
    base = nn.Linear(12, 20)
    whole = base.weight.detach().clone()
    adapted = LoRALinear(base, 3, 6.0, LoraConfig(init_lora_weights="pissa"))
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    rest = U[:, 3:] @ torch.diag(S[3:]) @ Vh[3:]
    left = lora.take_over_largest(adapted)
    assert torch.equal(base.weight, whole), "a plan touched the model"
    torch.testing.assert_close(left, rest, atol=1e-5, rtol=0)
    base.weight.data = left
    torch.testing.assert_close(adapted.merged()["weight"], whole, atol=1e-5, rtol=0)
    A, B = adapted.lora_A.weight, adapted.lora_B.weight
    torch.testing.assert_close(A @ A.T, torch.diag(S[:3] / 2), atol=1e-5, rtol=0)        # s = 6 / 3
    torch.testing.assert_close(B.T @ B, torch.diag(S[:3] / 2), atol=1e-5, rtol=0)


def test_init_false_does_not_start_at_the_base_model(tiny_config):
    model = build(GPT2LMHeadModel, tiny_config)
    base = model(IDS)
    inject(model, LoraConfig(init_lora_weights=False))
    assert (model(IDS) - base).abs().max() > 1e-3
    assert all(module.lora_B.weight.abs().min() > 0 for module in lora_layers(model).values())


def test_every_field_reaches_the_layers(tiny_config):
    model = inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.25, use_rslora=True, init_lora_weights=False))
    for adapted in lora_layers(model).values():
        assert adapted.lora_A.weight.shape == (4, 24) and adapted.lora_B.weight.shape == (72, 4)
        assert adapted.lora_dropout.p == 0.25
        assert adapted.scaling == 3.0
        assert adapted.lora_B.weight.abs().max() > 0


def test_the_seed_decides_the_start(tiny_config):
    def injected(seed):
        model = build(GPT2LMHeadModel, tiny_config)
        torch.manual_seed(seed)
        return inject(model, LoraConfig()).transformer.h[1].attn.c_attn.lora_A.weight

    assert torch.equal(injected(1), injected(1))
    assert not torch.equal(injected(1), injected(2))


# --- counts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("model_class", "head"), [
    (GPT2LMHeadModel, lambda d, K: 0), (GPT2Model, lambda d, K: 0),
    (GPT2ForSequenceClassification, lambda d, K: K * d), (GPT2ForTokenClassification, lambda d, K: K * d + K)])
@pytest.mark.parametrize(("L", "d", "m", "r", "K"), [(2, 24, None, 8, 2), (3, 12, 20, 1, 5), (1, 36, 50, 5, 1)])
def test_trained_parameters_equal_the_closed_forms(tiny_config, model_class, head, L, d, m, r, K):
    config = dataclasses.replace(tiny_config, n_layer=L, n_embd=d, n_inner=m, num_labels=K)
    m = m or 4 * d

    def trained(**fields):
        return trainable_parameters(inject(model_class(config), LoraConfig(r=r, **fields))).trainable - head(d, K)

    every_bias = L * (7 * d + m) + d  # a block: attention 3d + d, MLP m + d, LayerNorms d + d; then ln_f
    assert trained() == 4 * L * r * d
    assert trained(target_modules="all-linear") == L * r * (8 * d + 2 * m)
    assert trained(target_modules=["c_proj"]) == L * r * (2 * d + m + d)
    assert trained(layers_to_transform=0) == 4 * r * d
    assert trained(bias="lora_only") == 4 * L * r * d + 3 * L * d
    assert trained(bias="lora_only", target_modules="all-linear") == L * r * (8 * d + 2 * m) + L * (5 * d + m)
    assert trained(bias="all") == 4 * L * r * d + every_bias


def gpt2_on_meta(name):
    with torch.device("meta"):  # shapes without memory
        return GPT2LMHeadModel(GPT2Config.official(name))


@pytest.mark.parametrize(("name", "fields", "trained"), [
    ("gpt2", {}, 294_912), ("gpt2", {"r": 16, "target_modules": "all-linear"}, 2_359_296),
    ("gpt2-medium", {}, 786_432), ("gpt2-xl", {"r": 4}, 1_228_800)])
def test_counts_at_the_official_sizes(name, fields, trained):
    model = inject(gpt2_on_meta(name), LoraConfig(**fields))
    assert trainable_parameters(model).trainable == trained


def test_gpt2_has_124_million_parameters_and_a_c_attn_of_the_sizes_in_the_docstring():
    model = gpt2_on_meta("gpt2")
    assert trainable_parameters(model).total == 124_439_808
    c_attn = inject(model, LoraConfig(r=8)).transformer.h[0].attn.c_attn
    assert c_attn.base_layer.weight.numel() == 1_769_472
    assert c_attn.lora_A.weight.numel() + c_attn.lora_B.weight.numel() == 24_576
    assert "= 24,576 for a c_attn of GPT-2 beside 1,769,472 in its W" in lora.__doc__


# --- the fields -------------------------------------------------------------------------------------------------------

def test_rank_and_alpha_patterns_are_looked_up_independently_and_the_first_match_counts(tiny_config):
    model = inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(
        r=2, lora_alpha=6, target_modules="all-linear",
        rank_pattern={"h.0.attn.c_attn": 3, "c_fc|mlp.c_proj": 4, "c_attn": 5, "attn": 24, "_proj": 24},
        alpha_pattern={"^transformer.h.1.mlp.c_fc": 1, "c_proj": 10}))
    actual = {name.removeprefix("transformer."): (module.lora_A.out_features, module.scaling)
              for name, module in lora_layers(model).items()}
    assert actual == {
        "h.0.attn.c_attn": (3, 6 / 3), "h.0.attn.c_proj": (2, 10 / 2), "h.0.mlp.c_fc": (4, 6 / 4),
        "h.0.mlp.c_proj": (4, 10 / 4), "h.1.attn.c_attn": (5, 6 / 5), "h.1.attn.c_proj": (2, 10 / 2),
        "h.1.mlp.c_fc": (4, 1 / 4), "h.1.mlp.c_proj": (4, 10 / 4)}


def test_patterns_under_rslora_use_the_modules_own_rank(tiny_config):
    model = inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["c_attn", "c_fc"], rank_pattern={"c_fc": 9},
        alpha_pattern={"c_fc": 12}))
    assert model.transformer.h[0].attn.c_attn.scaling == pytest.approx(3.0)
    assert model.transformer.h[0].mlp.c_fc.scaling == pytest.approx(4.0)


BASE_BIASES = ["ln_1.bias", "attn.c_attn.bias", "attn.c_proj.bias", "ln_2.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"]


@pytest.mark.parametrize(("model_class", "head"), [
    (GPT2LMHeadModel, set()), (GPT2ForSequenceClassification, {"score.weight"}),
    (GPT2ForTokenClassification, {"classifier.weight", "classifier.bias"})])
@pytest.mark.parametrize(("bias", "biases"), [
    ("none", set()),
    ("lora_only", {f"transformer.h.{i}.attn.c_attn.base_layer.bias" for i in (0, 1)}),
    ("all", {f"transformer.h.{i}.{name}" for i in (0, 1) for name in BASE_BIASES if name != "attn.c_attn.bias"}
            | {f"transformer.h.{i}.attn.c_attn.base_layer.bias" for i in (0, 1)} | {"transformer.ln_f.bias"})])
def test_bias_says_which_biases_are_trained(tiny_config, model_class, head, bias, biases):
    model = inject(build(model_class, tiny_config), LoraConfig(r=2, bias=bias))
    matrices = {f"transformer.h.{i}.attn.c_attn.lora_{AB}.weight" for i in (0, 1) for AB in "AB"}
    assert trained_names(model) == matrices | biases | head
    bare = [name.replace("base_layer.", "") for name in biases | head]
    assert sorted(active_injections(model)[0].trained_base) == sorted(bare)  # each once


@pytest.mark.parametrize(("fields", "message"), [
    ({"r": 0}, "r must be a positive integer, got 0"),
    ({"r": -1}, "r must be a positive integer, got -1"),
    ({"r": True}, "r must be int, got True"),
    ({"r": 2.5}, r"r must be int, got 2\.5"),
    ({"r": "8"}, "r must be int, got '8'"),
    ({"r": None}, "r must be int, got None"),
    ({"r": 25}, r"r=25 is larger than transformer\.h\.0\.attn\.c_attn's smaller side, 24"),
    ({"rank_pattern": {"c_attn": 0}}, r"rank_pattern\['c_attn'\] must be a positive integer, got 0"),
    ({"rank_pattern": {"h.1.attn.c_attn": 25}}, r"r=25 is larger than transformer\.h\.1\.attn\.c_attn"),
    ({"rank_pattern": {"not_there": 1.5}}, "rank_pattern must be .*1.5"),
    ({"rank_pattern": {"c_attn": True}}, "rank_pattern must be .*True"),
    ({"rank_pattern": {5: 2}}, "rank_pattern must be .*5"),
    ({"rank_pattern": {"(": 4}}, r"'.*\(\(.*' is not a regular expression"),
    ({"rank_pattern": []}, "rank_pattern must be"),
    ({"rank_pattern": None}, "rank_pattern must be"),
    ({"lora_alpha": math.nan}, "lora_alpha must be a finite number, got nan"),
    ({"lora_alpha": math.inf}, "lora_alpha must be a finite number, got inf"),
    ({"lora_alpha": "16"}, "lora_alpha must be float, got '16'"),
    ({"lora_alpha": True}, "lora_alpha must be float, got True"),
    ({"alpha_pattern": {"c_attn": math.nan}}, r"alpha_pattern\['c_attn'\] must be a finite number, got nan"),
    ({"alpha_pattern": {"c_attn": "8"}}, "alpha_pattern must be .*'8'"),
    ({"lora_dropout": 1.0}, r"lora_dropout must be a probability in \[0, 1\), got 1\.0"),
    ({"lora_dropout": -0.1}, "lora_dropout must be a probability"),
    ({"lora_dropout": math.nan}, "lora_dropout must be a probability"),
    ({"lora_dropout": "0.1"}, "lora_dropout must be float, got '0.1'"),
    ({"lora_dropout": False}, "lora_dropout must be float, got False"),
    ({"bias": "some"}, "bias must be one of none, lora_only, all, got 'some'"),
    ({"bias": None}, "bias must be one of"),
    ({"bias": True}, "bias must be one of"),
    ({"init_lora_weights": "olora"}, "init_lora_weights must be one of True, False, gaussian, pissa, got 'olora'"),
    ({"init_lora_weights": "pissa", "lora_alpha": 0}, "PiSSA divides by the scale: lora_alpha must be positive, got 0"),
    ({"init_lora_weights": "pissa", "alpha_pattern": {"c_attn": -1}}, "PiSSA.*c_attn must be positive, got -1"),
    ({"use_dora": 1}, "."),
    ({"init_lora_weights": None}, "init_lora_weights must be one of"),
    ({"init_lora_weights": 0}, "init_lora_weights must be one of"),  # which is equal to False, and is not False
    ({"use_rslora": "false"}, "use_rslora must be bool, got 'false'"),
    ({"use_rslora": 1}, "use_rslora must be bool, got 1"),
], ids=str)
def test_a_value_that_makes_no_lora_is_refused_before_anything_is_touched(tiny_config, fields, message):
    model = build(GPT2ForSequenceClassification, tiny_config)
    before = snapshot(model)
    if "r=25" not in message and "regular expression" not in message:
        with pytest.raises(ConfigError, match=message):
            LoraConfig(**fields)
    config = LoraConfig()
    vars(config).update(fields)  # also later, when it is injected, and what only then can be known to be wrong
    kept = copy.deepcopy(dataclasses.asdict(config))
    with pytest.raises(ConfigError, match=message) as caught:
        inject(model, config)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)
    assert repr(dataclasses.asdict(config)) == repr(kept)  # repr, since nan is not equal to itself
