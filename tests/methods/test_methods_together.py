"""What holds for every method: where it starts, what it trains, that it can be saved, and what is refused."""

import copy
import dataclasses
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import changed_by_hand
from models import (
    CASES,
    EVERY_CLASS,
    HEAD_TENSORS,
    HEADED,
    IDS,
    MASK,
    SMALL,
    VIRTUAL,
    assert_load_refused,
    assert_refused,
    assert_unchanged,
    copies,
    on,
    perturb,
    renew_head,
    snapshot,
    train,
    trained_names,
)
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

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
    remove,
    save_adapter,
    trainable_parameters,
)
from minipeft.errors import AdapterError, ConfigError, InjectionError, MinipeftError, WeightsError
from minipeft.methods.injection import active_injections
from minipeft.methods.layers import AdapterLayer, ReplacementLayer
from minipeft.model import linear
from minipeft.model.kv_cache import KVCache

EVERYWHERE = {"target_modules": "all-linear"}
STARTS_AT_THE_BASE = {name: config for name, config in CASES.items() if not isinstance(config, VIRTUAL)} | {
    "lora by default": LoraConfig(), "lora everywhere, full rank": LoraConfig(r=24, **EVERYWHERE),
    "lora, gaussian": LoraConfig(init_lora_weights="gaussian"), "lora, every bias": LoraConfig(bias="all"),
    "lora, rsLoRA, dropout": LoraConfig(use_rslora=True, lora_dropout=0.5),
    "dora, dropout": LoraConfig(r=2, use_dora=True, lora_dropout=0.5),
    "dora, rsLoRA, gaussian": LoraConfig(r=2, use_dora=True, use_rslora=True, init_lora_weights="gaussian"),
    "vera, dropout": VeraConfig(r=6, vera_dropout=0.5), "houlsby, dropout": BottleneckConfig(adapter_dropout=0.5)}
