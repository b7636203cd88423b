"""The official files: both spellings in, one out; every damage an error of one line; never a half-written folder."""

from __future__ import annotations

import dataclasses
import errno
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session
from huggingface_hub import constants as hub_constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minipeft.errors import ConfigError, OutputError, WeightsError
from minipeft.files import write_json_file
from minipeft.model import hub, weights
from minipeft.model.config import GPT2Config
from minipeft.model.gpt2 import (
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from minipeft.model.tokenizer import get_tokenizer

EVERY_CLASS = [GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification]
FILES = ["config.json", "model.safetensors"]


@pytest.fixture
def saved(tmp_path, make_model):
    """A language model's folder, as save_pretrained writes it."""
    make_model(GPT2LMHeadModel).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, change):
    """Pass the folder's tensors through `change`, a function of the dict that edits it in place."""
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def refused(cls, folder, error=WeightsError, **config):
    """The message of the error that loading gives; it must be one line."""
    with pytest.raises(error) as caught:
        cls.from_pretrained(folder, **config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same_parameters(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


# --- saving and loading -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_a_saved_model_loads_bit_for_bit(tmp_path, tiny_config, make_model, make_ids, cls):
    tiny_config.num_labels = 3
    model = make_model(cls)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert_same_parameters(loaded, model)
    assert loaded.config == model.config
    assert torch.equal(loaded(make_ids(2, 9)), model(make_ids(2, 9)))


def test_a_vocabulary_of_its_own_goes_with_a_model(tmp_path):
    GPT2LMHeadModel.from_pretrained("mini").save_pretrained(tmp_path / "copy")
    GPT2LMHeadModel.from_pretrained(tmp_path / "copy").save_pretrained(tmp_path / "again")
    assert get_tokenizer(tmp_path / "again").encode("a good film") == get_tokenizer("mini").encode("a good film")


def test_a_vocabulary_is_that_of_the_folder_loaded_from_wherever_the_process_went_since(
        tmp_path, monkeypatch, saved, make_model):
    (saved / "vocab.tiktoken").write_text("its own")
    monkeypatch.chdir(tmp_path)
    model = GPT2LMHeadModel.from_pretrained("saved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "vocab.tiktoken").write_text("another one")
    monkeypatch.chdir("elsewhere")
    for name, loaded in (("copy", model), ("drawn", make_model(GPT2LMHeadModel))):
        loaded.save_pretrained(tmp_path / name)
    assert (tmp_path / "copy" / "vocab.tiktoken").read_text() == "its own"
    assert not (tmp_path / "drawn" / "vocab.tiktoken").exists()


def test_saving_draws_no_values_for_the_model_that_it_compares_with(tmp_path, monkeypatch, make_model):
    """On the meta device that would import torch's compiler."""
    model = make_model(GPT2LMHeadModel)
    monkeypatch.setattr(torch.nn.init, "_no_grad_normal_", lambda *arguments, **_: pytest.fail("drawn"))
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"num_label": 3}, "from_pretrained takes dtype and fields of GPT2Config, not num_label"),
    ({"torch_dtype": torch.bfloat16}, "not torch_dtype"), ({"dtype": "bfloat16"}, "dtype must be a torch.dtype")])
def test_an_argument_that_means_nothing_is_refused(saved, arguments, message):
    assert message in refused(GPT2LMHeadModel, saved, ConfigError, **arguments)


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_a_loaded_model_is_ready_to_use(saved, cls):
    model = cls.from_pretrained(saved)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu" and parameter.dtype == torch.float32, name
        assert parameter.requires_grad and parameter.is_leaf and parameter.is_contiguous(), name


def test_matrices_are_stored_in_out_and_become_out_in(saved, make_model):
    stored, model = tensors_of(saved), make_model(GPT2LMHeadModel)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        name = f"transformer.h.1.{name}.weight"
        assert torch.equal(stored[name], model.get_parameter(name).T), name
    assert stored["transformer.h.0.attn.c_attn.weight"].shape == (24, 72)
    assert stored["transformer.h.0.mlp.c_proj.weight"].shape == (96, 24)
    assert torch.equal(stored["transformer.wte.weight"], model.transformer.wte.weight)


