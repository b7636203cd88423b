"""Operations on models that carry methods: off, on, from one to another, folded in, taken out, together, copied."""

import copy
import io
import itertools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn
from models import (
    HEADED,
    IDS,
    MASK,
    adapter_modules,
    assert_same_tensors,
    assert_unchanged,
    build,
    inject_all,
    perturb,
    snapshot,
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
    GPT2Model,
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
from minipeft.methods.injection import active_injections
from minipeft.methods.layers import AdapterLayer
from minipeft.methods.saving import CONFIG_FILE, TENSORS_FILE

LORA, PISSA = LoraConfig(r=2, lora_alpha=6), LoraConfig(r=2, init_lora_weights="pissa")
DORA_OF_FC = LoraConfig(r=2, use_dora=True, target_modules=["c_fc"])
IA3_OF_FC = IA3Config(target_modules=["c_fc"], feedforward_modules=[])
PREFIX, PROMPT = PrefixTuningConfig(num_virtual_tokens=3), PromptTuningConfig(num_virtual_tokens=3)
PTUNING, ADAPTER = PromptEncoderConfig(num_virtual_tokens=3), BottleneckConfig(bottleneck_size=5, non_linearity="gelu")
EVERY_METHOD = {
    "lora": LORA, "lora everywhere": LoraConfig(r=2, target_modules="all-linear", bias="lora_only"),
    "lora, bias all": LoraConfig(r=2, bias="all"), "lora, random": LoraConfig(r=2, init_lora_weights=False),
    "pissa": PISSA, "dora": LoraConfig(r=2, use_dora=True), "vera": VeraConfig(r=4, bias="vera_only"),
    "ia3": IA3Config(), "adapter": ADAPTER, "parallel": BottleneckConfig(architecture="parallel", layer_norm=True),
    "bitfit": BitFitConfig(), "layer_norm": BitFitConfig(train="layer_norm"), "prompt": PROMPT, "ptuning": PTUNING,
    "prefix": PREFIX, "prefix, projected": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
}
every_method = pytest.mark.parametrize("config", EVERY_METHOD.values(), ids=EVERY_METHOD)


def names_of(configs):
    return " + ".join(config.method for config in configs)


def both_orders(*combinations):
    """parametrize("configs", ...) over each combination, either of its methods first."""
    orders = [order for combination in combinations for order in itertools.permutations(combination)]
    return pytest.mark.parametrize("configs", orders, ids=names_of)


# --- several adapters on one base -----------------------------------------------------------------------------------

class Saved(NamedTuple):
    """An adapter on disk, and what the model it was saved from computes."""

    folder: Path
    logits: torch.Tensor
    trained: set[str]


SEVERAL = {"lora": [LoraConfig(r=2, bias="all")], "pissa": [PISSA], "dora": [DORA_OF_FC], "vera": [VeraConfig(r=4)],
           "prefix": [PREFIX], "bitfit": [BitFitConfig()], "head": [HeadConfig()],
           "adapter and ia3": [ADAPTER, IA3_OF_FC]}


@pytest.fixture
def saved(tiny_config, tmp_path):
    """name -> a classifier's adapter, each of another method, trained away from its start."""
    adapters = {}
    for seed, (name, configs) in enumerate(SEVERAL.items()):
        model = inject_all(build(GPT2ForSequenceClassification, tiny_config), *configs)
        save_adapter(perturb(model, seed=seed), tmp_path / name)
        adapters[name] = Saved(tmp_path / name, model(IDS, MASK), trained_names(model))
    return adapters


def load_all(model, adapters):
    for name, adapter in adapters.items():
        load_adapter(model, adapter.folder, name)
    return model


def test_each_of_several_adapters_gives_its_exact_logits_again_and_again(tiny_config, saved):
    model = with_new_head(GPT2ForSequenceClassification, tiny_config)
    base, before = model(IDS, MASK), snapshot(model)
    for name, adapter in saved.items():
        assert load_adapter(model, adapter.folder, name) is model
        assert torch.equal(model(IDS, MASK), adapter.logits), name
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


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("active", [True, False])
def test_removing_one_adapter_leaves_the_other(tiny_config, saved, name, active):
    other = "lora" if name != "lora" else "pissa"
    model = with_new_head(GPT2ForSequenceClassification, tiny_config)
    base, before = model(IDS, MASK), snapshot(model)
    load_all(model, {key: saved[key] for key in (name, other)})
    set_adapter(model, name if active else other)
    assert remove(model, name) is model
    assert torch.equal(model(IDS, MASK), base if active else saved[other].logits)
    with pytest.raises(InjectionError, match=f"no adapter '{name}'; there are {other}"):
        set_adapter(model, name)
    assert torch.equal(set_adapter(model, other)(IDS, MASK), saved[other].logits)
    load_adapter(model, saved[name].folder, name)
    assert torch.equal(model(IDS, MASK), saved[name].logits)
    remove(model, other)
    assert_unchanged(remove(model, name), before)


def test_loading_and_removing_leaves_frozen_what_the_user_had_frozen_and_nothing_else(tiny_config, saved):
    model = build(GPT2ForSequenceClassification, tiny_config)
    model.transformer.wpe.weight.requires_grad_(False)
    before = snapshot(model)
    assert_unchanged(remove(load_all(model, saved)), before)


@pytest.mark.parametrize("operation", [set_adapter, remove])
@pytest.mark.parametrize("loaded", [[], ["lora", "prefix"]], ids=["none there", "others there"])
def test_a_name_that_is_not_there_is_refused_with_those_that_are(tiny_config, saved, operation, loaded):
    model = load_all(build(GPT2ForSequenceClassification, tiny_config), {name: saved[name] for name in loaded})
    before = snapshot(model)
    with pytest.raises(InjectionError, match=f"no adapter 'Lora'; there are {', '.join(loaded) or 'none'}"):
        operation(model, "Lora")
    assert_unchanged(model, before)


def nothing_matches(folder):
    edit_config(folder, target_modules=["q_proj"])


def bad_value(folder):
    edit_config(folder, r=-1)


def another_rank(folder):
    edit_config(folder, r=3)


def no_tensors(folder):
    (folder / TENSORS_FILE).unlink()


def a_tensor_too_many(folder):
    save_file({**load_file(folder / TENSORS_FILE), "more": torch.zeros(1)}, folder / TENSORS_FILE)


def edit_config(folder, **fields):
    file = folder / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("damage", [nothing_matches, bad_value, another_rank, no_tensors, a_tensor_too_many])
@pytest.mark.parametrize("first", [*SEVERAL, None])
def test_a_failed_load_leaves_the_adapter_active_active_and_as_it_was(tiny_config, saved, first, damage):
    model = build(GPT2ForSequenceClassification, tiny_config)
    if first is not None:
        load_adapter(model, saved[first].folder, "first")
    before, expected = snapshot(model), model(IDS, MASK)
    damage(saved["pissa"].folder)
    with pytest.raises(MinipeftError):
        load_adapter(model, saved["pissa"].folder, "second")
    assert_unchanged(model, before)
    assert torch.equal(model(IDS, MASK), expected)


def test_a_combination_whose_second_part_is_damaged_is_refused_as_a_whole(tiny_config, saved):
    model = load_adapter(build(GPT2ForSequenceClassification, tiny_config), saved["bitfit"].folder, "first")
    before, folder = snapshot(model), saved["adapter and ia3"].folder
    for part in ("ia3", "adapter"):
        a_tensor_too_many(folder / part)
        with pytest.raises(AdapterError, match="unexpected more"):
            load_adapter(model, folder, "second")
        save_file({name: tensor for name, tensor in load_file(folder / part / TENSORS_FILE).items() if name != "more"},
                  folder / part / TENSORS_FILE)
        assert_unchanged(model, before)
    assert torch.equal(load_adapter(model, folder, "second")(IDS, MASK), saved["adapter and ia3"].logits)


def test_a_name_that_is_taken_or_a_model_without_a_copy_of_its_base_takes_no_adapter(tiny_config, saved):
    for model, message in ((load_all(build(GPT2ForSequenceClassification, tiny_config), saved), "already carries"),
                           (inject(build(GPT2ForSequenceClassification, tiny_config), FullConfig(), "all"),
                            "full keeps no copy of the base")):
        before = snapshot(model)
        with pytest.raises(InjectionError, match=message):
            load_adapter(model, saved["lora"].folder, "lora")
        assert_unchanged(model, before)


# --- combinations -----------------------------------------------------------------------------------------------------

@both_orders((LORA, PREFIX), (ADAPTER, BitFitConfig()), (LORA, BitFitConfig()), (LORA, ADAPTER), (IA3_OF_FC, LORA),
             (DORA_OF_FC, LORA), (PISSA, PROMPT), (VeraConfig(r=4), PTUNING))
@pytest.mark.parametrize("model_class", HEADED)
def test_two_methods_together(tiny_config, tmp_path, model_class, configs):
    """Both act and are trained, both come back from disk, and both go without a trace."""
    model = build(model_class, tiny_config)
    base, before = model(IDS, MASK), snapshot(model)
    alone = [trainable_parameters(inject(build(model_class, tiny_config), config)).trainable for config in configs]
    head = sum(p.numel() for p in getattr(model, model.head).parameters()) if model.head != "lm_head" else 0
    perturb(inject_all(model, *configs))
    assert trainable_parameters(model).trainable == sum(alone) - head

    expected = model(IDS, MASK)
    expected.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == parameter.requires_grad, name

    with disable_adapter(model):
        assert torch.equal(model(IDS, MASK), base)
        assert_same_tensors(model.state_dict(), before["values"])
    assert torch.equal(model(IDS, MASK), expected)

    save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {config.method for config in configs}
    assert torch.equal(load_adapter(with_new_head(model_class, tiny_config), tmp_path)(IDS, MASK), expected)

    assert_unchanged(remove(model), before)
    assert torch.equal(model(IDS, MASK), base)


@both_orders((LoraConfig(r=2, bias="all"), BitFitConfig()))
def test_tensors_that_two_methods_train_are_trained_once_and_given_back(tiny_config, tmp_path, configs):
    model = build(GPT2ForSequenceClassification, tiny_config)
    before = snapshot(model)
    lora_alone = trainable_parameters(inject(build(GPT2ForSequenceClassification, tiny_config), configs[0]
                                             if configs[0].method == "lora" else configs[1])).trainable
    perturb(inject_all(model, *configs))
    assert trainable_parameters(model).trainable == lora_alone
    save_adapter(model, tmp_path)
    loaded = load_adapter(with_new_head(GPT2ForSequenceClassification, tiny_config), tmp_path)
    assert torch.equal(loaded(IDS, MASK), model(IDS, MASK))
    assert_unchanged(remove(model), before)


@pytest.mark.parametrize(("present", "refused"), [
    *[(config, config) for config in (LORA, DORA_OF_FC, VeraConfig(), IA3Config(), ADAPTER, BitFitConfig(), PREFIX)],
    *itertools.permutations((FullConfig(), LORA), 2), *itertools.permutations((HeadConfig(), ADAPTER), 2),
    *itertools.permutations((FullConfig(), HeadConfig()), 2), *itertools.permutations((HeadConfig(), PREFIX), 2),
    *itertools.permutations((PROMPT, PREFIX, PTUNING), 2), (LORA, LoraConfig(target_modules=["c_fc"])),
    *itertools.permutations((LORA, IA3Config(), VeraConfig(), LoraConfig(use_dora=True)), 2),
    (LORA, VeraConfig(target_modules="all-linear")), (ADAPTER, LoraConfig(target_modules=["down"])),
], ids=lambda config: config.method)
def test_a_refused_combination_leaves_the_model_as_it_was(tiny_config, present, refused):
    model = perturb(inject(build(GPT2ForSequenceClassification, tiny_config), present))
    expected, before, config = model(IDS, MASK), snapshot(model), copy.deepcopy(refused)
    with pytest.raises(InjectionError, match=r"already carries|match nothing") as caught:
        inject(model, refused)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)
    assert refused == config
    assert torch.equal(model(IDS, MASK), expected)


