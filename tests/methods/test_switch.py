"""Switching: adapters off and on, one instead of another, several at once, merged, removed; and copies of all that."""

import copy
import io
import itertools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import changed_by_hand
from models import (
    CASES,
    EVERY_CLASS,
    HEADED,
    IDS,
    MASK,
    adapter_modules,
    assert_load_refused,
    assert_refused,
    assert_same_tensors,
    assert_unchanged,
    build,
    copies,
    inject_all,
    on,
    perturb,
    snapshot,
    train,
    trained_names,
    with_new_head,
)
from safetensors.torch import load_file, save_file

from minipeft import (
    BitFitConfig,
    BottleneckConfig,
    FullConfig,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    HeadConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge,
)
from minipeft.errors import AdapterError, InjectionError, MinipeftError
from minipeft.methods.folder import CONFIG_FILE, TENSORS_FILE
from minipeft.methods.injection import active_injections
from minipeft.methods.layers import AdapterLayer
from minipeft.methods.lora import LoRALinear
from minipeft.methods.switch import adapter_names
from minipeft.model.linear import Linear

LORA, PISSA = LoraConfig(r=2, lora_alpha=6), LoraConfig(r=2, init_lora_weights="pissa")
EVERY_BIAS = LoraConfig(r=2, bias="all")
DORA_OF_FC = LoraConfig(r=2, use_dora=True, target_modules=["c_fc"])
IA3_OF_FC = IA3Config(target_modules=["c_fc"], feedforward_modules=[])
PREFIX, PROMPT = PrefixTuningConfig(num_virtual_tokens=3), PromptTuningConfig(num_virtual_tokens=3)
PTUNING, ADAPTER = PromptEncoderConfig(num_virtual_tokens=3), BottleneckConfig(bottleneck_size=5, non_linearity="gelu")
# More starts and biases, which have to be taken out and put back.
MORE_CASES = CASES | {
    "lora everywhere, its biases": LoraConfig(r=2, target_modules="all-linear", bias="lora_only"),
    "lora, every bias": EVERY_BIAS, "lora, random": LoraConfig(r=2, init_lora_weights=False), "pissa": PISSA,
    "vera, its biases": VeraConfig(r=4, bias="vera_only"),
}

LM_AND_CLASSIFIER = [GPT2LMHeadModel, GPT2ForSequenceClassification]
lm_and_classifier = pytest.mark.parametrize("model_class", LM_AND_CLASSIFIER)


def names_of(configs):
    return " + ".join(config.method for config in configs)


def in_both_orders(*pairs):
    """Names of two methods -> their configurations, with either first."""
    return {names_of(order): list(order) for pair in pairs for order in itertools.permutations(pair)}


# --- several adapters on one base -----------------------------------------------------------------------------------

class Saved(NamedTuple):
    """An adapter on disk, what the model it was saved from computes, and what a model trains that has loaded it."""

    folder: Path
    logits: torch.Tensor
    trained: set[str]


SEVERAL = {"lora": [EVERY_BIAS], "pissa": [PISSA], "dora": [DORA_OF_FC], "vera": [VeraConfig(r=4)], "prefix": [PREFIX],
           "ptuning": [PTUNING], "bitfit": [BitFitConfig()], "head": [HeadConfig()],
           "adapter and ia3": [ADAPTER, IA3_OF_FC],
           "adapter and LayerNorms": [BottleneckConfig(bottleneck_size=4), BitFitConfig(train="layer_norm")]}


def names_on(model_class):
    """Those of SEVERAL that there are for a class."""
    return [name for name in SEVERAL if name != "head" or model_class is not GPT2LMHeadModel]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(model_class, sizes): name -> an adapter of SEVERAL, trained away from its start.

    All tests share these folders: damage a copy.
    """
    done = {}

    def write(model_class, sizes):
        if model_class not in done:
            folder, done[model_class] = tmp_path_factory.mktemp("adapters"), {}
            for seed, name in enumerate(names_on(model_class)):
                model = perturb(inject_all(build(model_class, sizes), *SEVERAL[name]), seed=seed)
                save_adapter(model, folder / name)
                trained = trained_names(load_adapter(build(model_class, sizes), folder / name))
                done[model_class][name] = Saved(folder / name, model(IDS, MASK).detach(), trained)
        return done[model_class]

    return write


@pytest.fixture
def saved(written, tiny_config):
    """name -> a classifier's adapter."""
    return written(GPT2ForSequenceClassification, tiny_config)


def load_all(model, adapters):
    for name, adapter in adapters.items():
        load_adapter(model, adapter.folder, name)
    return model


@lm_and_classifier
def test_each_of_several_adapters_gives_its_exact_logits_again_and_again(tiny_config, written, model_class):
    saved, model = written(model_class, tiny_config), with_new_head(model_class, tiny_config)
    model.transformer.wpe.weight.requires_grad_(False)  # a choice of the user's that must survive
    base, before = model(IDS, MASK), snapshot(model)
    for name, adapter in saved.items():
        assert load_adapter(model, adapter.folder, name) is model
        assert torch.equal(model(IDS, MASK), adapter.logits), name
    assert adapter_names(model) == list(saved)
    for name in [*reversed(saved), *saved, "lora", "lora"]:
        assert set_adapter(model, name) is model
        assert torch.equal(model(IDS, MASK), saved[name].logits), name
        assert trained_names(model) == saved[name].trained, name
        with disable_adapter(model):
            assert torch.equal(model(IDS, MASK), base)
            assert_same_tensors(model.state_dict(), before["values"])
    assert_unchanged(remove(model), before)


