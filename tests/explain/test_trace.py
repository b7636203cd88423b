"""trace.py: each method's equation, computed as its docstring has it, is what the model computes, and must be."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from helpers import write_tiny_model
from models import CASES, assert_same_tensors, build, copies, perturb

from minipeft import (
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    HeadConfig,
    LoraConfig,
    get_tokenizer,
    inject,
    save_adapter,
)
from minipeft.errors import ConfigError, InjectionError
from minipeft.explain.equation import equation_of, text_under
from minipeft.explain.trace import ALLOWED, fresh, trace, trained
from minipeft.explain.trace_text import as_text
from minipeft.methods import METHODS, Method, head
from minipeft.methods.injection import active_injections
from minipeft.model.config import GPT2Config
from minipeft.runs.defaults import DEFAULTS

each_method = pytest.mark.parametrize("method", METHODS)
# Lines of an equation that hold in another model than the default one: of head, tagging's.
ELSEWHERE = {"head": ["logits = dropout(h) W^T + bias"]}
TEXT = "a good film, truly good"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny"))


def docstring(method):
    return importlib.import_module(f"minipeft.methods.{method}").__doc__


def all_lines(found):
    return [line for place in found.places for line in place.forward]


# --- all methods ------------------------------------------------------------------------------------------------------

@each_method
def test_every_line_of_the_equation_is_computed_and_comes_to_what_the_model_computes(folder, method):
    model, tokenizer, start = fresh(folder, method, {})
    before = copies(model)
    found = trace(model, tokenizer, TEXT, start=start)
    elsewhere = ELSEWHERE.get(method, [])
    assert [line.text for line in found.not_here] == elsewhere
    assert [line.line.text for line in all_lines(found)] == [
        line.text for line in equation_of(docstring(method)) if line.text not in elsewhere]
    for line in all_lines(found):
        assert line.difference <= ALLOWED
        assert line.terms[-1].text == line.line.right and len(line.terms) > 1
    assert_same_tensors(copies(model), before)


@each_method
def test_merging_is_shown_where_the_method_merges_and_else_why_not(folder, method):
    model, tokenizer, start = fresh(folder, method, {})
    found = trace(model, tokenizer, TEXT, start=start)
    text = text_under(docstring(method), "Merging")
    if text.startswith("Not possible"):
        assert found.why_not_merged.startswith("Not possible") and "`merge` answers: " in found.why_not_merged
        assert not any(place.merged for place in found.places)
    else:
        assert not found.why_not_merged
        for place in found.places:
            weight, output = place.merged
            assert text.startswith(f"W <- {weight.line.right}") and output.line.left == "y"
            assert max(weight.difference, output.difference) <= ALLOWED


@each_method
def test_a_fresh_adapter_is_moved_where_it_would_change_nothing(folder, method):
    model, _, start = fresh(folder, method, {})
    identity = method not in ("prompt", "ptuning", "prefix", "full", "head")
    assert ("moved: at its start it changes nothing" in start) == identity
    if identity:
        torch.manual_seed(0)
        base = GPT2ForSequenceClassification.from_pretrained(folder).transformer
        ids = torch.tensor([[1, 2, 3]])
        assert not torch.allclose(model.transformer(ids), base(ids), atol=1e-3)


@each_method
def test_what_is_trained_is_marked_so_in_the_text(folder, method):
    model, tokenizer, start = fresh(folder, method, {})
    found = trace(model, tokenizer, TEXT, start=start)
    text = as_text(found)
    if method == "head":
        assert re.search(r"^  \* W +\(2, 16\)", text, re.MULTILINE)
    else:
        injection = active_injections(model)[0]
        trained_symbols = {line.split()[1] for line in text.splitlines() if line.startswith("  * ")}
        assert trained_symbols and (injection.layers or injection.trained_base)
        assert "W" not in trained_symbols or method == "full"
    assert start.split(":")[0] in text and "equal" in text and max(map(len, text.splitlines())) <= 130
    assert "\033[" in as_text(found, color=True) and "\033[" not in text


def test_a_method_cannot_be_without_symbols():
    with pytest.raises(TypeError, match="symbols"):
        Method(HeadConfig, head.plan, summary="no equation")


# --- settings and models ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", CASES)
def test_the_equation_holds_in_every_setting(tiny_config, case):
    model = perturb(inject(build(GPT2ForSequenceClassification, tiny_config), CASES[case]))
    found = trace(model, Letters(), TEXT)
    lines = all_lines(found)
    assert lines and all(line.difference <= ALLOWED for line in lines)
    if case == "ptuning, LSTM":
        assert [line.left for line in found.not_here] == ["P"]
    if case == "bitfit, LayerNorms":
        assert [line.line.remark for line in lines] == ["LayerNorms"]


class Letters:
    """A tokenizer for the tiny configuration: a token for each letter."""

    def encode(self, text):
        return [ord(letter) % 97 for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_tagger_s_head_has_the_second_line(tiny_config):
    model = inject(build(GPT2ForTokenClassification, tiny_config), HeadConfig())
    (line,) = all_lines(trace(model, Letters(), TEXT))
    assert line.line.remark == "tagging" and line.model.shape == (1, len(TEXT), 2)


def test_a_language_model_can_be_traced(tiny_config):
    model = perturb(inject(build(GPT2LMHeadModel, tiny_config), LoraConfig()))
    assert len(all_lines(trace(model, Letters(), TEXT))) == 1


@pytest.mark.parametrize("method", ["lora", "adapter", "ptuning", "prefix", "bitfit"])
def test_a_trained_adapter_is_taken_as_it_is(folder, tmp_path, method):
    model, tokenizer, _ = fresh(folder, method, {})
    save_adapter(model, tmp_path / "adapter", {"task": "classification", "label_names": ["bad", "good"],
                                               "base_model": folder, "max_length": 30})
    loaded, same_tokenizer, start = trained(tmp_path / "adapter")
    assert start == f"trained, from {tmp_path / 'adapter'}"
    found, expected = trace(loaded, same_tokenizer, TEXT), trace(model, tokenizer, TEXT)
    assert torch.equal(all_lines(found)[-1].model, all_lines(expected)[-1].model)
    assert [line.left for line in found.not_here] == (["P"] if method == "ptuning" else [])


def test_a_whole_model_is_traced_as_full_fine_tuning(folder, tmp_path):
    GPT2ForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path)
    model, tokenizer, _ = trained(tmp_path)
    assert trace(model, tokenizer, TEXT).method == "full"


def test_any_block_and_any_token_can_be_looked_at(folder):
    model, tokenizer, _ = fresh(folder, "lora", {})
    found = trace(model, tokenizer, TEXT, block=1, token=2)
    (place,) = found.places
    assert place.name == "transformer.h.1.attn.c_attn"
    x = place.forward[0].terms[0]
    assert x.text == "x" and torch.equal(found.row(x.value), x.value[0, 2])
    assert found.norm(x.value) == pytest.approx(float(x.value[0, 2].norm()))


def test_of_a_text_behind_virtual_tokens_the_token_s_own_row_is_shown(folder):
    model, tokenizer, _ = fresh(folder, "prompt", {"num_virtual_tokens": 3})
    found = trace(model, tokenizer, TEXT, token=1)
    terms = {term.text: term.value for term in found.places[0].forward[0].terms}
    assert torch.equal(found.row(terms["wpe[positions]"]), model.transformer.wpe.weight[4])


@pytest.mark.parametrize("virtual", [1, 20])
def test_a_prefix_s_own_keys_are_no_row_of_a_token(folder, virtual):
    model, tokenizer, _ = fresh(folder, "prefix", {"num_virtual_tokens": virtual})
    found = trace(model, tokenizer, TEXT, token=0)
    terms = {term.text: term.value for line in all_lines(found) for term in line.terms}
    assert torch.equal(found.row(terms["P_k"]), terms["P_k"][0, 0, 0])
    assert torch.equal(found.row(terms["[P_v; v]"]), terms["v"][0, 0, 0])
    shares = found.row(terms["softmax(q [P_k; k]^T / sqrt(D) + mask)"])
    assert (shares > 0).tolist() == [True] * (virtual + 1) + [False] * (len(found.tokens) - 1)
    assert as_text(found)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"text": ""}, ConfigError, "the text is empty"), ({"block": 2}, ConfigError, "no block 2.* from 0 to 1"),
    ({"token": 99}, ConfigError, "there is no token 99"),
    ({"block": 0}, InjectionError, r"h\.0 carries nothing of lora")])
def test_what_is_not_there_cannot_be_looked_at(folder, arguments, error, message):
    model, tokenizer, _ = fresh(folder, "lora", {"layers_to_transform": 1})
    with pytest.raises(error, match=message):
        trace(model, tokenizer, **{"text": TEXT, **arguments})


# --- what must fail ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("method", "right", "wrong"), [
    ("lora", "+ s * dropout(x) A^T B^T", "+ dropout(x) A^T B^T"),
    ("lora", "W <- W + s B A", "W <- W - s B A"),
    ("dora", "c * (x W^T + s * x A^T B^T) + bias", "c * (x W^T + s * x A^T B^T + bias)"),
    ("dora", "c = m / ||W + s B A||", "c = m / ||W||"),
    ("vera", "b * ((d * (dropout(x) A^T)) B^T)", "d * ((d * (dropout(x) A^T)) B^T)"),
    ("ia3", "(l * x) W^T + bias", "l * x W^T + bias"),
    ("bitfit", "(x - mean(x)) / sqrt(var(x) + eps)", "(x - mean(x)) / sqrt(var(x))"),
    ("adapter", "y = h + s *", "y = s *"),
    ("prompt", "wte[ids]] + wpe[positions]", "wte[ids]]"),
    ("prefix", " / sqrt(D) + mask", " + mask"),
    ("full", "0.001 * g^2", "0.01 * g^2"),
    ("full", "1 - 0.9^t", "1 - 0.9"),
    ("head", "h_last W^T", "h_last (W + W)^T")])
def test_a_wrong_equation_in_a_docstring_is_an_error(tiny_config, monkeypatch, method, right, wrong):
    module = importlib.import_module(f"minipeft.methods.{method}")
    assert right in module.__doc__
    config = METHODS[method].config(**DEFAULTS[method]["method"])
    model = perturb(inject(build(GPT2ForSequenceClassification, tiny_config), config))
    trace(model, Letters(), "A film.")
    monkeypatch.setattr(module, "__doc__", module.__doc__.replace(right, wrong))
    with pytest.raises((AssertionError, RuntimeError)):  # a wrong value, or shapes that do not go together
        trace(model, Letters(), "A film.")


def test_a_model_that_computes_something_else_is_an_error(folder):
    model, tokenizer, _ = fresh(folder, "lora", {})
    layer = model.transformer.h[0].attn.c_attn
    layer.forward = lambda x: layer.base_layer(x) + layer.scaling * layer.lora_B(layer.lora_A(x)) * 1.001
    with pytest.raises(AssertionError, match=r"y = x W\^T .* by hand and in the model it differs"):
        trace(model, tokenizer, TEXT)


def test_the_tokenizer_of_the_model_cuts_the_text(folder):
    model, _, _ = fresh(folder, "lora", {})
    assert trace(model, get_tokenizer(folder), "a good").tokens == ["a", " good"]
    assert GPT2Config.from_dict(model.config.to_dict()).vocab_size == 264
