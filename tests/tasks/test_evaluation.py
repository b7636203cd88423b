"""evaluation.py: every example once, longest first, in its place afterwards; and no mode outlives its block."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from helpers import load, write_datasets, write_tiny_model
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import HardwareError
from minipeft.model.gpt2 import GPT2Model
from minipeft.model.tokenizer import get_tokenizer
from minipeft.tasks.evaluation import (
    EVALUATION_BATCH_SIZE,
    bootstrap_interval,
    evaluation_batches,
    gather,
    predicting,
    predictions,
)
from minipeft.training import distributed as parallel

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def ids_of(lengths):
    """One array of token ids per length; all its tokens are the example's number."""
    return [np.full(length, number, dtype=np.int32) for number, length in enumerate(lengths)]


def modes():
    """Whether inference mode, autocast and gradients are on."""
    return torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()


# --- batches and results ----------------------------------------------------------------------------------------------

@given(lengths=LENGTHS, batch_size=st.integers(1, 9))
def test_every_example_comes_once_longest_first_and_its_result_in_the_given_order(lengths, batch_size):
    found, seen = [], []
    for numbers, batch in evaluation_batches(ids_of(lengths), lengths, CPU, batch_size):
        assert len(numbers) <= batch_size
        assert batch.input_ids[:, 0].tolist() == numbers and batch.labels.tolist() == [lengths[i] for i in numbers]
        assert batch.attention_mask.sum(dim=1).tolist() == batch.labels.tolist()
        seen += batch.labels.tolist()
        found += zip(numbers, [f"of {number}" for number in numbers])
    assert seen == sorted(lengths, reverse=True)
    assert gather(found, len(lengths)) == [f"of {number}" for number in range(len(lengths))]


def test_a_batch_is_as_large_as_suits_the_device():
    sizes = [len(numbers) for numbers, _ in evaluation_batches(ids_of([3] * 40), [0] * 40, CPU)]
    assert sizes == [EVALUATION_BATCH_SIZE["cpu"]] * 2 + [8]


