"""One fine-tuning run, from names to results: choose, prepare, train, test, write.

This is what `scripts/train.py` calls. The library's parts (inject, train, save_adapter) can be used without it.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from minipeft.errors import TrainingError
from minipeft.files import check_writable, locked, write_json_file
from minipeft.methods import inject
from minipeft.methods.injection import ParameterCount, fingerprint, trainable_parameters
from minipeft.runs.features import Material, material_of
from minipeft.runs.plan import Options, RunPlan, Say, choose, make_task, silent, where_data_are
from minipeft.runs.record import described, headline
from minipeft.runs.request import STATE_FOLDER, check_places, request_of
from minipeft.runs.trained import save_finetuned
from minipeft.tasks.task import Task
from minipeft.training import distributed as parallel
from minipeft.training import loop
from minipeft.training.hardware import cast_frozen, matmul_precision, tokens_per_micro_batch
from minipeft.training.progress import History
from minipeft.training.sharding import shard
from minipeft.training.stopping import Stopped


def finetune(options: Options, say: Say = silent) -> dict[str, Any]:
    """Fine-tune a model as `options` say, test it once, and write the adapter folder and the results file.

    Under torchrun all processes call this; the first one prints and writes.

    Args:
        say: where progress lines go; silent by default.

    Returns:
        The content of the results file.

    Raises:
        Stopped: Ctrl-C or a like signal ended the training; the state to resume from is saved. It is a
            KeyboardInterrupt.
        TrainingError: the loss became no number before the first validation.
        MinipeftError: whatever is wrong with the request, before anything is written.
    """
    say = say if parallel.rank() == 0 else silent
    plan = choose(options, say)
    with locked(plan.folder) if parallel.rank() == 0 else nullcontext():
        run = prepare(plan, say)
        history = train(run, say)
        if history.stopped_by:
            say(f"interrupted: {plan.folder} holds the best model so far; --resume goes on from here")
            raise Stopped(history.stopped_by)
        check_result(history, plan)
        say(f"trained in {history.seconds:.0f} s, best validation {plan.best_by} {history.best[plan.best_by]:.4f}; "
            "testing")
        return write(run, history, *test(plan, run.model, run.task), say)


def check_result(history: History, plan: RunPlan) -> None:
    """Refuse a training that left nothing of use.

    Raises:
        TrainingError: the loss was no number at every validation.
    """
    loss = history.best["loss"]
    if not math.isfinite(loss):
        raise TrainingError(f"the loss is {loss} at every validation, and {plan.folder} holds nothing of use: take a "
                            "lower --learning-rate, or --precision fp32")


@dataclass
class Run:
    """A plan carried out up to the first training step.

    Attributes:
        model: with its method, on its device.
        task: set up for this model.
        material: what the loop trains on.
        counts: of the model's parameters.
        request: noted in all that the run leaves.
        tokenizing_seconds: what encoding the splits took.
    """

    plan: RunPlan
    model: nn.Module
    task: Task
    material: Material
    counts: ParameterCount
    request: dict[str, Any]
    tokenizing_seconds: float


def prepare(plan: RunPlan, say: Say = silent) -> Run:
    """Load the model, inject the method, and encode what it trains on.

    Raises:
        MinipeftError: the model cannot carry the method or read the texts, or a folder cannot be written.
    """
    options, data = plan.options, plan.data
    torch.manual_seed(plan.training.seed)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), options.dropout)
    model = data.task.load_model(plan.model_name, data.label_names, **dropouts)
    request = request_of(plan, fingerprint(model))
    if plan.folder is not None:
        check_places(plan, request, say)
    inject(model, plan.method_config)
    counts = trainable_parameters(model)  # before a tied head gets weights of its own
    cast_frozen(model.to(plan.device), plan.precision)
    model.transformer.gradient_checkpointing = options.gradient_checkpointing
    say(f"{'method':10} {options.method}: {counts}")
    if options.shard:
        shard(model, parallel.world_size())
    task = make_task(plan, model)
    if plan.folder is not None and parallel.rank() == 0:  # several at once would clear away each other's folders
        for place in (plan.folder, plan.results_file.parent):
            check_writable(place)  # known before training, not after
    started = time.perf_counter()
    training, validation = task.encode(data.train), task.encode(data.validation)
    tokenizing_seconds = time.perf_counter() - started
    with matmul_precision(options.matmul_precision):
        material = material_of(plan, task, model, training, validation)
    return Run(plan, model, task, material, counts, request, tokenizing_seconds)


def train(run: Run, say: Say = silent) -> History:
    """Train on the training split, and leave the model with the values of its best validation."""
    plan, model, task = run.plan, run.model, run.task
    options, data = plan.options, plan.data

    def save_best() -> None:
        if plan.folder is not None:
            save_finetuned(model, plan.folder, {**task.details(), "dataset": data.name, "request": run.request,
                                                "data": where_data_are(options)})

    loss_sum = task.loss_sum if plan.training.class_weights == "none" else weighted_loss_sum(plan, task)
    with matmul_precision(options.matmul_precision):
        history = loop.train(
            run.material.model, run.material.batches, loss_sum, run.material.validate, plan.training, plan.precision,
            options.compile, save_best, state_folder=plan.folder and plan.folder / STATE_FOLDER, resume=options.resume,
            request=run.request, best_by=plan.best_by, save_minutes=options.save_minutes, say=say,
            # A sharded model computes in step, and processes may have a row more or less.
            tokens_per_micro_batch=None if options.shard else tokens_per_micro_batch(plan.device, model.config.n_embd))
    model.eval()
    return history


def weighted_loss_sum(plan: RunPlan, task: Task) -> loop.LossSum:
    """The task's loss, of which all labels of the training split have the same share."""
    weights = task.balanced_weights(plan.data.train, plan.data.label_names)
    return partial(task.loss_sum, weights=torch.tensor(weights, device=plan.device))                         # (K,)