def test_methods_that_work_together_share_a_name(tiny_config):
    model = inject(build(GPT2ForSequenceClassification, tiny_config), LORA, "mine")
    before = snapshot(model)
    for name in ("default", "yours"):
        with pytest.raises(InjectionError, match=r"the adapter 'mine' is active.*share a name"):
            inject(model, PREFIX, name)
        assert_unchanged(model, before)
    inject(model, PREFIX, "mine")


# --- remove -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model_class", [*HEADED, GPT2Model])
@every_method
def test_remove_gives_back_the_same_modules_keys_and_bytes(tiny_config, model_class, config):
    model = build(model_class, tiny_config)
    before = snapshot(model)
    perturb(inject(model, config))
    assert any(not torch.equal(tensor, before["values"].get(name, torch.empty(0)))
               for name, tensor in model.state_dict().items())
    assert remove(model) is model
    assert_unchanged(model, before)


def test_remove_leaves_what_the_user_had_frozen_frozen(tiny_config):
    model = build(GPT2ForSequenceClassification, tiny_config)
    model.transformer.wpe.weight.requires_grad_(False)
    before = snapshot(model)
    remove(perturb(inject(model, LoraConfig(r=2, bias="all"))))
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


# --- disable ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model_class", HEADED)
@every_method
def test_disable_adapter_is_exactly_the_base_model_inside_and_the_trained_one_outside(
        tiny_config, model_class, config):
    model = build(model_class, tiny_config)
    base, values = model(IDS, MASK), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perturb(inject(model, config))
    trained, before = model(IDS, MASK), snapshot(model)
    assert not torch.allclose(trained, base, atol=1e-3)
    for _ in range(2):
        with disable_adapter(model) as same:
            assert same is model
            assert torch.equal(model(IDS, MASK), base)
            assert_same_tensors(model.state_dict(), values)  # biases, head and PiSSA's matrices included
            assert trained_names(model) == set()
        assert torch.equal(model(IDS, MASK), trained)
        assert_unchanged(model, before)


def test_disabling_nothing_is_no_error_and_changes_nothing(tiny_config):
    model = build(GPT2ForSequenceClassification, tiny_config)
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


# --- merge ------------------------------------------------------------------------------------------------------------

MERGEABLE = {
    "c_attn": [LORA],
    "all-linear": [LoraConfig(r=3, lora_alpha=2, target_modules="all-linear")],
    "lora_only": [LoraConfig(r=2, lora_alpha=4, bias="lora_only")],
    "bias all": [LoraConfig(r=2, lora_alpha=4, bias="all", target_modules=["c_proj"])],
    "rslora": [LoraConfig(r=4, lora_alpha=4, use_rslora=True, target_modules=["c_fc", "c_attn"])],
    "patterns": [LoraConfig(r=2, rank_pattern={"c_fc": 5}, alpha_pattern={"c_attn": 20}, target_modules="all-linear")],
    "dropout": [LoraConfig(r=2, lora_dropout=0.5)],
    "pissa": [PISSA],
    "dora": [LoraConfig(r=2, use_dora=True, target_modules="all-linear", bias="all")],
    "dora on pissa": [LoraConfig(r=2, use_dora=True, init_lora_weights="pissa")],
    "vera": [VeraConfig(r=4, target_modules="all-linear")],
    "ia3": [IA3Config(target_modules="all-linear")],
    "lora and dora": [LORA, DORA_OF_FC],
    "ia3 and lora": [IA3_OF_FC, LORA],
    "lora and bitfit": [LORA, BitFitConfig()],
    "bitfit and ia3": [BitFitConfig(), IA3Config()],
}
mergeable = pytest.mark.parametrize("configs", MERGEABLE.values(), ids=MERGEABLE)


@pytest.mark.parametrize("model_class", HEADED)
@mergeable
def test_a_merged_model_computes_the_same_with_plain_layers(tiny_config, model_class, configs):
    model = build(model_class, tiny_config)
    base, keys = model(IDS, MASK), list(model.state_dict())
    perturb(inject_all(model, *configs)).eval()
    expected = model(IDS, MASK)
    assert (expected - base).abs().max() > 1e-2
    assert merge(model) is model
    torch.testing.assert_close(model(IDS, MASK), expected, atol=1e-5, rtol=0)
    assert adapter_modules(model) == []
    assert list(model.state_dict()) == keys
    assert {type(m) for name, m in model.named_modules() if "c_" in name} == {nn.Linear}


@mergeable
def test_unmerge_restores_everything_bit_for_bit(tiny_config, configs):
    model = perturb(inject_all(build(GPT2ForSequenceClassification, tiny_config), *configs)).eval()
    before, expected = snapshot(model), model(IDS, MASK)
    for _ in range(3):  # by keeping the weights, not by subtraction: nothing drifts
        assert unmerge(merge(model)) is model
    assert_unchanged(model, before)
    assert torch.equal(model(IDS, MASK), expected)


@mergeable
def test_a_merged_model_is_saved_as_a_plain_model(tiny_config, tmp_path, configs):
    model = merge(perturb(inject_all(build(GPT2ForSequenceClassification, tiny_config), *configs)))
    model.save_pretrained(tmp_path)
    plain = GPT2ForSequenceClassification.from_pretrained(tmp_path)
    assert active_injections(plain) == []
    assert torch.equal(plain(IDS, MASK), model(IDS, MASK))


@both_orders((LORA, PREFIX), (LORA, PROMPT), (IA3Config(), PTUNING), (DORA_OF_FC, ADAPTER), (ADAPTER, BitFitConfig()))
def test_merging_a_combination_with_something_that_is_no_change_of_weights_is_refused_as_a_whole(tiny_config, configs):
    model = perturb(inject_all(build(GPT2ForSequenceClassification, tiny_config), *configs))
    expected, before = model(IDS, MASK), snapshot(model)
    with pytest.raises(InjectionError, match=r"^(Prefix|Prompt|BottleneckAdapter) cannot be merged"):
        merge(model)
    assert_unchanged(model, before)
    assert torch.equal(model(IDS, MASK), expected)


def test_while_merged_an_adapter_is_neither_switched_nor_saved_nor_joined_by_another(tiny_config, tmp_path, saved):
    model = load_adapter(load_adapter(with_new_head(GPT2ForSequenceClassification, tiny_config), saved["bitfit"].folder,
                                      "other"), saved["lora"].folder, "merged")
    before = snapshot(merge(model))
    for operation in (lambda: set_adapter(model, "other"), lambda: save_adapter(model, tmp_path / "new"),
                      lambda: load_adapter(model, saved["prefix"].folder, "third")):
        with pytest.raises(MinipeftError, match="merged"):
            operation()
        assert_unchanged(model, before)
    assert torch.equal(set_adapter(unmerge(model), "other")(IDS, MASK), saved["bitfit"].logits)


def test_unmerge_is_exact_in_bfloat16_too(tiny_config):
    model = perturb(inject(build(GPT2LMHeadModel, tiny_config).bfloat16(), LoraConfig(r=2)))
    before = snapshot(model)
    merge(model)
    assert model.transformer.h[0].attn.c_attn.weight.dtype == torch.bfloat16
    assert not torch.equal(model.transformer.h[0].attn.c_attn.weight,
                           before["values"]["transformer.h.0.attn.c_attn.base_layer.weight"])
    assert_unchanged(unmerge(model), before)


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


@pytest.mark.parametrize("config", [None, FullConfig(), HeadConfig(), BitFitConfig()], ids=repr)
def test_there_must_be_something_to_merge(tiny_config, config):
    model = build(GPT2ForSequenceClassification, tiny_config)
    if config is not None:
        inject(model, config)
    with pytest.raises(InjectionError, match="nothing to merge"):
        merge(model)


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


@copiers
@pytest.mark.parametrize("configs", [
    [LoraConfig(r=2, bias="lora_only")], [PISSA], [DORA_OF_FC], [VeraConfig(r=4)], [IA3Config()],
    [BottleneckConfig(non_linearity="none")], [LORA, PREFIX], [ADAPTER, BitFitConfig()], [PTUNING, LORA]],
    ids=names_of)
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
    perturb(twin, seed=8)  # its hooks must be its own, not the original's
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
def test_a_copy_knows_the_adapters_that_are_out_of_force(tiny_config, saved, copier):
    model = load_all(with_new_head(GPT2ForSequenceClassification, tiny_config), saved)
    before, twin = snapshot(model), copier(model)
    for name, adapter in saved.items():
        assert torch.equal(set_adapter(twin, name)(IDS, MASK), adapter.logits)
    assert_unchanged(model, before)


# --- moves ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-4), (torch.bfloat16, 0.5)], ids=str)
def test_adapters_in_and_out_of_force_follow_the_model_to_another_type(tiny_config, saved, dtype, tolerance):
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
def test_adapters_in_and_out_of_force_follow_the_model_to_another_device(tiny_config, saved, device):
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
