"""Each method's file explains its method in one block of fixed headings; what it says is held against the code.

Conventions of the block, as lora.py has it: the equation is the first indented paragraph (what follows three spaces on
its line is a remark), a picture comes after it, and the text under a heading is indented by four. Under "Saved" a line
`NAME (shape)` is a tensor (indented by four more, one that `bias` adds), under "At step 0" a line begins with a
configuration, and under "Errors" a message is indented by four more than the call that raises it; any other line there
is text. "By hand: SYMBOL = VALUE, ... give TERM = VALUE, ..." is an example of numbers. Sizes are those of GPT-2 124M
with a classifier of two labels.
"""

import copy
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from models import IDS, MASK, build, perturb

import minipeft
from minipeft import (
    METHODS,
    GPT2Config,
    GPT2ForSequenceClassification,
    LoraConfig,
    VeraConfig,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge,
)
from minipeft.errors import AdapterError, InjectionError, MinipeftError
from minipeft.explain.equation import compute, equation_of, heading_lines, symbols_in
from minipeft.explain.equation import text_under as paragraph_under
from minipeft.methods.dora import DoraConfig
from minipeft.methods.injection import active_injections
from minipeft.methods.saving import _stored
from minipeft.model.weights import _TRANSPOSED

HEADINGS = ["Symbols", "Trained", "Frozen", "At step 0", "Positions and mask", "Saved", "Merging", "Cost", "Errors",
            "Differs from the paper"]
NAMES = {**vars(minipeft), "DoraConfig": DoraConfig}
TINY = GPT2Config(vocab_size=97, n_positions=40, n_embd=24, n_layer=2, n_head=3)

MERGED = ["lora", "dora", "vera", "ia3"]
LINEAR = [*MERGED, "bitfit"]
SAVED = [method for method in METHODS if METHODS[method].config_class.saves_adapter]

each_method = pytest.mark.parametrize("method", METHODS)


def docstring(method):
    return importlib.import_module(f"minipeft.methods.{method}").__doc__


def equation(method):
    """The lines of the first indented paragraph, without their remarks."""
    return [line.text for line in equation_of(docstring(method))]


def lines_under(method, heading):
    """The lines under a heading, four spaces of indentation taken off."""
    return heading_lines(docstring(method), heading)


def text_under(method, heading):
    """The text under a heading, in one line."""
    return paragraph_under(docstring(method), heading)


def on_meta():
    """GPT-2 124M's shape, with a classifier of two labels and no values."""
    with torch.device("meta"):
        return GPT2ForSequenceClassification(GPT2Config.official("gpt2"))


def default_injection(method):
    return inject(on_meta(), METHODS[method].config_class())


# --- form -------------------------------------------------------------------------------------------------------------

@each_method
def test_the_headings_come_in_order_each_with_a_text_and_papers_last(method):
    unindented = [line for line in docstring(method).split("\n") if line and not line.startswith(" ")]
    start = unindented.index(HEADINGS[0])
    assert unindented[start:start + len(HEADINGS)] == HEADINGS
    assert all(text_under(method, heading) for heading in HEADINGS)
    papers = unindented[start + len(HEADINGS):]
    assert re.match("Papers?: ", papers[0])
    assert re.search(r"\b\d{4}\.\d{5}\b", " ".join(papers))


@each_method
def test_the_equation_and_a_picture_come_first_and_lines_are_not_too_long(method):
    before = docstring(method).split("\nSymbols\n")[0]
    assert all("=" in line for line in equation(method))
    assert re.search(r"^ {5,}.*\|", before, re.MULTILINE), "no picture"
    assert max(map(len, docstring(method).split("\n"))) <= 120


@each_method
def test_a_docstring_with_backslashes_is_raw(method):
    source = Path(importlib.import_module(f"minipeft.methods.{method}").__file__).read_text(encoding="utf-8")
    if "\\" in docstring(method):
        assert source.startswith('r"""')


@each_method
def test_every_symbol_of_the_equation_is_explained(method):
    """Functions too, such as dropout; ^T is a transposition."""
    symbols = set(re.findall(r"[A-Za-z_]\w*", text_under(method, "Symbols")))
    for line in equation(method):
        used = set(re.findall(r"[A-Za-z_]\w*", line.replace("^T", "")))
        assert used <= symbols, f"not explained: {used - symbols}"