def test_what_is_active_is_what_is_saved(tiny_config, tmp_path, saved):
    model = load_all(with_new_head(GPT2ForSequenceClassification, tiny_config), saved)
    for name, adapter in saved.items():
        save_adapter(set_adapter(model, name), tmp_path / "again")
        files = [file.relative_to(adapter.folder) for file in adapter.folder.rglob("*.safetensors")]
        assert files
        for file in files:
            assert_same_tensors(load_file(tmp_path / "again" / file), load_file(adapter.folder / file))
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize("first", SEVERAL)
def test_training_one_adapter_changes_neither_the_other_nor_the_base(tiny_config, saved, first):
    second = "bitfit" if first != "bitfit" else "lora"  # which share biases and head with the others
    model = with_new_head(GPT2ForSequenceClassification, tiny_config)
    base = model(IDS, MASK)
    load_all(model, {name: saved[name] for name in (first, second)})
    trained = perturb(set_adapter(model, first), seed=11)(IDS, MASK)
    assert not torch.allclose(trained, saved[first].logits, atol=1e-3)
    assert torch.equal(set_adapter(model, second)(IDS, MASK), saved[second].logits)
    with disable_adapter(model):
        assert torch.equal(model(IDS, MASK), base)
    assert torch.equal(set_adapter(model, first)(IDS, MASK), trained)


@pytest.mark.parametrize(("model_class", "name"), [(c, name) for c in LM_AND_CLASSIFIER for name in names_on(c)])
@pytest.mark.parametrize("active", [True, False])
def test_removing_one_adapter_leaves_the_other(tiny_config, written, model_class, name, active):
    other, saved = "lora" if name != "lora" else "pissa", written(model_class, tiny_config)
    model = with_new_head(model_class, tiny_config)
    base, before = model(IDS, MASK), snapshot(model)
    load_all(model, {key: saved[key] for key in (name, other)})
    set_adapter(model, name if active else other)
    assert remove(model, name) is model
    assert torch.equal(model(IDS, MASK), base if active else saved[other].logits)
    without = snapshot(model)
    for operation in (set_adapter, remove):
        assert_refused(InjectionError, f"no adapter '{name}'; there are {other}", lambda: operation(model, name))
        assert_unchanged(model, without)
    assert torch.equal(set_adapter(model, other)(IDS, MASK), saved[other].logits)
    load_adapter(model, saved[name].folder, name)
    assert torch.equal(model(IDS, MASK), saved[name].logits)
    remove(model, other)
    assert_unchanged(remove(model, name), before)


@pytest.mark.parametrize("operation", [set_adapter, remove])
@pytest.mark.parametrize("loaded", [[], ["lora", "prefix"]], ids=["none there", "others there"])
def test_a_name_that_is_not_there_is_refused_with_those_that_are(tiny_config, saved, operation, loaded):
    model = load_all(build(GPT2ForSequenceClassification, tiny_config), {name: saved[name] for name in loaded})
    before = snapshot(model)
    assert_refused(InjectionError, f"no adapter 'Lora'; there are {', '.join(loaded) or 'none'}",
                   lambda: operation(model, "Lora"))
    assert_unchanged(model, before)


def test_a_name_that_is_taken_or_a_model_without_a_copy_of_its_base_takes_no_adapter(tiny_config, saved):
    for model, message in ((load_all(build(GPT2ForSequenceClassification, tiny_config), saved),
                            "already carries an adapter 'lora'.*another name"),
                           (perturb(inject(build(GPT2ForSequenceClassification, tiny_config), EVERY_BIAS, "lora")),
                            "already carries an adapter 'lora'.*another name"),
                           (inject(build(GPT2ForSequenceClassification, tiny_config), FullConfig(), "all"),
                            "full keeps no copy of the base"),
                           (inject(build(GPT2ForSequenceClassification, tiny_config), FullConfig(), "lora"),
                            "full keeps no copy of the base")):
        assert_load_refused(model, saved["lora"].folder, InjectionError, message, name="lora")


# --- damaged adapters beside an active one ----------------------------------------------------------------------------

def edit_config(folder, **fields):
    changed_by_hand(folder)
    file = folder / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_tensors(folder, change):
    """Save the tensors after change(tensors, the first one's name)."""
    changed_by_hand(folder)
    tensors = load_file(folder / TENSORS_FILE)
    change(tensors, sorted(tensors)[0])
    save_file(tensors, folder / TENSORS_FILE)


def a_tensor_too_many(folder):
    edit_tensors(folder, lambda tensors, first: tensors.update(more=torch.zeros(1)))


def a_tensor_too_few(folder):
    edit_tensors(folder, lambda tensors, first: tensors.pop(first))


def not_a_number(folder):
    edit_tensors(folder, lambda tensors, first: tensors[first].fill_(torch.nan))


DAMAGES = [
    ("pissa", lambda folder: edit_config(folder, target_modules=["q_proj"]), "'q_proj' match nothing"),
    ("pissa", lambda folder: edit_config(folder, r=-1), "r must be a positive integer, got -1"),
    ("pissa", lambda folder: edit_config(folder, r=3), r"this model needs \(72, 3\)"),
    ("pissa", lambda folder: (folder / TENSORS_FILE).unlink(), f"holds no {TENSORS_FILE}"),
    ("pissa", a_tensor_too_many, "unexpected more"),
    ("prefix", not_a_number, "holds NaN or infinity"),
]


@pytest.mark.parametrize(("model_class", "first"), [
    (model_class, name) for model_class in LM_AND_CLASSIFIER for name in [*names_on(model_class), None]])
def test_a_failed_load_leaves_the_adapter_active_active_and_as_it_was(
        tiny_config, tmp_path, written, model_class, first):
    model, saved = build(model_class, tiny_config), written(model_class, tiny_config)
    if first is not None:
        load_adapter(model, saved[first].folder, "first")
    before, expected = snapshot(model), model(IDS, MASK)
    for number, (name, damage, message) in enumerate(DAMAGES):
        damage(shutil.copytree(saved[name].folder, tmp_path / str(number)))
        assert_refused(MinipeftError, message, lambda: load_adapter(model, tmp_path / str(number), "second"))
        assert_unchanged(model, before)
        assert adapter_names(model) == ([] if first is None else ["first"])
        assert torch.equal(model(IDS, MASK), expected)