def test_the_file_is_spelled_as_transformers_spells_it(tmp_path, make_model):
    names = {cls: set() for cls in EVERY_CLASS}
    for cls in EVERY_CLASS:
        make_model(cls).save_pretrained(tmp_path)
        names[cls] = set(tensors_of(tmp_path))
        assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    base = names[GPT2LMHeadModel]                                                 # lm_head is tied, so not stored
    assert len(base) == 2 * 12 + 4 and all(name.startswith("transformer.") for name in base)
    assert names[GPT2Model] == base
    assert names[GPT2ForSequenceClassification] == base | {"score.weight"}
    assert names[GPT2ForTokenClassification] == base | {"classifier.weight", "classifier.bias"}


def test_config_json_says_what_transformers_needs(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
    assert (config["n_embd"], config["n_layer"], config["n_head"], config["vocab_size"]) == (24, 2, 3, 97)


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_openais_spelling_loads_too(saved, make_model, make_ids, cls):
    """No prefix, and causal-mask buffers that are not parameters, in whatever type."""
    expected = make_model(GPT2LMHeadModel).transformer

    def to_openai(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in (0, 1):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(saved, to_openai)
    model = cls.from_pretrained(saved)
    base = model if cls is GPT2Model else model.transformer
    assert_same_parameters(base, expected)
    assert torch.equal(base(make_ids(2, 5)), expected(make_ids(2, 5)))


def test_the_buffers_are_skipped_under_the_prefix_too(saved, make_model):
    rewrite(saved, lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 40, 40),
                                                   "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}))
    assert_same_parameters(GPT2LMHeadModel.from_pretrained(saved), make_model(GPT2LMHeadModel))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_whatever_the_file_stores_loads_as_float32(tmp_path, make_model, stored):
    model = make_model(GPT2ForSequenceClassification)
    model.save_pretrained(tmp_path, dtype=stored)
    assert {tensor.dtype for tensor in tensors_of(tmp_path).values()} == {stored}
    loaded = GPT2ForSequenceClassification.from_pretrained(tmp_path)
    for name, parameter in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter.to(stored).float()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_the_dtype_argument_sets_every_parameter_also_a_new_heads(saved, cls, dtype):
    model = cls.from_pretrained(saved, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_saving_keeps_the_parameters_own_type(tmp_path, saved):
    GPT2Model.from_pretrained(saved, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "half").values()} == {torch.bfloat16}


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_saving_takes_tensors_that_a_caller_gathered(tmp_path, make_model, cls):
    model, gathered = make_model(cls), make_model(cls, seed=1)
    model.save_pretrained(tmp_path, state_dict=gathered.state_dict())
    assert_same_parameters(cls.from_pretrained(tmp_path), gathered)
    assert_same_parameters(model, make_model(cls))


@pytest.mark.parametrize(("change", "told"), [
    (lambda model: setattr(model.transformer, "wte", torch.nn.Embedding(99, 24)),
     r"not the one that its configuration describes: transformer\.wte\.weight is \(99, 24\), not \(97, 24\)"),
    (lambda model: model.add_module("gate", torch.nn.Linear(2, 2)), r"no part of a GPT2ForSequence.*: gate\.weight"),
    (lambda model: delattr(model, "score"), r"score\.weight is missing"),
    (lambda model: delattr(model.transformer.h, "1"), r"missing; transformer\.h\.1\..* is missing; and 6 more$"),
    (lambda model: [model.add_module(name, torch.nn.Linear(2, 2)) for name in "ab"],
     r": a\.weight; a\.bias; b\.weight; and 1 more\. Merge")])
def test_a_model_that_its_configuration_does_not_describe_is_not_saved(tmp_path, make_model, change, told):
    model = make_model(GPT2ForSequenceClassification)
    change(model)
    with pytest.raises(WeightsError, match=told):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_head_that_is_no_longer_the_embeddings_is_not_lost_in_saving(tmp_path, make_model):
    model = make_model(GPT2LMHeadModel)
    model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.detach().clone())
    model.save_pretrained(tmp_path / "equal")  # another tensor, of the same values
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1
    with pytest.raises(WeightsError, match=r"lm_head\.weight is another tensor than transformer\.wte\.weight, of"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_leaves_the_random_generator_as_it_was(tmp_path, make_model):
    model, before = make_model(GPT2LMHeadModel), torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_leaves_the_model_as_it_was(tmp_path, make_model):
    model = make_model(GPT2LMHeadModel)
    model.save_pretrained(tmp_path, dtype=torch.float16)
    assert_same_parameters(model, make_model(GPT2LMHeadModel))
    assert model.lm_head.weight is model.transformer.wte.weight


# --- heads ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cls, head", [(GPT2ForSequenceClassification, "score"),
                                       (GPT2ForTokenClassification, "classifier")])