PISSA = {
    "pissa": LoraConfig(r=4, init_lora_weights="pissa"),
    "pissa everywhere": LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", **EVERYWHERE),
    "pissa everywhere, full rank": LoraConfig(r=24, init_lora_weights="pissa", **EVERYWHERE),
    "pissa, rsLoRA, a rank of its own": LoraConfig(use_rslora=True, lora_alpha=3, rank_pattern={"c_attn": 2},
                                                   init_lora_weights="pissa"),
    "dora from pissa": LoraConfig(r=4, lora_alpha=6, use_dora=True, init_lora_weights="pissa", **EVERYWHERE)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained_tensors(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_these_cases_cover_every_method_but_full_fine_tuning():
    assert {config.method for config in CASES.values()} == set(METHODS) - {"full"}


@pytest.mark.kind("5: empty batch")
@on([GPT2LMHeadModel, GPT2ForSequenceClassification])
@pytest.mark.parametrize("shape", [(0, 7), (2, 0)], ids=str)
def test_a_batch_without_a_token_is_refused_in_one_line(make_model, model_class, config, shape):
    model = inject(make_model(model_class), config)
    assert_refused(ConfigError, f"there is nothing to read: {shape[0]} texts of {shape[1]} tokens",
                   lambda: model(torch.zeros(shape, dtype=torch.long)))


@on([GPT2ForSequenceClassification], {name: CASES[name] for name in ("lora", "prompt", "prefix")})
def test_a_call_without_ids_or_embeds_is_refused_in_one_line(make_model, model_class, config):
    model = inject(make_model(model_class), config)
    assert_refused(ConfigError, "there is nothing to read: neither input_ids nor inputs_embeds", model)


@on([GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_on_the_meta_device_a_forward_pass_gives_the_shape(tiny_config, model_class, config):
    with torch.device("meta"):
        model = inject(model_class(tiny_config), config)
        logits = model(torch.zeros(2, 5, dtype=torch.long))
    assert logits.is_meta and logits.shape == ((2, 5, 97) if model_class is GPT2LMHeadModel else (2, 2))


# --- generation -------------------------------------------------------------------------------------------------------

@pytest.mark.kind("5: train-mode generate with checkpointing")
@on([GPT2LMHeadModel], {name: CASES[name] for name in ("lora", "houlsby", "prompt", "prefix")})
def test_generating_while_blocks_are_recomputed_is_refused_in_one_line(make_model, model_class, config):
    model = perturb(inject(make_model(model_class), config)).train()
    expected = generate(model.eval(), IDS, max_new_tokens=3)
    model.train().transformer.gradient_checkpointing = True
    assert_refused(ConfigError, "gradient checkpointing computes each block twice and fills no cache: call model.eval",
                   lambda: generate(model, IDS, max_new_tokens=3))
    assert torch.equal(generate(model.eval(), IDS, max_new_tokens=3), expected)


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

@on(EVERY_CLASS, STARTS_AT_THE_BASE)
def test_at_step_0_the_model_is_the_base_model_bit_for_bit_in_training_too(make_model, model_class, config):
    model = make_model(model_class)
    expected = [model.train(training)(IDS, MASK) for training in (False, True)]
    assert inject(model, config) is model
    for training in (False, True):
        assert torch.equal(model.train(training)(IDS, MASK), expected[training])


@on(HEADED, PISSA)
def test_at_step_0_a_pissa_start_is_the_base_model_within_rounding(make_model, model_class, config):
    model = make_model(model_class)
    expected = model(IDS, MASK)
    inject(model, config)
    torch.testing.assert_close(model(IDS, MASK), expected, atol=1e-5, rtol=0)


@on([GPT2LMHeadModel], {name: CASES[name] for name in ("prompt", "ptuning, MLP", "prefix", "prefix from zero")})
def test_virtual_tokens_do_not_start_at_the_base_model(make_model, model_class, config):
    model = make_model(model_class)
    expected = model(IDS, MASK)
    assert (inject(model, config)(IDS, MASK) - expected).abs().max() > 1e-3


@on([GPT2LMHeadModel, GPT2ForSequenceClassification], CASES | {"lora, dropout": LoraConfig(r=2, lora_dropout=0.5)})
def test_injection_keeps_each_modules_mode(make_model, model_class, config):
    """from_pretrained gives a model in eval mode: after inject no dropout of the method's may be active."""
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

@on(HEADED, CASES | {
    "lora, its biases": LoraConfig(r=4, bias="lora_only"), "lora, every bias": LoraConfig(r=4, bias="all"),
    "lora everywhere, dropout": LoraConfig(r=4, lora_dropout=0.1, **EVERYWHERE), "pissa": PISSA["pissa"],
    "lora in one block": LoraConfig(r=4, layers_to_transform=1)})
def test_steps_of_adamw_move_every_declared_tensor_and_no_other_bit(make_model, model_class, config):
    model = inject(make_model(model_class), config).train()
    declared, before = trained_names(model), copies(model)
    assert {name for name in declared if not name.startswith("transformer.")} == set(HEAD_TENSORS[model_class])
    for steps, weight_decay in ((4, 0.0), (1, 0.1)):
        train(model, steps, weight_decay)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) == (name not in declared or tensor.numel() == 0), name
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None) == (name in declared), name


@on([GPT2ForSequenceClassification], CASES | {"lora everywhere": LoraConfig(r=4, **EVERYWHERE)})
def test_each_method_learns_to_tell_two_texts_apart(make_model, model_class, config):
    model = inject(make_model(model_class), config).train()
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=2e-2, weight_decay=0.0)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(IDS, MASK), torch.tensor([0, 1])).backward()
        optimizer.step()
    assert F.cross_entropy(model.eval()(IDS, MASK), torch.tensor([0, 1])) < 0.05


@on([GPT2ForSequenceClassification], {name: config for name, config in CASES.items() if "dora" not in name} | {
    "lora everywhere": LoraConfig(r=1, **EVERYWHERE)})
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


class Products(TorchDispatchMode):
    """Notes the number formats of all products of matrices within its block."""

    carried_out_here = True  # nothing takes another way because of it

    def __init__(self):
        super().__init__()
        self.formats = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name()
        if any(word in name for word in ("mm", "linear", "attention", "matmul")):
            self.formats |= {(name, tensor.dtype) for tensor in args if isinstance(tensor, torch.Tensor)
                             and tensor.is_floating_point()}
        return operation(*args, **(kwargs or {}))


@on([GPT2ForSequenceClassification, GPT2LMHeadModel])
def test_where_a_cpu_cannot_multiply_bfloat16_autocast_multiplies_float32(make_model, model_class, config, monkeypatch):
    """torch's own products of bfloat16 take many times as long there."""
    monkeypatch.setattr(linear, "onednn_multiplies", lambda dtype: dtype == torch.float32)
    model = perturb(inject(make_model(model_class), config)).train()
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS, MASK)
        logits.float().square().mean().backward()
    assert products.formats and {dtype for _, dtype in products.formats} == {torch.float32}, products.formats


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
    perturb(model)
    logits = model(IDS, MASK)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all() and logits.shape == exact.shape
    for layer in active_injections(model)[0].layers.values():
        if isinstance(layer, ReplacementLayer):
            x = torch.randn(3, layer.base_layer.in_features).bfloat16()
            assert layer(x).dtype == layer.merged()["weight"].dtype == torch.bfloat16


