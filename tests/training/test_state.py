"""The training state: saved, resumed from bit for bit, refused where it is damaged, and never half-written."""

import dataclasses
import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import assert_unchanged, build, snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minipeft.training.state
from minipeft import FullConfig, GPT2ForSequenceClassification, LoraConfig, inject
from minipeft.errors import OutputError
from minipeft.training.optimizer import adamw
from minipeft.training.state import STATE_FILE, load_training_state, save_training_state


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def batches(step):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, 96, (4, 9), generator=generator), torch.randint(0, 2, (4,), generator=generator)


def run(model, optimizer, steps):
    """Training steps that use torch's generator (dropout), momentum, and both parameter groups."""
    model.train()
    for step in steps:
        ids, labels = batches(step)
        optimizer.zero_grad()
        F.cross_entropy(model(ids), labels).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def start(tiny_config, method):
    model = inject(build(GPT2ForSequenceClassification, dataclasses.replace(tiny_config, resid_pdrop=0.1)), method)
    return model, adamw([p for p in model.parameters() if p.requires_grad], model, learning_rate=1e-2, weight_decay=0.1)


METHODS = [LoraConfig(r=4, lora_dropout=0.2), LoraConfig(r=2, bias="all", target_modules="all-linear"), FullConfig()]


@pytest.mark.parametrize("method", METHODS, ids=["lora", "lora with biases", "full"])
def test_six_steps_equal_three_saved_loaded_into_a_fresh_model_and_three_more(tiny_config, tmp_path, method):
    model, optimizer = start(tiny_config, method)
    torch.manual_seed(11)
    uninterrupted = run(model, optimizer, range(6))

    model, optimizer = start(tiny_config, method)
    torch.manual_seed(11)
    half = run(model, optimizer, range(3))
    save_training_state(tmp_path, model, optimizer, step=3, extra={"curve": [0.5, 0.25]},
                        tensors={"best": torch.arange(3)})

    torch.manual_seed(999)  # another process, another random state, another start of A
    model, optimizer = start(tiny_config, method)
    torch.manual_seed(999)
    step, extra, tensors = load_training_state(tmp_path, model, optimizer)
    assert (step, extra) == (3, {"curve": [0.5, 0.25]})
    assert list(tensors) == ["best"] and torch.equal(tensors["best"], torch.arange(3))
    resumed = run(model, optimizer, range(step, 6))

    assert any(not torch.equal(uninterrupted[name], half[name]) for name in half)
    for name, tensor in uninterrupted.items():
        assert torch.equal(resumed[name], tensor), name


def test_saving_the_state_does_not_disturb_the_run(tiny_config, tmp_path):
    model, optimizer = start(tiny_config, METHODS[0])
    torch.manual_seed(11)
    expected = run(model, optimizer, range(4))
    model, optimizer = start(tiny_config, METHODS[0])
    torch.manual_seed(11)
    for step in range(4):
        actual = run(model, optimizer, [step])
        save_training_state(tmp_path, model, optimizer, step + 1, {})
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert names_in(tmp_path) == ["training_state.safetensors"]


def test_only_what_is_trained_is_stored(tiny_config, tmp_path):
    model, optimizer = start(tiny_config, METHODS[0])
    run(model, optimizer, range(1))
    save_training_state(tmp_path, model, optimizer, 1, {})
    stored = {name.removeprefix("model/") for name in load_file(tmp_path / "training_state.safetensors")
              if name.startswith("model/")}
    assert stored == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["no folder", "an empty folder"])
def test_where_there_is_no_state_a_run_starts_at_step_0(tiny_config, tmp_path, make):
    make(tmp_path / "state")
    model, optimizer = start(tiny_config, METHODS[0])
    before, random_state = snapshot(model), torch.get_rng_state()
    assert load_training_state(tmp_path / "state", model, optimizer) == (0, {}, {})
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random_state) and not optimizer.state


@pytest.mark.parametrize("other", [LoraConfig(r=3), LoraConfig(r=4, bias="all"), LoraConfig(r=4, layers_to_transform=0),
                                   FullConfig()], ids=["rank", "biases", "blocks", "method"])
def test_a_state_of_other_parameters_is_refused(tiny_config, tmp_path, other):
    model, optimizer = start(tiny_config, METHODS[0])
    run(model, optimizer, range(1))
    save_training_state(tmp_path, model, optimizer, 1, {})
    model, optimizer = start(tiny_config, other)
    before = snapshot(model)
    with pytest.raises(OutputError, match="a run with other parameters: delete it or use another folder"):
        load_training_state(tmp_path, model, optimizer)
    assert_unchanged(model, before)


def drop(name):
    return lambda tensors, header: (({key: t for key, t in tensors.items() if key != name}), header)


def header(text):
    return lambda tensors, _: (tensors, {"state": text})


@pytest.mark.parametrize("damage", [
    pytest.param(header("{"), id="broken JSON"), pytest.param(header("[]"), id="JSON of another kind"),
    pytest.param(header("{}"), id="no step"), pytest.param(lambda tensors, _: (tensors, None), id="no header"),
    pytest.param(lambda tensors, _: (tensors, {"format": "pt"}), id="another program's header"),
    pytest.param(drop("random/cpu"), id="no random state"), pytest.param(None, id="truncated")])
