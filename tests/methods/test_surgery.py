"""Module surgery: which layers are chosen, what is left alone, and that everything can be undone."""

import copy
import dataclasses
import io

import pytest
import torch
import torch.nn as nn

from minipeft import (
    FullConfig,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LoraConfig,
    disable_adapter,
    inject,
    merge,
    remove,
    trainable_parameters,
    unmerge,
)
from minipeft.errors import ConfigError, InjectionError
from minipeft.methods.surgery import AdapterLayer, find_targets, freeze, injections

HEADED = [GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification]
ALL_FOUR = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 60], [70, 2, 2, 33, 8, 95, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])


def build(model_class, config, seed=0):
    """A base model whose biases and LayerNorms are not at their neutral starting values."""
    torch.manual_seed(seed)
    model = model_class(config)
    return perturb(model, 0.05).eval()


@torch.no_grad()
def perturb(model, size=0.1, seed=7):
    """Move every trained tensor away from where it stands, so that no test passes only because B = 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def names(*layers_and_modules):
    return [f"transformer.h.{layer}.{module}" for layer, module in layers_and_modules]


def snapshot(model):
    """All that a refused operation must leave alone: values, module objects, gradients flags, modes."""
    return {"values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "modules": dict(model.named_modules()),
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "training": {name: module.training for name, module in model.named_modules()},
            "injections": len(injections(model))}


def assert_same_tensors(actual, expected):
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def assert_unchanged(model, before):
    after = snapshot(model)
    assert_same_tensors(after.pop("values"), before["values"])
    assert list(after["modules"]) == list(before["modules"])
    for name, module in after.pop("modules").items():
        assert module is before["modules"][name], name
    assert after == {key: value for key, value in before.items() if key not in ("values", "modules")}


def adapter_modules(model):
    return [name for name, module in model.named_modules() if isinstance(module, AdapterLayer)]


# --- choose -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("fields", "expected"), [
    pytest.param({}, names((0, "attn.c_attn"), (1, "attn.c_attn")), id="the default is c_attn"),
    pytest.param({"target_modules": ["c_proj"]},
                 names((0, "attn.c_proj"), (0, "mlp.c_proj"), (1, "attn.c_proj"), (1, "mlp.c_proj")),
                 id="a list entry matches every name that ends with it after a dot"),
    pytest.param({"target_modules": ["attn.c_proj"]}, names((0, "attn.c_proj"), (1, "attn.c_proj")),
                 id="a longer ending matches fewer"),
    pytest.param({"target_modules": ["transformer.h.1.mlp.c_fc"]}, names((1, "mlp.c_fc")), id="a full name"),
    pytest.param({"target_modules": ["c_fc", "q_proj"]}, names((0, "mlp.c_fc"), (1, "mlp.c_fc")),
                 id="entries that match nothing are ignored beside others that do"),
    pytest.param({"target_modules": r".*\.h\.0\..*\.c_(attn|fc)"}, names((0, "attn.c_attn"), (0, "mlp.c_fc")),
                 id="a string is a regular expression for the full name"),
    pytest.param({"target_modules": "all-linear"}, names(*[(layer, m) for layer in (0, 1) for m in ALL_FOUR]),
                 id="all-linear"),
    pytest.param({"target_modules": "All-Linear"}, names(*[(layer, m) for layer in (0, 1) for m in ALL_FOUR]),
                 id="all-linear in any case"),
    pytest.param({"target_modules": "all-linear", "exclude_modules": ["c_proj", "transformer.h.1.mlp.c_fc"]},
                 names((0, "attn.c_attn"), (0, "mlp.c_fc"), (1, "attn.c_attn")),
                 id="an exclude list names endings and full names"),
    pytest.param({"target_modules": ["c_attn", "c_proj"], "exclude_modules": r".*\.mlp\..*"},
                 names((0, "attn.c_attn"), (0, "attn.c_proj"), (1, "attn.c_attn"), (1, "attn.c_proj")),
                 id="an exclude string is a regular expression for the full name"),
    pytest.param({"target_modules": ["c_attn"], "exclude_modules": "c_attn"},
                 names((0, "attn.c_attn"), (1, "attn.c_attn")), id="an exclude expression must match the whole name"),
    pytest.param({"target_modules": ["c_attn"], "layers_to_transform": 1}, names((1, "attn.c_attn")), id="one block"),
    pytest.param({"target_modules": ["c_attn"], "layers_to_transform": 0}, names((0, "attn.c_attn")),
                 id="block 0 is a block, not nothing"),
    pytest.param({"target_modules": ["c_fc"], "layers_to_transform": [1, 0]}, names((0, "mlp.c_fc"), (1, "mlp.c_fc")),
                 id="a list of blocks"),
    pytest.param({"target_modules": ["c_attn"], "layers_to_transform": []},
                 names((0, "attn.c_attn"), (1, "attn.c_attn")), id="an empty list of blocks is no filter"),
    pytest.param({"layers_to_transform": 1}, names((1, "attn.c_attn")), id="blocks filter the default too"),
    pytest.param({"target_modules": ["transformer.h.0.attn.c_attn", "c_fc"], "layers_to_transform": 1},
                 names((0, "attn.c_attn"), (1, "mlp.c_fc")), id="a full name bypasses the block filter"),
    pytest.param({"target_modules": ["c_attn"], "layers_to_transform": 1, "layers_pattern": "h"},
                 names((1, "attn.c_attn")), id="layers_pattern names what stands before the block number"),
    pytest.param({"target_modules": ["c_proj"], "layers_to_transform": [1], "exclude_modules": ["mlp.c_proj"]},
                 names((1, "attn.c_proj")), id="blocks and exclusions together"),
])
def test_these_fields_choose_these_layers(tiny_config, fields, expected):
    model = build(GPT2LMHeadModel, tiny_config)
    inject(model, LoraConfig(r=2, **fields))
    assert adapter_modules(model) == expected
    assert list(injections(model)[0].layers) == expected


def test_block_1_is_not_block_10_or_11(tiny_config):
    model = GPT2Model(dataclasses.replace(tiny_config, n_layer=12))
    config = LoraConfig(target_modules=["c_attn"], layers_to_transform=1)
    assert find_targets(model, config, default=[]) == ["h.1.attn.c_attn"]


def test_a_base_model_without_head_is_matched_the_same_way(tiny_config):
    model = inject(build(GPT2Model, tiny_config), LoraConfig(r=2, layers_to_transform=[1]))
    assert adapter_modules(model) == ["h.1.attn.c_attn"]


@pytest.mark.parametrize("model_class", HEADED)
def test_all_linear_leaves_out_the_head(tiny_config, model_class):
    model = inject(build(model_class, tiny_config), LoraConfig(r=2, target_modules="all-linear"))
    assert adapter_modules(model) == names(*[(layer, m) for layer in (0, 1) for m in ALL_FOUR])
    assert type(getattr(model, model.head)) is nn.Linear


# --- refuse -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("fields", "error", "message"), [
    pytest.param({"target_modules": ["c_atn"]}, InjectionError, r"'c_atn'.*nearest names: c_attn", id="misspelt"),
    pytest.param({"target_modules": ["q_proj", "v_proj"]}, InjectionError, r"q_proj, v_proj.*nearest names: .*c_proj",
                 id="another architecture's names"),
    pytest.param({"target_modules": ["proj"]}, InjectionError, "nearest names: .*c_proj",
                 id="an ending inside a word is no match"),
    pytest.param({"target_modules": "c_attn"}, InjectionError, "nearest names: c_attn",
                 id="an expression must match the whole name"),
    pytest.param({"target_modules": ["Q"]}, InjectionError, "nearest names: .*c_attn.*c_fc.*c_proj",
                 id="where nothing is near, all names are listed"),
    pytest.param({"target_modules": []}, InjectionError, "match nothing", id="an empty list"),
    pytest.param({"target_modules": ["c_attn"], "layers_to_transform": 2}, InjectionError, r"in layers \[2\]",
                 id="a block that does not exist"),
    pytest.param({"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "layers"}, InjectionError,
                 "match nothing", id="another architecture's block list"),
    pytest.param({"target_modules": ["c_attn"], "exclude_modules": ["attn.c_attn"]}, InjectionError, "match nothing",
                 id="everything excluded"),
    pytest.param({"target_modules": ["score"]}, InjectionError, "match nothing", id="the head"),
    pytest.param({"target_modules": ["c_attn", "ln_1"]}, InjectionError, r"h\.0\.ln_1 is a LayerNorm.*attn\.c_attn",
                 id="a LayerNorm"),
    pytest.param({"target_modules": ["c_attn", "wte"]}, InjectionError, r"transformer\.wte is a Embedding",
                 id="an embedding"),
    pytest.param({"target_modules": ".*"}, InjectionError, "transformer is a GPT2Model", id="a container"),
    pytest.param({"target_modules": ".*(c_attn"}, ConfigError, r"'\.\*\(c_attn' is not a regular expression",
                 id="a bad expression"),
    pytest.param({"exclude_modules": "[c"}, ConfigError, r"'\[c' is not a regular expression",
                 id="a bad exclude expression"),
    pytest.param({"target_modules": ".*c_attn", "layers_to_transform": 0}, ConfigError,
                 "layers_to_transform needs target_modules as a list", id="blocks with an expression"),
    pytest.param({"target_modules": "all-linear", "layers_to_transform": [0]}, ConfigError,
                 "layers_to_transform needs target_modules as a list", id="blocks with all-linear"),
    pytest.param({"target_modules": ["c_attn"], "layers_pattern": "h"}, ConfigError,
                 "layers_pattern needs layers_to_transform", id="a pattern without blocks"),
    pytest.param({"target_modules": ".*c_attn", "layers_pattern": "h"}, ConfigError, "layers_pattern",
                 id="a pattern with an expression"),
    pytest.param({"layers_to_transform": 0, "layers_pattern": "("}, ConfigError,
                 "layers_pattern .* is not a regular expression", id="a bad layers_pattern"),
    pytest.param({"layers_to_transform": 0, "layers_pattern": ["hello"]}, ConfigError, "layers_pattern must be str",
                 id="a list of patterns, which would else be read as a set of characters"),
    pytest.param({"target_modules": 5}, ConfigError, "target_modules must be .*, got 5",
                 id="targets of another type"),
    pytest.param({"target_modules": [None]}, ConfigError, "target_modules must be", id="targets that are no names"),
    pytest.param({"exclude_modules": 5}, ConfigError, "exclude_modules must be", id="exclusions of another type"),
    pytest.param({"layers_to_transform": 1.5}, ConfigError, "layers_to_transform must be", id="half a block"),
    pytest.param({"layers_to_transform": "0"}, ConfigError, "layers_to_transform must be", id="a block as text"),
    pytest.param({"layers_to_transform": True}, ConfigError, "layers_to_transform must be .*, got True",
                 id="a boolean block number"),
])
def test_a_refused_injection_says_why_and_leaves_model_and_config_as_they_were(tiny_config, fields, error, message):
    model = build(GPT2ForSequenceClassification, tiny_config)
    model.transformer.wpe.weight.requires_grad_(False)  # a choice of the user's that must survive
    model.transformer.h[1].train()
    config = LoraConfig(r=2, **fields)
    before, config_before = snapshot(model), copy.deepcopy(config)
    with pytest.raises(error, match=message) as caught:
        inject(model, config)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)
    assert config == config_before


def test_a_second_injection_is_refused(tiny_config):
    model = perturb(inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(r=2)))
    before = snapshot(model)
    for config in (LoraConfig(r=2), LoraConfig(r=2, target_modules=["c_fc"]), FullConfig()):
        with pytest.raises(InjectionError, match="already carries lora"):
            inject(model, config)
    assert_unchanged(model, before)


def test_a_merged_model_still_carries_its_method(tiny_config):
    model = merge(inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(r=2)))
    with pytest.raises(InjectionError, match="already carries lora"):
        inject(model, LoraConfig(r=2))


@pytest.mark.parametrize("config", [None, {"r": 8}, LoraConfig, dataclasses.make_dataclass("VeraConfig", [])()])
def test_what_is_not_a_method_configuration_is_refused_with_those_that_are(tiny_config, config):
    model = build(GPT2LMHeadModel, tiny_config)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"not a method's configuration.*LoraConfig"):
        inject(model, config)
    assert_unchanged(model, before)


@pytest.mark.parametrize("targets", [["weight"], [""], ".*", "all-linear"])
def test_a_model_that_is_itself_one_linear_layer_is_refused(targets):
    """The root has no parent to swap it in."""
    model = nn.Linear(4, 4)
    before = snapshot(model)
    with pytest.raises(InjectionError):
        inject(model, LoraConfig(r=2, target_modules=targets))
    assert_unchanged(model, before)


def test_a_plain_container_of_linear_layers_can_be_adapted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    x = torch.randn(5, 4)
    expected = model(x)
    inject(model, LoraConfig(r=2, target_modules="all-linear", bias="lora_only"))
    assert adapter_modules(model) == ["0", "2"]
    assert torch.equal(model(x), expected)
    assert set(injections(model)[0].base_values) == {"0.base_layer.bias"}  # the second layer has none


@pytest.mark.parametrize("fields", [{}, {"target_modules": "all-linear"}, {"target_modules": ["c_fc"], "bias": "all"},
                                    {"rank_pattern": {"c_proj": 3}, "target_modules": ["c_proj", "c_attn"]}])
def test_an_accepted_configuration_is_not_edited_either(tiny_config, fields):
    config = LoraConfig(r=2, **fields)
    before = copy.deepcopy(config)
    model = inject(build(GPT2ForTokenClassification, tiny_config), config)
    model.train()(IDS).sum().backward()
    merge(model)
    unmerge(model)
    remove(model)
    assert config == before


def test_one_configuration_object_serves_several_models(tiny_config):
    config = LoraConfig(r=2, target_modules="all-linear")
    lm, tagger = (inject(build(c, tiny_config), config) for c in (GPT2LMHeadModel, GPT2ForTokenClassification))
    assert adapter_modules(lm) == adapter_modules(tagger)


@pytest.mark.parametrize("training", [True, False])
def test_injection_keeps_the_models_mode(tiny_config, training):
    """from_pretrained gives a model in eval mode: after inject, its adapter dropout must not be active."""
    model = build(GPT2LMHeadModel, tiny_config).train(training)
    inject(model, LoraConfig(r=2, lora_dropout=0.5))
    assert {module.training for module in model.modules()} == {training}


# --- freeze and count -------------------------------------------------------------------------------------------------

def test_only_declared_parameters_require_gradients(tiny_config):
    model = inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig(r=2, layers_to_transform=0))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "transformer.h.0.attn.c_attn.lora_A.weight", "transformer.h.0.attn.c_attn.lora_B.weight", "score.weight"]
    assert injections(model)[0].trained_names() == [
        "transformer.h.0.attn.c_attn.lora_A.weight", "transformer.h.0.attn.c_attn.lora_B.weight", "score.weight"]


def test_freeze_restores_what_somebody_unfroze(tiny_config):
    model = inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig(r=2))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    freeze(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_frozen_parameters_get_no_gradient_and_declared_ones_do(tiny_config):
    model = perturb(inject(build(GPT2ForTokenClassification, tiny_config), LoraConfig(r=2, bias="lora_only")))
    model(IDS).square().mean().backward()
    declared = set(injections(model)[0].trained_names())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in declared), name


def test_full_fine_tuning_trains_everything_and_replaces_nothing(tiny_config):
    model = build(GPT2ForSequenceClassification, tiny_config)
    modules = dict(model.named_modules())
    inject(model, FullConfig())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module is modules[name] for name, module in model.named_modules())
    assert trainable_parameters(model).trainable == trainable_parameters(model).total


def test_counts_and_the_printed_line(tiny_config):
    # wte 97*24 + wpe 40*24 + 2 blocks of (12 d^2 + 13 d) + ln_f 2*24; the tied lm_head counts once.
    base = 97 * 24 + 40 * 24 + 2 * (12 * 24 ** 2 + 13 * 24) + 2 * 24
    assert base == 17_784
    model = build(GPT2LMHeadModel, tiny_config)
    assert trainable_parameters(model) == (base, base)
    inject(model, LoraConfig(r=2))
    assert trainable_parameters(model) == (4 * 2 * 2 * 24, base + 4 * 2 * 2 * 24)
    assert str(trainable_parameters(model)) == "trainable params: 384 || all params: 18,168 || trainable%: 2.1136"


# --- remove -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model_class", [*HEADED, GPT2Model])
@pytest.mark.parametrize("config", [LoraConfig(r=2), LoraConfig(r=2, target_modules="all-linear", bias="lora_only"),
                                    LoraConfig(r=2, bias="all")], ids=["c_attn", "all-linear", "bias all"])
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
    assert adapter_modules(model) == names((0, "mlp.c_fc"), (1, "mlp.c_fc"))
    assert torch.equal(model(IDS, MASK), expected)


# --- disable ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model_class", HEADED)
@pytest.mark.parametrize("config", [LoraConfig(r=2), LoraConfig(r=2, target_modules="all-linear", bias="lora_only"),
                                    LoraConfig(r=2, bias="all"), LoraConfig(r=2, init_lora_weights=False)],
                         ids=["c_attn", "lora_only", "bias all", "random init"])
def test_disable_adapter_is_exactly_the_base_model_inside_and_the_trained_one_outside(
        tiny_config, model_class, config):
    model = build(model_class, tiny_config)
    base = model(IDS, MASK)
    perturb(inject(model, config))
    trained, before = model(IDS, MASK), snapshot(model)
    assert not torch.allclose(trained, base, atol=1e-3)
    with disable_adapter(model) as same:
        assert same is model
        assert torch.equal(model(IDS, MASK), base)
    assert torch.equal(model(IDS, MASK), trained)
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
    "c_attn": LoraConfig(r=2, lora_alpha=4),
    "all-linear": LoraConfig(r=3, lora_alpha=2, target_modules="all-linear"),
    "lora_only": LoraConfig(r=2, lora_alpha=4, bias="lora_only"),
    "bias all": LoraConfig(r=2, lora_alpha=4, bias="all", target_modules=["c_proj"]),
    "rslora": LoraConfig(r=4, lora_alpha=4, use_rslora=True, target_modules=["c_fc", "c_attn"]),
    "patterns": LoraConfig(r=2, rank_pattern={"c_fc": 5}, alpha_pattern={"c_attn": 20}, target_modules="all-linear"),
    "dropout": LoraConfig(r=2, lora_dropout=0.5),
}


@pytest.mark.parametrize("model_class", HEADED)
@pytest.mark.parametrize("config", MERGEABLE.values(), ids=MERGEABLE)
def test_a_merged_model_computes_the_same_with_plain_layers(tiny_config, model_class, config):
    model = build(model_class, tiny_config)
    base, keys = model(IDS, MASK), list(model.state_dict())
    perturb(inject(model, config)).eval()
    expected = model(IDS, MASK)
    assert (expected - base).abs().max() > 1e-2
    assert merge(model) is model
    torch.testing.assert_close(model(IDS, MASK), expected, atol=1e-5, rtol=0)
    assert adapter_modules(model) == []
    assert list(model.state_dict()) == keys
    assert {type(m) for name, m in model.named_modules() if "c_" in name} == {nn.Linear}


@pytest.mark.parametrize("config", MERGEABLE.values(), ids=MERGEABLE)
def test_unmerge_restores_everything_bit_for_bit(tiny_config, config):
    model = perturb(inject(build(GPT2ForSequenceClassification, tiny_config), config)).eval()
    before, expected = snapshot(model), model(IDS, MASK)
    for _ in range(3):  # by keeping the weights, not by subtraction: nothing drifts
        assert unmerge(merge(model)) is model
    assert_unchanged(model, before)
    assert torch.equal(model(IDS, MASK), expected)


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


@pytest.mark.parametrize("config", [None, FullConfig()], ids=["no method", "full fine-tuning"])
def test_there_must_be_something_to_merge(tiny_config, config):
    model = build(GPT2LMHeadModel, tiny_config)
    if config is not None:
        inject(model, config)
    with pytest.raises(InjectionError, match="nothing to merge"):
        merge(model)


def test_a_layer_that_is_no_change_of_weights_cannot_be_merged():
    with pytest.raises(InjectionError, match="AdapterLayer cannot be merged"):
        AdapterLayer(nn.Linear(2, 2)).merged_weight()


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


@pytest.mark.parametrize("copier", [copy.deepcopy, pickled])
@pytest.mark.parametrize("model_class", HEADED)
def test_a_copy_of_an_injected_model_is_complete_and_independent(tiny_config, model_class, copier):
    base = build(model_class, tiny_config)
    expected_base, keys = base(IDS, MASK), list(base.state_dict())
    model = perturb(inject(base, LoraConfig(r=2, bias="lora_only")))
    expected, before = model(IDS, MASK), snapshot(model)
    twin = copier(model)
    assert torch.equal(twin(IDS, MASK), expected)
    assert trainable_parameters(twin) == trainable_parameters(model)
    with disable_adapter(twin):
        assert torch.equal(twin(IDS, MASK), expected_base)
    merge(twin)
    torch.testing.assert_close(twin(IDS, MASK), expected, atol=1e-5, rtol=0)
    remove(twin)
    assert list(twin.state_dict()) == keys
    assert torch.equal(twin(IDS, MASK), expected_base)
    assert_unchanged(model, before)
    assert torch.equal(model(IDS, MASK), expected)