# --- hooks and transforms ---------------------------------------------------------------------------------------------

@pytest.mark.kind("5: hooks on base layers")
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


@pytest.mark.kind("5: hooks on base layers")
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


@pytest.mark.kind("5: double backward")
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


@pytest.mark.kind("5: torch.func.vmap over adapters' tensors")
@on([GPT2ForSequenceClassification], {name: config for name, config in CASES.items() if "LSTM" not in name})
def test_many_adapters_are_computed_at_once_by_vmap(make_model, model_class, config):
    """An ensemble: one base, the trained tensors of three adapters stacked, also under padding and for gradients.

    PyTorch has no such rule for its LSTM.
    """
    model = perturb(inject(make_model(model_class), config))
    stacked = {name: torch.stack([p.detach() + shift for shift in (0.0, 0.1, -0.1)])
               for name, p in trained_tensors(model).items()}
    left = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])
    for mask in (None, MASK, left):
        def output(tensors, mask=mask):
            return torch.func.functional_call(model, tensors, (IDS, mask))

        def loss(tensors, output=output):
            return output(tensors).square().sum()

        logits, gradients = torch.func.vmap(output)(stacked), torch.func.vmap(torch.func.grad(loss))(stacked)
        for number in range(3):
            alone = {name: tensor[number].clone().requires_grad_() for name, tensor in stacked.items()}
            torch.testing.assert_close(logits[number], output(alone), atol=1e-5, rtol=1e-5)
            expected = torch.autograd.grad(loss(alone), list(alone.values()))
            for name, gradient in zip(alone, expected):
                torch.testing.assert_close(gradients[name][number], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are constants of a recorded program
@pytest.mark.kind("5: jit.trace and export with a left-padded mask")
@on([GPT2ForSequenceClassification], {name: CASES[name] for name in ("lora", "houlsby", "prompt", "prefix")})
@pytest.mark.parametrize("record", [lambda model: torch.jit.trace(model, (IDS, MASK), check_trace=False),
                                    lambda model: torch.export.export(model, (IDS, MASK)).module()],
                         ids=["jit.trace", "export"])
def test_a_recorded_model_is_right_for_other_masks_than_the_recorded_one(make_model, model_class, config, record):
    model = perturb(inject(make_model(model_class), config)).requires_grad_(False)
    recorded = record(model)
    for mask in (MASK, torch.ones_like(MASK), torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])):
        torch.testing.assert_close(recorded(IDS, mask), model(IDS, mask), atol=1e-5, rtol=1e-5)


# --- half precision ---------------------------------------------------------------------------------------------------

@pytest.mark.kind("5: a half-precision base with a trained head")
@on(HEADED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_half_precision_base_all_that_is_trained_is_float32(make_model, model_class, config, dtype):
    base = make_model(model_class).to(dtype)
    finer = copy.deepcopy(base).float()
    expected_base = base.requires_grad_(False)(IDS, MASK)
    torch.manual_seed(1)
    model = perturb(inject(base, config))
    torch.manual_seed(1)
    expected = perturb(inject(finer, config))(IDS, MASK)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} <= {dtype, torch.float32}
    logits = model(IDS, MASK)
    assert logits.dtype == (dtype if model_class is GPT2LMHeadModel else torch.float32)
    torch.testing.assert_close(logits.float(), expected, atol=0.05 * expected.abs().max().item(), rtol=0)
    with disable_adapter(model):
        assert model(IDS, MASK).dtype == dtype
        assert torch.equal(model(IDS, MASK), expected_base)
    assert torch.equal(model(IDS, MASK), logits)
    model(IDS, MASK).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert {p.dtype for p in remove(model).parameters()} == {dtype}
    assert torch.equal(model(IDS, MASK), expected_base)


@pytest.mark.kind("5: a half-precision base with a trained head")
def test_small_steps_on_a_half_precision_base_add_up(make_model):
    model = inject(make_model(GPT2ForSequenceClassification).bfloat16(), LoraConfig(r=2, bias="all"))
    head, bias = model.score.weight, model.transformer.h[0].mlp.c_fc.bias
    before = head.detach().clone(), bias.detach().clone()
    with torch.no_grad():
        for _ in range(8):
            head += 1e-5
            bias += 1e-5
    torch.testing.assert_close(head - before[0], torch.full_like(head, 8e-5), atol=1e-6, rtol=0)
    torch.testing.assert_close(bias - before[1], torch.full_like(bias, 8e-5), atol=1e-6, rtol=0)


