"""folder.py: a save deletes what an earlier one wrote and nothing else, and files of two saves are never mixed."""

from __future__ import annotations

import json
import multiprocessing
import struct

import pytest
import torch
from models import IDS, MASK, build, inject_all, perturb, with_new_head

from minipeft import (
    GPT2ForSequenceClassification,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    inject,
    load_adapter,
    save_adapter,
)
from minipeft.errors import AdapterError
from minipeft.methods.folder import CONFIG_FILE, DETAILS_FILE, TENSORS_FILE

PREFIX = PrefixTuningConfig(num_virtual_tokens=3)


def trained(config, *configs, seed=0):
    return perturb(inject_all(build(GPT2ForSequenceClassification, config), *configs), seed=seed)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- nothing else is deleted ------------------------------------------------------------------------------------------

@pytest.mark.kind("0: saving deletes only what it wrote")
@pytest.mark.parametrize("below", ["lora", "prefix", "full", "mine"])
def test_an_adapter_saved_above_another_ones_folder_leaves_it_alone(tiny_config, tmp_path, below):
    """`--output runs` after `--output runs/lora`."""
    save_adapter(trained(tiny_config, IA3Config()), tmp_path / "runs" / below)
    before = files(tmp_path / "runs" / below)
    save_adapter(trained(tiny_config, LoraConfig(r=2)), tmp_path / "runs")
    assert files(tmp_path / "runs" / below) == before
    combination = trained(tiny_config, LoraConfig(r=2, target_modules=["c_fc"]), PREFIX)
    if below in ("lora", "prefix"):
        with pytest.raises(AdapterError, match=f"{below} holds an adapter of its own"):
            save_adapter(combination, tmp_path / "runs")
    else:
        save_adapter(combination, tmp_path / "runs")
    assert files(tmp_path / "runs" / below) == before


def test_a_combination_is_followed_by_one_method_without_anything_of_it_left(tiny_config, tmp_path):
    save_adapter(trained(tiny_config, LoraConfig(r=2), PREFIX), tmp_path)
    (tmp_path / "lora" / "notes.txt").write_text("mine")
    save_adapter(trained(tiny_config, IA3Config()), tmp_path)
    assert set(files(tmp_path)) == {CONFIG_FILE, TENSORS_FILE, DETAILS_FILE, "lora/notes.txt"}
    assert not (tmp_path / "prefix").exists()


@pytest.mark.kind("0: saving deletes only what it wrote")
def test_what_a_link_leads_to_is_not_deleted(tiny_config, tmp_path):
    save_adapter(trained(tiny_config, LoraConfig(r=2), PREFIX), tmp_path / "runs")
    (tmp_path / "runs" / "prefix").rename(tmp_path / "elsewhere")
    (tmp_path / "runs" / "prefix").symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    save_adapter(trained(tiny_config, IA3Config()), tmp_path / "runs")
    assert files(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("parts", [["../elsewhere"], ["/etc"], [".."], [5], "lora", []])
def test_an_account_that_names_other_places_is_refused_and_not_followed(tiny_config, tmp_path, parts):
    save_adapter(trained(tiny_config, IA3Config()), tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / DETAILS_FILE).write_text(json.dumps({"parts": parts}))
    with pytest.raises(AdapterError, match="parts must be a list of sub-folders' names"):
        load_adapter(build(GPT2ForSequenceClassification, tiny_config), tmp_path / "runs")
    save_adapter(trained(tiny_config, LoraConfig(r=2)), tmp_path / "runs")
    assert files(tmp_path / "elsewhere") == before


# --- one save ---------------------------------------------------------------------------------------------------------

@pytest.mark.kind("0: a folder changes as a whole")
@pytest.mark.parametrize("mixed", [CONFIG_FILE, TENSORS_FILE])
def test_files_of_two_saves_are_refused_by_name(tiny_config, tmp_path, mixed):
    """What a process leaves that is killed between two renames."""
    for name, alpha in (("old", 4), ("new", 8)):
        save_adapter(trained(tiny_config, LoraConfig(r=2, lora_alpha=alpha), seed=alpha), tmp_path / name)
    (tmp_path / "old" / mixed).write_bytes((tmp_path / "new" / mixed).read_bytes())
    with pytest.raises(AdapterError, match=f"holds files of different saves: {mixed} is not what"):
        load_adapter(build(GPT2ForSequenceClassification, tiny_config), tmp_path / "old")


def test_an_adapter_without_an_account_loads_as_peft_wrote_it(tiny_config, tmp_path):
    model = trained(tiny_config, LoraConfig(r=2))
    save_adapter(model, tmp_path)
    (tmp_path / DETAILS_FILE).unlink()
    loaded = load_adapter(with_new_head(GPT2ForSequenceClassification, tiny_config), tmp_path)
    assert torch.equal(loaded(IDS, MASK), model.eval()(IDS, MASK))


def test_a_combination_saved_before_there_were_accounts_still_loads(tiny_config, tmp_path):
    model = trained(tiny_config, LoraConfig(r=2), PREFIX)
    save_adapter(model, tmp_path)
    (tmp_path / DETAILS_FILE).unlink()
    loaded = load_adapter(with_new_head(GPT2ForSequenceClassification, tiny_config), tmp_path)
    assert torch.equal(loaded(IDS, MASK), model.eval()(IDS, MASK))


def test_a_tensor_of_a_type_that_safetensors_does_not_know_is_named(tiny_config, tmp_path):
    save_adapter(trained(tiny_config, LoraConfig(r=2)), tmp_path)
    (tmp_path / DETAILS_FILE).unlink()
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / TENSORS_FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    with pytest.raises(AdapterError, match=rf"{TENSORS_FILE} holds a tensor of type 'F8_E8M0', which is not read here"):
        load_adapter(build(GPT2ForSequenceClassification, tiny_config), tmp_path)


def save_in_turns(folder, config, ended):
    """Two adapters, saved over each other until told to end; alpha tells which tensors belong to it."""
    torch.set_num_threads(1)
    models = []
    for alpha in (4, 8):
        model = inject(build(GPT2ForSequenceClassification, config), LoraConfig(r=2, lora_alpha=alpha))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.fill_(alpha)
        models.append(model)
    while not ended.is_set():
        for model in models:
            save_adapter(model, folder)


@pytest.mark.kind("0: a folder changes as a whole")
def test_a_reader_beside_a_writer_never_gets_one_config_with_the_others_tensors(tiny_config, tmp_path):
    save_adapter(inject(build(GPT2ForSequenceClassification, tiny_config), LoraConfig(r=2, lora_alpha=4)), tmp_path)
    processes = multiprocessing.get_context("spawn")
    ended, loads = processes.Event(), 0
    writer = processes.Process(target=save_in_turns, args=(tmp_path, tiny_config, ended))
    writer.start()
    try:
        seen = set()
        while loads < 60 or len(seen) < 2:
            model = load_adapter(build(GPT2ForSequenceClassification, tiny_config), tmp_path)
            layer = model.transformer.h[0].attn.c_attn
            if layer.lora_B.weight.flatten()[0] > 1:  # not the adapter that was there at first
                assert layer.lora_B.weight.flatten()[0] == 2 * layer.scaling  # alpha = s r, r = 2
                seen.add(layer.scaling)
            loads += 1
            assert writer.is_alive()
    finally:
        ended.set()
        writer.join(timeout=60)
        writer.kill()
