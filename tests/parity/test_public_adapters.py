"""Adapters as they lie about in public: pickled, with a configuration that says what does not matter, among a
trainer's files. They are the same functions here as in peft."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from parity_helpers import (
    TASKS,
    assert_close,
    batches,
    inject_theirs,
    load_theirs,
    logits_of,
    move,
    real_logits,
    save_theirs,
    silent,
    write_pair,
    write_trainer_files,
)
from safetensors.torch import load_file, save_file

from minipeft import load_adapter, save_adapter
from minipeft.errors import AdapterError, OutputError
from minipeft.methods.folder import CONFIG_FILE, PICKLED_FILE, TENSORS_FILE, convert

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, on its own attributes
EACH_TASK = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The same tiny model for each task in both libraries, written once."""
    return {task: write_pair(tmp_path_factory.mktemp("pairs") / task, task) for task in TASKS}


@pytest.fixture
def said(caplog):
    """said(): what the library has logged, a line each."""
    caplog.set_level(logging.WARNING, logger="minipeft")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("minipeft")]


def pickled(pair, method, task, folder, **changes):
    """An adapter that peft trained and pickled, with changes to its configuration; returns (folder, peft's model)."""
    theirs = inject_theirs(pair, method, task)
    save_theirs(theirs, folder, safe_serialization=False)
    edit(folder, **changes)
    return folder, theirs


def edit(folder, **changes):
    content = {**json.loads((folder / CONFIG_FILE).read_text()), **changes}
    (folder / CONFIG_FILE).write_text(json.dumps(content))


def assert_same_logits(ours, theirs, method, task):
    for batch in batches(method, task):
        assert_close(real_logits(ours, task, batch), real_logits(theirs, task, batch), 1e-5)


# --- pickled ----------------------------------------------------------------------------------------------------------

@EACH_TASK
@pytest.mark.parametrize("method", ["LoRA", "rsLoRA", "DoRA", "(IA)^3", "VeRA", "prompt tuning", "P-tuning, MLP",
                                    "prefix tuning"])
@pytest.mark.kind("6: adapter_model.bin gives peft's logits")
def test_an_adapter_that_peft_pickled_is_the_same_function_here(pairs, tmp_path, said, method, task):
    folder, theirs = pickled(pairs[task], method, task, tmp_path)
    assert (folder / PICKLED_FILE).is_file() and not (folder / TENSORS_FILE).exists()
    assert_same_logits(load_adapter(pairs[task].ours(), folder), theirs, method, task)
    assert said() == []


@pytest.mark.parametrize("change", [torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.double, torch.nn.Parameter,
                                    lambda tensor: tensor.t().contiguous().t()],
                         ids=["float16", "bfloat16", "float64", "parameters", "turned"])
def test_tensors_of_other_types_and_layouts_mean_the_same_as_in_peft(pairs, tmp_path, change):
    folder, _ = pickled(pairs["SEQ_CLS"], "LoRA", "SEQ_CLS", tmp_path)
    tensors = torch.load(folder / PICKLED_FILE, weights_only=True)
    torch.save({name: change(tensor) for name, tensor in tensors.items()}, folder / PICKLED_FILE)
    theirs = load_theirs(pairs["SEQ_CLS"], folder)
    assert_same_logits(load_adapter(pairs["SEQ_CLS"].ours(), folder), theirs, "LoRA", "SEQ_CLS")


def test_views_of_one_storage_are_read_as_in_peft(pairs, tmp_path):
    """As one gets them from parameters that lay flat in one tensor."""
    folder, theirs = pickled(pairs["SEQ_CLS"], "LoRA", "SEQ_CLS", tmp_path)
    tensors = torch.load(folder / PICKLED_FILE, weights_only=True)
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    views = dict(zip(tensors, flat.split([tensor.numel() for tensor in tensors.values()])))
    torch.save({name: views[name].view(tensor.shape) for name, tensor in tensors.items()}, folder / PICKLED_FILE)
    assert_same_logits(load_adapter(pairs["SEQ_CLS"].ours(), folder), theirs, "LoRA", "SEQ_CLS")