@pytest.mark.parametrize("first", ["bitfit", None])
@pytest.mark.parametrize("configs", [[LORA, PREFIX], [ADAPTER, IA3_OF_FC]], ids=names_of)
def test_a_combination_with_one_damaged_part_is_refused_as_a_whole(tiny_config, tmp_path, saved, configs, first):
    whole = perturb(inject_all(build(GPT2ForSequenceClassification, tiny_config), *configs))
    save_adapter(whole, tmp_path / "whole")
    model = build(GPT2ForSequenceClassification, tiny_config)
    if first is not None:
        load_adapter(model, saved[first].folder, "first")
    for damage, message in ((a_tensor_too_many, "unexpected more"), (a_tensor_too_few, "missing ")):
        for part in (config.method for config in configs):
            folder = shutil.copytree(tmp_path / "whole", tmp_path / f"{damage.__name__} in {part}")
            damage(folder / part)
            assert_load_refused(model, folder, AdapterError, f"{part}.*{message}", name="second")
    assert torch.equal(load_adapter(model, tmp_path / "whole", "second")(IDS, MASK), whole(IDS, MASK))


# --- combinations -----------------------------------------------------------------------------------------------------

COMBINATIONS = in_both_orders(
    (LORA, PREFIX), (ADAPTER, BitFitConfig()), (LORA, BitFitConfig()), (LORA, ADAPTER), (IA3_OF_FC, LORA),
    (DORA_OF_FC, LORA), (PISSA, PROMPT), (VeraConfig(r=4), PTUNING)) | {
    "lora, every bias, + bitfit": [EVERY_BIAS, BitFitConfig()],
    "bitfit + lora, every bias": [BitFitConfig(), EVERY_BIAS],
    "prefix, projected, + lora everywhere": [PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
                                             LoraConfig(r=2, target_modules="all-linear")],
    "bitfit + parallel adapter": [BitFitConfig(), BottleneckConfig(non_linearity="gelu", architecture="parallel")],
    "normalizing adapter + LayerNorms": [BottleneckConfig(non_linearity="gelu", layer_norm=True),
                                         BitFitConfig(train="layer_norm")],
    "adapter + lora everywhere": [ADAPTER, LoraConfig(r=2, target_modules="all-linear")],
    "ptuning, LSTM, + bitfit": [PromptEncoderConfig(num_virtual_tokens=3, encoder_reparameterization_type="LSTM"),
                                BitFitConfig()],
    "dora + ia3, each its own targets": [DORA_OF_FC, IA3Config()],
    "prompt + ia3 + adapter + bitfit": [PROMPT, IA3Config(), ADAPTER, BitFitConfig()],
}


def bare(name):
    """A tensor's name as it is in the bare model."""
    return name.replace(".base_layer.", ".")


def trained_sizes(model):
    """Bare name -> number of elements of all that is trained."""
    return {bare(name): parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("configs", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("model_class", HEADED)
def test_methods_together(tiny_config, tmp_path, model_class, configs):
    """Each trains what it trains alone, all act, all come back from disk, and all go without a trace."""
    model, alone = build(model_class, tiny_config), {}
    base, before = model(IDS, MASK), snapshot(model)
    for config in configs:
        alone |= trained_sizes(inject(build(model_class, tiny_config), config))
    inject_all(model, *configs)
    assert trained_sizes(model) == alone
    assert trainable_parameters(model).trainable == sum(alone.values())  # what two of them train counts once

    start = copies(model)
    train(model, steps=2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name]) == (bare(name) not in alone), name
    perturb(model).zero_grad()
    expected = model(IDS, MASK)
    expected.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == parameter.requires_grad, name

    with disable_adapter(model):
        assert torch.equal(model(IDS, MASK), base)
        assert_same_tensors(model.state_dict(), before["values"])
    assert torch.equal(model(IDS, MASK), expected)

    save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"minipeft.json", *(config.method for config in configs)}
    assert torch.equal(load_adapter(with_new_head(model_class, tiny_config), tmp_path)(IDS, MASK), expected)

    assert_unchanged(remove(model), before)
    assert torch.equal(model(IDS, MASK), base)


@pytest.mark.parametrize("configs", [[EVERY_BIAS, BitFitConfig()], [BitFitConfig(), LORA]], ids=names_of)
def test_a_method_that_joins_a_trained_one_does_not_take_its_values_for_the_bases(tiny_config, configs):
    model = build(GPT2ForSequenceClassification, tiny_config)
    base, before = model(IDS, MASK), snapshot(model)
    for config in configs:
        perturb(inject(model, config))
    expected = model(IDS, MASK)
    with disable_adapter(model):
        assert torch.equal(model(IDS, MASK), base)
    assert torch.equal(model(IDS, MASK), expected)
    assert_unchanged(remove(model), before)


def test_lora_beside_a_prefix_is_the_prefix_on_a_base_with_lora_folded_in_by_hand(tiny_config):
    model = perturb(inject_all(build(GPT2LMHeadModel, tiny_config), LORA, PREFIX))
    by_hand = build(GPT2LMHeadModel, tiny_config)
    with torch.no_grad():
        for block, adapted in zip(by_hand.transformer.h, model.transformer.h):
            c_attn = adapted.attn.c_attn
            block.attn.c_attn.weight += 3.0 * c_attn.lora_B.weight @ c_attn.lora_A.weight
        inject(by_hand, PREFIX)
        by_hand.transformer.prefix_tuning.encoder.weight.copy_(model.transformer.prefix_tuning.encoder.weight)
    torch.testing.assert_close(model(IDS, MASK), by_hand(IDS, MASK), atol=1e-5, rtol=1e-5)


def alone(present, refused):
    """A row for methods that do not go together anywhere."""
    return present, refused, f"already carries {present.method}, which does not combine with {refused.method}"


SAME_LAYER = {"LoRALinear": LORA, "IA3Linear": IA3Config(), "VeRALinear": VeraConfig(),
              "DoRALinear": LoraConfig(use_dora=True)}