def test_a_head_the_file_lacks_is_drawn_at_random(saved, make_model, cls, head):
    torch.manual_seed(0)
    model = cls.from_pretrained(saved, num_labels=50)
    weight = model.get_parameter(f"{head}.weight")
    assert weight.shape == (50, 24) and weight.std().item() == pytest.approx(0.02, rel=0.1)
    if head == "classifier":
        assert not model.classifier.bias.any()
    assert_same_parameters(model.transformer, make_model(GPT2LMHeadModel).transformer)
    torch.manual_seed(0)
    assert torch.equal(cls.from_pretrained(saved, num_labels=50).get_parameter(f"{head}.weight"), weight)


def test_num_labels_replaces_the_configs(saved, tiny_config):
    rewrite_config(saved, id2label={"0": "a", "1": "b", "2": "c"})
    assert GPT2ForSequenceClassification.from_pretrained(saved).score.weight.shape == (3, 24)
    model = GPT2ForSequenceClassification.from_pretrained(saved, num_labels=7)
    assert model.score.weight.shape == (7, 24) and model.config.num_labels == 7


def test_a_trained_head_is_never_swapped_for_a_random_one_of_another_size(tmp_path, tiny_config, make_model):
    tiny_config.num_labels = 3
    make_model(GPT2ForSequenceClassification).save_pretrained(tmp_path)
    message = refused(GPT2ForSequenceClassification, tmp_path, num_labels=5)
    assert "score.weight is (3, 24), expected (5, 24)" in message


def test_another_classs_head_is_left_in_the_file(tmp_path, make_model):
    source = make_model(GPT2ForTokenClassification)
    source.save_pretrained(tmp_path)
    for cls in (GPT2LMHeadModel, GPT2ForSequenceClassification):
        assert_same_parameters(cls.from_pretrained(tmp_path).transformer, source.transformer)
    assert_same_parameters(GPT2Model.from_pretrained(tmp_path), source.transformer)


def test_half_a_head_is_an_error(tmp_path, make_model):
    make_model(GPT2ForTokenClassification).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("classifier.bias"))
    assert "missing classifier.bias" in refused(GPT2ForTokenClassification, tmp_path)


def test_a_tensor_the_head_has_no_place_for_is_an_error(tmp_path, make_model):
    """Dropping a trained bias would change every prediction without a word."""
    make_model(GPT2ForSequenceClassification).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"score.bias": torch.ones(2)}))
    assert "score.bias" in refused(GPT2ForSequenceClassification, tmp_path)


def test_a_stored_copy_of_the_tied_embedding_is_accepted(saved):
    rewrite(saved, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].clone()}))
    model = GPT2LMHeadModel.from_pretrained(saved)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_differing_head_that_the_config_ties_is_refused(saved):
    rewrite(saved, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1}))
    message = refused(GPT2LMHeadModel, saved)
    assert "lm_head.weight that differs from wte.weight" in message and "tie_word_embeddings" in message


def test_an_untied_head_loads_when_the_config_says_so(tmp_path, tiny_config, make_model, make_ids):
    tiny_config.tie_word_embeddings = False
    model = make_model(GPT2LMHeadModel)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" in tensors_of(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert_same_parameters(loaded, model)
    assert not torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)
    assert torch.equal(loaded(make_ids(2, 5)), model(make_ids(2, 5)))


# --- damaged files ----------------------------------------------------------------------------------------------------

def test_missing_tensors_are_named(saved):
    rewrite(saved, lambda tensors: [tensors.pop(f"transformer.{name}") for name in ("wpe.weight", "h.1.ln_2.bias")])
    message = refused(GPT2LMHeadModel, saved)
    assert "missing transformer.wpe.weight (40, 24)" in message
    assert "missing transformer.h.1.ln_2.bias (24,)" in message


