"""LoRA against peft: stored reference cases, adapters written by one and read by the other, one training step."""

import copy
import dataclasses
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minipeft import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LoraConfig,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    save_adapter,
    trainable_parameters,
)
from minipeft.methods.saving import TENSORS_FILE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, on its own attributes

PAD = 0
TASKS = {"CAUSAL_LM": GPT2LMHeadModel, "SEQ_CLS": GPT2ForSequenceClassification,
         "TOKEN_CLS": GPT2ForTokenClassification}
# As the fixture tiny_config, which hypothesis cannot take; PAD is the id transformers' classifier looks for.
TINY = GPT2Config(vocab_size=97, n_positions=40, n_embd=24, n_layer=2, n_head=3, resid_pdrop=0.0, embd_pdrop=0.0,
                  attn_pdrop=0.0, classifier_dropout=0.0, bos_token_id=96, eos_token_id=96, num_labels=3)
MASK = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 1 + [0] * 8])
IDS = torch.randint(1, 96, (3, 9), generator=torch.Generator().manual_seed(5)) * MASK  # real ids are never PAD


# --- stored reference cases: no transformers needed -------------------------------------------------------------------

@pytest.mark.parametrize(("case", "model_class"), [
    ("lora_lm", GPT2LMHeadModel), ("lora_cls", GPT2ForSequenceClassification),
    ("rslora_cls", GPT2ForSequenceClassification), ("dora_cls", GPT2ForSequenceClassification)])