def test_wrappers_names_are_seen_through_and_two_tensors_of_one_name_are_refused(pairs, tmp_path):
    folder, theirs = pickled(pairs["SEQ_CLS"], "LoRA", "SEQ_CLS", tmp_path)
    tensors = torch.load(folder / PICKLED_FILE, weights_only=True)
    for prefix in ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod."):
        named = {name.replace("base_model.model.", f"base_model.model.{prefix}"): tensor
                 for name, tensor in tensors.items()}
        torch.save(named, folder / PICKLED_FILE)
        assert_same_logits(load_adapter(pairs["SEQ_CLS"].ours(), folder), theirs, "LoRA", "SEQ_CLS")
    torch.save({**tensors, **named}, folder / PICKLED_FILE)
    with pytest.raises(AdapterError, match=r"twice, once as base_model\.model\.module"):
        load_adapter(pairs["SEQ_CLS"].ours(), folder)


def test_names_without_peft_s_prefix_are_refused_by_name(pairs, tmp_path):
    """peft would go on with an adapter that does nothing."""
    folder, _ = pickled(pairs["CAUSAL_LM"], "LoRA", "CAUSAL_LM", tmp_path)
    tensors = torch.load(folder / PICKLED_FILE, weights_only=True)
    torch.save({name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()},
               folder / PICKLED_FILE)
    with pytest.raises(AdapterError, match=rf"{PICKLED_FILE} does not fit this model: missing base_model\.model"):
        load_adapter(pairs["CAUSAL_LM"].ours(), folder)