NOT_TOGETHER = [
    *[alone(config, config) for config in CASES.values()],
    alone(LORA, LoraConfig(target_modules=["c_fc"])),
    *[alone(*order) for pair in (
        (FullConfig(), LORA), (FullConfig(), HeadConfig()), (HeadConfig(), ADAPTER), (HeadConfig(), PREFIX),
        (HeadConfig(), BitFitConfig()), (PROMPT, PREFIX), (PROMPT, PTUNING), (PREFIX, PTUNING))
      for order in itertools.permutations(pair)],
    *[(SAME_LAYER[present], SAME_LAYER[refused], rf"h\.0\.attn\.c_attn already carries a {present}")
      for present, refused in itertools.permutations(SAME_LAYER, 2)],
    (LORA, VeraConfig(target_modules="all-linear"), r"h\.0\.attn\.c_attn already carries a LoRALinear"),
    (ADAPTER, LoraConfig(target_modules=["down"]), "'down' match nothing"),
]


@pytest.mark.parametrize(("model_class", "present", "refused", "message"), [
    *[(GPT2ForSequenceClassification, *row) for row in NOT_TOGETHER],
    *[(GPT2LMHeadModel, *row) for row in NOT_TOGETHER if row[0] is LORA]],
    ids=lambda value: getattr(value, "method", value if isinstance(value, str) else None))
def test_a_refused_combination_leaves_the_model_as_it_was(tiny_config, model_class, present, refused, message):
    model = perturb(inject(build(model_class, tiny_config), present))
    expected, before, config = model(IDS, MASK), snapshot(model), copy.deepcopy(refused)
    assert_refused(InjectionError, message, lambda: inject(model, refused))
    assert_unchanged(model, before)
    assert refused == config
    assert torch.equal(model(IDS, MASK), expected)


@lm_and_classifier
@pytest.mark.parametrize("second", [PREFIX, BitFitConfig()], ids=lambda config: config.method)
def test_methods_that_work_together_share_a_name(tiny_config, model_class, second):
    model = inject(build(model_class, tiny_config), LORA, "mine")
    before = snapshot(model)
    for name in ("default", "yours"):
        assert_refused(InjectionError, "the adapter 'mine' is active.*share a name",
                       lambda: inject(model, second, name))
        assert_unchanged(model, before)
    inject(model, second, "mine")
    assert adapter_names(model) == ["mine"]


@pytest.mark.parametrize("second", [LORA, BitFitConfig()], ids=lambda config: config.method)
def test_an_adapter_that_waits_is_joined_by_no_method(tiny_config, second):
    """It would be active in part, or have two layers, one inside the other."""
    model = inject(build(GPT2LMHeadModel, tiny_config), LORA)
    with disable_adapter(model):
        assert_refused(InjectionError, "carries an adapter 'default', which is inactive", lambda: inject(model, second))
        inject(model, second, "other")
    assert [injection.name for injection in active_injections(model)] == ["default"]
    assert [injection.name for injection in active_injections(set_adapter(model, "other"))] == ["other"]


# --- disable ----------------------------------------------------------------------------------------------------------

@on(EVERY_CLASS, MORE_CASES)
def test_disable_adapter_is_exactly_the_base_model_inside_and_the_trained_one_outside(
        tiny_config, model_class, config):
    model = build(model_class, tiny_config)
    base, values = model(IDS, MASK), copies(model)
    perturb(inject(model, config))
    trained, before = model(IDS, MASK), snapshot(model)
    assert not torch.allclose(trained, base, atol=1e-3)
    for _ in range(2):
        with disable_adapter(model) as same:
            assert same is model
            assert torch.equal(model(IDS, MASK), base)
            assert_same_tensors(model.state_dict(), values)  # biases, head and PiSSA's matrices included
            assert adapter_modules(model) == []
            assert trained_names(model) == set()
        assert torch.equal(model(IDS, MASK), trained)
        assert_unchanged(model, before)


@lm_and_classifier
def test_disabling_nothing_is_no_error_and_changes_nothing(tiny_config, model_class):
    model = build(model_class, tiny_config)
    before = snapshot(model)
    with disable_adapter(model):
        assert_unchanged(model, before)
    assert_unchanged(model, before)


def test_what_is_removed_while_disabled_does_not_come_back(tiny_config):
    model = build(GPT2ForSequenceClassification, tiny_config)
    before = snapshot(model)
    perturb(inject(model, LoraConfig(r=2, bias="all")))
    with disable_adapter(model):
        remove(model)
    assert_unchanged(model, before)


def test_disable_adapter_restores_the_trained_model_after_an_exception(tiny_config):
    model = perturb(inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig(r=2, bias="all")))
    trained, before = model(IDS, MASK), snapshot(model)
    with pytest.raises(ZeroDivisionError):
        with disable_adapter(model):
            raise ZeroDivisionError
    assert torch.equal(model(IDS, MASK), trained)
    assert_unchanged(model, before)


def test_what_a_disabled_block_makes_active_stays_so_if_nothing_was_before(tiny_config, saved):
    model = remove(load_all(build(GPT2ForSequenceClassification, tiny_config), saved), list(saved)[-1])
    assert active_injections(model) == [] and not any(parameter.requires_grad for parameter in model.parameters())
    first = next(iter(saved))
    with disable_adapter(model):
        set_adapter(model, first)
    assert {injection.name for injection in active_injections(model)} == {first}


def test_disable_adapter_can_be_nested(tiny_config):
    model = build(GPT2ForSequenceClassification, tiny_config)
    base = model(IDS, MASK)
    perturb(inject(model, LoraConfig(r=2)))
    with disable_adapter(model):
        with disable_adapter(model):
            pass
        assert torch.equal(model(IDS, MASK), base)


def test_disable_adapter_works_on_a_model_that_was_converted_after_injection(tiny_config):
    model = build(GPT2ForSequenceClassification, tiny_config)
    base = copy.deepcopy(model).double()(IDS, MASK)
    perturb(inject(model, LoraConfig(r=2))).double()
    with disable_adapter(model):
        torch.testing.assert_close(model(IDS, MASK), base, atol=1e-5, rtol=0)


