"""One cell of a comparison, run and written: a trial, a training with its test, a baseline, or what training costs.

    RESULTS/cells/DATASET/METHOD_seed0.json              what `results_of` says, "costs" and "each" (see comparison.py)
    RESULTS/cells/DATASET/METHOD_seed0-DIGEST.error      instead: the last line of a run that failed
    RESULTS/cells/DATASET/size/METHOD_16_seed0.json      the same, of a training with 16 examples
    RESULTS/cells/DATASET/tuning/METHOD_RATE_SIZE.json   what `described_trial` says
    RESULTS/cells/DATASET/costs/METHOD_turn0.json        time and memory of a short training, time at inference
    OUTPUT/cells/DATASET/METHOD_seed0-DIGEST/            the trained model, the log and, while it runs, state and locks

The digest is of all that was asked for, so that no cell ever meets what another one left.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minipeft.files import digest, locked, read_json_file, write_json_file
from minipeft.runs.baseline import base_of, tested
from minipeft.runs.budget import FEW_EXAMPLES, TIMED_EXAMPLES, Budget, Cell
from minipeft.runs.costs import adapter_bytes, forgotten, inference_of
from minipeft.runs.finetune import Run, check_result, prepare, results_of, train
from minipeft.runs.plan import Options, Say, choose, silent
from minipeft.runs.request import STATE_FOLDER
from minipeft.runs.sweep import described_trial, with_trial
from minipeft.tasks import TASKS
from minipeft.tasks.task import Task
from minipeft.training.hardware import (
    machine,
    matmul_precision,
    memory_bytes,
    peak_memory_bytes,
    reset_peak_memory,
    versions,
)
from minipeft.training.progress import History, Stopwatch
from minipeft.training.stopping import Stopped


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process of its own is to do: a cell, the options it comes to, and where it writes.

    Attributes:
        terms: what the cells of one table have in common: data, base model, budget.
    """

    cell: Cell
    options: Options
    file: Path
    terms: dict[str, Any]

    def as_json(self) -> str:
        """As one word of a command line."""
        return json.dumps({**dataclasses.asdict(self), "file": str(self.file)}, default=str)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that `as_json` wrote."""
        read = json.loads(text)
        return cls(cell_in(read), Options(**read["options"]), Path(read["file"]), read["terms"])

    def found(self) -> dict[str, Any] | None:
        """What its file holds; None where there is none, or one of the same name and other settings."""
        content = read_json_file(self.file) if self.file.is_file() else None
        return content if content and cell_in(content) == self.cell else None

    @property
    def error_file(self) -> Path:
        """Where the last line of a run that failed is kept: of this very request, by its digest."""
        return self.file.with_name(f"{self.folder.name}.error")

    @property
    def folder(self) -> Path:
        """Of the trained model, the state and the log."""
        return Path(self.options.output)

    @property
    def log_file(self) -> Path:
        """What the run prints."""
        return self.folder / "log.txt"


def cell_in(content: dict[str, Any]) -> Cell:
    """The cell that a job or a cell's file names."""
    return Cell(**{**content["cell"], "values": tuple((key, value) for key, value in content["cell"]["values"])})


