"""The base model against transformers: same folder, same numbers, in both directions and at every official size."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from parity_helpers import generate_theirs
from safetensors.torch import load_file, save_file

from minipeft.model.config import OFFICIAL_SIZES, GPT2Config
from minipeft.model.gpt2 import (
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from minipeft.tasks.decoding import generate

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
EVERY_CLASS = [GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification]
LENGTHS = [12, 5, 1, 9]
PAD = 96                                                                         # occurs in no text of these tests


def theirs(cls):
    """The class of the same name in transformers."""
    return getattr(transformers, cls.__name__)


def load_theirs(cls, folder, **config):
    """transformers' model from a folder, having found there every tensor it wants and no other."""
    model, report = theirs(cls).from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **config)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], (kind, report[kind])
    return model.eval()


def output(model, ids, mask):
    """Hidden states or logits, from either library."""
    with torch.inference_mode():
        result = model(ids, attention_mask=mask)
    return result if isinstance(result, torch.Tensor) else result[0]


def assert_same_output(ours, reference, ids, mask):
    """Equal at every real position; one row per text where the head pools."""
    actual, expected = output(ours, ids, mask), output(reference, ids, mask)
    assert actual.shape == expected.shape and expected.std() > 0.1
    real = slice(None) if mask is None or actual.dim() == 2 else mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=TOLERANCE)


def batches(make_ids, make_mask):
    """Ids and masks: not padded, padded on the right, padded on the left."""
    ids = make_ids(len(LENGTHS), max(LENGTHS), vocab_size=PAD)
    yield ids, None
    for side in ("right", "left"):
        mask = make_mask(LENGTHS, side)
        yield ids.masked_fill(mask == 0, PAD), mask


# --- reference numbers, written by transformers once ------------------------------------------------------------------

@pytest.fixture
def reference(peft_fixtures):
    return load_file(peft_fixtures / "base" / "reference.safetensors")


def test_the_reference_logits_are_met(peft_fixtures, reference):
    model = GPT2LMHeadModel.from_pretrained(peft_fixtures / "base")
    for ids, mask, logits in (("input_ids", reference["attention_mask"], "logits"), ("full_ids", None, "full_logits")):
        real = slice(None) if mask is None else mask.bool()
        actual = output(model, reference[ids], mask)
        torch.testing.assert_close(actual[real], reference[logits][real], rtol=0, atol=TOLERANCE)


def test_the_reference_greedy_tokens_are_met(peft_fixtures, reference):
    model = GPT2LMHeadModel.from_pretrained(peft_fixtures / "base")
    expected, prompt = reference["greedy"], reference["full_ids"][:1]
    new = expected.shape[1] - prompt.shape[1]
    assert new > 10 and torch.equal(generate(model, prompt, max_new_tokens=new), expected)


# --- tiny models, both directions -------------------------------------------------------------------------------------

@pytest.mark.parametrize("num_labels", [2, 5])
@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_transformers_loads_what_we_save(tmp_path, tiny_config, make_model, make_ids, make_mask, cls, num_labels):
    tiny_config.num_labels, tiny_config.n_inner = num_labels, 60
    ours = make_model(cls)
    ours.save_pretrained(tmp_path)
    reference = load_theirs(cls, tmp_path, pad_token_id=PAD)
    for ids, mask in batches(make_ids, make_mask):
        assert_same_output(ours, reference, ids, mask)


@pytest.mark.parametrize("num_labels", [2, 5])
@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_we_load_what_transformers_saves(tmp_path, make_ids, make_mask, cls, num_labels):
    torch.manual_seed(0)
    reference = theirs(cls)(transformers.GPT2Config(
        vocab_size=97, n_positions=40, n_embd=24, n_layer=3, n_head=3, initializer_range=0.2, num_labels=num_labels,
        bos_token_id=1, eos_token_id=1, pad_token_id=PAD)).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("bias") or "ln_" in name:                            # zeros and ones would hide mistakes
                parameter.add_(0.2 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path)
    ours = cls.from_pretrained(tmp_path)
    for ids, mask in batches(make_ids, make_mask):
        assert_same_output(ours, reference, ids, mask)