def test_disable_adapter_needs_the_bases_weights(tiny_config):
    model = merge(inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(r=2)))
    with pytest.raises(InjectionError, match=r"merged.*unmerge"):
        with disable_adapter(model):
            pass


# --- remove -----------------------------------------------------------------------------------------------------------

@on(EVERY_CLASS, MORE_CASES)
def test_remove_gives_back_the_same_modules_keys_bytes_and_gradient_flags(tiny_config, model_class, config):
    model = build(model_class, tiny_config)
    next(p for name, p in model.named_parameters() if name.endswith("wpe.weight")).requires_grad_(False)
    before = snapshot(model)
    perturb(inject(model, config))
    assert any(not torch.equal(tensor, before["values"].get(name, torch.empty(0)))
               for name, tensor in model.state_dict().items())
    assert remove(model) is model
    assert_unchanged(model, before)


def test_full_fine_tuning_keeps_no_copy_of_the_base_and_says_so(tiny_config):
    model = perturb(inject(build(GPT2LMHeadModel, tiny_config), FullConfig()))
    before = snapshot(model)
    with pytest.raises(InjectionError, match="full keeps no copy of the base"):
        remove(model)
    with pytest.raises(InjectionError, match="full keeps no copy of the base"):
        with disable_adapter(model):
            pass
    assert_unchanged(model, before)


def test_what_was_added_after_the_injection_stays_when_it_is_removed(tiny_config):
    model = inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(r=2))
    model.probe = torch.nn.Linear(24, 2)
    remove(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_removing_nothing_is_no_error(tiny_config):
    model = build(GPT2LMHeadModel, tiny_config)
    before = snapshot(model)
    assert remove(model) is model
    assert_unchanged(model, before)


def test_remove_works_on_a_merged_model(tiny_config):
    model = build(GPT2ForSequenceClassification, tiny_config)
    before = snapshot(model)
    remove(merge(perturb(inject(model, LoraConfig(r=2, bias="all")))))
    assert_unchanged(model, before)


def test_after_remove_a_method_can_be_injected_again(tiny_config):
    model = build(GPT2ForSequenceClassification, tiny_config)
    expected = model(IDS, MASK)
    remove(perturb(inject(model, LoraConfig(r=2))))
    inject(model, LoraConfig(r=3, target_modules=["c_fc"]))
    assert adapter_modules(model) == ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]
    assert torch.equal(model(IDS, MASK), expected)


# --- merge ------------------------------------------------------------------------------------------------------------

MERGEABLE = {name: [config] for name, config in CASES.items()
             if isinstance(config, (LoraConfig, VeraConfig, IA3Config))} | {
    "lora everywhere": [LoraConfig(r=3, lora_alpha=2, target_modules="all-linear")],
    "lora, its biases": [LoraConfig(r=2, lora_alpha=4, bias="lora_only")],
    "lora, every bias": [LoraConfig(r=2, lora_alpha=4, bias="all", target_modules=["c_proj"])],
    "lora, rsLoRA": [LoraConfig(r=4, lora_alpha=4, use_rslora=True, target_modules=["c_fc", "c_attn"])],
    "lora, patterns": [LoraConfig(r=2, rank_pattern={"c_fc": 5}, alpha_pattern={"c_attn": 20},
                                  target_modules="all-linear")],
    "lora, dropout": [LoraConfig(r=2, lora_dropout=0.5)],
    "pissa": [PISSA],
    "dora from pissa": [LoraConfig(r=2, use_dora=True, init_lora_weights="pissa")],
    "dora, rsLoRA": [LoraConfig(r=3, lora_alpha=5, use_dora=True, use_rslora=True)],
    "ia3 everywhere by default": [IA3Config(target_modules="all-linear")],
    "lora and dora": [LORA, DORA_OF_FC],
    "ia3 and lora": [IA3_OF_FC, LORA],
    "lora and bitfit": [LORA, BitFitConfig()],
    "bitfit and ia3": [BitFitConfig(), IA3Config()],
}
mergeable = pytest.mark.parametrize("configs", MERGEABLE.values(), ids=MERGEABLE)


@pytest.mark.parametrize("model_class", EVERY_CLASS)
@mergeable
def test_a_merged_model_computes_the_same_with_plain_layers_and_unmerging_is_bit_exact(
        tiny_config, model_class, configs):
    model = build(model_class, tiny_config)
    base, keys = model(IDS, MASK), list(model.state_dict())
    perturb(inject_all(model, *configs))
    expected, before = model(IDS, MASK), snapshot(model)
    assert (expected - base).abs().max() > 1e-2
    assert merge(model) is model
    torch.testing.assert_close(model(IDS, MASK), expected, atol=1e-5, rtol=0)
    assert adapter_modules(model) == []
    assert list(model.state_dict()) == keys
    assert {type(m) for name, m in model.named_modules() if "c_" in name} == {Linear}
    assert unmerge(model) is model
    for _ in range(2):  # by keeping the weights, not by subtraction: nothing drifts
        unmerge(merge(model))
    assert_unchanged(model, before)
    assert torch.equal(model(IDS, MASK), expected)


@mergeable
def test_a_merged_model_is_saved_as_a_plain_model(tiny_config, tmp_path, configs):
    model = merge(perturb(inject_all(build(GPT2ForSequenceClassification, tiny_config), *configs)))
    model.save_pretrained(tmp_path)
    plain = GPT2ForSequenceClassification.from_pretrained(tmp_path)
    assert active_injections(plain) == []
    assert torch.equal(plain(IDS, MASK), model(IDS, MASK))


PARTLY_MERGEABLE = in_both_orders((LORA, PREFIX), (LORA, PROMPT), (IA3Config(), PTUNING), (DORA_OF_FC, ADAPTER),
                                  (ADAPTER, BitFitConfig()))
NOTHING_TO_MERGE = {"nothing": [], "full": [FullConfig()], "head": [HeadConfig()], "bitfit": [BitFitConfig()],
                    "LayerNorms": [BitFitConfig(train="layer_norm")]}


