"""Several processes compute what one would have: curves, weights and test results, DDP and FSDP2 alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minipeft.data.batches import Batch
from minipeft.training import distributed as parallel

ROOT = Path(__file__).resolve().parents[2]
RUN = ["scripts/train.py", "--model", "mini", "--dataset", "sample", "--device", "cpu", "--precision", "fp32",
       "--dropout", "0", "--epochs", "1", "--train-size", "58", "--validation-size", "21", "--test-size", "31",
       "--batch-size", "19", "--max-length", "48"]  # no number is even, and the last batch has a single review


def batch(size):
    return Batch(torch.arange(size * 3).view(size, 3), torch.ones(size, 3), torch.arange(size))


def of_process(monkeypatch, rank, world_size):
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    monkeypatch.setattr(parallel, "world_size", lambda: world_size)


def test_alone_nothing_is_cut_summed_or_gathered():
    whole = batch(5)
    assert parallel.share(whole) is whole
    assert parallel.share_of(3) == [0, 1, 2]
    assert parallel.total(torch.tensor([1.5, 2.0])) == [1.5, 2.0]
    assert parallel.gathered(["second", "first"], [1, 0], 2) == ["first", "second"]


def test_the_shares_of_a_batch_make_the_batch(monkeypatch):
    labels = []
    for rank in range(3):
        of_process(monkeypatch, rank, 3)
        part = parallel.share(batch(8))
        assert torch.equal(part.input_ids[:, 0], part.labels * 3)
        labels += part.labels.tolist()
    assert sorted(labels) == list(range(8))


def test_a_process_without_a_row_gets_one_that_does_not_count(monkeypatch):
    of_process(monkeypatch, 2, 3)
    part = parallel.share(batch(2))
    assert part.labels.tolist() == [parallel.IGNORED_LABEL]
    logits = torch.randn(1, 4, requires_grad=True)
    torch.nn.functional.cross_entropy(logits, part.labels, reduction="sum").backward()
    assert torch.equal(logits.grad, torch.zeros(1, 4))


@pytest.mark.parametrize("examples", [1, 2, 7, 9])
def test_every_example_is_somebodys_and_all_have_equally_many(monkeypatch, examples):
    shares = []
    for rank in range(3):
        of_process(monkeypatch, rank, 3)
        shares.append(parallel.share_of(examples))
    assert {number for share in shares for number in share} == set(range(examples))
    assert len({len(share) for share in shares}) == 1


def train(folder, processes, *options, crashes_forgiven=1):
    """Train under torchrun, and return the results file and the trained tensors.

    Of hundreds of such runs one died in torch's own code (a segmentation fault in a process of gloo's, torch 2.13), and
    nothing we tried showed it again. So a run that dies of one is started once more, and its last words are a warning.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    done = subprocess.run([*(launcher if processes > 1 else [sys.executable]), *RUN, *options, "--output",
                           str(folder / "out"), "--results-dir", str(folder)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}, timeout=300)
    if processes > 1 and "(SIGSEGV)" in done.stderr and crashes_forgiven:
        warnings.warn(f"started once more after a crash: {done.stderr}", stacklevel=2)
        return train(folder, processes, *options, "--overwrite", crashes_forgiven=crashes_forgiven - 1)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (json.loads(path.read_text()) for path in folder.glob("fine_tuned_*_results.json"))
    (tensors,) = (load_file(path) for path in (folder / "out").glob("*.safetensors"))
    return results, tensors, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ("--method", "lora", "--gradient-accumulation", "2"), ("--method", "head"), ("--method", "full"),
    ("--method", "full", "--shard"), ("--method", "lora", "--gradient-checkpointing")],
    ids=["lora, accumulating", "head", "full", "full, sharded", "lora, checkpointing"])
def test_two_processes_learn_what_one_does(tmp_path, options):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, one_tensors, _ = train(tmp_path / "one", 1, *(option for option in options if option != "--shard"))
    two, two_tensors, said = train(tmp_path / "two", 2, *options)
    assert two["processes"] == 2
    assert [point["step"] for point in two["curve"]] == [point["step"] for point in one["curve"]]
    for here, there in zip(two["curve"], one["curve"]):
        assert here["train_loss"] == pytest.approx(there["train_loss"], abs=2e-4)
        assert here["validation_loss"] == pytest.approx(there["validation_loss"], abs=2e-4)
    assert two["metrics"]["test"]["examples"] == 31
    assert two["metrics"]["test"]["loss"] == pytest.approx(one["metrics"]["test"]["loss"], abs=2e-4)
    assert two_tensors.keys() == one_tensors.keys()
    for name, tensor in one_tensors.items():
        torch.testing.assert_close(two_tensors[name], tensor, atol=2e-3, rtol=1e-2)
    assert said.count("test accuracy") == 1  # the first process alone speaks


def test_sharding_alone_is_refused(tmp_path):
    done = subprocess.run([sys.executable, *RUN, "--method", "full", "--shard", "--output", str(tmp_path / "out"),
                           "--results-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "torchrun" in done.stderr
    assert not list(tmp_path.glob("*.json"))