def test_a_damaged_state_is_refused_and_changes_nothing(tiny_config, tmp_path, damage):
    model, optimizer = start(tiny_config, METHODS[0])
    run(model, optimizer, range(1))
    save_training_state(tmp_path, model, optimizer, 1, {})
    (path,) = tmp_path.iterdir()
    if damage is None:
        path.write_bytes(path.read_bytes()[:-7])
    else:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = damage(load_file(path), file.metadata())
        save_file(tensors, path, metadata=metadata)
    model, optimizer = start(tiny_config, METHODS[0])
    before = snapshot(model)
    with pytest.raises(OutputError, match="delete it") as caught:
        load_training_state(tmp_path, model, optimizer)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


def test_a_full_disk_leaves_the_older_state(tiny_config, tmp_path, monkeypatch):
    model, optimizer = start(tiny_config, METHODS[0])
    run(model, optimizer, range(1))
    save_training_state(tmp_path, model, optimizer, 1, {})
    before = contents(tmp_path)
    monkeypatch.setattr(minipeft.training.state, "save_file", disk_full)
    with pytest.raises(OutputError, match="the disk is full"):
        save_training_state(tmp_path, model, optimizer, 2, {})
    assert contents(tmp_path) == before


def test_a_process_killed_while_saving_leaves_one_whole_state(tiny_config, tmp_path, monkeypatch):
    model, optimizer = start(tiny_config, METHODS[0])
    values = {1: run(model, optimizer, [0])}
    save_training_state(tmp_path, model, optimizer, 1, {})
    values[2] = run(model, optimizer, [1])
    renamed = []

    def rename_once(replace):
        def rename(*places):
            if renamed not in ([], [places]):  # Path.replace goes on to os.replace
                raise KeyboardInterrupt
            renamed[:] = [places]
            return replace(*places)
        return rename

    monkeypatch.setattr(Path, "replace", rename_once(Path.replace))
    monkeypatch.setattr(os, "replace", rename_once(os.replace))
    with suppress(KeyboardInterrupt):
        save_training_state(tmp_path, model, optimizer, 2, {})
    monkeypatch.undo()
    model, optimizer = start(tiny_config, METHODS[0])
    try:
        step, _, _ = load_training_state(tmp_path, model, optimizer)
    except OutputError:
        return  # to say so would be as good
    assert all(torch.equal(tensor, values[step][name]) for name, tensor in model.state_dict().items())


# --- damaged states ---------------------------------------------------------------------------------------------------

def saved(tiny_config, folder):
    model, optimizer = start(tiny_config, METHODS[0])
    run(model, optimizer, range(2))
    save_training_state(folder, model, optimizer, 2, extra={"curve": []})
    return folder / STATE_FILE


def rewritten(file, change):
    """The state file with its tensors and its header changed."""
    with safe_open(file, framework="pt") as opened:
        tensors, header = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()
    header = change(tensors, header) or header
    save_file(tensors, file, metadata=header)


def header(text):
    return lambda tensors, _: {"state": text}


DAMAGE = {
    "step is a text": header('{"step": "2", "extra": {}}'), "step is negative": header('{"step": -1, "extra": {}}'),
    "step is a bool": header('{"step": true, "extra": {}}'), "extra is a list": header('{"step": 2, "extra": []}'),
    "no step": header('{"extra": {}}'), "the header is no object": header("[1]"),
    "the header is deep": header("[" * 9999),
    "the header is no JSON": header("{"), "no header": lambda tensors, header: {"other": "x"},
    "no random state": lambda tensors, header: tensors.__delitem__("random/cpu"),
    "a short random state": lambda tensors, header: tensors.update({"random/cpu": torch.zeros(3, dtype=torch.uint8)}),
    "a random state of floats": lambda tensors, header: tensors.update({"random/cpu": torch.zeros(5056)}),
    "moments of another shape": lambda tensors, header: tensors.update(
        {next(name for name in sorted(tensors) if "exp_avg/" in name): torch.zeros(1, 1)}),
    "moments of an unknown parameter": lambda tensors, header: tensors.update(
        {"optimizer/exp_avg/nobody": torch.zeros(1)}),
}


@pytest.mark.kind("0: a damaged state to resume from")
@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_is_refused_in_one_line_that_says_what_to_do(tiny_config, tmp_path, change):
    rewritten(saved(tiny_config, tmp_path), change)
    model, optimizer = start(tiny_config, METHODS[0])
    with pytest.raises(OutputError, match=r"holds a damaged training state .*delete it") as caught:
        load_training_state(tmp_path, model, optimizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 0.5, 0.99])
def test_a_state_cut_off_anywhere_is_refused(tiny_config, tmp_path, kept):
    file = saved(tiny_config, tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[:kept if isinstance(kept, int) else int(kept * len(content))])
    model, optimizer = start(tiny_config, METHODS[0])
    with pytest.raises(OutputError, match="damaged training state"):
        load_training_state(tmp_path, model, optimizer)