def test_several_processes_share_the_examples_and_each_gets_all_results(monkeypatch):
    lengths, world_size, sent = [5, 1, 4, 2, 9, 7, 3], 3, []
    monkeypatch.setattr(parallel, "world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        batches = evaluation_batches(ids_of(lengths), lengths, CPU, 2)
        sent.append([(number, lengths[number]) for numbers, _ in batches for number in numbers])
    assert len({len(part) for part in sent}) == 1  # a sharded model computes in step

    def all_gather_object(everyone, own):
        everyone[:] = [([result for _, result in part], [number for number, _ in part]) for part in sent]

    monkeypatch.setattr(parallel.distributed, "all_gather_object", all_gather_object)
    assert gather(sent[0], len(lengths)) == lengths


# --- memory -----------------------------------------------------------------------------------------------------------

GPU_IS_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


class Small(torch.nn.Module):
    """A model that runs out of memory with more than `most` rows at once."""

    def __init__(self, most, error=GPU_IS_FULL):
        super().__init__()
        self.most, self.error, self.sizes = most, error, []

    def forward(self, batch):
        self.sizes.append(len(batch.input_ids))
        if len(batch.input_ids) > self.most:
            raise self.error
        return batch.input_ids[:, 0]


@pytest.mark.kind("8: evaluation halves its batch where the memory is not enough")
@pytest.mark.parametrize("error", [
    GPU_IS_FULL, RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")],
    ids=["GPU", "CPU", "GPU's driver", "GPU's library"])
def test_where_the_memory_is_not_enough_batches_are_halved_and_nothing_is_lost(caplog, error):
    model, ids = Small(3, error), ids_of([9] * 8 + [2] * 8)
    found = predictions(model, model, ids, [0] * 16, CPU, torch.float32, batch_size=8)
    assert [int(number) for number in found] == list(range(16))
    assert model.sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]  # a size that fits is kept for the batches to come
    assert [record.getMessage() for record in caplog.records] == [
        f"cpu is out of memory with {n} texts of 9 tokens at once: going on with {n // 2}" for n in (8, 4)]


@pytest.mark.kind("8: out of memory is one line")
def test_a_single_text_that_does_not_fit_is_one_line():
    model = Small(0)
    with pytest.raises(HardwareError, match=r"cpu is out of memory: 1 text of 9 tokens at once does not fit: use a "
                                            "smaller --max-length or a smaller model$"):
        predictions(model, model, ids_of([9] * 4), [0] * 4, CPU, torch.float32, batch_size=4)
    assert model.sizes == [4, 2, 1]


def test_another_error_is_not_taken_for_memory():
    model = Small(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        predictions(model, model, ids_of([9] * 4), [0] * 4, CPU, torch.float32, batch_size=4)
    assert model.sizes == [4]


@pytest.mark.kind("8: evaluation halves its batch where the memory is not enough")
@pytest.mark.parametrize("task", ["classification", "tagging", "translation"])
def test_every_tasks_figures_are_the_same_in_half_the_memory(task, tmp_path, monkeypatch):
    """What a model of so little memory predicts: metrics and texts, of a whole test."""
    write_datasets(tmp_path / "data", others=5)
    data = load({"classification": "sst2", "tagging": "wnut_17", "translation": "multi30k"}[task], tmp_path / "data")
    tokenizer = get_tokenizer(write_tiny_model(tmp_path / "base"))
    model = data.task.load_model(tmp_path / "base", data.label_names)
    subject = data.task(tokenizer, data.label_names, **{"max_length": 40})
    whole = subject.test(model, data.test, CPU, torch.float32)
    forward = GPT2Model.forward

    def with_little_memory(self, input_ids=None, *arguments, **named):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, input_ids, *arguments, **named)

    monkeypatch.setattr(GPT2Model, "forward", with_little_memory)
    halved = subject.test(model, data.test, CPU, torch.float32)
    assert halved.pop("loss") == pytest.approx(whole.pop("loss"), abs=2e-6)  # a batch's width may round differently
    assert halved == whole


# --- progress ---------------------------------------------------------------------------------------------------------

def test_a_progress_bar_counts_texts_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in evaluation_batches(ids_of([3] * 5), [0] * 5, CPU, 2, progress="testing"):
        pass
    assert "testing: 100%" in capsys.readouterr().err
    list(evaluation_batches(ids_of([3] * 5), [0] * 5, CPU, 2))
    assert capsys.readouterr().err == ""


# --- modes ------------------------------------------------------------------------------------------------------------

def test_predicting_computes_without_gradients_in_the_precision_asked_for():
    model = torch.nn.Linear(4, 4).train()
    with predicting(model, CPU, torch.bfloat16):
        assert modes() == (True, True, False) and not model.training
        assert model(torch.ones(1, 4)).dtype == torch.bfloat16
    with predicting(model, CPU, torch.float32):
        assert modes() == (True, False, False)
    assert modes() == (False, False, True)


def test_batches_change_no_mode_of_the_loop_that_takes_them():
    for _ in evaluation_batches(ids_of([3, 2, 1]), [0] * 3, CPU, 1):
        assert modes() == (False, False, True)
    assert modes() == (False, False, True)


@pytest.mark.parametrize("how", ["break", "error", "return"])
def test_a_loop_that_is_left_early_leaves_no_mode_behind(how):
    model, kept = torch.nn.Linear(4, 4), []

    def loop():
        with predicting(model, CPU, torch.bfloat16):
            batches = evaluation_batches(ids_of([3, 2, 1]), [0] * 3, CPU, 1)
            kept.append(batches)  # so that the generator is still there, suspended
            for _ in batches:
                if how == "error":
                    raise ValueError("out of memory")
                if how == "return":
                    return
                break

    try:
        loop()
    except ValueError as error:
        assert error.__traceback__ is not None and modes() == (False, False, True)
    assert modes() == (False, False, True)
    next(kept[0])
    assert modes() == (False, False, True)
    model(torch.ones(1, 4)).sum().backward()  # gradients are computed again


# --- the bootstrap ----------------------------------------------------------------------------------------------------

def test_a_bootstrap_interval_is_that_of_theory():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(lambda rows: values[rows].mean(), 400)
    error = values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert [low, high] == bootstrap_interval(lambda rows: values[rows].mean(), 400)