def test_where_both_files_are_the_safetensors_file_is_read_as_in_peft_and_that_is_said(pairs, tmp_path, said):
    folder, theirs = pickled(pairs["CAUSAL_LM"], "LoRA", "CAUSAL_LM", tmp_path)
    tensors = torch.load(folder / PICKLED_FILE, weights_only=True)
    save_file(tensors, folder / TENSORS_FILE)
    torch.save({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, folder / PICKLED_FILE)
    assert_same_logits(load_adapter(pairs["CAUSAL_LM"].ours(), folder), theirs, "LoRA", "CAUSAL_LM")
    assert said() == [f"{folder}: {PICKLED_FILE} is ignored, since {TENSORS_FILE} is there"]


def test_saving_beside_a_pickled_file_leaves_it_and_both_libraries_read_what_was_saved(pairs, tmp_path):
    folder, _ = pickled(pairs["SEQ_CLS"], "LoRA", "SEQ_CLS", tmp_path)
    before = (folder / PICKLED_FILE).read_bytes()
    ours = move(load_adapter(pairs["SEQ_CLS"].ours(), folder), seed=9)
    save_adapter(ours, folder)
    assert (folder / PICKLED_FILE).read_bytes() == before
    assert_same_logits(load_adapter(pairs["SEQ_CLS"].ours(), folder), ours, "LoRA", "SEQ_CLS")
    assert_same_logits(load_theirs(pairs["SEQ_CLS"], folder), ours, "LoRA", "SEQ_CLS")
    (folder / TENSORS_FILE).unlink()  # the account names it: the older file is another adapter's
    with pytest.raises(AdapterError, match=f"holds no {TENSORS_FILE}"):
        load_adapter(pairs["SEQ_CLS"].ours(), folder)


# --- configurations of older versions ---------------------------------------------------------------------------------

COMMON = {"base_model_name_or_path": "gpt2", "inference_mode": True}
LORA = {**COMMON, "peft_type": "LORA", "bias": "none", "fan_in_fan_out": True, "lora_alpha": 8, "lora_dropout": 0.1,
        "modules_to_save": None, "r": 4}
VIRTUAL = {**COMMON, "num_attention_heads": 3, "num_layers": 3, "num_transformer_submodules": 1,
           "num_virtual_tokens": 5, "token_dim": 24}
# The keys that each version wrote; the values are those of the small adapters here.
OLD = {
    "0.2": ("LoRA", {**LORA, "enable_lora": None, "merge_weights": False, "target_modules": ["c_attn"]}),
    "0.3": ("LoRA", {**LORA, "fan_in_fan_out": False, "init_lora_weights": True, "target_modules": ["c_attn"]}),
    "0.4": ("LoRA", {**LORA, "auto_mapping": None, "init_lora_weights": True, "layers_pattern": None,
                     "layers_to_transform": None, "revision": None, "target_modules": ["c_attn"]}),
    "0.8": ("LoRA", {**LORA, "alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {}, "megatron_config": None,
                     "megatron_core": "megatron.core", "use_rslora": False, "target_modules": ["c_attn"]}),
    "0.10": ("DoRA", {**LORA, "layer_replication": None, "use_dora": True, "use_rslora": False,
                      "target_modules": ["c_attn"]}),
    "IA3, 0.3": ("(IA)^3", {**COMMON, "peft_type": "IA3", "fan_in_fan_out": True, "feedforward_modules": ["mlp.c_proj"],
                            "init_ia3_weights": True, "modules_to_save": None,
                            "target_modules": ["c_attn", "mlp.c_proj"]}),
    "prompt, 0.3": ("prompt tuning", {**VIRTUAL, "peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT",
                                      "prompt_tuning_init_text": "Classify if the tweet is a complaint or not:",
                                      "tokenizer_name_or_path": "gpt2"}),
    "P-tuning, 0.3": ("P-tuning, MLP", {**VIRTUAL, "peft_type": "P_TUNING", "encoder_dropout": 0.0,
                                        "encoder_hidden_size": 128, "encoder_num_layers": 2,
                                        "encoder_reparameterization_type": "MLP"}),
    "prefix, 0.3": ("prefix tuning", {**VIRTUAL, "peft_type": "PREFIX_TUNING", "encoder_hidden_size": 24,
                                      "prefix_projection": False}),
}


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize(("method", "config"), OLD.values(), ids=OLD)
def test_configurations_of_older_versions_of_peft_mean_the_same(pairs, tmp_path, said, task, method, config):
    folder, theirs = pickled(pairs[task], method, task, tmp_path)
    kept = ["classifier", "score"] if task == "SEQ_CLS" and "modules_to_save" in config else None
    old = {**config, "task_type": task, **({"modules_to_save": kept} if "modules_to_save" in config else {})}
    (folder / CONFIG_FILE).write_text(json.dumps(old))
    assert_same_logits(load_adapter(pairs[task].ours(), folder), theirs, method, task)
    assert said() == []


# --- configurations that say what does not matter ---------------------------------------------------------------------

@pytest.mark.parametrize("named", [["classifier"], ["classifier", "score"], "classifier"], ids=str)
@pytest.mark.kind("6: modules_to_save that matches nothing loads, and is said")
def test_modules_to_save_that_match_nothing_are_said(pairs, tmp_path, said, named):
    folder, theirs = pickled(pairs["CAUSAL_LM"], "LoRA", "CAUSAL_LM", tmp_path, modules_to_save=named)
    assert_same_logits(load_adapter(pairs["CAUSAL_LM"].ours(), folder), theirs, "LoRA", "CAUSAL_LM")
    words = "classifier, score" if len(named) == 2 else "classifier"
    assert said() == [f"{folder}: modules_to_save {words} is ignored, since {PICKLED_FILE} holds no such module"]


def test_of_the_two_heads_that_peft_names_the_missing_one_is_not_told(pairs, tmp_path, said):
    folder, _ = pickled(pairs["SEQ_CLS"], "LoRA", "SEQ_CLS", tmp_path,
                        modules_to_save=["classifier", "score", "pooler", "score"])
    load_adapter(pairs["SEQ_CLS"].ours(), folder)
    assert said() == [f"{folder}: modules_to_save pooler is ignored, since {PICKLED_FILE} holds no such module"]


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.kind("6: task_type null and auto_mapping load, and are said")
def test_an_adapter_without_a_task_is_taken_for_the_model_s(pairs, tmp_path, said, task):
    """peft writes auto_mapping where it is told no task."""
    peft = pytest.importorskip("peft")
    kept = ["score"] if task == "SEQ_CLS" else None
    with silent():
        theirs = move(peft.get_peft_model(pairs[task].theirs(), peft.LoraConfig(r=4, modules_to_save=kept))).eval()
    save_theirs(theirs, tmp_path, safe_serialization=False)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["task_type"] is None and config["auto_mapping"]
    assert_same_logits(load_adapter(pairs[task].ours(), tmp_path), theirs, "LoRA", task)
    held = "holds the score of" if kept else "fits"
    assert said() == [f"{tmp_path}: task_type null is ignored, since the adapter {held} a {task} model; auto_mapping "
                      "is ignored, since the model is there already"]


@pytest.mark.parametrize(("task", "says"), [("SEQ_CLS", "CAUSAL_LM"), ("TOKEN_CLS", "SEQ_CLS"),
                                            ("CAUSAL_LM", "SEQ_CLS"), ("CAUSAL_LM", "SEQ_2_SEQ_LM")])
@pytest.mark.kind("6: an adapter that says another task than its tensors are for loads, and is said")
def test_where_the_task_and_the_tensors_disagree_the_tensors_decide(pairs, tmp_path, said, task, says):
    folder, theirs = pickled(pairs[task], "LoRA", task, tmp_path, task_type=says)
    assert_same_logits(load_adapter(pairs[task].ours(), folder), theirs, "LoRA", task)
    held = {"SEQ_CLS": "holds the score of", "TOKEN_CLS": "holds the classifier of"}.get(task, "fits")
    assert said() == [f"{folder}: task_type {says} is ignored, since the adapter {held} a {task} model"]


@pytest.mark.parametrize(("task", "says", "model", "told"), [
    ("SEQ_CLS", "CAUSAL_LM", "TOKEN_CLS", "was trained for SEQ_CLS, this model is for TOKEN_CLS"),
    ("SEQ_CLS", "CAUSAL_LM", "CAUSAL_LM", r"unexpected base_model\.model\.score\.weight"),
    ("SEQ_CLS", None, "TOKEN_CLS", "was trained for SEQ_CLS, this model is for TOKEN_CLS"),
    ("CAUSAL_LM", "CAUSAL_LM", "SEQ_CLS", "was trained for CAUSAL_LM, this model is for SEQ_CLS"),
    ("CAUSAL_LM", "SEQ_CLS", "SEQ_CLS", r"missing base_model\.model\.score\.weight"),
    ("CAUSAL_LM", None, "SEQ_CLS", r"missing base_model\.model\.score\.weight")])
def test_an_adapter_of_another_model_is_refused_and_nothing_else_is_said(
        pairs, tmp_path, said, task, says, model, told):
    folder, _ = pickled(pairs[task], "LoRA", task, tmp_path, task_type=says)
    with pytest.raises(AdapterError, match=told):
        load_adapter(pairs[model].ours(), folder)
    assert said() == []


def test_virtual_tokens_are_for_the_task_that_they_say_unless_a_head_is_there(pairs, tmp_path, said):
    folder, theirs = pickled(pairs["SEQ_CLS"], "prefix tuning", "SEQ_CLS", tmp_path / "cls", task_type="CAUSAL_LM")
    assert_same_logits(load_adapter(pairs["SEQ_CLS"].ours(), folder), theirs, "prefix tuning", "SEQ_CLS")
    assert len(said()) == 1
    folder, _ = pickled(pairs["CAUSAL_LM"], "prefix tuning", "CAUSAL_LM", tmp_path / "lm", task_type="SEQ_CLS")
    with pytest.raises(AdapterError, match="was trained for SEQ_CLS, this model is for CAUSAL_LM"):
        load_adapter(pairs["CAUSAL_LM"].ours(), folder)


# --- a trainer's folder -----------------------------------------------------------------------------------------------

@EACH_TASK
@pytest.mark.kind("6: a checkpoint folder of transformers' Trainer loads its adapter")
def test_a_trainer_s_checkpoint_loads_its_adapter(pairs, tmp_path, said, task):
    folder, theirs = pickled(pairs[task], "LoRA", task, tmp_path / "checkpoint-100")
    write_trainer_files(folder, theirs)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert_same_logits(load_adapter(pairs[task].ours(), folder), theirs, "LoRA", task)
    assert said() == [] and {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_what_a_trainer_really_leaves_loads(pairs, tmp_path):
    """Two steps of transformers' own Trainer, so that the files above are not only what we believe they are."""
    transformers = pytest.importorskip("transformers")
    theirs = inject_theirs(pairs["SEQ_CLS"], "LoRA", "SEQ_CLS").train()
    rows = [{"input_ids": row, "attention_mask": mask, "labels": torch.tensor(i)}
            for i, (row, mask) in enumerate(zip(*next(batches("LoRA", "SEQ_CLS"))))]
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=2, save_steps=1, report_to=[],
                                               per_device_train_batch_size=3, use_cpu=True, disable_tqdm=True)
    with silent():
        transformers.Trainer(theirs, arguments, train_dataset=rows).train()
    folder = tmp_path / "checkpoint-2"
    assert {"rng_state.pth", "training_args.bin", "optimizer.pt", CONFIG_FILE} <= {p.name for p in folder.iterdir()}
    assert_same_logits(load_adapter(pairs["SEQ_CLS"].ours(), folder), theirs.eval(), "LoRA", "SEQ_CLS")


# --- converted --------------------------------------------------------------------------------------------------------

@EACH_TASK
@pytest.mark.parametrize("method", ["LoRA", "prefix tuning"])
@pytest.mark.kind("6: adapter_model.bin is converted to safetensors")
def test_a_converted_adapter_is_the_same_function_in_both_libraries(pairs, tmp_path, method, task):
    folder, theirs = pickled(pairs[task], method, task, tmp_path / "pickled")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    written = convert(folder, tmp_path / "new" / "converted")
    assert written == [tmp_path / "new" / "converted" / name for name in (TENSORS_FILE, CONFIG_FILE)]
    assert {path.name for path in written[0].parent.iterdir()} == {TENSORS_FILE, CONFIG_FILE}
    assert written[1].read_bytes() == before[CONFIG_FILE]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert_same_logits(load_adapter(pairs[task].ours(), written[0].parent), theirs, method, task)
    assert_same_logits(load_theirs(pairs[task], written[0].parent), theirs, method, task)


def test_a_converted_file_holds_the_same_tensors_bit_for_bit_each_of_its_own(tmp_path):
    A = torch.randn(4, 6)
    tensors = {"base_model.model.a": A.t(), "base_model.model.b": A, "base_model.model.c": A[1].bfloat16(),
               "base_model.model.d": torch.nn.Parameter(A[::2].half()), "base_model.model.e": A}
    torch.save(tensors, tmp_path / PICKLED_FILE)
    (tmp_path / CONFIG_FILE).write_text('{"peft_type": "LORA"}')
    assert convert(tmp_path, tmp_path) == [tmp_path / TENSORS_FILE]  # in its own folder
    found = load_file(tmp_path / TENSORS_FILE)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    assert (tmp_path / PICKLED_FILE).is_file()


def test_nothing_is_overwritten_by_a_conversion(pairs, tmp_path):
    folder, _ = pickled(pairs["SEQ_CLS"], "LoRA", "SEQ_CLS", tmp_path / "pickled")
    other, _ = pickled(pairs["SEQ_CLS"], "(IA)^3", "SEQ_CLS", tmp_path / "other")
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    with pytest.raises(OutputError, match=f"other holds {CONFIG_FILE} already: choose another folder"):
        convert(folder, other)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    convert(folder, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(AdapterError, match=f"holds {TENSORS_FILE}: there is nothing to convert"):
        convert(folder, tmp_path / "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("missing", "told"), [(PICKLED_FILE, f"holds no {PICKLED_FILE}: there is nothing to convert"),
                                               (CONFIG_FILE, f"holds no {CONFIG_FILE}")])
def test_a_folder_without_its_files_is_not_converted(pairs, tmp_path, missing, told):
    folder, _ = pickled(pairs["SEQ_CLS"], "LoRA", "SEQ_CLS", tmp_path / "pickled")
    (folder / missing).unlink()
    with pytest.raises(AdapterError, match=told):
        convert(folder, tmp_path / "new")
    shutil.rmtree(folder)
    with pytest.raises(AdapterError, match="there is nothing to convert"):
        convert(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@torch.no_grad()
def test_the_tests_see_a_difference(pairs, tmp_path):
    """Otherwise equal logits would say nothing."""
    _, theirs = pickled(pairs["SEQ_CLS"], "LoRA", "SEQ_CLS", tmp_path)
    for batch in batches("LoRA", "SEQ_CLS"):
        base = logits_of(pairs["SEQ_CLS"].ours(), "SEQ_CLS", batch)
        assert (logits_of(theirs, "SEQ_CLS", batch) - base).abs().max() > 0.1
