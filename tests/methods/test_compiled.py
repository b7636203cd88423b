"""What is compiled before a method is put in, switched, disabled or removed computes what the uncompiled model does."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
import torch.nn as nn
from models import CASES, IDS, MASK, build, perturb, renew_head

from minipeft import (
    GPT2ForSequenceClassification,
    LoraConfig,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_adapter,
    unmerge,
)
from minipeft.methods.layers import AddedLayer

# One case of each way of standing in a model: in place of a layer, with a head and biases, around modules, around all.
KINDS = {name: CASES[name] for name in ("dora everywhere, biases", "houlsby", "prompt", "prefix")}
OTHER = LoraConfig(r=3, lora_alpha=30)


@pytest.fixture
def one_block(tiny_config):
    """Sizes of a model that is compiled quickly."""
    return dataclasses.replace(tiny_config, n_layer=1)


@pytest.fixture(autouse=True)
def without_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model, backend):
    return torch.compile(model, backend=backend)


def by_blocks(model, backend):
    for block in model.transformer.h:
        block.compile(backend=backend)
    return model


def assert_same(compiled, model):
    """The compiled model gives what the model itself does."""
    with torch.no_grad():
        with torch.compiler.set_stance("force_eager"):
            expected = model(IDS, MASK)
        torch.testing.assert_close(compiled(IDS, MASK), expected, atol=1e-5, rtol=1e-5)


def gradients(run, model):
    model.zero_grad()
    run(IDS, MASK).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.kind("4: a method switched under a compiled model")
@pytest.mark.parametrize("compile_model", [whole, by_blocks])
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_model_compiled_before_follows_every_change(one_block, tmp_path, compile_model, config):
    model = build(GPT2ForSequenceClassification, one_block)
    save_adapter(perturb(inject(build(GPT2ForSequenceClassification, one_block), OTHER)), tmp_path)
    compiled = compile_model(model, "eager")
    assert_same(compiled, model)
    base = model(IDS, MASK)
    perturb(inject(model, config))
    assert_same(compiled, model)
    assert not torch.allclose(compiled(IDS, MASK), base)
    with disable_adapter(model):
        assert_same(compiled, model)
        torch.testing.assert_close(compiled(IDS, MASK), base)
    assert_same(compiled, model)
    load_adapter(model, tmp_path, "other")
    assert_same(compiled, model)
    set_adapter(model, "default")
    assert_same(compiled, model)
    remove(model)
    assert_same(compiled, model)
    torch.testing.assert_close(compiled(IDS, MASK), base)


@pytest.mark.kind("4: merging under a compiled model")
@pytest.mark.parametrize("case", ["lora", "ia3 everywhere"])
def test_a_model_compiled_before_is_merged_and_unmerged(one_block, case):
    model = perturb(inject(build(GPT2ForSequenceClassification, one_block), CASES[case]))
    compiled, adapted = whole(model, "eager"), model(IDS, MASK)
    for change in (merge, unmerge, merge):
        change(model)
        assert_same(compiled, model)
        torch.testing.assert_close(compiled(IDS, MASK), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.kind("4: training under a compiled model")
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_gradients_of_a_compiled_model_are_those_of_the_model(one_block, config):
    model = renew_head(build(GPT2ForSequenceClassification, one_block))
    compiled = whole(model, "aot_eager")
    compiled(IDS, MASK)
    perturb(inject(model, config))
    with torch.compiler.set_stance("force_eager"):
        expected = gradients(model, model)
    actual = gradients(compiled, model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.kind("4: a method switched under a compiled model")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_machine_code_follows_too(one_block):
    model = build(GPT2ForSequenceClassification, one_block)
    compiled = whole(model, "inductor")
    assert_same(compiled, model)
    perturb(inject(model, CASES["houlsby"]))
    assert_same(compiled, model)
    with disable_adapter(model):
        assert_same(compiled, model)
    assert_same(compiled, model)


class Twice(AddedLayer):
    """A layer of somebody's own around any module."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def after(self, module, args, kwargs, output):
        return output * self.factor


def test_several_layers_around_one_module_are_put_on_and_taken_off_in_turn(tiny_config):
    model = build(GPT2ForSequenceClassification, tiny_config)
    mlp, x = model.transformer.h[0].mlp, torch.randn(2, 3, 24)
    plain, first, second = mlp(x), Twice(2.0), Twice(3.0)
    first.attach(model, "transformer.h.0.mlp.first")
    second.attach(model, "transformer.h.0.mlp.second")
    torch.testing.assert_close(mlp(x), 6 * plain)
    second.detach(model, "transformer.h.0.mlp.second")
    torch.testing.assert_close(mlp(x), 2 * plain)
    first.detach(model, "transformer.h.0.mlp.first")
    assert torch.equal(mlp(x), plain) and "forward" not in vars(mlp)


@pytest.mark.kind("4: blocks that are compiled one by one, in place")
@pytest.mark.parametrize("first", ["compiled", "injected"])
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_model_whose_blocks_are_wrapped_is_injected_saved_disabled_and_freed(tiny_config, tmp_path, config, first):
    model, fresh = (build(GPT2ForSequenceClassification, tiny_config) for _ in range(2))
    base = model(IDS, MASK)

    def wrap():
        for number, block in enumerate(model.transformer.h):
            model.transformer.h[number] = torch.compile(block, backend="eager")

    if first == "compiled":
        wrap()
    perturb(inject(model, config))
    if first == "injected":
        wrap()
    adapted = model(IDS, MASK)
    save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(load_adapter(renew_head(fresh), tmp_path / "adapter")(IDS, MASK), adapted)
    with disable_adapter(model):
        torch.testing.assert_close(model(IDS, MASK), base)
    assert torch.equal(model(IDS, MASK), adapted)
    remove(model).save_pretrained(tmp_path / "base")
    torch.testing.assert_close(model(IDS, MASK), base)
    assert torch.equal(GPT2ForSequenceClassification.from_pretrained(tmp_path / "base")(IDS, MASK), base)