@pytest.mark.parametrize(("model_class", "configs"), [
    *[(GPT2ForSequenceClassification, [config]) for config in CASES.values()
      if config.method in ("adapter", "prompt", "ptuning", "prefix")],
    *[(model_class, configs) for model_class in LM_AND_CLASSIFIER for configs in PARTLY_MERGEABLE.values()]],
    ids=lambda value: names_of(value) if isinstance(value, list) else None)
def test_merging_with_something_that_is_no_change_of_weights_is_refused_as_a_whole(tiny_config, model_class, configs):
    model = perturb(inject_all(build(model_class, tiny_config), *configs))
    expected, before = model(IDS, MASK), snapshot(model)
    assert_refused(InjectionError, "^(Prefix|Prompt|BottleneckAdapter) cannot be merged: it is not a change of weights",
                   lambda: merge(model))
    assert_unchanged(model, before)
    assert torch.equal(model(IDS, MASK), expected)


@pytest.mark.parametrize("configs", NOTHING_TO_MERGE.values(), ids=NOTHING_TO_MERGE)
def test_there_must_be_something_to_merge(tiny_config, configs):
    model = perturb(inject_all(build(GPT2ForSequenceClassification, tiny_config), *configs))
    before = snapshot(model)
    why = f"{configs[0].method} trains the model's own tensors" if configs else "no method is injected"
    assert_refused(InjectionError, f"^there is nothing to merge: {why}$", lambda: merge(model))
    assert_unchanged(model, before)


def test_where_every_adapter_is_inactive_merge_says_so(tiny_config):
    model = inject(build(GPT2ForSequenceClassification, tiny_config), LORA)
    with disable_adapter(model):
        assert_refused(InjectionError, "^there is nothing to merge: no adapter is active$", lambda: merge(model))


@on(LM_AND_CLASSIFIER, {"lora": EVERY_BIAS, "dora": LoraConfig(r=2, use_dora=True), "ia3": IA3Config()})
def test_while_merged_an_adapter_is_neither_switched_nor_saved_nor_joined_by_another(
        tiny_config, tmp_path, written, model_class, config):
    saved = written(model_class, tiny_config)
    save_adapter(perturb(inject(build(model_class, tiny_config), config)), tmp_path / "merged")
    model = load_adapter(with_new_head(model_class, tiny_config), saved["bitfit"].folder, "other")
    before = snapshot(merge(load_adapter(model, tmp_path / "merged", "merged")))
    merged_first, joined = "merged into the weights: call unmerge first", (
        f"carries {config.method}, merged into its weights: unmerge or remove it")
    for error, message, operation in (
            (InjectionError, merged_first, lambda: set_adapter(model, "other")),
            (InjectionError, merged_first, lambda: load_adapter(model, saved["prefix"].folder, "third")),
            (InjectionError, joined, lambda: inject(model, config, "merged")),
            (InjectionError, joined, lambda: inject(model, PREFIX)),
            (AdapterError, "merged.*unmerge it", lambda: save_adapter(model, tmp_path / "new"))):
        assert_refused(error, message, operation)
        assert_unchanged(model, before)
    assert_unchanged(set_adapter(model, "merged"), before)
    assert torch.equal(set_adapter(unmerge(model), "other")(IDS, MASK), saved["bitfit"].logits)


def test_unmerge_is_exact_in_bfloat16_too(tiny_config):
    model = perturb(inject(build(GPT2LMHeadModel, tiny_config).bfloat16(), LoraConfig(r=2)))
    before = snapshot(model)
    merge(model)
    assert model.transformer.h[0].attn.c_attn.weight.dtype == torch.bfloat16
    assert not torch.equal(model.transformer.h[0].attn.c_attn.weight,
                           before["values"]["transformer.h.0.attn.c_attn.base_layer.weight"])
    assert_unchanged(unmerge(model), before)


@torch.no_grad()
def test_the_example_of_merging_worked_by_hand_comes_to_what_the_docstring_says():
    layer = LoRALinear(Linear(2, 2, bias=False), r=1, lora_alpha=2, config=LoraConfig())
    model = torch.nn.Sequential(layer)
    for parameter, values in zip((layer.base_layer.weight, layer.lora_B.weight, layer.lora_A.weight),
                                 ([[1.0, 2], [3, 4]], [[1.0], [0]], [[0.5, 0]])):
        parameter.copy_(torch.tensor(values))
    assert model(torch.ones(1, 2)).tolist() == [[4, 7]]
    assert layer.merged()["weight"].tolist() == [[2, 2], [3, 4]]
    assert "W becomes [[2, 2], [3, 4]]" in merge.__doc__ and "[3, 7] + [1, 0] = [4, 7]" in merge.__doc__


def test_merging_under_autocast_rounds_nothing_more(tiny_config):
    models = [perturb(inject(build(GPT2LMHeadModel, tiny_config), LORA)) for _ in range(2)]
    merge(models[0])
    with torch.autocast("cpu", torch.bfloat16):
        merge(models[1])
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models)))


def test_a_model_converted_while_merged_can_be_unmerged(tiny_config):
    model = perturb(inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(r=2)))
    expected = model(IDS).double()
    unmerge(merge(model).double())
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.double}
    torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=0)


def test_merging_leaves_the_tied_embedding_alone(tiny_config):
    model = perturb(inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(r=2, target_modules="all-linear")))
    embedding = model.transformer.wte.weight.clone()
    merge(model)
    assert torch.equal(model.transformer.wte.weight, embedding)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_merging_twice_is_refused_and_changes_nothing(tiny_config):
    model = merge(perturb(inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(r=2))))
    before = snapshot(model)
    with pytest.raises(InjectionError, match="already merged"):
        merge(model)
    assert_unchanged(model, before)


def test_unmerging_what_is_not_merged_is_refused(tiny_config):
    model = build(GPT2LMHeadModel, tiny_config)
    with pytest.raises(InjectionError, match="nothing is merged"):
        unmerge(model)
    inject(model, LoraConfig(r=2))
    with pytest.raises(InjectionError, match="nothing is merged"):
        unmerge(model)
    unmerge(merge(model))
    with pytest.raises(InjectionError, match="nothing is merged"):
        unmerge(model)


