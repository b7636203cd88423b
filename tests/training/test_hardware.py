"""hardware.py: device and precision are chosen as asked or as is best, and apply only where they should."""

from __future__ import annotations

import copy
import subprocess

import pytest
import torch
import torch.nn.functional as F

from minipeft import GPT2Config, GPT2LMHeadModel, inject
from minipeft.errors import HardwareError
from minipeft.methods import METHODS
from minipeft.training.hardware import (
    cast_frozen,
    choose_device,
    choose_precision,
    commit,
    computing_in,
    machine,
    matmul_precision,
    versions,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "present", "chosen"), [
    (None, False, "cpu"), (None, True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda")])
def test_the_device_is_the_one_asked_for_else_the_best_there_is(monkeypatch, name, present, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert choose_device(name).type == chosen


@pytest.mark.kind("8: float32 matmul precision is an option")
def test_products_of_float32_are_as_exact_as_asked_for_within_the_block_and_as_before_after_it():
    before = torch.get_float32_matmul_precision()
    for name in ("medium", "high", "highest"):
        with pytest.raises(ZeroDivisionError), matmul_precision(name):
            assert torch.get_float32_matmul_precision() == name
            with matmul_precision(None):
                assert torch.get_float32_matmul_precision() == name
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == before


def test_cuda_asked_for_and_absent_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HardwareError, match=r"CUDA was asked for.*--device cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:1", "mps", ""])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(HardwareError, match="use cpu or cuda"):
        choose_device(name)


@pytest.mark.parametrize(("name", "dtype"), [
    ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_precision_asked_for_is_the_one_used(name, dtype, device):
    assert choose_precision(name, torch.device(device)) is dtype


@pytest.mark.kind("7: fp16 on a CPU warns")
@pytest.mark.parametrize(("name", "device", "lines"), [
    ("fp16", "cpu", 1), ("bf16", "cpu", 0), ("fp32", "cpu", 0), ("auto", "cpu", 0), ("fp16", "cuda", 0)])
def test_float16_on_a_cpu_is_warned_of_in_one_line(caplog, name, device, lines):
    choose_precision(name, torch.device(device))
    assert len(caplog.messages) == lines
    assert all("float16 is slower than float32 on a CPU" in line and "\n" not in line for line in caplog.messages)


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_cuda_runs_in_bfloat16_where_the_hardware_has_it_else_in_float16(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert choose_precision("auto", torch.device("cuda")) is dtype


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_runs_in_bfloat16_where_it_has_the_instructions_else_in_float32(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
    assert choose_precision("auto", CPU) is dtype


def test_an_unknown_precision_is_refused():
    with pytest.raises(HardwareError, match="unknown precision 'fp8': use auto, fp32, bf16, fp16"):
        choose_precision("fp8", CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_run_in_the_chosen_precision_inside_the_block_and_as_before_outside(dtype):
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with pytest.raises(ZeroDivisionError), computing_in(dtype, CPU):
        assert F.linear(x, weight).dtype is dtype
        raise ZeroDivisionError
    assert F.linear(x, weight).dtype is torch.float32


def test_machine_and_versions_say_what_the_numbers_depend_on():
    assert machine()["cores"] >= 1 and machine()["memory_gib"] > 0 and machine()["processor"]
    assert {"python", "torch", "numpy", "minipeft"} <= set(versions())


def test_the_commit_of_folders_is_the_last_that_changed_one_and_a_plus_says_that_files_differ(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.strip()

    folders = [tmp_path / name for name in ("a", "b", "c")]
    git("init")
    for folder in folders:
        folder.mkdir()
        (folder / "file").write_text("1")
        git("add", ".")
        git("commit", "-m", folder.name)
    a, b, c = git("log", "--reverse", "--format=%h").split()
    assert (commit(folders[0]), commit(*folders[:2]), commit(*folders)) == (a, b, c)
    (folders[1] / "file").write_text("2")
    assert (commit(folders[0]), commit(*folders[:2])) == (a, f"{b}+")
    monkeypatch.setenv("PATH", "")
    assert commit(folders[0]) == "unknown"


@pytest.mark.parametrize("method", ["lora", "dora", "bitfit", "adapter", "prefix", "ia3"])
def test_frozen_layers_cast_once_compute_what_autocast_does(method):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=40)
    model = inject(GPT2LMHeadModel(config), METHODS[method].config()).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    cast, ids = cast_frozen(copy.deepcopy(model), torch.bfloat16), torch.randint(50, (2, 9))
    with computing_in(torch.bfloat16, CPU):
        torch.testing.assert_close(cast(ids), model(ids), atol=0.03 if method == "dora" else 0, rtol=0)  # DoRA's norms
    here, there = dict(cast.named_parameters()), dict(model.named_parameters())
    kinds = {name: tensor.dtype for name, tensor in here.items()}
    assert kinds["lm_head.weight"] == torch.bfloat16
    assert kinds["transformer.wte.weight"] == kinds["transformer.h.0.ln_1.weight"] == torch.float32
    assert all(kinds[name] == torch.float32 for name in kinds if name in there and there[name].requires_grad)
    assert [n for n, p in here.items() if p.requires_grad] == [n for n, p in there.items() if p.requires_grad]


def test_in_float32_nothing_is_cast():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8))
    cast_frozen(model.requires_grad_(False), torch.float32)
    assert model.lm_head.weight is model.transformer.wte.weight
