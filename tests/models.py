"""For tests of methods: models away from their neutral start, and all that a refused operation must leave alone."""

from __future__ import annotations

import torch

from minipeft import GPT2ForSequenceClassification, GPT2ForTokenClassification, GPT2LMHeadModel, inject
from minipeft.methods.injection import all_injections
from minipeft.methods.layers import AdapterLayer

HEADED = [GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification]
IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 60], [70, 2, 2, 33, 8, 95, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])


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


def with_new_head(model_class, config):
    """The same base, and a head that starts elsewhere: what somebody loading an adapter has."""
    model = build(model_class, config)
    if model_class in (GPT2ForSequenceClassification, GPT2ForTokenClassification):
        torch.nn.init.normal_(getattr(model, model.head).weight)
    return model


def inject_all(model, *configs, name="default"):
    """One method after the other, under one name."""
    for config in configs:
        inject(model, config, name)
    return model


def trained_names(model):
    """Names of the parameters that gradients flow to."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_modules(model):
    """Names of the layers that methods have put into the model."""
    return [name for name, module in model.named_modules() if isinstance(module, AdapterLayer)]


def snapshot(model):
    """All that a refused operation must leave alone: values, module objects, hooks, gradient flags, modes, records."""
    return {"values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "modules": dict(model.named_modules()),
            "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "training": {name: module.training for name, module in model.named_modules()},
            "injections": [(i.name, i.method, i.active, list(i.merged)) for i in all_injections(model)]}


def assert_same_tensors(actual, expected):
    """The same names in the same order, the same types and bits."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def assert_unchanged(model, before):
    """The model is as it was when `before` was taken."""
    after = snapshot(model)
    assert_same_tensors(after.pop("values"), before["values"])
    assert list(after["modules"]) == list(before["modules"])
    for name, module in after.pop("modules").items():
        assert module is before["modules"][name], name
    assert after == {key: value for key, value in before.items() if key not in ("values", "modules")}
