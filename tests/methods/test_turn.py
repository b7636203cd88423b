"""turn.py: a model is changed by one thread at a time, and what is made in inference mode can be trained."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from models import IDS, MASK, assert_unchanged, build, inject_all, perturb, snapshot, train
from safetensors.torch import load_file

from minipeft import (
    BitFitConfig,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    VeraConfig,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_adapter,
    unmerge,
)
from minipeft.errors import InjectionError
from minipeft.methods import METHODS, ia3
from minipeft.methods.injection import active_injections
from minipeft.methods.turn import without_autocast


def test_threads_do_not_mix_up_whether_autocast_is_on():
    """B enters, A enters, B leaves: with one context for both, autocast stayed on in B."""
    entered, left = threading.Barrier(2, timeout=10), threading.Event()
    found = {}

    @without_autocast
    def compute(wait):
        entered.wait()
        found[wait] = torch.is_autocast_enabled("cpu")
        if wait:
            left.wait(10)

    def one(wait, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            compute(wait)
            found["after", wait] = torch.is_autocast_enabled("cpu")
            left.set()

    threads = [threading.Thread(target=one, args=arguments) for arguments in ((True, True), (False, False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {True: False, False: False, ("after", True): True, ("after", False): False}


@pytest.fixture
def model(tiny_config):
    return perturb(inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig(r=2, bias="all")))


def in_another_thread(call):
    """What a call raises in a thread of its own; None if nothing."""
    raised = []

    def run():
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


@pytest.mark.kind("5: two threads on one model")
def test_no_other_thread_changes_a_model_whose_adapters_one_has_disabled(model, tmp_path):
    save_adapter(model, tmp_path)
    changes = {"set_adapter": lambda: set_adapter(model, "default"), "merge": lambda: merge(model),
               "unmerge": lambda: unmerge(model), "remove": lambda: remove(model),
               "inject": lambda: inject(model, PrefixTuningConfig()),
               "load_adapter": lambda: load_adapter(model, tmp_path, "other"),
               "disable_adapter": lambda: disable_adapter(model).__enter__()}
    adapted = model(IDS, MASK)
    with disable_adapter(model):
        before, base = snapshot(model), model(IDS, MASK)
        for name, change in changes.items():
            error = in_another_thread(change)
            assert isinstance(error, InjectionError), name
            assert "another thread is changing this model's adapters, or has them disabled" in str(error)
            assert "\n" not in str(error)
        with disable_adapter(model):  # the same thread may
            pass
        assert_unchanged(model, before)
        assert torch.equal(model(IDS, MASK), base)
    assert torch.equal(model(IDS, MASK), adapted)
    assert in_another_thread(changes["merge"]) is None  # its turn has come
    torch.testing.assert_close(model(IDS, MASK), adapted)


def test_no_other_thread_injects_while_one_does(tiny_config, monkeypatch):
    model, raised = build(GPT2ForSequenceClassification, tiny_config), []

    def slow_plan(model, config):
        raised.append(in_another_thread(lambda: inject(model, LoraConfig(r=2))))
        return ia3.plan(model, config)

    monkeypatch.setitem(METHODS, "ia3", dataclasses.replace(METHODS["ia3"], plan=slow_plan))
    inject(model, IA3Config())
    assert [str(error)[:46] for error in raised] == ["another thread is changing this model's adapte"]
    assert [injection.method for injection in active_injections(model)] == ["ia3"]


@pytest.mark.kind("5: two threads on one model")
def test_threads_that_only_run_a_model_do_not_wait_for_each_other(model):
    expected, found = model(IDS, MASK), []
    threads = [threading.Thread(target=lambda: found.append(model(IDS, MASK))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(logits, expected) for logits in found)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["deepcopy", "pickle"])
def test_a_copy_has_a_turn_of_its_own(model, copier):
    adapted = model(IDS, MASK)
    with disable_adapter(model):
        twin = copier(model)
        assert in_another_thread(lambda: set_adapter(twin, "default")) is None
    torch.testing.assert_close(twin(IDS, MASK), adapted)


def test_an_error_within_the_block_ends_the_turn(model):
    with pytest.raises(ZeroDivisionError), disable_adapter(model):
        raise ZeroDivisionError
    assert in_another_thread(lambda: merge(model)) is None


@pytest.mark.kind("5: a merge under inference_mode")
def test_what_is_done_in_inference_mode_can_be_trained_afterwards(tiny_config, tmp_path):
    model = build(GPT2ForSequenceClassification, tiny_config)
    with torch.inference_mode():
        inject_all(model, LoraConfig(r=2), BitFitConfig())
    train(perturb(model))
    save_adapter(model, tmp_path)
    expected = model(IDS, MASK)
    with torch.inference_mode():
        merge(model)
        torch.testing.assert_close(model(IDS, MASK), expected, atol=1e-5, rtol=1e-5)
    model.transformer.wpe.weight.requires_grad_(True)
    model(IDS, MASK).sum().backward()                      # through the merged weights
    assert model.transformer.wpe.weight.grad.abs().max() > 0
    with torch.inference_mode():
        unmerge(model)
        with disable_adapter(model):
            model(IDS, MASK)
    train(model, steps=1)
    assert not torch.allclose(model(IDS, MASK), expected)
    fresh = build(GPT2ForSequenceClassification, tiny_config)
    with torch.inference_mode():
        load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS, MASK), expected)
    train(fresh.requires_grad_(True), steps=1)
    assert not any(parameter.is_inference() for parameter in (*model.parameters(), *fresh.parameters()))


@pytest.mark.parametrize("case", ["dora", "pissa", "ptuning", "vera"])
def test_what_is_done_under_autocast_is_what_is_done_without(case, tiny_config, tmp_path):
    """Autocast keeps rounded copies of weights, and would go on using those of initial values."""
    config = {"dora": LoraConfig(r=2, use_dora=True),
              "pissa": LoraConfig(r=2, init_lora_weights="pissa", use_dora=True),
              "ptuning": PromptEncoderConfig(num_virtual_tokens=3), "vera": VeraConfig(r=4)}[case]
    base = build(GPT2LMHeadModel, tiny_config)

    def adapted(under_autocast):
        torch.manual_seed(1)
        model, folder = copy.deepcopy(base), tmp_path / str(under_autocast)
        with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
            inject(model, config)
            with torch.no_grad():
                for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
                    parameter.add_(0.1)
            save_adapter(model, folder)
            loaded = load_adapter(copy.deepcopy(base), folder)
        return model, loaded, load_file(folder / "adapter_model.safetensors")

    (model, loaded, saved), (with_it, loaded_with_it, saved_with_it) = adapted(False), adapted(True)
    assert saved.keys() == saved_with_it.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == saved_with_it[name].dtype == torch.float32 and torch.equal(tensor, saved_with_it[name])
    assert torch.equal(model(IDS), with_it(IDS)) and torch.equal(loaded(IDS), loaded_with_it(IDS))