@pytest.mark.parametrize("method", SAVED)
def test_what_is_the_same_for_several_methods_is_said_in_the_same_words(method):
    parts = {"Errors": "`load_adapter` raises an AdapterError, .* is an InjectionError[.]",
             "Saved": "All tensors are float32, .* the folder loads, too",
             "Merging": "Several adapters[.] .* another one active"}
    if method != "head":  # which works along with no other
        parts["Saved"] = "All tensors are float32, .* sub-folders names them[.]"
    for heading, part in parts.items():
        assert re.search(part, text_under(method, heading))[0] == re.search(part, text_under("lora", heading))[0]
    if method in MERGED:
        for part in ("Order[.] .* unmerges first.*nothing is merged, `unmerge` is an InjectionError",
                     "Under one name other methods .* trained biases stay[.]"):
            own, lora = text_under(method, "Merging"), text_under("lora", "Merging")
            assert re.search(part, own)[0] == re.search(part, lora)[0]


# --- facts ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", [*LINEAR, "full", "head"])
def test_the_example_worked_by_hand_comes_to_what_it_says(method):
    """Each term that is printed, and what every line of the equation gives that needs nothing but what is given."""
    given, results = re.search(r"^By hand: (.*?)\sgive\s(.*?)\.$", docstring(method), re.M | re.S).groups()
    values = {name: torch.tensor(json.loads(value), dtype=torch.float64)
              for name, value in re.findall(r"(\w+) = (\[[^=]*\]|\d[\d.]*)", given)} | {"dropout": lambda x: x}
    lines, waiting = [], equation_of(docstring(method))
    while ready := [line for line in waiting if symbols_in(line.right) <= values.keys()]:
        waiting = [line for line in waiting if line not in ready]  # DoRA's second line makes the c of its first
        lines += [(line.left, compute(line.right, values)[-1].value) for line in ready]
        values |= dict(lines)
    printed = re.findall(r"(?:^|, |; )([A-Za-z|][^=,;]*) = (\[[^=;]*\]|\d[\d.]*)", " ".join(results.split()))
    for term, value in printed:
        found = [computed for left, computed in lines if left == term] or [compute(term, values)[-1].value]
        expected = torch.tensor(json.loads(value), dtype=torch.float64)
        assert any(computed.shape == expected.shape and torch.allclose(computed, expected) for computed in found), term
    of_lines = sorted(left for left, _ in lines)
    assert of_lines and sorted(term for term, _ in printed if term in of_lines) == of_lines


@each_method
def test_at_step_0_the_model_is_the_base_or_not_as_it_says(method):
    claims = ("the base model, bit for bit", "the base model, up to rounding", "not the base model")
    found = re.findall(rf"^(\w+\(.*?\)) +is ({'|'.join(claims)})\b", "\n".join(lines_under(method, "At step 0")), re.M)
    assert found[0][0] == f"{METHODS[method].config_class.__name__}()", "the default configuration comes first"
    base = build(GPT2ForSequenceClassification, TINY)(IDS, MASK)
    for call, claim in found:
        logits = inject(build(GPT2ForSequenceClassification, TINY), eval(call, NAMES))(IDS, MASK)
        equal, close = torch.equal(logits, base), torch.allclose(logits, base, atol=1e-5)
        assert claim == claims[0 if equal else 1 if close else 2], call