def job_of(cell: Cell, shared: Options, budget: Budget, terms: dict[str, Any], results_dir: Path,
            output: Path) -> Job:
    """What is to be done for a cell.

    Args:
        shared: the options that all cells of the dataset have in common.
        results_dir, output: of the whole comparison.
    """
    tuning = cell.kind == "tuning"
    # A cell's seed draws what training draws; the examples are the same ones for all.
    training = {"epochs": budget.tuning_epochs if tuning else budget.epochs, "batch_size": budget.batch_size,
                "evaluations_per_epoch": 1 if tuning else budget.evaluations_per_epoch, "seed": cell.seed}
    size = {"tuning": budget.tuning_size, "best": None}.get(cell.kind, budget.train_size)
    options = dataclasses.replace(
        shared, method=cell.method, full=True, resume=True, train_size=size, validation_size=budget.validation_size,
        test_size=budget.test_size, subset_seed=0, training_values=training)
    if cell.size is not None:
        few = FEW_EXAMPLES
        options = dataclasses.replace(
            options, train_size=cell.size, subset_seed=cell.seed,
            validation_size=min(few.validation_size, budget.validation_size or few.validation_size),
            test_size=min(few.test_size, budget.test_size or few.test_size),
            training_values=training | few.training(cell.size, budget))
    if cell.kind == "best":
        options = dataclasses.replace(options, validation_size=None)
    if cell.kind == "costs":  # as many epochs as in training: what is done once for all of them counts as much
        options = dataclasses.replace(
            options, train_size=max(budget.batch_size, TIMED_EXAMPLES // budget.epochs),
            validation_size=budget.batch_size, training_values=training | {"evaluations_per_epoch": 1, "seed": 0})
    if cell.method != "baseline":
        options = with_trial(options, dict(cell.values))
    place = Path("cells", terms["dataset"]["name"], cell.name)
    asked = json.dumps([dataclasses.asdict(cell), terms], sort_keys=True)
    folder = output / place.with_name(f"{place.name}-{digest(asked.encode())[:8]}")
    # No run but this one writes into its folder, so nothing of another request can be there.
    options = dataclasses.replace(options, output=str(folder), results_dir=str(folder))
    return Job(cell, options, results_dir / place.with_name(f"{place.name}.json"), terms)


def run_cell(job: Job, say: Say = silent) -> None:
    """Do it, and write its file; go on from its state, if it has been begun.

    Raises:
        InUseError: another process is at it.
        Stopped: a signal ended it; its state is saved.
        MinipeftError: whatever is wrong.
    """
    with locked(job.folder):
        if job.found() is not None:  # another process has ended it since this one was started
            return
        make = {"tuning": _trial, "costs": _costs, "baseline": _baseline}.get(
            "baseline" if job.cell.method == "baseline" else job.cell.kind, _training)
        content = {"cell": dataclasses.asdict(job.cell), "terms": job.terms, **make(job, say)}
        content["process_core_seconds"] = round(time.process_time(), 1)
        write_json_file(job.file, content)
        job.error_file.unlink(missing_ok=True)
        kept = job.cell.kind not in ("tuning", "costs")
        shutil.rmtree(job.folder / STATE_FOLDER if kept else job.folder, ignore_errors=True)


def _baseline(job: Job, say: Say) -> dict[str, Any]:
    plan = choose(job.options, say, baseline=True)
    return tested(plan, base_of(plan), say)


def _trial(job: Job, say: Say) -> dict[str, Any]:
    run = prepare(choose(job.options, say), say)
    history = _trained(run)
    return {"trial": dict(job.cell.values), **described_trial(run, history), "curve": history.curve}


def _training(job: Job, say: Say) -> dict[str, Any]:
    """Train, test once, and see what the base has forgotten."""
    run = prepare(choose(job.options, say), say)
    history = _trained(run)
    check_result(history, run.plan)
    plan, tested_from = run.plan, Stopwatch()
    with matmul_precision(plan.options.matmul_precision):
        metrics, each = run.task.test_each(run.model, plan.data.test, plan.device, plan.precision, progress="testing")
    results = results_of(run, history, metrics, tested_from.seconds)
    say("measuring what the base has forgotten")
    return {**results, "adapter_folder": str(job.folder), "each": None if each is None else packed(each),
            "counted_as": counted_as(run.task),
            "costs": {"adapter_bytes": adapter_bytes(plan.folder), "forgetting": forgotten(run)}}


def counted_as(task: Task) -> str | None:
    """The task of this library that counts each example, and makes the headline of it, as this one does: itself, or the
    one from which a user's own inherits both."""
    return next((name for name, known in TASKS.items() if known.headline == task.headline
                 and known.headline_of.__func__ is type(task).headline_of.__func__), None)


def _costs(job: Job, say: Say) -> dict[str, Any]:
    """A short training, and what it and its model take of the machine. Nothing is saved: the time is training's alone.

    Memory is what the run needs beside Python and the texts, so base model and activations. On a GPU seconds stand for
    core seconds.
    """
    plan = dataclasses.replace(choose(job.options, say), folder=None)
    started_with = memory_bytes(plan.device)
    reset_peak_memory(plan.device)
    run = prepare(plan, say)
    validating = _timed(run)
    history = _trained(run)
    memory = peak_memory_bytes(plan.device)
    on_cpu, texts = plan.device.type == "cpu", plan.sizes
    features = run.material.core_seconds if on_cpu else run.material.seconds  # of training's and validation's texts
    trained_for = ((history.core_seconds if on_cpu else history.seconds) - sum(validating)
                   + features * texts["train"] / (texts["train"] + texts["validation"]))
    return {"method": job.cell.method, "machine": machine(), "versions": versions(), "costs": {
        "core_seconds_per_1000_examples": round(1000 * trained_for / history.samples, 4),
        "training_memory_bytes": None if None in (started_with, memory) else max(0, memory - started_with),
        "inference": inference_of(run)}}


def _trained(run: Run) -> History:
    """Train to the end.

    Raises:
        Stopped: a signal ended it.
    """
    history = train(run)
    if history.stopped_by:
        raise Stopped(history.stopped_by)
    return history


def _timed(run: Run) -> list[float]:
    """A list that will hold what each validation of the run took, in core seconds, on a GPU in seconds."""
    validate, seconds = run.material.validate, []

    def timed() -> dict[str, Any]:
        if run.plan.device.type == "cuda":
            torch.cuda.synchronize(run.plan.device)  # what training has asked for is not validation's
        clock = Stopwatch()
        found = validate()
        seconds.append(clock.core_seconds if run.plan.device.type == "cpu" else clock.seconds)
        return found

    run.material.validate = timed
    return seconds


# --- in files ---------------------------------------------------------------------------------------------------------

def packed(counts: np.ndarray) -> dict[str, Any]:
    """Whole numbers of each example, (N, S), for a JSON file: as bits where they are 0 and 1, compressed, in base64."""
    kind = "bits" if counts.max(initial=0) <= 1 else np.min_scalar_type(int(counts.max())).newbyteorder("<").str
    content = np.packbits(counts.astype(np.uint8)) if kind == "bits" else counts.astype(kind)
    return {"shape": list(counts.shape), "kind": kind, "zlib_base64": base64.b64encode(
        zlib.compress(content.tobytes(), 9)).decode("ascii")}


def unpacked(content: dict[str, Any]) -> np.ndarray:
    """The whole numbers that `packed` wrote, (N, S)."""
    shape, raw = tuple(content["shape"]), zlib.decompress(base64.b64decode(content["zlib_base64"]))
    if content["kind"] == "bits":
        return np.unpackbits(np.frombuffer(raw, np.uint8), count=math.prod(shape)).reshape(shape).astype(np.int64)
    return np.frombuffer(raw, content["kind"]).reshape(shape).astype(np.int64)


def score_of(results: dict[str, Any]) -> float | None:
    """How good a trial's file says it was, higher is better; None where it or its loss came to no number."""
    by, best = results["best_by"], results["validation"]
    found = best.get(by)
    return None if None in (found, best.get("loss", 0.0)) else -found if by == "loss" else found