def test_a_layer_that_is_no_change_of_weights_cannot_be_merged():
    with pytest.raises(InjectionError, match="AdapterLayer cannot be merged"):
        AdapterLayer().merged()


def test_nothing_merges_in_train_eval_or_forward(tiny_config):
    model = perturb(inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(r=2)))
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    for step in (model.train, model.eval, lambda: model(IDS), lambda: model.train()(IDS), lambda: model.eval()(IDS)):
        assert step() is not None  # train() and eval() return the model, as torch promises
        assert_same_tensors(model.state_dict(), values)
        assert all(module is modules[name] for name, module in model.named_modules())


def test_unmerged_layers_come_back_in_the_models_present_mode(tiny_config):
    model = merge(perturb(inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(r=2, lora_dropout=0.5))))
    assert {module.training for module in unmerge(model.train()).modules()} == {True}
    assert {module.training for module in unmerge(merge(model).eval()).modules()} == {False}


def test_a_merged_model_stays_merged_in_train_and_eval(tiny_config):
    model = merge(perturb(inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(r=2))))
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()(IDS)
    model.eval()(IDS)
    assert_same_tensors(model.state_dict(), values)
    assert adapter_modules(model) == []


# --- copies -----------------------------------------------------------------------------------------------------------

def pickled(model):
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


copiers = pytest.mark.parametrize("copier", [copy.deepcopy, pickled])
COPIED = {name: [config] for name, config in CASES.items()} | {
    "linear adapter": [BottleneckConfig(non_linearity="none")], "lora, its biases": [LoraConfig(r=2, bias="lora_only")],
    "pissa": [PISSA], "lora + prefix": [LORA, PREFIX], "adapter + bitfit": [ADAPTER, BitFitConfig()],
    "ptuning + lora": [PTUNING, LORA]}


@copiers
@pytest.mark.parametrize("configs", COPIED.values(), ids=COPIED)
def test_a_copy_of_an_injected_model_is_complete_and_independent(tiny_config, configs, copier):
    base = build(GPT2ForSequenceClassification, tiny_config)
    expected_base, keys = base(IDS, MASK), list(base.state_dict())
    model = perturb(inject_all(base, *configs))
    expected, before = model(IDS, MASK), snapshot(model)
    twin = copier(model)
    assert torch.equal(twin(IDS, MASK), expected)
    assert trainable_parameters(twin) == trainable_parameters(model)
    with disable_adapter(twin):
        assert torch.equal(twin(IDS, MASK), expected_base)
        assert torch.equal(model(IDS, MASK), expected)
    perturb(twin, seed=8)  # its layers must be its own, not the original's
    assert not torch.allclose(twin(IDS, MASK), expected, atol=1e-3)
    remove(twin)
    assert list(twin.state_dict()) == keys
    assert torch.equal(twin(IDS, MASK), expected_base)
    assert_unchanged(model, before)
    assert torch.equal(model(IDS, MASK), expected)


@copiers
@pytest.mark.parametrize("model_class", HEADED)
def test_merging_a_copy_leaves_the_original_alone(tiny_config, model_class, copier):
    model = perturb(inject(build(model_class, tiny_config), LoraConfig(r=2, bias="lora_only")))
    expected, before = model(IDS, MASK), snapshot(model)
    torch.testing.assert_close(merge(copier(model))(IDS, MASK), expected, atol=1e-5, rtol=0)
    assert_unchanged(model, before)


@copiers
def test_a_copy_knows_the_adapters_that_are_inactive(tiny_config, saved, copier):
    model = load_all(with_new_head(GPT2ForSequenceClassification, tiny_config), saved)
    before, twin = snapshot(model), copier(model)
    for name, adapter in saved.items():
        assert torch.equal(set_adapter(twin, name)(IDS, MASK), adapter.logits)
    assert_unchanged(model, before)


# --- moves ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-4), (torch.bfloat16, 0.5)], ids=str)
def test_adapters_active_and_inactive_follow_the_model_to_another_type(tiny_config, saved, dtype, tolerance):
    model = with_new_head(GPT2ForSequenceClassification, tiny_config)
    base = model(IDS, MASK)
    load_all(model, saved).to(dtype)
    for name in [*saved, *saved]:
        actual = set_adapter(model, name)(IDS, MASK)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), saved[name].logits, atol=tolerance, rtol=0)
        with disable_adapter(model):
            torch.testing.assert_close(model(IDS, MASK).float(), base, atol=tolerance, rtol=0)
    assert {p.dtype for p in remove(model).parameters()} == {dtype}


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))])
def test_adapters_active_and_inactive_follow_the_model_to_another_device(tiny_config, saved, device):
    model = load_all(with_new_head(GPT2ForSequenceClassification, tiny_config), saved).to(device)
    for name in [*saved, *saved]:
        set_adapter(model, name)
        assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {device}, name
        if device != "meta":
            logits = model(IDS.to(device), MASK.to(device))
            torch.testing.assert_close(logits.cpu(), saved[name].logits, atol=1e-4, rtol=0)
    set_adapter(model, "dora")
    unmerge(merge(model).to("cpu" if device == "cuda" else device))
    assert len({tensor.device for tensor in [*model.parameters(), *model.buffers()]}) == 1


@pytest.mark.kind("5: an adapter injected on the meta device is not taken out of a base without values")
def test_what_was_injected_on_the_meta_device_is_not_taken_out_when_the_base_has_no_values(tiny_config):
    with torch.device("meta"):
        model = inject(GPT2ForSequenceClassification(tiny_config), LoraConfig(r=2))
    model.to_empty(device="cpu").load_state_dict({name: torch.zeros(t.shape) for name, t in model.state_dict().items()})
    before = snapshot(model)
    for refused in (lambda: disable_adapter(model).__enter__(), lambda: remove(model)):
        assert_refused(InjectionError, r"the base's own score\.weight has no values.*load the base first", refused)
        assert_unchanged(model, before)