@pytest.mark.kind("5: a half-precision base with a trained head")
def test_a_head_trained_beside_half_precision_follows_the_model_while_it_is_inactive(make_model):
    model = perturb(inject(make_model(GPT2ForSequenceClassification).bfloat16(), LoraConfig(r=2, bias="all")))
    with disable_adapter(model):
        model.double()
    assert {p.dtype for p in model.parameters() if "lora" not in p_name(model, p)} == {torch.double}
    model.bfloat16()
    logits = model(IDS, MASK)
    with disable_adapter(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(IDS, MASK), logits)


@pytest.mark.kind("5: a half-precision base with a trained head")
@pytest.mark.parametrize("config", [LoraConfig(r=2), BitFitConfig(), PrefixTuningConfig(num_virtual_tokens=2)],
                         ids=lambda config: config.method)
def test_a_model_that_is_cast_to_half_with_all_that_it_carries_computes_in_half(make_model, config):
    model = inject(make_model(GPT2ForSequenceClassification).bfloat16(), config).bfloat16()
    assert model(IDS, MASK).dtype == torch.bfloat16


@pytest.mark.kind("5: a half-precision base with a trained head")
@pytest.mark.parametrize("config", [LoraConfig(r=2, bias="all"), BitFitConfig()], ids=lambda config: config.method)
def test_float32_biases_beside_half_precision_work_under_autocast_too(make_model, config):
    model = perturb(inject(make_model(GPT2ForSequenceClassification).bfloat16(), config))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS, MASK)
    torch.testing.assert_close(logits.float(), model(IDS, MASK).float(), atol=0.1, rtol=0.05)


def p_name(model, parameter):
    return next(name for name, found in model.named_parameters() if found is parameter)


@pytest.mark.kind("5: a half-precision base with a trained head")
def test_full_fine_tuning_of_a_half_precision_model_trains_float32(make_model):
    model = inject(make_model(GPT2LMHeadModel).bfloat16(), FullConfig())
    assert {p.dtype for p in model.parameters()} == {torch.float32} == {model(IDS).dtype}
    assert model.lm_head.weight is model.transformer.wte.weight


# --- adapter folders --------------------------------------------------------------------------------------------------

ROUND_TRIPS_OF_LORA = {
    "lora everywhere": LoraConfig(r=2, **EVERYWHERE),
    "lora, expression": LoraConfig(r=2, target_modules=r"(.*\.)?h\.[01]\.mlp\.c_(fc|proj)"),
    "lora in one block": LoraConfig(r=2, target_modules=["c_attn", "transformer.h.0.mlp.c_fc"], layers_to_transform=1,
                                    layers_pattern="h"),
    "lora everywhere but": LoraConfig(r=2, exclude_modules=["c_fc", "transformer.h.0.attn.c_proj"], **EVERYWHERE),
    "lora, patterns": LoraConfig(r=2, target_modules=["c_attn", "c_fc"], rank_pattern={"c_fc": 5},
                                 alpha_pattern={r"h\.1\.attn\.c_attn": 30}),
    "lora, its biases": LoraConfig(r=2, bias="lora_only"),
    "lora, every bias": LoraConfig(r=2, bias="all"),
    "lora, rsLoRA": LoraConfig(r=4, use_rslora=True, lora_alpha=2.5),
    "lora, gaussian": LoraConfig(r=2, init_lora_weights="gaussian", lora_dropout=0.3),
    "lora, random": LoraConfig(r=2, init_lora_weights=False),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa"),
    "dora, two targets": LoraConfig(r=2, use_dora=True, target_modules=["c_attn", "mlp.c_proj"]),
}


@on(EVERY_CLASS, CASES | ROUND_TRIPS_OF_LORA)
def test_a_saved_adapter_loads_into_a_fresh_base_and_is_removed_again(make_model, tmp_path, model_class, config):
    model, base = perturb(inject(make_model(model_class), config)), make_model(model_class)
    expected = model(IDS, MASK)
    assert not torch.allclose(expected, base(IDS, MASK), atol=1e-3)
    save_adapter(model, tmp_path / "first")
    base.get_parameter("wpe.weight" if model_class is GPT2Model else "transformer.wpe.weight").requires_grad_(False)
    before = snapshot(renew_head(base))
    loaded = load_adapter(base, tmp_path / "first")
    assert loaded is base
    assert torch.equal(loaded(IDS, MASK), expected)
    assert not any(module.training for module in loaded.modules())
    if not isinstance(config, VIRTUAL):  # of these only the table is stored, not what makes it
        assert trained_names(loaded) == trained_names(model)
    save_adapter(loaded, tmp_path / "second")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert_unchanged(remove(loaded), before)


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


