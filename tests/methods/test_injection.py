"""Module surgery: which layers are chosen, what is refused and left alone, what is trained and counted."""

import copy
import dataclasses

import pytest
import torch
import torch.nn as nn
from models import HEADED, IDS, adapter_modules, assert_unchanged, build, snapshot

from minipeft import (
    FullConfig,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LoraConfig,
    inject,
    merge,
    remove,
    trainable_parameters,
    unmerge,
)
from minipeft.errors import ConfigError, InjectionError
from minipeft.methods.injection import active_injections, base_parameters, fingerprint
from minipeft.methods.targets import find_targets
from minipeft.model.linear import Linear

ALL_FOUR = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def names(*layers_and_modules):
    return [f"transformer.h.{layer}.{module}" for layer, module in layers_and_modules]


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
    pytest.param({"target_modules": ["c_attn"], "layers_to_transform": 1, "layers_pattern": "(h|layers)"},
                 names((1, "attn.c_attn")), id="layers_pattern may have a group of its own"),
    pytest.param({"target_modules": ["c_proj"], "layers_to_transform": [1], "exclude_modules": ["mlp.c_proj"]},
                 names((1, "attn.c_proj")), id="blocks and exclusions together"),
])
def test_these_fields_choose_these_layers(tiny_config, fields, expected):
    model = build(GPT2LMHeadModel, tiny_config)
    inject(model, LoraConfig(r=2, **fields))
    assert adapter_modules(model) == expected
    assert list(active_injections(model)[0].layers) == expected


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
    assert type(getattr(model, model.head)) is Linear


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
    pytest.param({"target_modules": ["c_attn"], "layers_to_transform": [0, 99]}, ConfigError,
                 r"layers_to_transform=\[0, 99\]: this model has the blocks 0 to 1",
                 id="a block that does not exist"),
    pytest.param({"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": "layers"}, InjectionError,
                 "match nothing", id="another architecture's block list"),
    pytest.param({"target_modules": ["c_attn"], "exclude_modules": ["attn.c_attn"]}, InjectionError,
                 r"exclude_modules \['attn.c_attn'\] leave nothing of what target_modules 'c_attn' match",
                 id="everything excluded"),
    pytest.param({"target_modules": ["score"]}, InjectionError, "match nothing", id="the head"),
    pytest.param({"target_modules": ["c_attn", "ln_1"]}, InjectionError,
                 r"h\.0\.ln_1 is of class LayerNorm.*attn\.c_attn", id="a LayerNorm"),
    pytest.param({"target_modules": ["c_attn", "wte"]}, InjectionError, r"transformer\.wte is of class Embedding",
                 id="an embedding"),
    pytest.param({"target_modules": ".*"}, InjectionError, "transformer is of class GPT2Model", id="a container"),
    pytest.param({"target_modules": ".*(c_attn"}, ConfigError, r"'\.\*\(c_attn' is not a regular expression",
                 id="a bad expression"),
    pytest.param({"target_modules": "c{99999999999}"}, ConfigError, r"'c\{9+\}' is not a regular expression",
                 id="more repetitions than there can be"),
    pytest.param({"target_modules": "(" * 5000 + ")" * 5000}, ConfigError, r"^target '\({100}' is not a regular expr",
                 id="groups within groups without end"),
    pytest.param({"exclude_modules": "[c"}, ConfigError, r"'\[c' is not a regular expression",
                 id="a bad exclude expression"),
    pytest.param({"target_modules": ".*c_attn", "layers_to_transform": 0}, ConfigError,
                 "layers_to_transform needs target_modules as a list", id="blocks with an expression"),
    pytest.param({"target_modules": ["c_attn"], "layers_pattern": "h"}, ConfigError,
                 "layers_pattern needs layers_to_transform", id="a pattern without blocks"),
    pytest.param({"target_modules": ".*c_attn", "layers_pattern": "h"}, ConfigError, "layers_pattern",
                 id="a pattern with an expression"),
    pytest.param({"layers_to_transform": 0, "layers_pattern": "("}, ConfigError,
                 "layers_pattern .* is not a regular expression", id="a bad layers_pattern"),
    pytest.param({"layers_to_transform": 0, "layers_pattern": ["hello", "o"]}, InjectionError, "match nothing",
                 id="a list of patterns of which none is there"),
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
    config = LoraConfig(r=2)
    for name, value in fields.items():
        setattr(config, name, value)  # after it was made, when a bad value would have been refused already
    before, config_before = snapshot(model), copy.deepcopy(config)
    with pytest.raises(error, match=message) as caught:
        inject(model, config)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)
    assert config == config_before


def test_a_bad_value_is_refused_when_the_configuration_is_made():
    for fields in ({"target_modules": 5}, {"exclude_modules": 5}, {"layers_to_transform": "0"}, {"r": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(fields))} must be"):
            LoraConfig(**fields)


def test_all_linear_keeps_to_the_chosen_blocks(tiny_config):
    model = inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(target_modules="all-linear", layers_to_transform=1))
    assert adapter_modules(model) == names(*[(1, module) for module in ALL_FOUR])


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
    assert set(active_injections(model)[0].base_values) == {"0.bias"}  # the second layer has none


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


# --- freeze and count -------------------------------------------------------------------------------------------------

def test_only_declared_parameters_require_gradients(tiny_config):
    model = inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig(r=2, layers_to_transform=0))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "transformer.h.0.attn.c_attn.lora_A.weight", "transformer.h.0.attn.c_attn.lora_B.weight", "score.weight"]
    (injection,) = active_injections(model)
    assert injection.trained_base == ["score.weight"]
    assert {name: layer.trained for name, layer in injection.layers.items()} == {
        "transformer.h.0.attn.c_attn": ("lora_A.weight", "lora_B.weight")}


def test_the_bases_tensors_are_recorded_by_the_names_they_have_in_the_bare_model(tiny_config):
    """Whatever stands around them by now: other methods, and other adapters, then find them."""
    model = build(GPT2ForSequenceClassification, tiny_config)
    bare = set(dict(model.named_parameters()))
    inject(model, LoraConfig(r=2, target_modules="all-linear", bias="lora_only"))
    (injection,) = active_injections(model)
    biases = {f"transformer.h.{layer}.{module}.bias" for layer in (0, 1) for module in ALL_FOUR}
    assert set(injection.trained_base) == set(injection.base_values) == biases | {"score.weight"}
    assert bare < set(base_parameters(model))


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


# --- recognize --------------------------------------------------------------------------------------------------------

def test_a_base_is_known_by_its_values_with_any_head_and_whatever_is_injected(tiny_config):
    model = build(GPT2ForSequenceClassification, tiny_config)
    found, bare = fingerprint(model), build(GPT2Model, tiny_config)
    bare.load_state_dict(model.transformer.state_dict())
    assert fingerprint(bare) == fingerprint(inject(model, LoraConfig())) == found
    with torch.no_grad():
        bare.h[0].ln_1.bias[0] += 1
    assert fingerprint(bare) != found


def test_a_base_is_the_same_one_whatever_the_sign_of_its_zeros(tiny_config):
    model = build(GPT2Model, tiny_config)
    with torch.no_grad():
        model.ln_f.bias.zero_()
        found = fingerprint(model)
        model.ln_f.bias.neg_()
    assert fingerprint(model) == found


def test_an_exclusion_that_excludes_nothing_is_told(make_model, caplog):
    inject(make_model(GPT2LMHeadModel), LoraConfig(r=2, exclude_modules=["c_atn"]))
    assert caplog.messages == ["exclude_modules ['c_atn'] match nothing"]
