"""The learning-rate schedule at the points where it can be worked out by hand, and which parameters decay."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

from minipeft import (
    BitFitConfig,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    inject,
)
from minipeft.training.optimizer import AdamW, adamw, warmup_cosine

# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "factor"), [
    (0, 0.1), (1, 0.2), (4, 0.5), (9, 1.0),                # ten steps up; the first is not lost at a rate of zero
    (10, 1.0), (35, 0.5 * (1 + math.sqrt(0.5))), (60, 0.5), (85, 0.5 * (1 - math.sqrt(0.5))), (110, 0.0),
    (111, 0.0), (500, 0.0)])                               # and no second wave beyond the end
def test_warmup_is_linear_and_then_half_a_cosine_falls_to_zero(step, factor):
    assert warmup_cosine(step, total_steps=110, warmup_steps=10) == pytest.approx(factor, abs=1e-12)


def test_without_warmup_the_first_step_has_the_full_rate():
    assert warmup_cosine(0, total_steps=100, warmup_steps=0) == 1.0
    assert warmup_cosine(50, total_steps=100, warmup_steps=0) == pytest.approx(0.5)


def test_warmup_may_be_the_whole_run():
    assert [warmup_cosine(step, 4, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_it_rises_then_falls_and_never_leaves_zero_to_one():
    factors = [warmup_cosine(step, 200, 20) for step in range(200)]
    assert all(a < b for a, b in itertools.pairwise(factors[:20]))
    assert all(a > b for a, b in itertools.pairwise(factors[20:]))
    assert min(factors) > 0 and max(factors) == 1.0


# --- the groups -------------------------------------------------------------------------------------------------------

def groups(model, weight_decay=0.1, trained_only=False):
    """name -> weight decay, after checking that each given parameter is in one group, once."""
    given = [(name, p) for name, p in model.named_parameters() if p.requires_grad or not trained_only]
    optimizer = adamw((p for _, p in given), model, learning_rate=3e-4, weight_decay=weight_decay)
    held = [(id(p), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(key for key, _ in held) == sorted(id(p) for _, p in given)
    return {name: dict(held)[id(p)] for name, p in given}


def test_in_gpt2_the_matrices_of_linear_layers_decay_and_nothing_else(tiny_config):
    decays = groups(GPT2LMHeadModel(tiny_config))
    block = {"ln_1.weight": 0, "ln_1.bias": 0, "attn.c_attn.weight": 0.1, "attn.c_attn.bias": 0,
             "attn.c_proj.weight": 0.1, "attn.c_proj.bias": 0, "ln_2.weight": 0, "ln_2.bias": 0,
             "mlp.c_fc.weight": 0.1, "mlp.c_fc.bias": 0, "mlp.c_proj.weight": 0.1, "mlp.c_proj.bias": 0}
    assert decays == {"transformer.wte.weight": 0, "transformer.wpe.weight": 0, "transformer.ln_f.weight": 0,
                      "transformer.ln_f.bias": 0} | {f"transformer.h.{i}.{name}": decay
                                                     for i in (0, 1) for name, decay in block.items()}


def test_the_tied_output_head_counts_as_the_embedding_it_is(tiny_config):
    model = GPT2LMHeadModel(tiny_config)
    optimizer = adamw([model.lm_head.weight], model, 1e-3, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


def test_in_an_adapted_classifier_the_methods_matrices_and_the_heads_decay(tiny_config):
    model = inject(GPT2ForTokenClassification(tiny_config), LoraConfig(r=2, bias="lora_only", layers_to_transform=0))
    target = "transformer.h.0.attn.c_attn"
    assert groups(model, trained_only=True) == {
        f"{target}.lora_A.weight": 0.1, f"{target}.lora_B.weight": 0.1, f"{target}.base_layer.bias": 0,
        "classifier.weight": 0.1, "classifier.bias": 0}


def test_the_owner_decides_and_not_the_name():
    """A matrix called bias, a LayerNorm over two dimensions, an embedding under an ordinary name."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias_norm_embedding = nn.Linear(3, 2)
            self.matrix = nn.Embedding(4, 3)
            self.linear = nn.LayerNorm((2, 3))

    assert groups(Odd()) == {"bias_norm_embedding.weight": 0.1, "bias_norm_embedding.bias": 0, "matrix.weight": 0,
                             "linear.weight": 0, "linear.bias": 0}