@on([GPT2LMHeadModel])
def test_training_goes_on_from_a_loaded_adapter(make_model, tmp_path, model_class, config):
    save_adapter(perturb(inject(make_model(model_class), config)), tmp_path)
    model = load_adapter(make_model(model_class), tmp_path).train()
    declared, before = trained_names(model), copies(model)
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
    changed_by_hand(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    changed_by_hand(folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, sorted(tensors)[0])
    save_file(tensors, path)


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
    assert_load_refused(make_model(model_class), tmp_path, AdapterError, message)


@on([GPT2ForSequenceClassification])
def test_an_adapter_of_another_base_is_refused(make_model, tmp_path, model_class, config):
    save_adapter(inject(make_model(model_class), config), tmp_path)
    assert_load_refused(make_model(model_class, seed=1), tmp_path, AdapterError,
                        r"trained on another base model.*fingerprint \w{16}")


@on([GPT2ForSequenceClassification, GPT2LMHeadModel])
@pytest.mark.parametrize("sizes", [{"n_embd": 36}, {"n_embd": 12}], ids=["wider", "narrower"])
def test_an_adapter_of_another_width_is_refused_also_where_no_fingerprint_tells(
        make_model, tiny_config, tmp_path, model_class, config, sizes):
    save_adapter(inject(make_model(model_class), config), tmp_path)
    (tmp_path / "minipeft.json").unlink()
    model = make_model(model_class, dataclasses.replace(tiny_config, **sizes))
    assert_load_refused(model, tmp_path, MinipeftError, "this model needs|made for another token_dim; this model's is")


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
    assert_load_refused(model, tmp_path, MinipeftError,
                        "missing |unexpected |another num_layers|match nothing|blocks 0 to")


@on([GPT2ForSequenceClassification])
def test_an_adapter_for_another_head_is_refused(make_model, tmp_path, model_class, config):
    save_adapter(inject(make_model(model_class), config), tmp_path)
    for other in (GPT2LMHeadModel, GPT2ForTokenClassification):
        assert_load_refused(make_model(other), tmp_path, AdapterError, "was trained for SEQ_CLS, this model is for")


@on([GPT2ForSequenceClassification], {name: CASES[name] for name in (
    "head", "bitfit", "lora", "dora", "vera", "ia3", "houlsby", "prompt", "ptuning, MLP", "prefix")})
def test_a_folder_that_claims_to_be_of_another_method_is_refused(make_model, tmp_path, model_class, config):
    kinds = {method.config_class.peft_type for method in METHODS.values() if method.config_class.saves_adapter}
    for kind in kinds - {config.peft_type}:
        save_adapter(inject(make_model(model_class), config), tmp_path)
        edit_config(tmp_path, peft_type=kind)
        assert_load_refused(make_model(model_class), tmp_path, MinipeftError,
                            "does not fit|does not implement|num_virtual")


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
    assert_load_refused(make_model(GPT2ForSequenceClassification), tmp_path, MinipeftError, message)


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
    (partial(IA3Config, exclude_modules=["c_attn", "c_proj"]), InjectionError, "leave nothing of what target_modules"),
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
    assert_refused(error, message, lambda: inject(model, config()))
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_vocabulary_that_cannot_be_read_is_refused_before_anything_is_touched(make_model, tmp_path):
    (tmp_path / "vocab.tiktoken").write_text("no rank file")
    model = make_model(GPT2LMHeadModel)
    before = snapshot(model)
    config = PromptTuningConfig(**SMALL, prompt_tuning_init="TEXT", prompt_tuning_init_text="a good film",
                                tokenizer_name_or_path=str(tmp_path))
    assert_refused(WeightsError, "is not a tiktoken rank file", lambda: inject(model, config))
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_field_that_a_method_does_not_have_is_refused_by_name(method):
    assert_refused(ConfigError, f"{METHODS[method].config_class.__name__} has no field rank_of_all_things; it has ",
                   lambda: METHODS[method].config(rank_of_all_things=3))