def test_tensors_left_over_are_named(saved):
    rewrite(saved, lambda tensors: tensors.update({"transformer.h.0.attn.rotary.weight": torch.ones(8)}))
    assert "unexpected transformer.h.0.attn.rotary.weight (8,)" in refused(GPT2LMHeadModel, saved)


def test_a_lookalike_of_the_mask_buffers_is_not_skipped(saved):
    rewrite(saved, lambda tensors: tensors.pop("transformer.h.0.attn.c_attn.bias"))
    assert "missing transformer.h.0.attn.c_attn.bias" in refused(GPT2LMHeadModel, saved)


def test_a_tensor_stored_under_both_spellings_is_an_error(saved):
    rewrite(saved, lambda tensors: tensors.update({"ln_f.weight": torch.zeros(24)}))
    assert "ln_f.weight" in refused(GPT2LMHeadModel, saved)


def test_misshapen_tensors_are_named_with_both_shapes(saved):
    def transpose(tensors):
        name = "transformer.h.0.attn.c_attn.weight"
        tensors[name] = tensors[name].t().contiguous()

    rewrite(saved, transpose)
    assert "transformer.h.0.attn.c_attn.weight is (72, 24), expected (24, 72)" in refused(GPT2LMHeadModel, saved)


@pytest.mark.parametrize("dtype, name", [(torch.int64, "I64"), (torch.int8, "I8"), (torch.bool, "BOOL")])
def test_tensors_that_are_not_floating_point_are_named(saved, dtype, name):
    rewrite(saved, lambda tensors: tensors.update({"transformer.wpe.weight": torch.ones(40, 24, dtype=dtype)}))
    assert f"transformer.wpe.weight is stored as {name}, expected floating point" in refused(GPT2LMHeadModel, saved)


@pytest.mark.parametrize("n_layer, problem", [(1, "unexpected transformer.h.1."), (9, "missing transformer.h.2.")])
def test_a_config_of_another_depth_is_an_error_that_stays_short(saved, n_layer, problem):
    rewrite_config(saved, n_layer=n_layer)
    message = refused(GPT2LMHeadModel, saved)
    assert problem in message and re.search(r"and \d+ more$", message) and len(message) < 1000


def test_a_file_that_is_no_gpt2_says_what_it_holds(saved):
    save_file({"encoder.conv.weight": torch.ones(3)}, saved / "model.safetensors")
    message = refused(GPT2LMHeadModel, saved)
    assert "is not a GPT-2" in message and "encoder.conv.weight" in message


@pytest.mark.parametrize("keep", [0, 4, 8, 200, 0.5, -1], ids=lambda keep: f"keep {keep}")
def test_a_truncated_file_is_an_error(saved, keep):
    content = (saved / "model.safetensors").read_bytes()
    kept = content[:int(len(content) * keep) if isinstance(keep, float) else keep]
    (saved / "model.safetensors").write_bytes(kept)
    assert "truncated or not a safetensors file" in refused(GPT2LMHeadModel, saved)


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"\xff" * 64, b"PK\x03\x04" + bytes(100),
                                     b"<!doctype html><title>404</title>"],
                         ids=["text", "ones", "pickle", "web page"])