@pytest.mark.parametrize("config", [LoraConfig(r=2), VeraConfig(r=6), PREFIX, BitFitConfig(), HeadConfig()],
                         ids=lambda config: config.method)
def test_what_was_out_when_the_model_left_the_meta_device_is_not_put_back(tiny_config, tmp_path, config):
    base = build(GPT2ForSequenceClassification, tiny_config)
    save_adapter(inject(build(GPT2ForSequenceClassification, tiny_config), IA3Config()), tmp_path)
    with torch.device("meta"):
        model = inject(GPT2ForSequenceClassification(tiny_config), config, "early")
    message = "the adapter 'early' has no values: it was out of the model when this left the meta device"
    with pytest.raises(InjectionError, match=message), disable_adapter(model):
        model.to_empty(device="cpu").load_state_dict(base.state_dict())
    load_adapter(model, tmp_path, "late")
    before = snapshot(model)
    assert_refused(InjectionError, message, lambda: set_adapter(model, "early"))
    assert_unchanged(model, before)
    remove(model)
    assert torch.equal(model(IDS, MASK), base(IDS, MASK))
    inject(model, config, "early")
    assert not any(parameter.is_meta for parameter in model.parameters())


# --- parameters of one's own ------------------------------------------------------------------------------------------

OWN = [LoraConfig(r=2, bias="all"), LoraConfig(r=2, init_lora_weights="pissa", bias="lora_only"), BitFitConfig(),
       IA3Config(), PREFIX, HeadConfig()]


@pytest.fixture
def two(tiny_config, tmp_path):
    """A classifier that carries two trained adapters, "one" and "two", each with biases and a head of its own."""
    for name, seed in (("one", 1), ("two", 2)):
        model = inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig(r=2, bias="all"))
        save_adapter(perturb(model, size=0.5, seed=seed), tmp_path / name)
    model = build(GPT2ForSequenceClassification, tiny_config)
    for name in ("one", "two"):
        load_adapter(model, tmp_path / name, name)
    return model


def trained_ids(model):
    return {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.kind("1: each adapter owns its parameters")
def test_two_adapters_share_no_parameter_with_each_other_or_the_base(two):
    second = trained_ids(two)
    first = trained_ids(set_adapter(two, "one"))
    with disable_adapter(two):
        base = {id(parameter) for parameter in two.parameters()}
    assert len(first) == len(second) and first.isdisjoint(second) and base.isdisjoint(first | second)
    assert trained_ids(set_adapter(two, "two")) == second  # and they are the same objects when they come back


@pytest.mark.kind("1: two optimizers, one for each adapter")
def test_two_optimizers_one_for_each_adapter_move_their_own_only(two):
    optimizers = {}
    for name in ("one", "two"):
        trained = [p for p in set_adapter(two, name).parameters() if p.requires_grad]
        optimizers[name] = torch.optim.AdamW(trained, lr=0.1)
    other = {name: p.detach().clone() for name, p in two.named_parameters()}
    set_adapter(two, "one").train()(IDS, MASK).sum().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    assert_same_tensors(dict(set_adapter(two, "two").named_parameters()), other)


@pytest.mark.kind("1: a gradient leaks to no other adapter")
def test_a_gradient_that_was_not_zeroed_stays_with_its_adapter(two):
    set_adapter(two, "one")(IDS, MASK).sum().backward()
    assert all(p.grad is None for p in set_adapter(two, "two").parameters())
    with disable_adapter(two):
        assert all(p.grad is None for p in two.parameters())
    assert two.score.weight.grad is None and set_adapter(two, "one").score.weight.grad is not None


@pytest.mark.kind("1: autocast's cache answers with the right head")
def test_within_one_autocast_block_each_adapter_answers_with_its_own_head(two):
    """Autocast remembers what it has cast by the Parameter it came from."""
    alone = {}
    for name in ("one", "two"):
        with torch.autocast("cpu", torch.bfloat16):
            alone[name] = set_adapter(two, name)(IDS, MASK)
    with torch.autocast("cpu", torch.bfloat16), disable_adapter(two):
        base = two(IDS, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("one", "two", "one"):
            assert torch.equal(set_adapter(two, name)(IDS, MASK), alone[name]), name
            with disable_adapter(two):
                assert torch.equal(two(IDS, MASK), base)
    assert not torch.allclose(alone["one"], alone["two"])


@pytest.mark.parametrize("config", OWN, ids=lambda config: f"{config.method} {getattr(config, 'bias', '')}")
def test_the_bases_own_parameters_are_never_written_to(tiny_config, config):
    model = build(GPT2ForSequenceClassification, tiny_config)
    base = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    perturb(inject(model, config))
    for parameter, value in base.values():
        assert torch.equal(parameter, value)
    remove(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {
        name: id(parameter) for name, (parameter, _) in base.items()}


# --- gradient flags ---------------------------------------------------------------------------------------------------

def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.kind("3: gradient flags are restored")
def test_what_a_user_unfreezes_or_freezes_stays_so_through_every_switch(two, tmp_path):
    two.transformer.wte.weight.requires_grad_(True)
    set_adapter(two, "one").transformer.h[0].attn.c_attn.lora_A.weight.requires_grad_(False)
    expected = flags(two)
    with disable_adapter(two):
        assert {name for name, flag in flags(two).items() if flag} == {"transformer.wte.weight"}
        two(IDS, MASK).sum().backward()
        assert two.transformer.wte.weight.grad is not None
    assert flags(two) == expected
    assert flags(set_adapter(two, "two"))["transformer.wte.weight"]
    assert flags(two)["transformer.h.0.attn.c_attn.lora_A.weight"]
    assert flags(set_adapter(two, "one")) == expected
    load_adapter(two, tmp_path / "one", "three")
    assert flags(two)["transformer.wte.weight"]
    remove(two, "three")
    assert flags(set_adapter(two, "one")) == expected
    unmerge(merge(two))
    assert flags(two) == expected
    remove(two)
    assert all(flags(two).values())  # as before the first injection