def test_an_untied_language_model_crosses_both_ways(tmp_path, tiny_config, make_model, make_ids):
    tiny_config.tie_word_embeddings = False
    ours = make_model(GPT2LMHeadModel)
    ours.save_pretrained(tmp_path / "ours")
    reference = load_theirs(GPT2LMHeadModel, tmp_path / "ours")
    assert_same_output(ours, reference, make_ids(2, 9), None)
    reference.save_pretrained(tmp_path / "theirs")
    assert_same_output(GPT2LMHeadModel.from_pretrained(tmp_path / "theirs"), reference, make_ids(2, 9), None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_hold_the_same_for_both(tmp_path, make_model, make_ids, dtype):
    make_model(GPT2LMHeadModel).save_pretrained(tmp_path, dtype=dtype)
    reference = load_theirs(GPT2LMHeadModel, tmp_path)
    assert_same_output(GPT2LMHeadModel.from_pretrained(tmp_path), reference, make_ids(2, 9), None)


def test_initialisation_has_the_spread_of_transformers():
    sizes = {"vocab_size": 500, "n_positions": 200, "n_embd": 128, "n_layer": 8, "n_head": 4}
    torch.manual_seed(0)
    ours, reference = GPT2LMHeadModel(GPT2Config(**sizes)), transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(expected[name].std().item(), rel=0.03), name
        else:
            assert torch.equal(parameter, expected[name]), name


def test_dropout_is_applied_at_the_same_places(tmp_path, tiny_config, make_model, make_ids, monkeypatch):
    """In training mode the masks are drawn in the same order, so with torch's dropout one seed gives one result in both
    libraries."""
    monkeypatch.setattr("minipeft.model.dropout.carried_out_here", lambda *tensors: False)
    for name in ("resid_pdrop", "embd_pdrop", "classifier_dropout"):
        setattr(tiny_config, name, 0.3)
    ours = make_model(GPT2ForTokenClassification)
    ours.save_pretrained(tmp_path)
    reference, ids = load_theirs(GPT2ForTokenClassification, tmp_path), make_ids(2, 9)
    outputs = []
    for model in (ours.train(), reference.train()):
        torch.manual_seed(3)
        outputs.append(output(model, ids, None))
    torch.testing.assert_close(*outputs, rtol=0, atol=TOLERANCE)
    assert (outputs[0] - output(ours.eval(), ids, None)).abs().max() > 0.1


# --- generation -------------------------------------------------------------------------------------------------------

@pytest.fixture
def language_models(tmp_path, make_model):
    """Ours and theirs, with the same weights."""
    ours = make_model(GPT2LMHeadModel)
    ours.save_pretrained(tmp_path)
    return ours, load_theirs(GPT2LMHeadModel, tmp_path)


@pytest.mark.parametrize("padded", [False, True], ids=["all of one length", "padded on the left"])
def test_greedy_generation_is_token_identical(language_models, make_ids, make_mask, padded):
    ours, reference = language_models
    ids = make_ids(len(LENGTHS), max(LENGTHS), vocab_size=PAD)
    mask = make_mask(LENGTHS, side="left") if padded else torch.ones_like(ids)
    ids = ids.masked_fill(mask == 0, PAD)
    generated = generate(ours, ids, attention_mask=mask, max_new_tokens=28)
    assert torch.equal(generated, generate_theirs(reference, ids, mask, new=28))
    assert len(generated[:, 12:].unique()) > 5                                    # not a constant: the test can fail


def test_greedy_generation_ends_alike(language_models, make_ids, make_mask):
    ours, reference = language_models
    ids, mask = make_ids(len(LENGTHS), max(LENGTHS), vocab_size=PAD), make_mask(LENGTHS, side="left")
    free = generate(ours, ids, attention_mask=mask, max_new_tokens=28)
    for eos in free[:, 16].unique().tolist():                                     # what some row says fifth
        generated = generate(ours, ids, attention_mask=mask, max_new_tokens=28, eos_token_id=eos)
        assert not torch.equal(generated, free[:, :generated.shape[1]])
        assert torch.equal(generated, generate_theirs(reference, ids, mask, new=28, eos=eos))


@pytest.mark.parametrize("eos", [None, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("num_beams", [2, 4])
def test_beam_search_is_token_identical(language_models, make_ids, make_mask, num_beams, length_penalty, eos):
    ours, reference = language_models
    ids, mask = make_ids(len(LENGTHS), max(LENGTHS), vocab_size=PAD), make_mask(LENGTHS, side="left")
    with torch.no_grad():  # an end token likely enough that beams meet it, early and late
        ours.transformer.ln_f.bias += 0.5 * ours.lm_head.weight[5]
        reference.transformer.ln_f.bias += 0.5 * reference.lm_head.weight[5]
    for new in (1, 7, 20):
        generated = generate(ours, ids, mask, new, num_beams=num_beams, length_penalty=length_penalty, eos_token_id=eos)
        expected = generate_theirs(reference, ids, mask, new, eos, num_beams=num_beams, length_penalty=length_penalty)
        assert torch.equal(generated, expected)


# --- the official sizes -----------------------------------------------------------------------------------------------

def write_official(name, folder, dtype):
    """A folder laid out as OpenAI's upload is: no prefix, (in, out) matrices, mask buffers, no head; random numbers."""
    n_layer, n_head, C = OFFICIAL_SIZES[name]
    generator = torch.Generator().manual_seed(0)
    # One pool of random numbers, from which every tensor takes a piece at a place of its own.
    pool = (0.02 * torch.randn(50257 * C + 1_000_003, generator=generator)).to(dtype)

    def tensor(*shape, mean=0.0):
        size = torch.Size(shape).numel()
        start = int(torch.randint(len(pool) - size + 1, (1,), generator=generator))
        return (pool[start:start + size] + mean).view(shape)

    tensors = {"wte.weight": tensor(50257, C), "wpe.weight": tensor(1024, C)}
    for layer in range(n_layer):
        for module, shape in {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C),
                              "mlp.c_proj": (4 * C, C)}.items():
            tensors[f"h.{layer}.{module}.weight"] = tensor(*shape)
            tensors[f"h.{layer}.{module}.bias"] = tensor(shape[1])
        for norm in ("ln_1", "ln_2"):
            tensors[f"h.{layer}.{norm}.weight"] = tensor(C, mean=1.0)
            tensors[f"h.{layer}.{norm}.bias"] = tensor(C)
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 1024, 1024, dtype=dtype).tril()
    tensors["ln_f.weight"], tensors["ln_f.bias"] = tensor(C, mean=1.0), tensor(C)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": C, "n_head": n_head,
        "n_layer": n_layer, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}))


