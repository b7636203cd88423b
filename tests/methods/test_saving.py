"""Adapter folders: what is written, what is refused, and that a failure leaves no trace."""

import copy
import dataclasses
import errno
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from helpers import changed_by_hand
from models import (
    CASES,
    IDS,
    MASK,
    assert_load_refused,
    assert_unchanged,
    build,
    inject_all,
    on,
    perturb,
    snapshot,
    with_new_head,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minipeft.methods.saving
from minipeft import (
    BitFitConfig,
    FullConfig,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    LoraConfig,
    PrefixTuningConfig,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from minipeft.errors import AdapterError, ConfigError, InjectionError, MinipeftError, OutputError, WeightsError
from minipeft.methods.folder import read_details
from minipeft.methods.injection import active_injections

CONFIG, TENSORS, DETAILS = "adapter_config.json", "adapter_model.safetensors", "minipeft.json"
P = "base_model.model.transformer."


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def adapter(tiny_config, tmp_path):
    """A saved classification adapter: (folder, the model it was saved from)."""
    model = perturb(inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig(r=2, lora_alpha=6)))
    save_adapter(model, tmp_path / "adapter", details={"labels": ["bad", "good"]})
    return tmp_path / "adapter", model


def edit_json(path, **changes):
    changed_by_hand(path.parent)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path, change):
    changed_by_hand(path.parent)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_refused(tiny_config, folder, error, message, model_class=GPT2ForSequenceClassification, model=None):
    """Loading on a fresh model, or on the given one, fails with one line that matches, and changes nothing."""
    assert_load_refused(model if model is not None else build(model_class, tiny_config), folder, error, message)


# --- adapter folders: round trips -------------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern", [
    {"rank_pattern": {"c_proj": 2, "attn.c_proj": 4}}, {"alpha_pattern": {"c_proj": 2, "attn.c_proj": 40}}], ids=str)
def test_overlapping_patterns_mean_the_same_after_saving(tiny_config, tmp_path, pattern):
    model = perturb(inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(target_modules=["c_proj"], **pattern)))
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(build(GPT2LMHeadModel, tiny_config), tmp_path)(IDS), model.eval()(IDS))


def test_what_is_saved_is_what_was_injected_even_if_the_configuration_object_is_reused(tiny_config, tmp_path):
    config = LoraConfig(r=2, lora_alpha=4)
    model = perturb(inject(build(GPT2LMHeadModel, tiny_config), config))
    config.lora_alpha = 400  # for the next run of a sweep
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(build(GPT2LMHeadModel, tiny_config), tmp_path)(IDS), model.eval()(IDS))


def test_saving_after_loading_gives_the_same_files(tiny_config, tmp_path, adapter):
    folder, _ = adapter
    model = load_adapter(with_new_head(GPT2ForSequenceClassification, tiny_config), folder)
    save_adapter(model, tmp_path / "again", details={"labels": ["bad", "good"]})
    assert contents(tmp_path / "again") == contents(folder)


def test_a_loaded_adapter_can_be_disabled_merged_and_unmerged(tiny_config, adapter):
    folder, trained = adapter
    base = with_new_head(GPT2ForSequenceClassification, tiny_config)
    expected_base, expected = base(IDS, MASK), trained.eval()(IDS, MASK)
    model = load_adapter(base, folder)
    with disable_adapter(model):
        assert torch.equal(model(IDS, MASK), expected_base)
    torch.testing.assert_close(merge(model)(IDS, MASK), expected, atol=1e-5, rtol=0)
    assert torch.equal(unmerge(model)(IDS, MASK), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_loads_on_the_same_base_in_half_precision_and_stays_float32(tiny_config, adapter, dtype):
    folder, trained = adapter
    model = load_adapter(build(GPT2ForSequenceClassification, tiny_config).to(dtype), folder)
    loaded = model.transformer.h[0].attn.c_attn.lora_A.weight
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, trained.transformer.h[0].attn.c_attn.lora_A.weight)


def test_a_loaded_model_is_in_eval_mode_wherever_it_was_before(tiny_config, adapter):
    model = load_adapter(build(GPT2ForSequenceClassification, tiny_config).train(), adapter[0])
    assert {module.training for module in model.modules()} == {False}