def test_a_file_of_another_format_is_an_error(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    assert "truncated or not a safetensors file" in refused(GPT2LMHeadModel, saved)


@pytest.mark.parametrize("content", [b"", b"{", b'{"n_embd": 24,}', b"\xff\xfe", b"[1, 2]", b"null", b'"gpt2"'])
def test_a_config_that_is_no_json_object_is_an_error(saved, content):
    (saved / "config.json").write_bytes(content)
    assert str(saved / "config.json") in refused(GPT2LMHeadModel, saved)


def test_a_config_of_another_model_is_an_error(saved):
    rewrite_config(saved, model_type="llama")
    assert "'llama'" in refused(GPT2LMHeadModel, saved, error=ConfigError)


def test_an_unsupported_config_is_an_error(saved):
    rewrite_config(saved, scale_attn_by_inverse_layer_idx=True)
    assert "scale_attn_by_inverse_layer_idx" in refused(GPT2LMHeadModel, saved, error=ConfigError)


@pytest.mark.parametrize("absent", [["config.json"], ["model.safetensors"], FILES], ids=" and ".join)
def test_a_folder_without_its_files_says_which(saved, absent):
    for name in absent:
        (saved / name).unlink()
    assert f"holds no {' and no '.join(absent)}" in refused(GPT2LMHeadModel, saved)


# --- names ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["gpt5", "GPT2", "openai-community/gpt5", "./gpt2", "/no/such"])
def test_an_unknown_name_lists_the_known_ones(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    message = refused(GPT2LMHeadModel, name)
    assert repr(name) in message and "mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl" in message


def test_a_file_is_not_a_model_folder(saved):
    assert "neither a folder" in refused(GPT2LMHeadModel, saved / "model.safetensors")


def test_mini_is_the_bundled_folder(monkeypatch, saved, make_model):
    monkeypatch.setattr(hub, "MINI_FOLDER", saved)
    assert_same_parameters(GPT2LMHeadModel.from_pretrained("mini"), make_model(GPT2LMHeadModel))


def test_the_bundled_mini_model_loads():
    if not (hub.MINI_FOLDER / "model.safetensors").is_file():
        pytest.skip("checkpoints/mini is not built")
    model = GPT2LMHeadModel.from_pretrained("mini")
    assert model.config.vocab_size == 8192
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_name_is_looked_up_on_disk_first(monkeypatch, saved, make_model, name):
    (saved.parent / name).parent.mkdir(exist_ok=True)
    saved.rename(saved.parent / name)
    monkeypatch.chdir(saved.parent)
    assert_same_parameters(GPT2LMHeadModel.from_pretrained(name), make_model(GPT2LMHeadModel))


def test_the_hubs_name_of_an_official_model_means_what_its_short_name_means(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert {hub.official(name) for name in ("gpt2-xl", "openai-community/gpt2-xl")} == {"gpt2-xl"}
    assert hub.official("mini") is hub.official("gpt2-xxl") is hub.official(tmp_path) is None


# --- saving where one cannot ------------------------------------------------------------------------------------------

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_place_that_cannot_be_a_folder_is_an_output_error(tmp_path, make_model, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=f"cannot write to {tmp_path / 'file'}") as caught:
        make_model(GPT2LMHeadModel).save_pretrained(tmp_path / "file" / below)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {"file": b"mine"}


def half_written(error):
    """A save_file that fails midway."""

    def save(tensors, path, metadata=None):
        Path(path).write_bytes(b"half of a mod")
        raise error

    return save


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   SafetensorError("Error while serializing: I/O error: No space left on device")],
                         ids=["OSError", "SafetensorError"])
def test_a_full_disk_leaves_the_older_model_intact_and_nothing_else(monkeypatch, saved, make_model, error):
    before = contents(saved)
    monkeypatch.setattr(weights, "save_file", half_written(error))
    with pytest.raises(OutputError, match="the disk is full") as caught:
        make_model(GPT2LMHeadModel, seed=1).save_pretrained(saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)
    assert contents(saved) == before


def test_a_disk_that_fills_while_writing_leaves_nothing_half_written(saved, make_model):
    """The same without a stand-in: the system refuses to let any file of this process grow past 20 kB."""
    resource = pytest.importorskip("resource")
    before, limits = contents(saved), resource.getrlimit(resource.RLIMIT_FSIZE)
    model = make_model(GPT2LMHeadModel, seed=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=f"cannot write to {saved}"):
            model.save_pretrained(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(saved) == before


def test_an_interruption_leaves_the_older_model_intact_and_nothing_else(monkeypatch, saved, make_model):
    before = contents(saved)
    monkeypatch.setattr(weights, "save_file", half_written(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        make_model(GPT2LMHeadModel, seed=1).save_pretrained(saved)
    assert contents(saved) == before


def test_saving_over_an_older_model_replaces_it_and_keeps_other_files(saved, make_model):
    (saved / "notes.txt").write_text("mine")
    newer = make_model(GPT2LMHeadModel, seed=1)
    newer.save_pretrained(saved)
    assert_same_parameters(GPT2LMHeadModel.from_pretrained(saved), newer)
    assert sorted(contents(saved)) == [*FILES, "notes.txt"]


def test_a_json_file_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot write to"):
        write_json_file(tmp_path / "file" / "results.json", {})
    write_json_file(tmp_path / "new" / "results.json", {"b": 1, "a": [2]})
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == {"a": [2], "b": 1}
    assert list(contents(tmp_path / "new")) == ["results.json"]


# --- memory -----------------------------------------------------------------------------------------------------------

def run_python(code, *arguments, **environment):
    """Run code in a fresh interpreter; environment entries that are None are removed. Returns its standard output."""
    merged = {**os.environ, "no_proxy": "*", **environment}
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], text=True,
                            env={name: str(value) for name, value in merged.items() if value is not None},
                            capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc to see the peak memory")
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_loading_needs_little_more_memory_than_the_model(tmp_path, saved, stored):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=5000, n_positions=128, n_layer=6))
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert 150e6 < size < 250e6
    model.save_pretrained(tmp_path / "large", dtype=stored)
    # The tiny model first, for the modules that torch imports when it is asked for the meta device (76 MB of them).
    # VmHWM rather than getrusage's ru_maxrss, which begins with the size of the process that started this one.
    growth = int(run_python("""
        import sys
        from pathlib import Path
        from minipeft import GPT2LMHeadModel

        def kilobytes(field):
            return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

        GPT2LMHeadModel.from_pretrained(sys.argv[1])
        before = kilobytes("VmRSS")
        model = GPT2LMHeadModel.from_pretrained(sys.argv[2])
        print(1024 * (kilobytes("VmHWM") - before))
        """, saved, tmp_path / "large", MALLOC_MMAP_THRESHOLD_="262144"))  # what is freed is given back at once
    (tmp_path / "large" / "model.safetensors").unlink()
    assert 0.9 * size < growth < 1.3 * size


# --- downloading ------------------------------------------------------------------------------------------------------

class StandInHub(http.server.ThreadingHTTPServer):
    """The part of the Hugging Face hub that a download uses: /{repository}/resolve/main/{file}.

    `files` maps a file's name to its content. As on the hub, weights are redirected to a store of large files. The
    first `cut` GETs of the weights break off after three quarters.
    """

    def __init__(self, repository, files, cut=0):
        super().__init__(("127.0.0.1", 0), StandInHubRequest)
        self.repository, self.files, self.cut = repository, files, cut
        self.requests = []                                                        # (method, file, Range header)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return super().__enter__()

    def __exit__(self, *arguments):
        self.shutdown()
        super().__exit__(*arguments)


class StandInHubRequest(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        hub, place, name = self.server, *self.path.split("?")[0].rsplit("/", 1)
        start = self.headers.get("Range", "")
        hub.requests.append((self.command, name, start))
        if place not in (f"/{hub.repository}/resolve/main", "/large") or name not in hub.files:
            self.reply(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})
            return
        content, etag = hub.files[name], f'"{"0123456789abcdef" * 4}"' if name == "model.safetensors" else '"1234abcd"'
        described = {"ETag": etag, "X-Repo-Commit": "0123456789" * 4, "Accept-Ranges": "bytes"}
        if name == "model.safetensors" and place != "/large":
            self.reply(302, {**described, "Location": f"{hub.address}/large/{name}", "X-Linked-Etag": etag,
                             "X-Linked-Size": str(len(content)), "Content-Length": "0"})
            return
        first = int(re.fullmatch(r"bytes=(\d+)-", start)[1]) if start else 0
        if start:
            described["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.reply(206 if start else 200, {**described, "Content-Length": str(len(content) - first)})
        if self.command == "GET":
            broken = hub.cut > 0 and name == "model.safetensors"
            hub.cut -= broken
            self.wfile.write(content[first:3 * len(content) // 4] if broken else content[first:])
            self.close_connection = broken

    do_GET = do_HEAD = answer

    def reply(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments):
        pass


FROM_HUB = """
    import sys, time
    import huggingface_hub
    from minipeft import GPT2LMHeadModel, MinipeftError

    started = time.monotonic()
    try:
        GPT2LMHeadModel.from_pretrained("gpt2").save_pretrained(sys.argv[1])
        GPT2LMHeadModel.from_pretrained("gpt2")
    except MinipeftError as error:
        print(type(error).__name__, round(time.monotonic() - started, 2), error)
    """


def test_an_official_name_is_downloaded_once_through_a_broken_connection(tmp_path, tiny_config):
    config = dataclasses.replace(tiny_config, vocab_size=5000, n_embd=288, n_layer=4)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "served")
    with StandInHub("openai-community/gpt2", contents(tmp_path / "served"), cut=1) as server:
        # The client keeps what came in whole pieces of ten megabytes, so the file must be larger.
        assert len(server.files["model.safetensors"]) > 20e6
        output = run_python(FROM_HUB, tmp_path / "copy", HF_ENDPOINT=server.address, HF_HOME=tmp_path / "home",
                            HF_HUB_OFFLINE=None)
    assert output == ""
    assert contents(tmp_path / "copy") == contents(tmp_path / "served")
    fetched = [(name, start) for method, name, start in server.requests if method == "GET" and name in FILES]
    assert [name for name, _ in fetched] == ["config.json", "model.safetensors", "model.safetensors"]
    assert re.fullmatch(r"bytes=[1-9]\d+-", fetched[2][1])                        # it went on where it broke off
    assert not list((tmp_path / "home").rglob("*.incomplete"))


def test_a_file_the_hub_lacks_is_an_error_that_says_what_to_do(tmp_path, saved):
    config_only = {"config.json": contents(saved)["config.json"]}
    with StandInHub("openai-community/gpt2", config_only) as server:
        output = run_python(FROM_HUB, tmp_path / "copy", HF_ENDPOINT=server.address, HF_HOME=tmp_path / "home",
                            HF_HUB_OFFLINE=None)
    kind, _, message = output.split(maxsplit=2)
    assert kind == "WeightsError" and "openai-community/gpt2 failed" in message
    assert all(name in message for name in FILES) and len(output.splitlines()) == 1
    assert not (tmp_path / "copy").exists()


def test_without_a_network_the_error_comes_soon_and_names_the_files(tmp_path):
    output = run_python(FROM_HUB, tmp_path / "copy", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=tmp_path / "home",
                        HF_HUB_OFFLINE=None)
    kind, seconds, message = output.split(maxsplit=2)
    assert kind == "WeightsError" and float(seconds) < 5
    assert "cannot be reached" in message and "openai-community/gpt2" in message
    assert all(name in message for name in FILES) and len(output.splitlines()) == 1


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "openai-community/gpt2-xl"])
def test_offline_mode_is_obeyed(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    attempts = []
    monkeypatch.setattr(socket, "create_connection", lambda *address, **_: attempts.append(address))
    message = refused(GPT2LMHeadModel, name)
    assert not attempts
    assert f"openai-community/{name.split('/')[-1]} into a folder" in message and all(file in message for file in FILES)


@pytest.fixture
def online(monkeypatch):
    """online(endpoint): the session may look for the hub, at this address."""

    def endpoint(url):
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "ENDPOINT", url)

    return endpoint


def test_the_hub_is_reachable_when_its_endpoint_answers(monkeypatch, online):
    with StandInHub("openai-community/gpt2", {}) as server:
        online(server.address)
        assert hub.hub_is_reachable()
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
        assert not hub.hub_is_reachable()
        online(server.address)
        assert hub.hub_is_reachable()
    close_session()                                               # it keeps a connection open
    assert not hub.hub_is_reachable()


def test_a_hub_that_takes_the_connection_but_never_answers_is_not_reachable(online):
    with socket.create_server(("127.0.0.1", 0)) as server:
        online(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not hub.hub_is_reachable(timeout=0.2)


@pytest.mark.parametrize("endpoint", ["no address", "http://[broken", "ftp://127.0.0.1:9"])
def test_a_malformed_endpoint_is_not_reachable(online, endpoint):
    online(endpoint)
    assert not hub.hub_is_reachable(timeout=1)


@pytest.mark.kind("0: base weights with NaN or infinity")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_finite_number_is_refused_by_name(saved, value):
    rewrite(saved, lambda tensors: tensors["transformer.h.1.mlp.c_fc.weight"].fill_(value))
    with pytest.raises(WeightsError, match=r"holds NaN or infinity in transformer\.h\.1\.mlp\.c_fc\.weight"):
        GPT2LMHeadModel.from_pretrained(saved)