def test(plan: RunPlan, model: nn.Module, task: Task) -> tuple[dict[str, Any], float]:
    """The model's metrics on the test split, and how many seconds that took."""
    started = time.perf_counter()
    with matmul_precision(plan.options.matmul_precision):
        metrics = task.test(model, plan.data.test, plan.device, plan.precision, progress="testing")
    return metrics, time.perf_counter() - started


def write(run: Run, history: History, metrics: dict[str, Any], test_seconds: float,
          say: Say = silent) -> dict[str, Any]:
    """Write the results file; the adapter folder is there already, but for the state that is no longer needed.

    Returns:
        The content of the results file.

    Raises:
        OutputError: it cannot be written.
    """
    plan, results = run.plan, results_of(run, history, metrics, test_seconds)
    if parallel.rank() == 0:
        write_json_file(plan.results_file, results)
        shutil.rmtree(plan.folder / STATE_FOLDER, ignore_errors=True)  # a run cut off in its test can resume
    say(f"test {headline(run.task, metrics)}; wrote {plan.folder} and {plan.results_file}")
    return results


def _on_cores(run: Run, history: History) -> dict[str, float]:
    """What training took of the processors, in core seconds of all processes together; a GPU is not among them."""
    if run.plan.device.type != "cpu":
        return {}
    (seconds,) = parallel.total(torch.tensor([history.core_seconds + run.material.core_seconds],
                                           dtype=torch.float64))
    return {"train_on_cores": round(seconds, 2)}


def results_of(run: Run, history: History, metrics: dict[str, Any], test_seconds: float) -> dict[str, Any]:
    """What the results file of a trained and tested run says."""
    plan, material = run.plan, run.material
    return {
        "method": plan.options.method, "method_config": dataclasses.asdict(plan.method_config),
        "training_config": dataclasses.asdict(plan.training), **described(plan, run.task, run.request),
        "metrics": {"test": metrics, "best_validation": history.best},
        "parameters": {"trainable": run.counts.trainable, "total": run.counts.total},
        "seconds": {"tokenising": round(run.tokenizing_seconds, 2), "features": round(material.seconds, 2),
                    "train": round(history.seconds, 2),
                    **_on_cores(run, history),
                    "test": round(test_seconds, 2)},
        "samples_per_second": {"train": round(history.samples / (history.seconds + material.seconds), 2),
                               "test": round(plan.sizes["test"] / test_seconds, 2)},
        "curve": history.curve}