def test_the_extra_copies_of_a_token_classifiers_bias_that_peft_writes_are_ignored(tiny_config, tmp_path):
    model = perturb(inject(build(GPT2ForTokenClassification, tiny_config), LoraConfig(r=2, bias="all")))
    save_adapter(model, tmp_path)
    edit_tensors(tmp_path / TENSORS, lambda tensors: tensors.update({
        "base_model.model.classifier.modules_to_save.bias": model.classifier.bias.detach().clone(),
        "base_model.model.classifier.original_module.bias": torch.full((2,), 100.0)}))
    loaded = load_adapter(with_new_head(GPT2ForTokenClassification, tiny_config), tmp_path)
    assert torch.equal(loaded(IDS, MASK), model.eval()(IDS, MASK))


def test_training_can_go_on_from_a_loaded_adapter(tiny_config, adapter):
    model = load_adapter(build(GPT2ForSequenceClassification, tiny_config), adapter[0]).train()
    model(IDS, MASK).square().sum().backward()
    assert model.transformer.h[0].attn.c_attn.lora_A.weight.grad.abs().max() > 0
    assert model.transformer.h[0].attn.c_attn.base_layer.weight.grad is None


# --- adapter folders: what is written ---------------------------------------------------------------------------------

C_ATTN = {f"{P}h.{i}.attn.c_attn.lora_{AB}.weight" for i in (0, 1) for AB in "AB"}
OTHER_BIASES = {f"{P}h.{i}.{name}.bias" for i in (0, 1)
                for name in ("ln_1", "ln_2", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")} | {f"{P}ln_f.bias"}
TARGET_BIASES = {f"{P}h.{i}.attn.c_attn.base_layer.bias" for i in (0, 1)}


@pytest.mark.parametrize(("model_class", "head", "task", "kept"), [
    (GPT2LMHeadModel, set(), "CAUSAL_LM", None),
    (GPT2ForSequenceClassification, {"base_model.model.score.weight"}, "SEQ_CLS", ["classifier", "score"]),
    (GPT2ForTokenClassification, {"base_model.model.classifier.weight", "base_model.model.classifier.bias"},
     "TOKEN_CLS", ["classifier", "score"])])
@pytest.mark.parametrize(("bias", "biases"), [
    ("none", set()), ("lora_only", TARGET_BIASES), ("all", TARGET_BIASES | OTHER_BIASES)])
def test_the_files_hold_these_tensors_and_fields(tiny_config, tmp_path, model_class, head, task, kept, bias, biases):
    model = perturb(inject(build(model_class, tiny_config), LoraConfig(r=3, lora_alpha=5, bias=bias)))
    save_adapter(model, tmp_path)
    assert names_in(tmp_path) == sorted([CONFIG, TENSORS, DETAILS])
    tensors = load_file(tmp_path / TENSORS)
    assert set(tensors) == C_ATTN | head | biases
    assert tensors[f"{P}h.0.attn.c_attn.lora_A.weight"].shape == (3, 24)    # (r, in)
    assert tensors[f"{P}h.0.attn.c_attn.lora_B.weight"].shape == (72, 3)    # (out, r)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        assert torch.equal(tensor, parameters[name.removeprefix("base_model.model.")]), name
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == task and config["modules_to_save"] == kept
    assert (config["r"], config["lora_alpha"], config["bias"]) == (3, 5, bias)
    assert config["target_modules"] == ["c_attn"]  # the default, spelt out
    assert config["fan_in_fan_out"] is True and config["inference_mode"] is True


def test_all_linear_is_written_as_the_names_it_stood_for(tiny_config, tmp_path):
    """peft would otherwise count a token classifier's head among them."""
    save_adapter(inject(build(GPT2ForTokenClassification, tiny_config), LoraConfig(target_modules="all-linear")),
                 tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == [
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc",
                                                                 "mlp.c_proj")]


def test_saving_does_not_edit_the_configuration_or_the_model(tiny_config, tmp_path):
    config = LoraConfig(target_modules="all-linear", bias="all")
    model = perturb(inject(build(GPT2LMHeadModel, tiny_config), config))
    before, fields = snapshot(model), dataclasses.asdict(config)
    save_adapter(model, tmp_path)
    assert_unchanged(model, before)
    assert dataclasses.asdict(config) == fields


def test_details_are_kept_beside_the_fingerprint(adapter):
    details = read_details(adapter[0])
    assert details["labels"] == ["bad", "good"]
    assert details["method"] == "lora" and len(details["base_fingerprint"]) == 16


def test_a_folder_that_peft_wrote_has_no_details_and_loads(tiny_config, adapter):
    folder, trained = adapter
    (folder / DETAILS).unlink()
    assert read_details(folder) == {}
    model = load_adapter(with_new_head(GPT2ForSequenceClassification, tiny_config), folder)
    assert torch.equal(model(IDS, MASK), trained.eval()(IDS, MASK))


def test_saving_over_an_older_adapter_replaces_it(tiny_config, adapter):
    folder, _ = adapter
    (folder / "README.md").write_text("mine")
    newer = perturb(inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig(r=5)), seed=8)
    save_adapter(newer, folder)
    assert names_in(folder) == sorted([CONFIG, TENSORS, DETAILS, "README.md"])
    model = load_adapter(build(GPT2ForSequenceClassification, tiny_config), folder)
    assert torch.equal(model(IDS, MASK), newer.eval()(IDS, MASK))


COMBINED = [LoraConfig(r=2), PrefixTuningConfig(num_virtual_tokens=3)]


@pytest.mark.parametrize(("older", "newer"), [
    ([LoraConfig(r=3)], COMBINED), (COMBINED, [LoraConfig(r=3)]), (COMBINED, [LoraConfig(r=3), BitFitConfig()])],
    ids=["one, then two", "two, then one", "two, then another two"])
@pytest.mark.parametrize("model_class", [GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_what_is_loaded_is_what_was_saved_last_whether_one_method_or_several(
        tiny_config, tmp_path, model_class, older, newer):
    for configs in (older, newer):
        model = perturb(inject_all(build(model_class, tiny_config), *configs))
        save_adapter(model, tmp_path)
    loaded = load_adapter(with_new_head(model_class, tiny_config), tmp_path)
    assert {injection.method for injection in active_injections(loaded)} == {
        injection.method for injection in active_injections(model)}
    assert torch.equal(loaded(IDS, MASK), model(IDS, MASK))


# --- adapter folders: refused to save ---------------------------------------------------------------------------------

def no_adapter(model):
    return model


def merged(model):
    return merge(inject(model, LoraConfig(r=2)))


def full(model):
    return inject(model, FullConfig())


@pytest.mark.parametrize(("prepare", "message"), [(no_adapter, "carries no adapter"), (merged, "merged.*unmerge it"),
                                                  (full, "full has no adapter.*save_pretrained")])
def test_only_an_unmerged_adapter_can_be_saved(tiny_config, adapter, tmp_path, prepare, message):
    before = contents(adapter[0])
    for folder in (adapter[0], tmp_path / "new"):
        with pytest.raises(AdapterError, match=message):
            save_adapter(prepare(build(GPT2ForSequenceClassification, tiny_config)), folder)
    assert contents(adapter[0]) == before
    assert not (tmp_path / "new").exists()


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_older_adapter_and_no_other_file(tiny_config, adapter, monkeypatch):
    folder, _ = adapter
    before = contents(folder)

    def half_written(tensors, path, **_):
        Path(path).write_bytes(b"half")
        disk_full()

    for failing in (disk_full, half_written):
        monkeypatch.setattr(minipeft.methods.saving, "save_file", failing)
        with pytest.raises(OutputError, match=r"cannot write to .*adapter: the disk is full") as caught:
            save_adapter(inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig(r=3)), folder)
        assert "\n" not in str(caught.value)
        assert contents(folder) == before


def test_a_disk_that_fills_up_at_the_last_file_leaves_the_older_adapter(tiny_config, adapter, monkeypatch):
    folder, _ = adapter
    before, write_json = contents(folder), minipeft.methods.saving.write_json
    monkeypatch.setattr(minipeft.methods.saving, "write_json",
                        lambda path, content: disk_full() if path.name == DETAILS else write_json(path, content))
    with pytest.raises(OutputError, match="the disk is full"):
        save_adapter(inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig(r=3)), folder)
    assert contents(folder) == before


def test_a_disk_that_fills_up_at_the_second_of_two_methods_leaves_the_older_two(tiny_config, tmp_path, monkeypatch):
    model = inject_all(build(GPT2ForSequenceClassification, tiny_config), *COMBINED)
    save_adapter(model, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    monkeypatch.setattr(minipeft.methods.saving, "save_file",
                        lambda tensors, path, **rest: save_file(tensors, path, **rest)
                        if "prompt_embeddings" not in tensors else disk_full())
    with pytest.raises(OutputError, match="the disk is full"):
        save_adapter(perturb(model), tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize("below", ["", "/a/b"], ids=["the file itself", "below it"])
def test_a_place_that_cannot_be_a_folder_is_an_output_error(tiny_config, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    model = inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(r=2))
    with pytest.raises(OutputError, match=r"cannot write to .*file") as caught:
        save_adapter(model, f"{tmp_path}/file{below}")
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


LEFT_IN_THE_TREE = {name: config for name, config in CASES.items() if config.method not in ("head", "bitfit")}


@on([GPT2LMHeadModel, GPT2ForSequenceClassification], LEFT_IN_THE_TREE)
@pytest.mark.kind("5: save_pretrained refuses a model that carries an adapter")
def test_a_model_that_carries_an_adapter_is_not_saved_as_a_whole(tiny_config, tmp_path, model_class, config):
    """Neither library could read the folder."""
    model = inject(build(model_class, tiny_config), config)
    with pytest.raises(WeightsError, match=r"no part of a GPT2.*Merge an adapter .*with save_adapter") as told:
        model.save_pretrained(tmp_path / "whole")
    assert "\n" not in str(told.value) and not (tmp_path / "whole").exists()
    with disable_adapter(model):  # what is left then is the base model
        model.save_pretrained(tmp_path / "base")
        assert torch.equal(model_class.from_pretrained(tmp_path / "base")(IDS, MASK), model(IDS, MASK))


@on([GPT2ForSequenceClassification], {name: config for name, config in CASES.items() if name not in LEFT_IN_THE_TREE})
def test_a_method_that_changes_the_model_s_own_tensors_is_saved_as_a_whole(tiny_config, tmp_path, model_class, config):
    model = perturb(inject(build(model_class, tiny_config), config)).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(model_class.from_pretrained(tmp_path)(IDS, MASK), model(IDS, MASK))


# --- adapter folders: the meta device ---------------------------------------------------------------------------------

@on([GPT2ForSequenceClassification, GPT2LMHeadModel], {name: CASES[name] for name in ("lora", "ia3", "prompt")})
@pytest.mark.kind("5: an adapter injected on the meta device loads on its base")
def test_an_adapter_that_was_injected_on_meta_loads_on_the_base_that_it_got_later(
        tiny_config, tmp_path, model_class, config):
    base = build(model_class, tiny_config)
    with torch.device("meta"):
        model = inject(model_class(tiny_config), config)
    values = base.state_dict()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            known = values.get(name.replace(".base_layer", ""))
            tensor.copy_(0.1 * torch.randn(tensor.shape) if known is None else known)
    save_adapter(model, tmp_path)
    assert read_details(tmp_path)["base_fingerprint"] is None
    loaded = load_adapter(build(model_class, tiny_config), tmp_path)
    assert torch.equal(loaded(IDS, MASK), model.eval()(IDS, MASK))
    edit_json(tmp_path / DETAILS, base_fingerprint="")  # as it was written before
    assert torch.equal(load_adapter(build(model_class, tiny_config), tmp_path)(IDS, MASK), model(IDS, MASK))


def test_an_adapter_is_not_loaded_into_a_model_without_values(tiny_config, adapter):
    """They would be lost without a word."""
    with torch.device("meta"):
        model = GPT2ForSequenceClassification(tiny_config)
    with pytest.raises(InjectionError, match="is on the meta device and has no values: load its weights first"):
        load_adapter(model, adapter[0])
    assert not active_injections(model)


# --- adapter folders: refused to load ---------------------------------------------------------------------------------

def test_one_changed_embedding_row_is_another_base(tiny_config, adapter):
    other = build(GPT2ForSequenceClassification, tiny_config)
    with torch.no_grad():
        other.transformer.wte.weight[50] += 0.01
    assert_refused(tiny_config, adapter[0], AdapterError, "another base model", model=other)


def test_a_model_that_was_cast_saves_the_fingerprint_with_the_format_that_it_is_of(tiny_config, tmp_path):
    base = build(GPT2ForSequenceClassification, tiny_config)
    save_adapter(inject(copy.deepcopy(base), LoraConfig(r=2)).to(torch.bfloat16), tmp_path / "cast")
    save_adapter(inject(copy.deepcopy(base).to(torch.bfloat16), LoraConfig(r=2)), tmp_path / "half")
    for folder in ("cast", "half"):
        for model in (copy.deepcopy(base), copy.deepcopy(base).to(torch.bfloat16),
                      inject(copy.deepcopy(base), LoraConfig(r=2), "first").to(torch.bfloat16)):
            load_adapter(model, tmp_path / folder, "second")
    with torch.no_grad():
        base.transformer.wte.weight[50] += 0.01
    with pytest.raises(AdapterError, match="another base model"):
        load_adapter(base, tmp_path / "cast")


def test_another_head_is_not_another_base(tiny_config, adapter):
    """The head is trained, so its starting value does not matter; the base is the same."""
    folder, trained = adapter
    model = load_adapter(with_new_head(GPT2ForSequenceClassification, tiny_config), folder)
    assert torch.equal(model.score.weight, trained.score.weight)


@pytest.mark.parametrize("missing", [[CONFIG], [TENSORS], [CONFIG, TENSORS]])
def test_a_folder_without_its_files_is_no_adapter(tiny_config, adapter, missing):
    for name in missing:
        (adapter[0] / name).unlink()
    assert_refused(tiny_config, adapter[0], AdapterError, f"holds no {missing[0]}: it is not an adapter folder")


@pytest.mark.parametrize("place", ["not/there", "adapter/adapter_config.json"])
def test_a_path_that_is_no_folder_is_no_adapter(tiny_config, tmp_path, adapter, place):
    assert_refused(tiny_config, tmp_path / place, AdapterError, "it is not an adapter folder")


class Malicious:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickled_adapter_is_never_read(tiny_config, adapter, tmp_path):
    folder, _ = adapter
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    load_adapter(build(GPT2ForSequenceClassification, tiny_config), folder)  # beside the safetensors file: ignored
    (folder / TENSORS).unlink()
    assert_refused(tiny_config, folder, AdapterError, f"holds no {TENSORS}")
    (folder / "adapter_model.bin").rename(folder / TENSORS)
    assert_refused(tiny_config, folder, AdapterError, "not a safetensors file")
    assert not (tmp_path / "executed").exists()
    pickle.loads((folder / TENSORS).read_bytes())
    assert (tmp_path / "executed").exists()  # it would have worked


@pytest.mark.parametrize("keep", [0, 5, 8, 200, 0.5, -1], ids="{} bytes kept".format)
def test_a_truncated_tensor_file_is_named(tiny_config, adapter, keep):
    path = adapter[0] / TENSORS
    content = path.read_bytes()
    path.write_bytes(content[:int(keep * len(content)) if isinstance(keep, float) else keep])
    assert_refused(tiny_config, adapter[0], AdapterError, rf"{TENSORS} is truncated or not a safetensors file")


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b'{"r": 8',
                                     pytest.param(b"[" * 100_000, id="nested too deep")])
@pytest.mark.parametrize("file", [CONFIG, DETAILS])
def test_a_damaged_json_file_is_named(tiny_config, adapter, file, content):
    (adapter[0] / file).write_bytes(content)
    assert_refused(tiny_config, adapter[0], AdapterError, rf"{file} is not (readable|a) JSON")


def missing_a(tensors):
    del tensors[f"{P}h.1.attn.c_attn.lora_A.weight"]


def missing_head(tensors):
    del tensors["base_model.model.score.weight"]


def without_prefix(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)


def extra_block(tensors):
    tensors[f"{P}h.2.attn.c_attn.lora_A.weight"] = torch.zeros(2, 24)


def base_weight(tensors):
    tensors[f"{P}ln_f.weight"] = torch.zeros(24)


def other_rank(tensors):
    tensors[f"{P}h.0.attn.c_attn.lora_B.weight"] = torch.zeros(72, 3)


def transposed(tensors):
    name = f"{P}h.0.attn.c_attn.lora_B.weight"
    tensors[name] = tensors[name].t().contiguous()


def more_labels(tensors):
    tensors["base_model.model.score.weight"] = torch.zeros(5, 24)


def not_a_number(tensors):
    tensors[f"{P}h.0.attn.c_attn.lora_A.weight"][1, 3] = float("nan")


def infinite(tensors):
    tensors["base_model.model.score.weight"][0, 0] = float("inf")


def integers(tensors):
    tensors["base_model.model.score.weight"] = torch.ones(2, 24, dtype=torch.int64)


@pytest.mark.parametrize(("change", "message"), [
    (missing_a, r"missing base_model\.model\.transformer\.h\.1\.attn\.c_attn\.lora_A\.weight"),
    (missing_head, r"missing base_model\.model\.score\.weight"),
    (without_prefix, r"missing base_model\.model\.transformer.*and 4 more"),
    (extra_block, r"unexpected base_model\.model\.transformer\.h\.2\.attn\.c_attn\.lora_A\.weight"),
    (base_weight, r"unexpected base_model\.model\.transformer\.ln_f\.weight"),
    (other_rank, r"h\.0\.attn\.c_attn\.lora_B\.weight is \(72, 3\), this model needs \(72, 2\)"),
    (transposed, r"h\.0\.attn\.c_attn\.lora_B\.weight is \(2, 72\), this model needs \(72, 2\)"),
    (more_labels, r"score\.weight is \(5, 24\), this model needs \(2, 24\)"),
    (not_a_number, r"h\.0\.attn\.c_attn\.lora_A\.weight holds NaN or infinity"),
    (infinite, r"score\.weight holds NaN or infinity"),
    (integers, r"score\.weight holds torch\.int64, not floating point"),
])
def test_tensors_that_do_not_fit_are_named(tiny_config, adapter, change, message):
    edit_tensors(adapter[0] / TENSORS, change)
    assert_refused(tiny_config, adapter[0], AdapterError, message)


@pytest.mark.parametrize("error", [MemoryError, RecursionError, KeyboardInterrupt])
@pytest.mark.parametrize("carries", [True, False])
def test_whatever_ends_a_load_leaves_the_model_as_it_was(tiny_config, adapter, monkeypatch, error, carries):
    model = build(GPT2ForSequenceClassification, tiny_config)
    if carries:
        perturb(inject(model, BitFitConfig(), "first"))
    before = snapshot(model)

    def end(*arguments):
        raise error

    monkeypatch.setattr(minipeft.methods.saving, "_fill", end)
    with pytest.raises(error):
        load_adapter(model, adapter[0], "second")
    assert_unchanged(model, before)


def test_all_problems_are_told_at_once(tiny_config, adapter):
    def spoil(tensors):
        missing_a(tensors)
        extra_block(tensors)
        not_a_number(tensors)

    edit_tensors(adapter[0] / TENSORS, spoil)
    assert_refused(tiny_config, adapter[0], AdapterError, r"missing .*h\.1.*; unexpected .*h\.2.*; .*h\.0.* NaN")


def test_an_lm_adapter_is_refused_by_a_classifier(tiny_config, tmp_path):
    save_adapter(inject(build(GPT2LMHeadModel, tiny_config), LoraConfig(r=2)), tmp_path)
    assert_refused(tiny_config, tmp_path, AdapterError, "was trained for CAUSAL_LM, this model is for SEQ_CLS")


def test_a_classifier_adapter_without_task_and_head_is_refused(tiny_config, adapter):
    """peft would go on with a random head."""
    edit_json(adapter[0] / CONFIG, task_type=None)
    edit_tensors(adapter[0] / TENSORS, missing_head)
    assert_refused(tiny_config, adapter[0], AdapterError, r"missing base_model\.model\.score\.weight")


@pytest.mark.parametrize("kind", ["ADALORA", "", "lora", None, 3, ["LORA"]])
def test_an_unknown_peft_type_is_refused_with_the_known_ones(tiny_config, adapter, kind):
    edit_json(adapter[0] / CONFIG, peft_type=kind)
    assert_refused(tiny_config, adapter[0], AdapterError, rf"peft_type {re.escape(repr(kind))}; known are .*LORA")


@pytest.mark.parametrize(("field", "value"), [
    ("lora_bias", True), ("layer_replication", [[0, 2], [1, 2]]), ("target_parameters", ["w"]),
    ("trainable_token_indices", [1, 2]), ("alora_invocation_tokens", [5]), ("arrow_config", {"top_k": 1}),
    ("use_bdlora", True), ("velora_config", {"x": 1}), ("kasa_config", {"x": 1}), ("monteclora_config", {"x": 1}),
    ("megatron_config", {"x": 1}), ("ensure_weight_tying", True), ("corda_config", {"x": 1}),
    ("a_field_of_tomorrow", 1)])
def test_a_field_that_changes_the_numbers_and_is_not_implemented_is_refused_by_name(
        tiny_config, adapter, field, value):
    edit_json(adapter[0] / CONFIG, **{field: value})
    assert_refused(tiny_config, adapter[0], ConfigError, rf"sets {field}=.*does not implement")


@pytest.mark.parametrize("value", ["pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "tomorrow"])
def test_an_initialisation_that_changes_the_base_is_refused(tiny_config, adapter, value):
    edit_json(adapter[0] / CONFIG, init_lora_weights=value)
    assert_refused(tiny_config, adapter[0], ConfigError, f"init_lora_weights.*{value}")


@pytest.mark.parametrize("fields", [
    {"init_lora_weights": "eva"}, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "mica"},
    {"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"megatron_core": "megatron.core"},
    {"qalora_group_size": 16}, {"loftq_config": {}}, {"eva_config": None}, {"revision": "main"}, {"use_dora": False},
    {"auto_mapping": {"base_model_class": "x"}}, {"peft_version": "0.21.2"}, {"layer_replication": None},
    {"base_model_name_or_path": "elsewhere"}, {"fan_in_fan_out": False}, {"rank_pattern": None},
    {"a_field_of_tomorrow": None}], ids=str)
def test_fields_that_change_no_number_are_accepted(tiny_config, adapter, fields):
    folder, trained = adapter
    edit_json(folder / CONFIG, **fields)
    model = load_adapter(build(GPT2ForSequenceClassification, tiny_config), folder)
    assert torch.equal(model(IDS, MASK), trained.eval()(IDS, MASK))


def test_the_smallest_config_means_the_defaults(tiny_config, tmp_path):
    model = perturb(inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig()))
    save_adapter(model, tmp_path)
    changed_by_hand(tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "task_type": "SEQ_CLS"}')
    loaded = load_adapter(build(GPT2ForSequenceClassification, tiny_config), tmp_path)
    assert torch.equal(loaded(IDS, MASK), model.eval()(IDS, MASK))


@pytest.mark.parametrize("fields", [
    {"r": "2"}, {"r": 2.0}, {"r": 0}, {"r": [2]}, {"lora_alpha": float("nan")}, {"lora_alpha": "6"},
    {"lora_dropout": 1}, {"bias": []}, {"target_modules": ["q_proj"]}, {"target_modules": "("}, {"target_modules": []},
    {"target_modules": ["wte"]}, {"layers_to_transform": [7]}, {"layers_pattern": "h"},
    {"alpha_pattern": {"c_attn": "6"}}, {"init_lora_weights": [1]}, {"init_lora_weights": {}},
    {"layers_to_transform": "0"},
    {"target_modules": 5},
    {"target_modules": [None]},
    {"exclude_modules": 5},
    {"layers_to_transform": 1.5},
    {"rank_pattern": [2]},
    {"rank_pattern": {"(": 2}},
    {"alpha_pattern": [1]},
    {"use_rslora": "false"},
], ids=str)
def test_a_config_with_a_bad_value_is_refused(tiny_config, adapter, fields):
    edit_json(adapter[0] / CONFIG, **fields)
    assert_refused(tiny_config, adapter[0], MinipeftError, ".")


@pytest.mark.parametrize("fields", [{"r": 3}, {"target_modules": ["c_attn", "c_fc"]}, {"layers_to_transform": 0},
                                    {"bias": "lora_only"}, {"rank_pattern": {"c_attn": 1}}, {"use_dora": True}],
                         ids=str)
def test_a_config_that_contradicts_the_tensors_is_refused(tiny_config, adapter, fields):
    edit_json(adapter[0] / CONFIG, **fields)
    assert_refused(tiny_config, adapter[0], AdapterError, "does not fit this model")