def test_a_stored_peft_adapter_gives_the_stored_logits(peft_fixtures, case, model_class):
    facts = json.loads((peft_fixtures / case / "case.json").read_text())
    reference = load_file(peft_fixtures / case / "reference.safetensors")
    head = {"num_labels": facts["num_labels"]} if model_class is GPT2ForSequenceClassification else {}
    model = model_class.from_pretrained(peft_fixtures / "base", **head)
    load_adapter(model, peft_fixtures / case)
    mask = reference["attention_mask"]
    with torch.no_grad():
        logits, full_logits = model(reference["input_ids"], mask), model(reference["full_ids"])
    if facts["head"] == "lm":  # what stands at pads does not matter
        logits, reference["logits"] = logits[mask.bool()], reference["logits"][mask.bool()]
    torch.testing.assert_close(logits, reference["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(full_logits, reference["full_logits"], atol=1e-4, rtol=0)
    assert trainable_parameters(model).trainable == facts["trainable_parameters"]
    with disable_adapter(model), torch.no_grad():
        assert (model(reference["full_ids"]) - reference["full_logits"]).abs().max() > 1e-2  # the adapter matters


# --- both models, from the same weights -------------------------------------------------------------------------------

class Pairs(dict):
    """A dictionary that hypothesis can print in one line."""

    def __repr__(self):
        return f"Pairs({list(self)})"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """task -> (our base model, transformers' with the same weights); to be copied before use."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    auto = {"CAUSAL_LM": transformers.GPT2LMHeadModel, "SEQ_CLS": transformers.GPT2ForSequenceClassification,
            "TOKEN_CLS": transformers.GPT2ForTokenClassification}
    pairs = Pairs()
    for task, model_class in TASKS.items():
        torch.manual_seed(0)
        ours = model_class(TINY)
        move(ours, 0.1)  # biases and LayerNorms away from 0 and 1
        folder = tmp_path_factory.mktemp(task)
        ours.save_pretrained(folder)
        theirs = auto[task].from_pretrained(folder)
        theirs.config.pad_token_id = PAD
        pairs[task] = (ours.eval(), theirs.eval())
    return pairs


@torch.no_grad()
def move(model, size, seed=3):
    """Move every trained tensor away from where it stands, so that neither A, B, head nor bias is at its start."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def theirs_with(base, task, fields):
    """peft's model for the same fields."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    fields = copy.deepcopy(fields)  # peft keeps and edits what it is given
    if task == "TOKEN_CLS" and fields.get("target_modules") == "all-linear":
        fields["modules_to_save"] = ["classifier"]  # or peft would adapt the classifier and then fail to wrap it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(base), PeftConfig(task_type=task, **fields))


@torch.no_grad()
def real_logits(model, task):
    logits = model(input_ids=IDS, attention_mask=MASK)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    return logits if task == "SEQ_CLS" else logits[MASK.bool()]


def assert_same_logits(actual, expected, base):
    assert (expected - base).abs().max() > 1e-2  # the adapter matters
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


# --- a space of configurations ----------------------------------------------------------------------------------------

ENDINGS = ["c_attn", "c_proj", "c_fc", "attn.c_proj", "mlp.c_proj", "transformer.h.1.mlp.c_fc"]
EXPRESSIONS = [r".*\.c_attn", r".*\.h\.[01]\.attn\.c_(attn|proj)", r"transformer\.h\.1\..*\.c_fc|.*c_attn",
               "all-linear"]
PATTERNS = ["c_attn", "h.0.attn.c_proj", "h.1.attn.c_proj", "mlp.c_proj", "c_fc"]  # no module matches two


@st.composite
def lora_fields(draw):
    fields = {"r": draw(st.integers(1, 6)), "lora_alpha": draw(st.sampled_from([1, 2.5, 8, 16])),
              "bias": draw(st.sampled_from(["none", "lora_only", "all"])), "use_rslora": draw(st.booleans()),
              "use_dora": draw(st.booleans())}
    fields["target_modules"] = draw(
        st.none() | st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=3, unique=True)
        | st.sampled_from(EXPRESSIONS))
    if isinstance(fields["target_modules"], list) and draw(st.booleans()):
        fields["layers_to_transform"] = draw(st.sampled_from([0, 1, [0], [0, 1]]))
        fields["layers_pattern"] = draw(st.sampled_from([None, "h"]))
        if fields["layers_to_transform"] in (0, [0]):  # keep something: this entry names block 1
            fields["target_modules"] = sorted({*fields["target_modules"], "c_attn"})
    if draw(st.booleans()):
        fields["rank_pattern"] = draw(st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 9), max_size=3))
        fields["alpha_pattern"] = draw(st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from([1, 4, 20.5]),
                                                       max_size=3))
    if draw(st.booleans()) and fields["target_modules"] == "all-linear":
        fields["exclude_modules"] = draw(st.sampled_from([["c_proj"], r".*\.h\.0\..*", ["transformer.h.0.mlp.c_fc"]]))
    return fields


few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
tasks = pytest.mark.parametrize("task", TASKS)
# The corners, whatever the draws: each bias mode, blocks, patterns with rsLoRA, everything.
EVERY_BIAS = {"r": 2, "bias": "all"}
BLOCK_1 = {"r": 3, "target_modules": ["c_proj", "transformer.h.0.attn.c_attn"], "layers_to_transform": 1,
           "layers_pattern": "h"}
PATTERNED = {"r": 4, "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"c_fc": 9, "c_attn": 1},
             "alpha_pattern": {"h.1.attn.c_proj": 20.5, "c_attn": 1}, "bias": "lora_only"}
# Keys that match the same module: peft sorts them on saving, so that another one counts when it loads its own file.
OVERLAPPING = {"r": 8, "target_modules": ["c_proj"], "rank_pattern": {"c_proj": 2, "attn.c_proj": 4},
               "alpha_pattern": {"c_proj": 3, "attn.c_proj": 40}}


@tasks
@given(fields=lora_fields())
@example(fields=EVERY_BIAS)  # for token classification peft then writes the classifier's bias two more times
@example(fields=BLOCK_1)
@example(fields=PATTERNED)
@few
def test_an_adapter_written_by_peft_loads_here(bases, tmp_path_factory, task, fields):
    """Equal logits, the same number of trained parameters, and equal logits again once merged."""
    folder = tmp_path_factory.mktemp("adapter")
    ours, theirs = bases[task]
    reference = theirs_with(theirs, task, fields)
    move(reference, 0.1)
    reference.eval().save_pretrained(folder)
    base = real_logits(ours, task)
    model = load_adapter(copy.deepcopy(ours), folder)
    expected = real_logits(reference, task)
    assert_same_logits(real_logits(model, task), expected, base)
    assert trainable_parameters(model).trainable == reference.get_nb_trainable_parameters()[0]
    torch.testing.assert_close(real_logits(merge(model), task), expected, atol=1e-4, rtol=0)


@tasks
@given(fields=lora_fields())
@example(fields=EVERY_BIAS)
@example(fields=BLOCK_1)
@example(fields=PATTERNED)
@example(fields=OVERLAPPING)
@few
def test_an_adapter_written_here_loads_in_peft(bases, tmp_path_factory, task, fields):
    from peft import PeftModel

    ours, theirs = bases[task]
    folder = tmp_path_factory.mktemp("adapter")
    model = inject(copy.deepcopy(ours), LoraConfig(**fields))
    move(model, 0.1)
    save_adapter(model.eval(), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")  # peft only warns of these
        reference = PeftModel.from_pretrained(copy.deepcopy(theirs), folder).eval()
    assert_same_logits(real_logits(reference, task), real_logits(model, task), real_logits(ours, task))


# --- training ---------------------------------------------------------------------------------------------------------

LABELS = {"CAUSAL_LM": IDS, "SEQ_CLS": torch.tensor([2, 0, 1]), "TOKEN_CLS": IDS % 3}


def loss(model, task):
    """The same loss, written once, on either model's logits."""
    logits = model(input_ids=IDS, attention_mask=MASK)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    labels = LABELS[task] if task == "SEQ_CLS" else LABELS[task].masked_fill(MASK == 0, -100)
    if task == "CAUSAL_LM":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


@tasks
@pytest.mark.parametrize("fields", [{"r": 4}, BLOCK_1, PATTERNED, {"r": 2, "bias": "lora_only", "lora_alpha": 20}],
                         ids=["default", "block 1", "patterned", "lora_only"])
def test_one_sgd_step_moves_the_same_tensors_to_the_same_values(bases, tmp_path, task, fields):
    ours, theirs = bases[task]
    reference = theirs_with(theirs, task, fields)
    move(reference, 0.1)
    reference.save_pretrained(tmp_path / "start")
    model = load_adapter(copy.deepcopy(ours), tmp_path / "start")
    start = load_file(tmp_path / "start" / TENSORS_FILE)
    for trained in (model.train(), reference.train()):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.5)
        loss(trained, task).backward()
        optimizer.step()
    save_adapter(model, tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    actual, expected = (load_file(tmp_path / side / TENSORS_FILE) for side in ("ours", "theirs"))
    assert set(actual) == set(expected) == set(start)
    for name, tensor in expected.items():
        assert (tensor - start[name]).abs().max() > 1e-5, name
        torch.testing.assert_close(actual[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_both_start_from_the_same_distribution(init):
    """The same bounds and deviations, at a size where uniform, normal and zero can be told apart."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    wide = dataclasses.replace(TINY, n_embd=192, n_layer=1)
    torch.manual_seed(0)
    ours = inject(GPT2Model(wide), LoraConfig(r=16, init_lora_weights=init)).h[0].attn.c_attn
    base = transformers.GPT2Model(transformers.GPT2Config(**wide.to_dict()))
    theirs = peft.get_peft_model(base, peft.LoraConfig(
        r=16, init_lora_weights=init, fan_in_fan_out=True)).base_model.model.h[0].attn.c_attn
    for mine, other in ((ours.lora_A.weight, theirs.lora_A["default"].weight),
                        (ours.lora_B.weight, theirs.lora_B["default"].weight)):
        assert mine.shape == other.shape
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.05, abs=1e-9)
        if init != "gaussian":
            assert mine.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.01, abs=1e-9)