def test_decay_pulls_only_what_may_decay(tiny_config):
    """With zero gradients AdamW does nothing but decay: theta - rate * decay * theta."""
    model = GPT2LMHeadModel(tiny_config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
            parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adamw(model.parameters(), model, learning_rate=0.5, weight_decay=0.2).step()
    for name, parameter in model.named_parameters():
        matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        torch.testing.assert_close(parameter, before[name] * (0.9 if matrix else 1.0), atol=1e-6, rtol=0)


def test_the_default_is_no_decay_and_the_given_rate_and_betas(tiny_config):
    model = GPT2LMHeadModel(tiny_config)
    for group in adamw(model.parameters(), model, learning_rate=3e-4).param_groups:
        assert (group["lr"], group["weight_decay"], group["betas"]) == (3e-4, 0.0, (0.9, 0.999))
    for group in adamw(model.parameters(), model, 1e-3, betas=(0.9, 0.95)).param_groups:
        assert (group["lr"], group["betas"]) == (1e-3, (0.9, 0.95))


METHODS_THAT_DO_NOT_DECAY = [IA3Config(), VeraConfig(r=4), PromptTuningConfig(num_virtual_tokens=3),
                             PrefixTuningConfig(num_virtual_tokens=3), BitFitConfig(), BitFitConfig("layer_norm")]


@pytest.mark.parametrize("config", METHODS_THAT_DO_NOT_DECAY, ids=lambda config: type(config).__name__)
def test_vectors_tables_and_scales_do_not_decay_whatever_their_shape(tiny_config, config):
    decays = groups(inject(GPT2ForSequenceClassification(tiny_config), config), trained_only=True)
    assert decays.pop("score.weight") == 0.1
    assert decays and set(decays.values()) == {0}


@pytest.mark.parametrize("use_dora", [False, True])
def test_loraplus_raises_the_rate_of_b_and_of_doras_magnitudes_and_of_nothing_else(tiny_config, use_dora):
    model = inject(GPT2ForSequenceClassification(tiny_config), LoraConfig(r=2, bias="lora_only", use_dora=use_dora))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(trained.values(), model, learning_rate=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): (group["lr"], group["rate_factor"]) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in trained.items():
        raised = name.endswith(("lora_B.weight", "lora_magnitude_vector"))
        assert rates[id(parameter)] == pytest.approx((16e-3, 16) if raised else (1e-3, 1))


def test_without_a_ratio_all_groups_have_one_rate(tiny_config):
    model = inject(GPT2ForSequenceClassification(tiny_config), LoraConfig(r=2))
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], model, learning_rate=1e-3)
    assert {group["rate_factor"] for group in optimizer.param_groups} == {1}


def test_the_groups_do_not_change_what_adamw_computes(tiny_config):
    """Against torch's plain AdamW, without decay: three steps, the same values."""
    def trained(optimizer_of):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(tiny_config)
        optimizer = optimizer_of(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(12).view(2, 6)).square().mean().backward()
            optimizer.step()
        return model.state_dict()

    actual = trained(lambda model: adamw(model.parameters(), model, learning_rate=1e-2))
    expected = trained(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0))
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-6, rtol=0)


# --- AdamW ------------------------------------------------------------------------------------------------------------

def steps_of(optimizer_class):
    """A parameter after three steps."""
    torch.manual_seed(0)
    weight, x = nn.Parameter(torch.randn(4, 3)), torch.randn(5, 3)
    optimizer = optimizer_class([weight], lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(3):
        (x @ weight.T).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert weight.grad is None
    return weight.detach(), optimizer.state_dict()


def test_our_adamw_is_torchs():
    (ours, our_state), (theirs, their_state) = steps_of(AdamW), steps_of(torch.optim.AdamW)
    assert torch.equal(ours, theirs) and not ours.requires_grad
    assert our_state["param_groups"] == their_state["param_groups"]
    assert all(torch.equal(our_state["state"][0][key], value) for key, value in their_state["state"][0].items())


def test_training_does_not_import_the_compiler():
    program = """if True:
        import sys, torch
        from minipeft.training.optimizer import AdamW
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = AdamW([weight], lr=0.1, fused=True)
        weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print("torch._dynamo" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr
