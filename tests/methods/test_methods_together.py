"""What holds for every method: where it starts, what it trains, and that it can be saved, switched and undone."""

import copy
import dataclasses
import io
import json
import math
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import HEADED, IDS, MASK, perturb
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from minipeft import (
    METHODS,
    BitFitConfig,
    BottleneckConfig,
    FullConfig,
    GPT2Config,
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
from minipeft.errors import AdapterError, ConfigError, InjectionError, MinipeftError, WeightsError
from minipeft.methods.injection import active_injections, all_injections
from minipeft.methods.layers import AdapterLayer
from minipeft.methods.switch import adapter_names
from minipeft.model.kv_cache import KVCache

HEAD_TENSORS = {GPT2Model: [], GPT2LMHeadModel: [], GPT2ForSequenceClassification: ["score.weight"],
                GPT2ForTokenClassification: ["classifier.weight", "classifier.bias"]}

SMALL = {"num_virtual_tokens": 3}
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
VIRTUAL = (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig)
STARTS_AT_THE_BASE = {name: config for name, config in CASES.items() if not isinstance(config, VIRTUAL)} | {
    "dora, dropout": LoraConfig(r=2, use_dora=True, lora_dropout=0.5),
    "dora, rsLoRA, gaussian": LoraConfig(r=2, use_dora=True, use_rslora=True, init_lora_weights="gaussian"),
    "vera, dropout": VeraConfig(r=6, vera_dropout=0.5), "houlsby, dropout": BottleneckConfig(adapter_dropout=0.5)}
MERGEABLE = {name: config for name, config in CASES.items() if isinstance(config, (LoraConfig, VeraConfig, IA3Config))}
MERGEABLE |= {"dora from pissa": LoraConfig(r=2, use_dora=True, init_lora_weights="pissa"),
              "dora, rsLoRA": LoraConfig(r=3, lora_alpha=5, use_dora=True, use_rslora=True)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def on(model_classes, cases=None):
    """Parameters (model_class, config): each case on each class it can be put into."""
    return pytest.mark.parametrize(("model_class", "config"), [
        pytest.param(model_class, config, id=f"{name}-{model_class.__name__}")
        for name, config in (CASES if cases is None else cases).items() for model_class in model_classes
        if not isinstance(config, HeadConfig) or HEAD_TENSORS[model_class]])


def copies(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def snapshot(model):
    """All that a refused operation must leave alone: values, module objects, gradient flags, modes, random state."""
    return {"values": copies(model), "modules": dict(model.named_modules()),
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "training": {name: module.training for name, module in model.named_modules()},
            "injections": list(all_injections(model)), "attached": list(active_injections(model))}


def assert_unchanged(model, before):
    after = snapshot(model)
    assert list(after["values"]) == list(before["values"])
    for name, tensor in before["values"].items():
        assert torch.equal(after["values"][name], tensor), name
    assert list(after["modules"]) == list(before["modules"])
    for name, module in after["modules"].items():
        assert module is before["modules"][name], name
    for key in ("hooks", "requires_grad", "training", "injections", "attached"):
        assert after[key] == before[key], key


def refused(error, message, call):
    """`call()` fails with one line that matches."""
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, MinipeftError)
    assert "\n" not in str(caught.value)


def trained_tensors(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model, steps=4, lr=1e-2):
    """AdamW without decay, so that only a gradient moves anything."""
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=lr, weight_decay=0.0)
    for _ in range(steps):  # a factor that starts beside a zero gets its first gradient in the second step
        optimizer.zero_grad()
        model(IDS, MASK).square().mean().backward()
        optimizer.step()


def test_these_cases_cover_every_method_but_full_fine_tuning():
    assert {config.method for config in CASES.values()} == set(METHODS) - {"full"}


# --- generation -------------------------------------------------------------------------------------------------------

@on([GPT2LMHeadModel])
def test_with_a_cache_token_by_token_gives_what_the_whole_text_gives(make_model, model_class, config):
    model = perturb(inject(make_model(model_class), config)).eval()
    with torch.no_grad():
        cache, whole = KVCache(), model(IDS)
        steps = [model(IDS[:, t:t + 1], cache=cache) for t in range(IDS.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-5)


@on([GPT2LMHeadModel])
def test_beams_of_padded_prompts_are_those_of_each_prompt_alone(make_model, model_class, config):
    model = perturb(inject(make_model(model_class), config)).eval()
    mask = MASK.flip(1)  # padded on the left
    together = generate(model, IDS, mask, max_new_tokens=9, num_beams=3, eos_token_id=4)
    for row in range(len(IDS)):
        alone = generate(model, IDS[row:row + 1, mask[row] != 0], max_new_tokens=9, num_beams=3, eos_token_id=4)
        new = alone[0, mask[row].sum():]
        assert torch.equal(together[row, IDS.shape[1]:][:len(new)], new)


# --- the start --------------------------------------------------------------------------------------------------------

@on([*HEADED, GPT2Model], STARTS_AT_THE_BASE)
def test_at_step_0_the_model_is_the_base_model_bit_for_bit_in_training_too(make_model, model_class, config):
    model = make_model(model_class)
    expected = model(IDS, MASK)
    assert inject(model, config) is model
    for mode in (model.eval, model.train):
        mode()
        assert torch.equal(model(IDS, MASK), expected)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("model_class", HEADED)
def test_at_step_0_a_pissa_start_is_the_base_model_within_rounding(make_model, model_class, use_dora):
    model = make_model(model_class)
    expected = model(IDS, MASK)
    inject(model, LoraConfig(r=4, lora_alpha=6, use_dora=use_dora, target_modules="all-linear",
                             init_lora_weights="pissa"))
    torch.testing.assert_close(model(IDS, MASK), expected, atol=1e-5, rtol=0)


@on([GPT2LMHeadModel], {name: CASES[name] for name in ("prompt", "ptuning, MLP", "prefix", "prefix from zero")})
def test_virtual_tokens_do_not_start_at_the_base_model(make_model, model_class, config):
    model = make_model(model_class)
    expected = model(IDS, MASK)
    assert (inject(model, config)(IDS, MASK) - expected).abs().max() > 1e-3


@on([GPT2ForSequenceClassification])
def test_injection_keeps_each_modules_mode(make_model, model_class, config):
    for training in (True, False):
        model = inject(make_model(model_class).train(training), config)
        assert all(module.training is training for module in model.modules())


@on([GPT2ForSequenceClassification])
def test_the_users_configuration_is_not_edited_and_serves_again(make_model, model_class, config):
    kept = copy.deepcopy(dataclasses.asdict(config))
    first = inject(make_model(model_class), config)
    assert dataclasses.asdict(config) == kept
    assert active_injections(first)[0].config is not config
    assert trainable_parameters(inject(make_model(model_class), config)) == trainable_parameters(first)


# --- training ---------------------------------------------------------------------------------------------------------

@on(HEADED)
def test_four_adamw_steps_move_every_declared_tensor_and_no_other_bit(make_model, model_class, config):
    base = copies(make_model(model_class))
    model = inject(make_model(model_class), config).train()
    declared, before = set(trained_tensors(model)), copies(model)
    assert {name for name in declared if not name.startswith("transformer.")} == set(HEAD_TENSORS[model_class])
    train(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in declared or tensor.numel() == 0), name
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in declared) and (parameter.grad is not None) == (name in declared)
    after = copies(remove(model))  # and taking the method out leaves the base, bit for bit, head and biases too
    assert list(after) == list(base)
    assert all(torch.equal(after[name], base[name]) for name in base)
    assert all(p.requires_grad for p in model.parameters())


@on([GPT2ForSequenceClassification])
def test_each_method_learns_to_tell_two_texts_apart(make_model, model_class, config):
    model = inject(make_model(model_class), config).train()
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=2e-2, weight_decay=0.0)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(IDS, MASK), torch.tensor([0, 1])).backward()
        optimizer.step()
    assert F.cross_entropy(model.eval()(IDS, MASK), torch.tensor([0, 1])) < 0.1


@on([GPT2ForSequenceClassification], {name: config for name, config in CASES.items() if "dora" not in name})
def test_gradients_of_a_whole_model_pass_gradcheck_in_float64(make_model, model_class, config):
    # DoRA's are no derivative of its output, by design: test_dora.py holds its norm constant.
    sizes = GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
                       attn_pdrop=0.0, classifier_dropout=0.0)
    smaller = {"bottleneck_size": 2, "reduction_factor": 2, "encoder_hidden_size": 2, "num_virtual_tokens": 2, "r": 2}
    config = dataclasses.replace(config, **{key: value for key, value in smaller.items() if hasattr(config, key)})
    model = perturb(inject(make_model(model_class, sizes), config), size=0.5).double()
    values = {name: p.detach().clone().requires_grad_() for name, p in trained_tensors(model).items()}
    ids, mask = torch.tensor([[1, 4, 9], [3, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])

    def output(*tensors):
        return torch.func.functional_call(model, dict(zip(values, tensors)), (ids, mask))

    assert torch.autograd.gradcheck(output, tuple(values.values()), fast_mode=False)


@on([GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_gradient_checkpointing_recomputes_the_blocks_and_gives_the_same_gradients(make_model, model_class, config):
    model = perturb(inject(make_model(model_class), config)).train()
    passes = []
    model.transformer.h[0].ln_1.register_forward_hook(lambda *_: passes.append(1))

    def gradients(checkpointing):
        model.transformer.gradient_checkpointing = checkpointing
        model.zero_grad(set_to_none=True)
        passes.clear()
        model(IDS, MASK).square().mean().backward()
        return {name: p.grad.clone() for name, p in trained_tensors(model).items()}

    expected = gradients(False)
    assert len(passes) == 1
    actual = gradients(True)
    # Under the head alone nothing in the blocks has a gradient, so nothing needs to be recomputed.
    assert len(passes) == (1 if isinstance(config, HeadConfig) else 2)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 and gradient.isfinite().all(), name
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)


@on([GPT2ForSequenceClassification])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_autocast_trained_tensors_and_their_gradients_stay_float32(make_model, model_class, config,
                                                                         checkpointing):
    model = perturb(inject(make_model(model_class), config)).train()
    model.transformer.gradient_checkpointing = checkpointing
    expected = model(IDS, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS, MASK)
    torch.testing.assert_close(logits.float(), expected, atol=0.15, rtol=0.1)
    logits.float().square().mean().backward()
    for name, parameter in trained_tensors(model).items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@on([GPT2LMHeadModel], {name: config for name, config in CASES.items() if not isinstance(config, BitFitConfig)})
def test_on_a_bfloat16_base_what_is_added_is_float32_and_the_output_bfloat16(make_model, model_class, config):
    exact = perturb(inject(make_model(model_class), config))(IDS, MASK)
    torch.manual_seed(0)
    model = make_model(model_class).bfloat16()
    torch.manual_seed(0)
    inject(model, config)
    added = {name: p for injection in active_injections(model) for layer_name, layer in injection.layers.items()
             for name, p in layer.named_parameters(prefix=layer_name) if name.removeprefix(f"{layer_name}.")
             in layer.trained}
    assert added and all(parameter.dtype == torch.float32 for parameter in added.values())
    logits = model(IDS, MASK)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all() and logits.shape == exact.shape


# --- hooks and transforms ---------------------------------------------------------------------------------------------

@on([GPT2ForSequenceClassification])
def test_a_hook_on_a_base_module_keeps_the_output_it_saw(make_model, model_class, config):
    """Nothing that a method adds is written into a tensor of the base's: tools that keep outputs rely on it."""
    model, seen, kept = perturb(inject(make_model(model_class), config)), {}, {}
    added = {part for layer in model.modules() if isinstance(layer, AdapterLayer) for part in layer.modules()
             if part is not getattr(layer, "base_layer", None)}
    for name, module in model.named_modules():
        if module not in added:
            module.register_forward_hook(lambda module, args, output, name=name: seen.update(
                {name: output}) or kept.update({name: output.detach().clone()}))
    model.train()(IDS, MASK).square().mean().backward()
    assert any(name.endswith("c_attn") or name.endswith("base_layer") for name in seen)
    for name, output in seen.items():
        assert torch.equal(output, kept[name]), name


@on([GPT2LMHeadModel], {name: CASES[name] for name in ("lora", "vera", "dora")})
def test_the_base_layer_gives_what_it_gives_in_the_base_model(make_model, model_class, config):
    base, seen = make_model(model_class), {}
    base.transformer.h[0].attn.c_attn.register_forward_hook(lambda module, args, output: seen.update(base=output))
    base(IDS)
    model = perturb(inject(make_model(model_class), config))
    layer = model.transformer.h[0].attn.c_attn
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.update(adapted=output))
    layer.register_forward_hook(lambda module, args, output: seen.update(whole=output))
    model(IDS)
    assert torch.equal(seen["adapted"], seen["base"]) and not torch.allclose(seen["whole"], seen["base"])


@on([GPT2ForSequenceClassification], {name: config for name, config in CASES.items() if "dora" not in name})
@sdpa_kernel(SDPBackend.MATH)  # PyTorch's fused attention kernels have no second derivative; its plain one has
def test_gradients_can_be_differentiated_again(make_model, model_class, config):
    """Double backward, as sharpness and meta-learning need it: against differences of gradients along a direction."""
    model = perturb(inject(make_model(model_class), config)).double()
    tensors = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(model(IDS, MASK).square().sum(), tensors, create_graph=True)
    direction = [torch.randn_like(tensor) for tensor in tensors]
    along = sum((gradient * step).sum() for gradient, step in zip(first, direction))
    second = torch.autograd.grad(along, tensors)

    def slope(size):
        with torch.no_grad():
            for tensor, step in zip(tensors, direction):
                tensor.add_(size * step)
        gradients = torch.autograd.grad(model(IDS, MASK).square().sum(), tensors)
        with torch.no_grad():
            for tensor, step in zip(tensors, direction):
                tensor.sub_(size * step)
        return sum((gradient * step).sum() for gradient, step in zip(gradients, direction))

    expected = (slope(1e-5) - slope(-1e-5)) / 2e-5
    found = sum((gradient * step).sum() for gradient, step in zip(second, direction))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# --- on and off -------------------------------------------------------------------------------------------------------

@on([GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2Model])
def test_disable_adapter_is_exactly_the_base_model_inside_and_the_trained_one_outside(make_model, model_class, config):
    model = make_model(model_class)
    base = model(IDS, MASK)
    perturb(inject(model, config))
    trained, flags = model(IDS, MASK), {name: p.requires_grad for name, p in model.named_parameters()}
    assert not torch.allclose(trained, base, atol=1e-3)
    with disable_adapter(model):
        assert torch.equal(model(IDS, MASK), base)
        assert not any(isinstance(module, AdapterLayer) for module in model.modules())
    assert torch.equal(model(IDS, MASK), trained)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_a_model_that_carries_nothing_can_be_disabled_and_stays_as_it_is(make_model):
    model = make_model(GPT2LMHeadModel)
    before = snapshot(model)
    with disable_adapter(model):
        assert_unchanged(model, before)
    assert_unchanged(model, before)


def pickled(model):
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


@on([GPT2ForSequenceClassification], CASES | {"linear adapter": BottleneckConfig(non_linearity="none")})
@pytest.mark.parametrize("copier", [copy.deepcopy, pickled])
def test_a_copy_of_an_injected_model_is_complete_and_independent(make_model, model_class, config, copier):
    model = make_model(model_class)
    base = model(IDS, MASK)
    perturb(inject(model, config))
    expected, before = model(IDS, MASK), snapshot(model)
    twin = copier(model)
    assert torch.equal(twin(IDS, MASK), expected)
    perturb(twin)
    assert not torch.equal(twin(IDS, MASK), expected)
    remove(twin)
    assert torch.equal(twin(IDS, MASK), base)
    assert_unchanged(model, before)
    assert torch.equal(model(IDS, MASK), expected)


# --- merge ------------------------------------------------------------------------------------------------------------

@on([*HEADED, GPT2Model], MERGEABLE)
def test_a_merged_model_computes_the_same_with_plain_layers_and_unmerging_is_bit_exact(make_model, model_class, config):
    keys = list(make_model(model_class).state_dict())
    model = inject(make_model(model_class), config)
    start = model(IDS, MASK)
    perturb(model)
    expected, before = model(IDS, MASK), snapshot(model)
    assert (expected - start).abs().max() > 1e-2
    assert merge(model) is model
    torch.testing.assert_close(model(IDS, MASK), expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())
    assert list(model.state_dict()) == keys
    unmerge(model)
    assert_unchanged(model, before)
    assert torch.equal(model(IDS, MASK), expected)


@on([GPT2ForSequenceClassification], {name: config for name, config in CASES.items() if name not in MERGEABLE})
def test_merging_what_is_no_change_of_weights_is_refused_and_changes_nothing(make_model, model_class, config):
    model = perturb(inject(make_model(model_class), config))
    before = snapshot(model)
    refused(InjectionError, "cannot be merged: it is not a change of weights|there is nothing to merge: (head|bitfit) "
                            "trains the model's own tensors", lambda: merge(model))
    assert_unchanged(model, before)


def test_merging_a_combination_with_one_part_that_cannot_be_merged_changes_neither(make_model):
    model = inject(make_model(GPT2LMHeadModel), LoraConfig(r=2))
    perturb(inject(model, PrefixTuningConfig(**SMALL)))
    before = snapshot(model)
    refused(InjectionError, "Prefix cannot be merged", lambda: merge(model))
    assert_unchanged(model, before)


# --- adapter folders --------------------------------------------------------------------------------------------------

def fresh(make_model, model_class, **fields):
    """The same base with another head: what somebody loading an adapter has."""
    model = make_model(model_class, **fields)
    if model_class in HEADED[1:]:
        nn.init.normal_(getattr(model, model.head).weight)
    return model


@on([*HEADED, GPT2Model])
def test_a_saved_adapter_loads_into_a_fresh_base_with_equal_logits(make_model, tmp_path, model_class, config):
    model = perturb(inject(make_model(model_class), config))
    expected = model(IDS, MASK)
    assert (expected - make_model(model_class)(IDS, MASK)).abs().max() > 1e-3
    save_adapter(model, tmp_path / "first")
    loaded = load_adapter(fresh(make_model, model_class), tmp_path / "first")
    # An LSTM's kernel differs in the last bit with and without a gradient; nothing else may.
    torch.testing.assert_close(loaded(IDS, MASK), expected, atol=1e-6, rtol=1e-5)
    assert not any(module.training for module in loaded.modules())
    save_adapter(loaded, tmp_path / "second")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert torch.equal(remove(loaded)(IDS, MASK), fresh(make_model, model_class)(IDS, MASK)) \
        or model_class in HEADED[1:]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@on([GPT2ForSequenceClassification], CASES | {"ptuning, LSTM with dropout": PromptEncoderConfig(
    **SMALL, encoder_reparameterization_type="LSTM", encoder_dropout=0.5)})
def test_saving_in_training_mode_writes_the_same_and_disturbs_nothing(make_model, tmp_path, model_class, config):
    model = perturb(inject(make_model(model_class), config))
    save_adapter(model.eval(), tmp_path / "eval")
    model.train()
    before, random_state = snapshot(model), torch.get_rng_state()
    save_adapter(model, tmp_path / "train")
    assert files_of(tmp_path / "train") == files_of(tmp_path / "eval")
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)


@on([GPT2ForSequenceClassification], CASES | {"ptuning, LSTM with dropout": PromptEncoderConfig(
    **SMALL, encoder_reparameterization_type="LSTM", encoder_dropout=0.5)})
def test_loading_leaves_the_random_generator_where_it_was(make_model, tmp_path, model_class, config):
    save_adapter(inject(make_model(model_class), config), tmp_path)
    model = make_model(model_class).train()
    random_state = torch.get_rng_state()
    load_adapter(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)


@on([GPT2ForSequenceClassification])
def test_removing_a_loaded_adapter_gives_back_the_base_and_its_gradient_flags(
        make_model, tmp_path, model_class, config):
    save_adapter(perturb(inject(make_model(model_class), config)), tmp_path)
    model = make_model(model_class)
    model.transformer.wpe.weight.requires_grad_(False)
    before = snapshot(model)
    remove(load_adapter(model, tmp_path))
    assert_unchanged(model, before)


@on([GPT2LMHeadModel])
def test_training_goes_on_from_a_loaded_adapter(make_model, tmp_path, model_class, config):
    save_adapter(perturb(inject(make_model(model_class), config)), tmp_path)
    model = load_adapter(make_model(model_class), tmp_path).train()
    declared, before = set(trained_tensors(model)), copies(model)
    train(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in declared), name


BLOCK_BIASES = {"ln_1.bias": (24,), "attn.c_attn.bias": (72,), "attn.c_proj.bias": (24,), "ln_2.bias": (24,),
                "mlp.c_fc.bias": (96,), "mlp.c_proj.bias": (24,)}
SHAPES = {"c_attn": (72, 24), "attn.c_proj": (24, 24), "c_fc": (96, 24), "mlp.c_proj": (24, 96)}


def per_block(**tensors):
    """{"base_model.model.transformer.h.<i>.<name>": shape} for both blocks; __ stands for a dot."""
    return {f"base_model.model.transformer.h.{i}.{name.replace('__', '.')}": shape
            for i in (0, 1) for name, shape in tensors.items()}


STORED = {
    "head": {},
    "bitfit": per_block(**BLOCK_BIASES) | {"base_model.model.transformer.ln_f.bias": (24,)},
    "bitfit, LayerNorms": per_block(**{f"{ln}.{kind}": (24,) for ln in ("ln_1", "ln_2") for kind in ("weight", "bias")})
    | {"base_model.model.transformer.ln_f.weight": (24,), "base_model.model.transformer.ln_f.bias": (24,)},
    "dora": per_block(attn__c_attn__lora_A__weight=(2, 24), attn__c_attn__lora_B__weight=(72, 2),
                      attn__c_attn__lora_magnitude_vector=(72,)),
    "vera": per_block(attn__c_attn__vera_lambda_d=(6,), attn__c_attn__vera_lambda_b=(72,))
    | {"base_model.vera_A": (6, 24), "base_model.vera_B": (72, 6)},
    "vera without its matrices": per_block(**{
        f"{'mlp.' if name == 'c_fc' else 'attn.' if name == 'c_attn' else ''}{name}.vera_lambda_{which}": (size,)
        for name, (out, _) in SHAPES.items() for which, size in (("d", 6), ("b", out))}),
    "ia3": per_block(attn__c_attn__ia3_l=(72, 1), mlp__c_proj__ia3_l=(1, 96)),
    "houlsby": per_block(**{f"{place}.adapter.{name}": shape for place in ("attn", "mlp") for name, shape in (
        ("down.weight", (5, 24)), ("down.bias", (5,)), ("up.weight", (24, 5)), ("up.bias", (24,)))}),
    "pfeiffer": per_block(mlp__adapter__down__weight=(4, 24), mlp__adapter__down__bias=(4,),
                          mlp__adapter__up__weight=(24, 4), mlp__adapter__up__bias=(24,)),
    "parallel": per_block(mlp__adapter__down__weight=(5, 24), mlp__adapter__down__bias=(5,),
                          mlp__adapter__up__weight=(24, 5), mlp__adapter__up__bias=(24,),
                          mlp__adapter__layer_norm__weight=(24,), mlp__adapter__layer_norm__bias=(24,)),
    "prompt": {"prompt_embeddings": (3, 24)},
    "ptuning, MLP": {"prompt_embeddings": (3, 24)},
    "ptuning, LSTM": {"prompt_embeddings": (3, 24)},
    "prefix": {"prompt_embeddings": (3, 96)},
    "prefix, projected": {"prompt_embeddings": (3, 96)},
}


@on(HEADED, {name: CASES[name] for name in STORED})
def test_the_file_holds_these_tensors_and_no_other(make_model, tmp_path, model_class, config):
    expected = STORED[next(name for name, case in CASES.items() if case is config)]
    prefix = "base_model." if isinstance(config, VIRTUAL) else "base_model.model."
    head = {"score.weight": (2, 24), "classifier.weight": (2, 24), "classifier.bias": (2,)}
    save_adapter(inject(make_model(model_class), config), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected | {
        prefix + name: head[name] for name in HEAD_TENSORS[model_class]}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


# --- adapter folders that do not fit ----------------------------------------------------------------------------------

def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, sorted(tensors)[0])
    save_file(tensors, path)


def assert_refused(model, folder, error, message):
    """Loading fails with one line, and leaves the model and the random generator as they were."""
    model.transformer.h[0].train()  # a mixture of modes, to see that it survives
    before, random_state = snapshot(model), torch.get_rng_state()
    refused(error, message, lambda: load_adapter(model, folder))
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)


def insert_tensor(tensors, first):
    tensors["base_model.model.transformer.h.0.ln_1.other"] = torch.zeros(3)


@on([GPT2ForSequenceClassification])
@pytest.mark.parametrize(("change", "message"), [
    (lambda tensors, first: tensors.pop(first), "missing "),
    (insert_tensor, r"unexpected base_model\.model\.transformer\.h\.0\.ln_1\.other"),
    (lambda tensors, first: tensors[first].view(-1)[-1:].fill_(math.nan), "holds NaN or infinity"),
    (lambda tensors, first: tensors[first].view(-1)[:1].fill_(-math.inf), "holds NaN or infinity"),
    (lambda tensors, first: tensors.update({first: tensors[first].int()}), "holds torch.int32, not floating point"),
    (lambda tensors, first: tensors.update({first: tensors[first][..., :-1].contiguous()}), "this model needs"),
], ids=["missing", "extra", "NaN", "infinity", "integers", "misshapen"])
def test_tensors_that_do_not_fit_are_named(make_model, tmp_path, model_class, config, change, message):
    save_adapter(inject(make_model(model_class), config), tmp_path)
    edit_tensors(tmp_path, change)
    assert_refused(make_model(model_class), tmp_path, AdapterError, message)


@on([GPT2ForSequenceClassification])
def test_an_adapter_of_another_base_is_refused(make_model, tmp_path, model_class, config):
    save_adapter(inject(make_model(model_class), config), tmp_path)
    assert_refused(make_model(model_class, seed=1), tmp_path, AdapterError, "trained on another base model")


@on([GPT2ForSequenceClassification, GPT2LMHeadModel])
@pytest.mark.parametrize("sizes", [{"n_embd": 36}, {"n_embd": 12}], ids=["wider", "narrower"])
def test_an_adapter_of_another_width_is_refused_also_where_no_fingerprint_tells(
        make_model, tiny_config, tmp_path, model_class, config, sizes):
    save_adapter(inject(make_model(model_class), config), tmp_path)
    (tmp_path / "minipeft.json").unlink()
    model = make_model(model_class, dataclasses.replace(tiny_config, **sizes))
    assert_refused(model, tmp_path, MinipeftError, "this model needs|made for another token_dim; this model's is")


# A prompt fits any depth. What names its targets in full (IA3, all-linear) means these blocks, also of a deeper model.
@on([GPT2LMHeadModel], {name: CASES[name] for name in (
    "bitfit", "bitfit, LayerNorms", "lora", "dora", "dora everywhere, biases", "vera", "houlsby", "pfeiffer",
    "parallel", "prefix", "prefix, projected")})
@pytest.mark.parametrize("n_layer", [1, 3])
def test_an_adapter_of_another_depth_is_refused_also_where_no_fingerprint_tells(
        make_model, tiny_config, tmp_path, model_class, config, n_layer):
    save_adapter(inject(make_model(model_class), config), tmp_path)
    (tmp_path / "minipeft.json").unlink()
    model = make_model(model_class, dataclasses.replace(tiny_config, n_layer=n_layer))
    assert_refused(model, tmp_path, MinipeftError, "missing |unexpected |another num_layers|match nothing|blocks 0 to")


@on([GPT2ForSequenceClassification])
def test_an_adapter_for_another_head_is_refused(make_model, tmp_path, model_class, config):
    save_adapter(inject(make_model(model_class), config), tmp_path)
    for other in (GPT2LMHeadModel, GPT2ForTokenClassification):
        assert_refused(make_model(other), tmp_path, AdapterError, "was trained for SEQ_CLS, this model is for")


@on([GPT2ForSequenceClassification], {name: CASES[name] for name in (
    "head", "bitfit", "lora", "dora", "vera", "ia3", "houlsby", "prompt", "ptuning, MLP", "prefix")})
def test_a_folder_that_claims_to_be_of_another_method_is_refused(make_model, tmp_path, model_class, config):
    kinds = {method.config_class.peft_type for method in METHODS.values() if method.config_class.saves_adapter}
    for kind in kinds - {config.peft_type}:
        save_adapter(inject(make_model(model_class), config), tmp_path)
        edit_config(tmp_path, peft_type=kind)
        assert_refused(make_model(model_class), tmp_path, MinipeftError, "does not fit|does not implement|num_virtual")


@pytest.mark.parametrize(("name", "fields", "message"), [
    ("dora", {"use_dora": False}, "unexpected .*lora_magnitude_vector"),
    ("lora", {"use_dora": True}, "missing .*lora_magnitude_vector"),
    ("vera", {"r": 5}, "this model needs"), ("vera", {"save_projection": False}, r"unexpected base_model\.vera_A"),
    ("vera without its matrices", {"save_projection": True}, r"missing base_model\.vera_A"),
    ("vera", {"r": "6"}, "r must be int"), ("vera", {"d_initial": math.nan}, "d_initial must be a finite number"),
    ("ia3", {"feedforward_modules": []}, r"ia3_l is \(1, 96\), this model needs \(24, 1\)"),
    ("ia3", {"feedforward_modules": ["c_fc"]}, "must be among the target_modules"),
    ("houlsby", {"architecture": "pfeiffer"}, r"unexpected .*attn\.adapter"),
    ("houlsby", {"architecture": "sideways"}, "architecture must be one of houlsby, pfeiffer, parallel"),
    ("houlsby", {"layer_norm": True}, r"missing .*layer_norm\.weight"),
    ("houlsby", {"bottleneck_size": 6}, "this model needs"), ("houlsby", {"bottleneck_size": -6}, "bottleneck_size"),
    ("bitfit", {"train": "layer_norm"}, r"missing .*ln_1\.weight"),
    ("prompt", {"num_virtual_tokens": 4}, r"prompt_embeddings is \(3, 24\), this model needs \(4, 24\)"),
    ("prompt", {"num_virtual_tokens": None}, "does not say num_virtual_tokens"),
    ("prompt", {"num_virtual_tokens": 40}, "between 1 and 39 virtual tokens fit"),
    ("prompt", {"token_dim": 768}, "another token_dim; this model's is 24"),
    ("prompt", {"task_type": None}, "does not say its task_type"),
    ("prefix", {"num_layers": 12}, "another num_layers; this model's is 2"),
    ("prefix", {"num_attention_heads": 12}, "another num_attention_heads; this model's is 3"),
    ("prefix", {"num_transformer_submodules": 2}, "another num_transformer_submodules; this model's is 1"),
    ("prefix", {"num_virtual_tokens": "3"}, "num_virtual_tokens must be int"),
    ("ptuning, LSTM", {"encoder_reparameterization_type": "GRU"}, "must be one of MLP, LSTM"),
], ids=str)
def test_a_config_that_contradicts_its_tensors_or_the_model_is_refused(make_model, tmp_path, name, fields, message):
    save_adapter(inject(make_model(GPT2ForSequenceClassification), CASES[name]), tmp_path)
    edit_config(tmp_path, **fields)
    assert_refused(make_model(GPT2ForSequenceClassification), tmp_path, MinipeftError, message)


# --- bad configurations -----------------------------------------------------------------------------------------------

NO_TYPE = {"a list": [3], "text": "3", "a boolean": True, "nothing": None}


@pytest.mark.parametrize(("config", "error", "message"), [
    (partial(LoraConfig, r=0, use_dora=True), ConfigError, "r must be a positive integer, got 0"),
    (partial(LoraConfig, r=25, use_dora=True), ConfigError, "r=25 is larger than transformer"),
    (partial(LoraConfig, use_dora=1), ConfigError, "use_dora must be bool, got 1"),
    (partial(LoraConfig, use_dora=True, lora_alpha=math.nan), ConfigError,
     "lora_alpha must be a finite number, got nan"),
    (partial(LoraConfig, use_dora=True, lora_dropout=1.0), ConfigError, "lora_dropout must be a probability"),
    (partial(LoraConfig, use_dora=True, target_modules=["q_proj"]), InjectionError, "'q_proj' match nothing"),
    (partial(LoraConfig, use_dora=True, layers_to_transform=2), ConfigError, "has the blocks 0 to 1"),
    (partial(LoraConfig, use_dora=True, init_lora_weights="pissa", lora_alpha=0), ConfigError, "must be positive"),
    (partial(VeraConfig, r=0), ConfigError, "r must be a positive integer, got 0"),
    (partial(VeraConfig, r=-4), ConfigError, "r must be a positive integer, got -4"),
    *[(partial(VeraConfig, r=value), ConfigError, "r must be int") for value in NO_TYPE.values()],
    (partial(VeraConfig, r=2.5), ConfigError, r"r must be int, got 2\.5"),
    (partial(VeraConfig, vera_dropout=1.0), ConfigError, "vera_dropout must be a probability"),
    (partial(VeraConfig, vera_dropout=math.nan), ConfigError, "vera_dropout must be a probability"),
    (partial(VeraConfig, d_initial=math.nan), ConfigError, "d_initial must be a finite number, got nan"),
    (partial(VeraConfig, d_initial=math.inf), ConfigError, "d_initial must be a finite number, got inf"),
    (partial(VeraConfig, projection_prng_key=-1), ConfigError, "projection_prng_key must be a number from 0"),
    (partial(VeraConfig, projection_prng_key=2**64), ConfigError, "projection_prng_key must be a number from 0"),
    (partial(VeraConfig, projection_prng_key=None), ConfigError, "projection_prng_key must be int"),
    (partial(VeraConfig, bias="lora_only"), ConfigError, "bias must be one of none, vera_only, all, got 'lora_only'"),
    (partial(VeraConfig, save_projection=1), ConfigError, "save_projection must be bool"),
    (partial(VeraConfig, target_modules=["q_proj"]), InjectionError, "'q_proj' match nothing"),
    (partial(VeraConfig, target_modules=["ln_1"]), InjectionError, "is of class LayerNorm; only linear"),
    (partial(VeraConfig, layers_to_transform=[5]), ConfigError, "has the blocks 0 to 1"),
    (partial(VeraConfig, layers_to_transform=[0, -1]), ConfigError,
     r"layers_to_transform=\[0, -1\]: .* has the blocks 0 to 1"),
    (partial(VeraConfig, target_modules="("), ConfigError, "is not a regular expression"),
    (partial(IA3Config, target_modules=["q_proj"]), InjectionError, "'q_proj' match nothing"),
    (partial(IA3Config, target_modules=["wte"]), InjectionError, "is of class Embedding; only linear"),
    (partial(IA3Config, target_modules=5), ConfigError, "target_modules must be"),
    (partial(IA3Config, exclude_modules=["c_attn", "c_proj"]), InjectionError, "match nothing"),
    (partial(IA3Config, feedforward_modules="("), ConfigError, r"feedforward_modules '\(' is not a regular expression"),
    (partial(IA3Config, feedforward_modules=7), ConfigError, "feedforward_modules must be"),
    (partial(IA3Config, target_modules=["c_attn"], feedforward_modules=["c_fc"]), ConfigError,
     "must be among the target_mod"),
    (partial(IA3Config, target_modules=("c_attn",), feedforward_modules=("c_fc",)), ConfigError,
     "must be among the target_mod"),
    (partial(IA3Config, init_ia3_weights="yes"), ConfigError, "init_ia3_weights must be bool"),
    (partial(BottleneckConfig, architecture="sideways"), ConfigError,
     "one of houlsby, pfeiffer, parallel, got 'sideways'"),
    (partial(BottleneckConfig, architecture=None), ConfigError, "architecture must be one of"),
    (partial(BottleneckConfig, bottleneck_size=0), ConfigError, "bottleneck_size must be a positive integer, got 0"),
    (partial(BottleneckConfig, bottleneck_size=-3), ConfigError, "bottleneck_size must be a positive integer, got -3"),
    (partial(BottleneckConfig, bottleneck_size=2.5), ConfigError, "bottleneck_size must be int or None"),
    (partial(BottleneckConfig, bottleneck_size=True), ConfigError, "bottleneck_size must be int or None, got True"),
    (partial(BottleneckConfig, reduction_factor=0), ConfigError, "reduction_factor must be positive and finite, got 0"),
    (partial(BottleneckConfig, reduction_factor=-2), ConfigError, "reduction_factor must be positive and finite"),
    (partial(BottleneckConfig, reduction_factor=25), ConfigError,
     "reduction_factor must lie between 0 and .* 24, got 25"),
    (partial(BottleneckConfig, reduction_factor=math.nan), ConfigError, "reduction_factor must be positive and finite"),
    (partial(BottleneckConfig, reduction_factor=math.inf), ConfigError, "reduction_factor must be positive and finite"),
    (partial(BottleneckConfig, reduction_factor="16"), ConfigError, "reduction_factor must be float"),
    (partial(BottleneckConfig, non_linearity="sigmoid"), ConfigError,
     "one of relu, gelu, swish, tanh, none, got 'sigmoid'"),
    (partial(BottleneckConfig, non_linearity=None), ConfigError, "non_linearity must be one of"),
    (partial(BottleneckConfig, scaling=math.nan), ConfigError, "scaling must be a finite number, got nan"),
    (partial(BottleneckConfig, scaling="learned"), ConfigError, "scaling must be float"),
    (partial(BottleneckConfig, adapter_dropout=1.0), ConfigError, "adapter_dropout must be a probability"),
    (partial(BottleneckConfig, adapter_dropout=-0.1), ConfigError, "adapter_dropout must be a probability"),
    (partial(BottleneckConfig, layer_norm="before"), ConfigError, "layer_norm must be bool"),
    (partial(BottleneckConfig, layers_to_transform=2), ConfigError,
     r"layers_to_transform=\[2\]: .* has the blocks 0 to 1"),
    (partial(BottleneckConfig, layers_to_transform=[0, 7]), ConfigError, "has the blocks 0 to 1"),
    (partial(BottleneckConfig, layers_to_transform=-1), ConfigError, "has the blocks 0 to 1"),
    (partial(BottleneckConfig, layers_to_transform="0"), ConfigError, "layers_to_transform must be"),
    (partial(BottleneckConfig, layers_to_transform=[0.5]), ConfigError, "layers_to_transform must be"),
    (partial(BottleneckConfig, layers_to_transform=True), ConfigError, "layers_to_transform must be"),
    (partial(BitFitConfig, train="weights"), ConfigError, "train must be one of bias, layer_norm, got 'weights'"),
    (partial(BitFitConfig, train=None), ConfigError, "train must be one of bias, layer_norm, got None"),
    *[(partial(config_class, num_virtual_tokens=value), ConfigError, "num_virtual_tokens must be int")
      for config_class in VIRTUAL for value in NO_TYPE.values()],
    *[(partial(config_class, num_virtual_tokens=value), ConfigError,
       f"num_virtual_tokens={value}: this model has 40 positions left, so between 1 and 39 virtual tokens fit")
      for config_class in VIRTUAL for value in (40, 41, 10**12)],
    *[(partial(config_class, num_virtual_tokens=value), ConfigError,
       f"num_virtual_tokens must be a positive integer, got {value}") for config_class in VIRTUAL for value in (0, -5)],
    (partial(PromptTuningConfig, prompt_tuning_init="ZERO"), ConfigError,
     "one of RANDOM, SAMPLE_VOCAB, TEXT, got 'ZERO'"),
    (partial(PromptTuningConfig, prompt_tuning_init="TEXT"), ConfigError,
     "needs a prompt_tuning_init_text, and it is empty"),
    (partial(PromptTuningConfig, prompt_tuning_init="TEXT", prompt_tuning_init_text=" \n"), ConfigError, "it is empty"),
    (partial(PromptTuningConfig, prompt_tuning_init="TEXT", prompt_tuning_init_text=5), ConfigError,
     "must be str or None"),
    (partial(PromptTuningConfig, prompt_tuning_init="TEXT", prompt_tuning_init_text="a film",
     tokenizer_name_or_path="mini"),
     ConfigError, "the tokenizer gives ids up to .*, the model has 97 words"),
    (partial(PromptEncoderConfig, encoder_reparameterization_type="GRU"), ConfigError,
     "must be one of MLP, LSTM, got 'GRU'"),
    (partial(PromptEncoderConfig, encoder_hidden_size=0), ConfigError,
     "encoder_hidden_size must be a positive integer, got 0"),
    (partial(PromptEncoderConfig, encoder_hidden_size=-2), ConfigError,
     "encoder_hidden_size must be a positive integer"),
    (partial(PromptEncoderConfig, encoder_hidden_size="8"), ConfigError, "encoder_hidden_size must be int or None"),
    (partial(PromptEncoderConfig, encoder_num_layers=0), ConfigError,
     "encoder_num_layers must be a positive integer, got 0"),
    (partial(PromptEncoderConfig, encoder_dropout=1.0), ConfigError, "encoder_dropout must be a probability"),
    (partial(PromptEncoderConfig, encoder_dropout=math.nan), ConfigError, "encoder_dropout must be a probability"),
    (partial(PrefixTuningConfig, init_weights="ones"), ConfigError,
     "init_weights must be one of None, zero, got 'ones'"),
    (partial(PrefixTuningConfig, prefix_projection=1), ConfigError, "prefix_projection must be bool, got 1"),
    (partial(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=0), ConfigError,
     "encoder_hidden_size must be a positive integer, got 0"),
    (partial(PrefixTuningConfig, encoder_hidden_size=-1), ConfigError,
     "encoder_hidden_size must be a positive integer"),
], ids=str)
def test_a_refused_configuration_says_why_and_leaves_the_model_as_it_was(make_model, config, error, message):
    model = make_model(GPT2ForSequenceClassification)
    model.transformer.wpe.weight.requires_grad_(False)
    before, random_state = snapshot(model), torch.get_rng_state()
    refused(error, message, lambda: inject(model, config()))
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_vocabulary_that_cannot_be_read_is_refused_before_anything_is_touched(make_model, tmp_path):
    (tmp_path / "vocab.tiktoken").write_text("no rank file")
    model = make_model(GPT2LMHeadModel)
    before = snapshot(model)
    config = PromptTuningConfig(**SMALL, prompt_tuning_init="TEXT", prompt_tuning_init_text="a good film",
                                tokenizer_name_or_path=str(tmp_path))
    refused(WeightsError, "is not a tiktoken rank file", lambda: inject(model, config))
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_field_that_a_method_does_not_have_is_refused_by_name(method):
    refused(ConfigError, f"{METHODS[method].config_class.__name__} has no field rank_of_all_things; it has ",
            lambda: METHODS[method].config(rank_of_all_things=3))


# --- several methods together -----------------------------------------------------------------------------------------

COMBINATIONS = {
    "lora + prefix": [LoraConfig(r=2), PrefixTuningConfig(**SMALL)],
    "prefix + lora everywhere": [PrefixTuningConfig(**SMALL, prefix_projection=True),
                                 LoraConfig(r=2, target_modules="all-linear")],
    "adapter + bitfit": [BottleneckConfig(bottleneck_size=4), BitFitConfig()],
    "bitfit + adapter": [BitFitConfig(), BottleneckConfig(bottleneck_size=4, architecture="parallel")],
    "normalising adapter + LayerNorms": [BottleneckConfig(bottleneck_size=4, layer_norm=True),
                                         BitFitConfig(train="layer_norm")],
    "bitfit + lora with biases": [BitFitConfig(), LoraConfig(r=2, bias="all")],
    "adapter + lora everywhere": [BottleneckConfig(bottleneck_size=4), LoraConfig(r=2, target_modules="all-linear")],
    "ptuning + bitfit": [PromptEncoderConfig(**SMALL, encoder_reparameterization_type="LSTM"), BitFitConfig()],
    "dora + ia3, each its own targets": [LoraConfig(r=2, use_dora=True, target_modules=["c_fc"]), IA3Config()],
    "prompt + ia3 + adapter + bitfit": [PromptTuningConfig(**SMALL), IA3Config(), BottleneckConfig(bottleneck_size=4),
                                        BitFitConfig()],
}


def bare(names):
    """Names of parameters as they are in the bare model."""
    return {name.replace(".base_layer.", ".") for name in names}


@pytest.mark.parametrize("configs", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("model_class", [GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_a_combination_trains_what_each_part_trains_and_can_be_saved_switched_off_and_removed(
        make_model, tmp_path, model_class, configs):
    base, model = make_model(model_class), make_model(model_class)
    apart = set()
    for config in configs:
        inject(model, config)
        apart |= bare(trained_tensors(inject(make_model(model_class), config)))
    assert bare(trained_tensors(model)) == apart
    before = copies(model.train())
    train(model)
    for name, tensor in model.eval().state_dict().items():
        assert torch.equal(tensor, before[name]) == (bare([name]).isdisjoint(apart)), name

    expected = model(IDS, MASK)
    with disable_adapter(model):
        assert torch.equal(model(IDS, MASK), base(IDS, MASK))
    assert torch.equal(model(IDS, MASK), expected)
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(config.method for config in configs)
    torch.testing.assert_close(load_adapter(fresh(make_model, model_class), tmp_path)(IDS, MASK), expected,
                               atol=1e-6, rtol=1e-6)
    remove(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_lora_beside_a_prefix_is_the_prefix_on_a_base_with_lora_folded_in_by_hand(make_model):
    model = inject(make_model(GPT2LMHeadModel), LoraConfig(r=2, lora_alpha=6))
    perturb(inject(model, PrefixTuningConfig(**SMALL)))
    by_hand = make_model(GPT2LMHeadModel)
    with torch.no_grad():
        for block, adapted in zip(by_hand.transformer.h, model.transformer.h):
            c_attn = adapted.attn.c_attn
            block.attn.c_attn.weight += 3.0 * c_attn.lora_B.weight @ c_attn.lora_A.weight
        inject(by_hand, PrefixTuningConfig(**SMALL))
        by_hand.transformer.prefix_tuning.encoder.weight.copy_(model.transformer.prefix_tuning.encoder.weight)
    torch.testing.assert_close(model(IDS, MASK), by_hand(IDS, MASK), atol=1e-5, rtol=1e-5)


def test_positions_taken_by_virtual_tokens_are_not_free_for_more(make_model):
    model = inject(make_model(GPT2LMHeadModel), PrefixTuningConfig(num_virtual_tokens=39))
    assert model(IDS[:, :1]).shape == (2, 1, 97)
    refused(ConfigError, "41 tokens do not fit this model: it has 40 positions", lambda: model(IDS[:, :2]))


@pytest.mark.parametrize(("first", "second", "message"), [
    *[(config, config, "already carries .*, which does not combine with") for config in CASES.values()],
    (FullConfig(), LoraConfig(), "already carries full, which does not combine with lora"),
    (LoraConfig(), FullConfig(), "already carries lora, which does not combine with full"),
    (HeadConfig(), BitFitConfig(), "already carries head, which does not combine with bitfit"),
    (PrefixTuningConfig(**SMALL), HeadConfig(), "already carries prefix, which does not combine with head"),
    (PromptTuningConfig(**SMALL), PrefixTuningConfig(**SMALL), "already carries prompt, .* with prefix"),
    (PrefixTuningConfig(**SMALL), PromptEncoderConfig(**SMALL), "already carries prefix, .* with ptuning"),
    (LoraConfig(), IA3Config(), r"h\.0\.attn\.c_attn already carries a LoRALinear"),
    (IA3Config(), VeraConfig(), r"h\.0\.attn\.c_attn already carries a IA3Linear"),
    (VeraConfig(), LoraConfig(use_dora=True), r"h\.0\.attn\.c_attn already carries a VeRALinear"),
], ids=lambda value: value if isinstance(value, str) else type(value).__name__)
def test_what_does_not_combine_is_refused_and_the_first_method_stays_as_it_was(make_model, first, second, message):
    model = inject(make_model(GPT2ForSequenceClassification), first)
    before = snapshot(model)
    refused(InjectionError, message, lambda: inject(model, second))
    assert_unchanged(model, before)


def test_methods_of_one_adapter_share_its_name_and_another_name_is_refused(make_model):
    model = inject(make_model(GPT2LMHeadModel), LoraConfig(r=2), name="films")
    before = snapshot(model)
    refused(InjectionError, "the adapter 'films' is active", lambda: inject(model, BitFitConfig(), name="books"))
    assert_unchanged(model, before)
    inject(model, BitFitConfig(), name="films")
    assert adapter_names(model) == ["films"]


def test_a_merged_model_takes_no_further_method(make_model):
    model = merge(perturb(inject(make_model(GPT2LMHeadModel), IA3Config())))
    before = snapshot(model)
    refused(InjectionError, "carries ia3, merged into its weights", lambda: inject(model, PrefixTuningConfig(**SMALL)))
    assert_unchanged(model, before)


def test_a_combination_saved_over_one_method_is_what_is_loaded(make_model, tmp_path):
    model = perturb(inject(make_model(GPT2LMHeadModel), LoraConfig(r=2)))
    save_adapter(model, tmp_path)
    perturb(inject(model, PrefixTuningConfig(**SMALL)))
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(make_model(GPT2LMHeadModel), tmp_path)(IDS), model(IDS))


@pytest.mark.parametrize("later", [[LoraConfig(r=2), BitFitConfig()], [LoraConfig(r=2)]], ids=["two", "one"])
def test_what_is_saved_over_a_combination_is_what_is_loaded(make_model, tmp_path, later):
    model = inject(make_model(GPT2LMHeadModel), LoraConfig(r=2))
    save_adapter(perturb(inject(model, PrefixTuningConfig(**SMALL))), tmp_path)
    model = make_model(GPT2LMHeadModel)
    for config in later:
        inject(model, config)
    save_adapter(perturb(model), tmp_path)
    assert torch.equal(load_adapter(make_model(GPT2LMHeadModel), tmp_path)(IDS), model(IDS))


def test_a_combination_with_one_damaged_part_is_refused_and_none_of_it_stays(make_model, tmp_path):
    model = inject(make_model(GPT2ForSequenceClassification), LoraConfig(r=2))
    save_adapter(inject(model, PrefixTuningConfig(**SMALL)), tmp_path)
    edit_tensors(tmp_path / "prefix", lambda tensors, first: tensors.pop(first))
    assert_refused(make_model(GPT2ForSequenceClassification), tmp_path, AdapterError, "prefix.*missing ")


# --- several adapters -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model_class", [GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_several_adapters_are_switched_between_without_touching_the_base(make_model, tmp_path, model_class):
    parts = {"films": [LoraConfig(r=2, bias="all")], "books": [PrefixTuningConfig(**SMALL)], "songs": [BitFitConfig()],
             "games": [BottleneckConfig(bottleneck_size=4), BitFitConfig(train="layer_norm")],
             "plays": [PromptEncoderConfig(**SMALL)], "poems": [LoraConfig(r=3, init_lora_weights="pissa")]}
    base, alone, together = make_model(model_class)(IDS, MASK), {}, make_model(model_class)
    for seed, (name, configs) in enumerate(parts.items()):
        model = make_model(model_class)
        for config in configs:
            inject(model, config)
        save_adapter(perturb(model, seed=seed), tmp_path / name)
        alone[name] = model(IDS, MASK)
        load_adapter(together, tmp_path / name, name=name)
    assert adapter_names(together) == list(parts)
    for name in ("books", "films", "poems", "games", "songs", "films", "plays", "books", "books"):
        assert set_adapter(together, name) is together
        torch.testing.assert_close(together(IDS, MASK), alone[name], atol=1e-6, rtol=1e-6)
        with disable_adapter(together):
            assert torch.equal(together(IDS, MASK), base)
    remove(together, "films")                                                    # one that is out of force
    torch.testing.assert_close(together(IDS, MASK), alone["books"], atol=1e-6, rtol=1e-6)
    remove(together, "books")                                                    # the active one
    assert torch.equal(together(IDS, MASK), base)
    torch.testing.assert_close(set_adapter(together, "poems")(IDS, MASK), alone["poems"], atol=1e-6, rtol=1e-6)
    before = snapshot(together)
    refused(InjectionError, "no adapter 'films'; there are songs, games, plays, poems",
            lambda: set_adapter(together, "films"))
    refused(InjectionError, "no adapter 'films'", lambda: remove(together, "films"))
    refused(InjectionError, "already carries an adapter 'songs'",
            lambda: load_adapter(together, tmp_path / "songs", name="songs"))
    assert_unchanged(together, before)
    remove(together)
    assert torch.equal(together(IDS, MASK), base)
    assert all(p.requires_grad for p in together.parameters())


def test_a_refused_load_puts_the_adapter_that_was_active_back(make_model, tmp_path):
    save_adapter(perturb(inject(make_model(GPT2LMHeadModel), PrefixTuningConfig(**SMALL))), tmp_path)
    edit_tensors(tmp_path, lambda tensors, first: tensors[first].fill_(math.nan))
    model = perturb(inject(make_model(GPT2LMHeadModel), LoraConfig(r=2, bias="all"), name="films"))
    before = snapshot(model)
    refused(AdapterError, "holds NaN", lambda: load_adapter(model, tmp_path, name="books"))
    assert_unchanged(model, before)
    assert adapter_names(model) == ["films"]


def test_a_merged_adapter_must_be_unmerged_before_another_takes_its_place(make_model, tmp_path):
    save_adapter(perturb(inject(make_model(GPT2LMHeadModel), BitFitConfig())), tmp_path)
    model = merge(perturb(inject(make_model(GPT2LMHeadModel), LoraConfig(r=2, use_dora=True))))
    before = snapshot(model)
    refused(InjectionError, "merged into the weights: call unmerge first",
            lambda: load_adapter(model, tmp_path, name="other"))
    assert_unchanged(model, before)
