"""wrappers.py: a model in torch.compile's, DataParallel's or DDP's wrapper is switched, saved and counted as itself."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as distributed
import torch.nn as nn
from helpers import read_json
from models import IDS, MASK, assert_unchanged, build, perturb, snapshot, with_new_head
from safetensors.torch import load_file, save_file

from minipeft import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LoraConfig,
    disable_adapter,
    generate,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge,
)
from minipeft.errors import InjectionError
from minipeft.methods.wrappers import unwrapped


@pytest.fixture
def alone(tmp_path):
    """This process as a group of one, which DistributedDataParallel needs."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS = {"compile": lambda model: torch.compile(model, backend="eager"), "DataParallel": nn.DataParallel,
            "DDP": nn.parallel.DistributedDataParallel,
            "DDP of compile": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def model(tiny_config):
    return perturb(inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig(r=2, bias="all")))


@pytest.mark.kind("2: disabled in a wrapper")
@each_wrapper
def test_a_wrapped_model_is_the_base_while_disabled(model, tiny_config, wrap):
    base, trained = build(GPT2ForSequenceClassification, tiny_config)(IDS, MASK), model(IDS, MASK)
    wrapped = wrap(model)
    torch.testing.assert_close(wrapped(IDS, MASK), trained)
    with disable_adapter(wrapped):
        torch.testing.assert_close(wrapped(IDS, MASK), base)
    torch.testing.assert_close(wrapped(IDS, MASK), trained)


@pytest.mark.kind("2: merged and removed in a wrapper")
@each_wrapper
def test_a_wrapped_model_is_merged_unmerged_and_freed_of_its_adapter(model, tiny_config, wrap):
    trained, before = model(IDS, MASK), snapshot(model)
    wrapped = wrap(model)
    assert merge(wrapped) is wrapped
    torch.testing.assert_close(wrapped(IDS, MASK), trained, atol=1e-5, rtol=1e-5)
    assert unmerge(wrapped) is wrapped
    assert_unchanged(model, before)
    assert remove(wrapped) is wrapped
    torch.testing.assert_close(wrapped(IDS, MASK), build(GPT2ForSequenceClassification, tiny_config)(IDS, MASK))


@pytest.mark.kind("2: saved names hold no wrapper's prefix, loaded ones may")
@each_wrapper
def test_what_is_saved_from_a_wrapped_model_is_what_is_saved_from_the_model(model, tmp_path, wrap):
    save_adapter(model, tmp_path / "bare")
    save_adapter(wrap(model), tmp_path / "wrapped")
    for file in ("adapter_config.json", "adapter_model.safetensors", "minipeft.json"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "bare" / file).read_bytes()


@each_wrapper
def test_a_wrapped_model_counts_as_the_model(model, wrap):
    assert trainable_parameters(wrap(model)) == trainable_parameters(model)
    assert unwrapped(wrap(model)) is model


@pytest.mark.kind("2: nothing is put into a wrapped model")
@each_wrapper
def test_nothing_is_put_into_a_wrapped_model(tiny_config, tmp_path, model, wrap):
    save_adapter(model, tmp_path / "adapter")
    base = build(GPT2ForSequenceClassification, tiny_config)
    before, wrapped = snapshot(base), wrap(base)
    for refused in (lambda: inject(wrapped, LoraConfig(r=2)), lambda: load_adapter(wrapped, tmp_path / "adapter")):
        with pytest.raises(InjectionError, match=r"is wrapped in .*: inject into the model itself") as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert_unchanged(base, before)


@pytest.mark.kind("2: switched in a wrapper")
def test_adapters_are_switched_through_compile_and_refused_on_data_parallel_wrappers(model, tiny_config, tmp_path):
    save_adapter(model, tmp_path / "one")
    two = load_adapter(with_new_head(GPT2ForSequenceClassification, tiny_config), tmp_path / "one", "one")
    perturb(load_adapter(two, tmp_path / "one", "two"), seed=3)
    second = two(IDS, MASK)
    compiled = torch.compile(two, backend="eager")
    torch.testing.assert_close(compiled(IDS, MASK), second)
    assert set_adapter(compiled, "one") is compiled
    torch.testing.assert_close(compiled(IDS, MASK), model.eval()(IDS, MASK))
    for wrapper in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        with pytest.raises(InjectionError, match="knows the active adapter's parameters only"):
            set_adapter(wrapper(two), "two")


def test_a_wrapped_language_model_generates_as_the_model(tiny_config):
    model = perturb(inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(r=2)))
    expected = generate(model, IDS, max_new_tokens=5)
    assert torch.equal(generate(torch.compile(model, backend="eager"), IDS, max_new_tokens=5), expected)
    assert torch.equal(generate(nn.DataParallel(model), IDS, max_new_tokens=5), expected)


@pytest.mark.kind("2: saved names hold no wrapper's prefix, loaded ones may")
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_with_a_wrappers_prefix_are_read(model, tiny_config, tmp_path, prefix):
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    start = "base_model.model."
    save_file({start + prefix + name.removeprefix(start): tensor for name, tensor in load_file(file).items()}, file)
    (tmp_path / "adapter" / "minipeft.json").unlink()
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["r"] == 2
    loaded = load_adapter(with_new_head(GPT2ForSequenceClassification, tiny_config), tmp_path / "adapter")
    assert torch.equal(loaded(IDS, MASK), model.eval()(IDS, MASK))

    model = build(GPT2ForSequenceClassification, tiny_config)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    loaded = GPT2ForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(loaded(IDS, MASK), model(IDS, MASK))


def test_a_part_that_somebody_calls_module_is_no_wrapper(tiny_config):
    class Outer(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    outer = Outer(build(GPT2LMHeadModel, tiny_config))
    assert unwrapped(outer) is outer
    assert inject(outer, LoraConfig(r=2)) is outer