def available_memory():
    """Bytes that can be had without swapping; infinite where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return float("inf")
    return 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL_SIZES)
def test_an_official_size_gives_transformers_logits(tmp_path, make_ids, make_mask, name):
    n_layer, _, C = OFFICIAL_SIZES[name]
    size = 4 * (12 * n_layer * C * C + 52_000 * C)
    # transformers holds the file's pages beside its parameters; 1.5 GB for everything else.
    needed = 1.7 * size + 1.5e9
    if available_memory() < needed:
        pytest.skip(f"{name} needs {needed / 1e9:.0f} GB of free memory")
    ids, mask = make_ids(2, 12, vocab_size=50257), make_mask([12, 7])
    folder = tmp_path / name
    try:
        write_official(name, folder, torch.float16 if name in ("gpt2-large", "gpt2-xl") else torch.float32)
        model = GPT2LMHeadModel.from_pretrained(folder)
        assert model.config == GPT2Config.official(name)
        actual = output(model, ids, mask)
        greedy = generate(model, ids[:1], max_new_tokens=3)
        del model
        gc.collect()
        reference = load_theirs(GPT2LMHeadModel, folder)
        expected = output(reference, ids, mask)
        expected_greedy = generate_theirs(reference, ids[:1], mask[:1], new=3)
        del reference
        gc.collect()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    real = mask.bool()
    assert expected[real].std() > 0.1
    torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=TOLERANCE)
    assert torch.equal(greedy, expected_greedy)
