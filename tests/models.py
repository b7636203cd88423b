"""What tests of methods share: a configuration of each kind, models away from their neutral start, and refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from minipeft import (
    BitFitConfig,
    BottleneckConfig,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    HeadConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    inject,
    load_adapter,
)
from minipeft.errors import MinipeftError
from minipeft.methods.injection import all_injections
from minipeft.methods.layers import AdapterLayer
from minipeft.training.optimizer import adamw

HEADED = [GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification]
EVERY_CLASS = [*HEADED, GPT2Model]
HEAD_TENSORS = {GPT2Model: [], GPT2LMHeadModel: [], GPT2ForSequenceClassification: ["score.weight"],
                GPT2ForTokenClassification: ["classifier.weight", "classifier.bias"]}
IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 60], [70, 2, 2, 33, 8, 95, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])


# --- configurations ---------------------------------------------------------------------------------------------------

SMALL = {"num_virtual_tokens": 3}
VIRTUAL = (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig)
# Every method but full fine-tuning, which keeps no copy of the base.
CASES = {
    "head": HeadConfig(),
    "bitfit": BitFitConfig(),
    "bitfit, LayerNorms": BitFitConfig(train="layer_norm"),
    "lora": LoraConfig(r=2),
    "dora": LoraConfig(r=2, use_dora=True),
    "dora everywhere, biases": LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules="all-linear", bias="all"),
    "vera": VeraConfig(r=6),
    "vera everywhere, biases": VeraConfig(r=6, target_modules="all-linear", bias="all"),
    "vera without its matrices": VeraConfig(r=6, target_modules="all-linear", save_projection=False),
    "ia3": IA3Config(),
    "ia3 everywhere": IA3Config(target_modules="all-linear", feedforward_modules=["c_fc", "mlp.c_proj"]),
    "houlsby": BottleneckConfig(bottleneck_size=5),
    "pfeiffer": BottleneckConfig(architecture="pfeiffer", reduction_factor=6, non_linearity="gelu"),
    "parallel": BottleneckConfig(architecture="parallel", bottleneck_size=5, non_linearity="tanh", scaling=4.0,
                                 layer_norm=True),
    "prompt": PromptTuningConfig(**SMALL),
    "ptuning, MLP": PromptEncoderConfig(**SMALL),
    "ptuning, LSTM": PromptEncoderConfig(**SMALL, encoder_reparameterization_type="LSTM", encoder_hidden_size=5),
    "prefix": PrefixTuningConfig(**SMALL),
    "prefix from zero": PrefixTuningConfig(**SMALL, init_weights="zero"),
    "prefix, projected": PrefixTuningConfig(**SMALL, prefix_projection=True, encoder_hidden_size=5),
}


def on(model_classes, cases=CASES):
    """Parameters (model_class, config): each case on each class it can be put into."""
    return pytest.mark.parametrize(("model_class", "config"), [
        pytest.param(model_class, config, id=f"{name}-{model_class.__name__}")
        for name, config in cases.items() for model_class in model_classes
        if not isinstance(config, HeadConfig) or HEAD_TENSORS[model_class]])


# --- models -----------------------------------------------------------------------------------------------------------

def build(model_class, config, seed=0):
    """A base model whose biases and LayerNorms are not at their neutral starting values."""
    torch.manual_seed(seed)
    return perturb(model_class(config), 0.05).eval()


@torch.no_grad()
def perturb(model, size=0.1, seed=7):
    """Move every trained tensor away from where it stands, so that no test passes only because B = 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def renew_head(model):
    """Let a new head start elsewhere; returns the model."""
    if HEAD_TENSORS[type(model)]:
        torch.nn.init.normal_(getattr(model, model.head).weight)
    return model


def with_new_head(model_class, config):
    """The same base, and a head that starts elsewhere: what somebody loading an adapter has."""
    return renew_head(build(model_class, config))


def inject_all(model, *configs, name="default"):
    """One method after the other, under one name."""
    for config in configs:
        inject(model, config, name)
    return model


def train(model, steps=4, weight_decay=0.0):
    """Steps of AdamW on everything that is trained. Without decay only a gradient moves anything."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adamw(trained, model, learning_rate=1e-2, weight_decay=weight_decay)
    for _ in range(steps):  # a factor that starts beside a zero gets its first gradient in the second step
        optimizer.zero_grad()
        model(IDS, MASK).square().mean().backward()
        optimizer.step()


def trained_names(model):
    """Names of the parameters that gradients flow to."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_modules(model):
    """Names of the layers that methods have put into the model."""
    return [name for name, module in model.named_modules() if isinstance(module, AdapterLayer)]


def copies(model):
    """A copy of every tensor of the model, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- what must not change ---------------------------------------------------------------------------------------------

def snapshot(model):
    """All that a refused operation must leave alone: values, modules, their calls, gradient flags, modes, records."""
    return {"values": copies(model),
            "modules": dict(model.named_modules()),
            "calls": {name: (len(m._forward_hooks), len(m._forward_pre_hooks), around(m))
                      for name, m in model.named_modules()},
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "training": {name: module.training for name, module in model.named_modules()},
            "injections": [(i, i.name, i.method, i.active, list(i.merged)) for i in all_injections(model)]}


def around(module):
    """What has been put around a module's own forward: the layers, the outermost first, or a function's name."""
    found, forward = [], vars(module).get("forward")
    while isinstance(forward, partial):
        found.append(getattr(forward.func, "__self__", forward.func.__name__))
        forward = forward.args[1] if len(forward.args) > 1 else None
    return found


def assert_same_tensors(actual, expected):
    """The same names in the same order, the same types and bits."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def assert_unchanged(model, before):
    """The model is as it was when `before` was taken."""
    after = snapshot(model)
    assert_same_tensors(after["values"], before["values"])
    assert list(after["modules"]) == list(before["modules"])
    for name, module in after["modules"].items():
        assert module is before["modules"][name], name
    for key in ("calls", "requires_grad", "training", "injections"):
        assert after[key] == before[key], key


def assert_refused(error, message, call):
    """`call()` fails with one line that matches."""
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, MinipeftError)
    assert "\n" not in str(caught.value)


def assert_load_refused(model, folder, error, message, name="default"):
    """Loading fails with one line that matches, and leaves the model and the random generator as they were."""
    model.transformer.h[0].train()  # a mixture of modes, and something the user froze, to see that they survive
    model.transformer.wpe.weight.requires_grad_(False)
    before, random_state = snapshot(model), torch.get_rng_state()
    assert_refused(error, message, lambda: load_adapter(model, folder, name))
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)