@pytest.mark.parametrize("method", ["full", "head", "bitfit"])
def test_on_a_half_precision_base_the_logits_are_the_bases_up_to_rounding_as_it_says(method):
    assert "half" in text_under(method, "At step 0") and "up to rounding" in text_under(method, "At step 0")
    base = build(GPT2ForSequenceClassification, TINY).bfloat16()
    expected = base(IDS, MASK)
    logits = inject(base, METHODS[method].config_class())(IDS, MASK)
    assert logits.dtype == torch.float32 and not torch.equal(logits, expected.float())
    torch.testing.assert_close(logits, expected.float(), atol=0.1, rtol=0)


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_the_numbers_kept_per_block_and_token_are_those_it_counts(method):
    """As autograd has it, for one block of GPT-2 and 7 tokens; parameters are not counted."""
    C, storages = 768, {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    config = GPT2Config(vocab_size=97, n_positions=8, n_layer=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = inject(build(GPT2ForSequenceClassification, config), METHODS[method].config_class()).train()
    x = torch.randn(1, 7, C, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.transformer.h[1](x)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = [size for place, size in storages.items() if place not in parameters and size >= 7 * C]
    assert output.requires_grad and sum(kept) / (7 * C) == {"full": 16, "bitfit": 10}[method]
    assert "16 C numbers. Frozen matrices leave 10 C" in text_under("full", "Cost")


@each_method
def test_the_tensors_on_disk_have_the_names_and_shapes_it_lists(method):
    lines = re.findall(r"^(\S+) \((\d[\d, ]*)\)$", "\n".join(lines_under(method, "Saved")), re.M)
    listed = {name: tuple(map(int, re.findall(r"\d+", shape))) for name, shape in lines}
    model = default_injection(method)
    if not METHODS[method].config_class.saves_adapter:
        assert f"{method} has no adapter to save: use save_pretrained" in text_under(method, "Saved")
        saved = {name: tuple(tensor.shape[::-1] if name.endswith(_TRANSPOSED) else tensor.shape)
                 for name, tensor in model.state_dict().items()}
        assert listed and listed.items() <= saved.items()
        return
    stored = {name: tuple(tensor.shape) for name, tensor in _stored(model, active_injections(model)[0]).items()}
    assert listed.items() <= stored.items()
    not_listed = stored.keys() - listed.keys()
    assert all(re.search(r"\.h\.[1-9]\d*\.", name) for name in not_listed), "of block 0, and outside blocks, all"


@each_method
def test_adapter_config_json_has_the_keys_it_names(method, tmp_path):
    config_class, text = METHODS[method].config_class, text_under(method, "Saved")
    if not config_class.saves_adapter:
        return
    save_adapter(inject(build(GPT2ForSequenceClassification, TINY), config_class()), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    sentence = re.search(r"adapter_config.json must say ([^.]*)", text)[1]
    assert sentence.startswith(f"peft_type {written['peft_type']}")
    assert set(re.findall(r"[a-z]+(?:_[a-z]+)+", sentence)) <= written.keys()


@each_method
def test_it_says_whether_the_method_can_be_merged(method):
    model = inject(build(GPT2ForSequenceClassification, TINY), METHODS[method].config_class())
    text = text_under(method, "Merging")
    try:
        merge(model)
    except MinipeftError:
        assert text.startswith("Not possible")
    else:
        assert re.match(r"\w+ <- ", text)


@each_method
def test_the_costs_are_right(method):
    """The trained parameters in all, with the sum that makes them; AdamW's bytes; and every sum that is printed."""
    trained, text = trainable_parameters(default_injection(method)).trainable, text_under(method, "Cost")
    assert f"{8 * trained:,} bytes" in text
    number = r"\(*\d[\d,]*\)*"
    sums = re.findall(rf"({number}(?: [-+*/] {number})+) = (\d[\d,]*\d|\d)", text)
    for left, right in sums:
        assert eval(left.replace(",", "")) == int(right.replace(",", "")), f"{left} = {right}"
    assert f"{trained:,}" in {right for _, right in sums}, "the sum of the trained parameters"


@pytest.mark.parametrize("method", LINEAR)
def test_the_frozen_numbers_are_right(method):
    count = trainable_parameters(default_injection(method))
    assert f" {count.total - count.trainable:,} numbers" in text_under(method, "Frozen")


def test_bitfit_s_frozen_numbers_with_layer_norm_are_right():
    count = trainable_parameters(inject(on_meta(), minipeft.BitFitConfig(train="layer_norm")))
    assert f"= {count.total - count.trainable:,} numbers" in text_under("bitfit", "Frozen")


@pytest.mark.parametrize("method", MERGED)
def test_the_options_counts_are_right(method):
    lines = re.findall(r"^(\w+\(.*?\)) +trains ([\d,]+):", "\n".join(lines_under(method, "Cost")), re.M)
    assert len(lines) == 3
    for call, figure in lines:
        assert figure == f"{trainable_parameters(inject(on_meta(), eval(call, NAMES))).trainable:,}", call


@pytest.mark.parametrize("method", MERGED)
def test_what_is_kept_for_the_backward_pass_has_the_shapes_it_lists(method):
    """As autograd has it, of the targets of one block, for 35 tokens; weights are not counted."""
    sentence = re.search(r"Kept[^:]*: (.*?)\. Optimizer", text_under(method, "Cost"))[1]
    (injection,), saved = active_injections(default_injection(method)), set()
    widths = {"in": 768, "out": 2304, "r": getattr(injection.config, "r", None)}
    for layer in (layer for name, layer in injection.layers.items() if ".h.0." in name):
        x = torch.ones(5, 7, layer.base_layer.in_features, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.add(tuple(tensor.shape)), id):
            layer.to_empty(device="cpu").train()(x)
    listed = {widths.get(word) or int(word) for word in re.findall(r"\(batch, seq, (\w+)\)", sentence)}
    assert {shape[-1] for shape in saved if torch.Size(shape[:-1]).numel() == 5 * 7} == listed


@pytest.mark.parametrize(("method", "still"), [("lora", "lora_A.weight"), ("dora", "lora_A.weight"),
                                               ("vera", "vera_lambda_d")])
def test_in_the_first_step_one_gradient_is_zero_as_it_says(method, still):
    assert re.search(r"gradient is 0 too: (the|in the) first step", text_under(method, "At step 0"))
    model = inject(build(GPT2ForSequenceClassification, TINY), METHODS[method].config_class())
    model(IDS).square().sum().backward()
    for layer in active_injections(model)[0].layers.values():
        assert {name for name in layer.trained if not layer.get_parameter(name).grad.any()} == {still}


@pytest.mark.parametrize("method", MERGED)
def test_on_a_half_precision_base_merging_rounds_once_and_unmerging_restores_every_bit(method):
    assert "rounded once, to W's type" in text_under(method, "Merging")
    model = perturb(inject(build(GPT2ForSequenceClassification, TINY).bfloat16(), METHODS[method].config_class()))
    layers = active_injections(model)[0].layers
    before = {name: layer.base_layer.weight.clone() for name, layer in layers.items()}
    finer = {name: copy.deepcopy(layer).float().merged()["weight"] for name, layer in layers.items()}
    merge(model)
    for name, layer in layers.items():
        assert torch.equal(layer.base_layer.weight, finer[name].bfloat16())
        assert not torch.equal(layer.base_layer.weight, before[name])
    unmerge(model)
    assert all(torch.equal(layer.base_layer.weight, before[name]) for name, layer in layers.items())


@pytest.mark.parametrize("config_class", [LoraConfig, DoraConfig, VeraConfig])
def test_trained_biases_have_the_names_and_shapes_on_disk_that_it_says(config_class, tmp_path):
    def stored(bias):
        model = inject(on_meta(), config_class(bias=bias))
        return {name: tuple(tensor.shape) for name, tensor in _stored(model, active_injections(model)[0]).items()}

    method = config_class().method
    lines = re.findall(r"^    (\S+) \((\d+),\)$", "\n".join(lines_under(method, "Saved")), re.M)
    biases = {name: shape for name, shape in stored("all").items() if name not in stored("none")}
    assert {name: (int(shape),) for name, shape in lines} == {
        name: shape for name, shape in biases.items() if ".h.0." in name or ".h." not in name}
    only = "vera_only" if method == "vera" else "lora_only"
    assert f'With `bias` "{only}"' in text_under(method, "Saved")
    assert {name for name in biases if ".base_layer." in name} == stored(only).keys() - stored("none").keys()

    assert "adapter_config.json must then say `bias`." in text_under(method, "Saved")
    save_adapter(inject(build(GPT2ForSequenceClassification, TINY), config_class(bias="all")), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"bias": None}), encoding="utf-8")
    (tmp_path / "minipeft.json").unlink()
    with pytest.raises(AdapterError, match=r"unexpected .*bias"):
        load_adapter(build(GPT2ForSequenceClassification, TINY), tmp_path)


def disabled(model):
    with minipeft.disable_adapter(model):
        pass


@pytest.mark.parametrize("method", SAVED)
def test_several_adapters_and_the_order_of_merging_are_as_it_says(method, tmp_path):
    model = inject(build(GPT2ForSequenceClassification, TINY), METHODS[method].config_class())
    save_adapter(model, tmp_path)
    with pytest.raises(InjectionError, match=f"already carries {method}"):
        inject(model, METHODS[method].config_class())
    load_adapter(model, tmp_path, "second")
    assert [injection.name for injection in active_injections(model)] == ["second"]
    set_adapter(model, "default")
    assert [injection.name for injection in active_injections(model)] == ["default"]
    if method in MERGED:
        merge(model)
        for refused in (merge, disabled, lambda model: inject(model, minipeft.BitFitConfig()),
                        lambda model: load_adapter(model, tmp_path, "third"),
                        lambda model: set_adapter(model, "second")):
            with pytest.raises(InjectionError, match="merged"):
                refused(model)
        with pytest.raises(AdapterError, match="merged"):
            save_adapter(model, tmp_path)
        unmerge(model)
    with pytest.raises(InjectionError, match="nothing is merged"):
        unmerge(model)


@each_method
def test_the_errors_are_raised_with_these_words(method):
    """The class stands before its message."""
    lines = lines_under(method, "Errors")
    calls, messages = [], []
    for line, after in zip(lines, [*lines[1:], ""]):
        if line.startswith("    "):
            messages[-1].append(line.strip())
        elif after.startswith("    "):
            calls.append(line)
            messages.append([])
    assert len(calls) >= 3
    for call, message in zip(calls, messages):
        with pytest.raises(MinipeftError) as raised, torch.device("meta"):
            eval(call, {**NAMES, "model": on_meta()})
        assert f"{type(raised.value).__name__}: {raised.value}" == " ".join(message), call
