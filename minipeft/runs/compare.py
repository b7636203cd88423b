"""A comparison: datasets x methods x seeds under one budget, from a request to comparison.json.

    choose subjects -> the estimate -> the queue of cells (workers.py) -> the costs, one by one -> comparison.json, and
    a table

Each dataset's cells share its `terms`: the data by content, the base model, the budget. Cells of other terms are never
mixed with them: results go where there are none, or are refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipeft.data.datasets import name_of
from minipeft.errors import ConfigError, InUseError, OutputError
from minipeft.files import LOCK_FILE, check_writable, is_locked, locked, read_json_file
from minipeft.methods.injection import fingerprint, trainable_parameters
from minipeft.runs.budget import (
    ALL,
    BUDGETS,
    FEW_EXAMPLES,
    OWN_FILE,
    VIRTUAL_TOKENS,
    Cell,
    Track,
    timed,
    tracks_of,
    wanted,
)
from minipeft.runs.cells import Job, cell_in, job_of, score_of
from minipeft.runs.comparison import COMPARISON_FILE, table_of, write_comparison
from minipeft.runs.places import CHECKPOINTS, RESULTS, own_results
from minipeft.runs.plan import Options, Say, check_method, choose, dtype_name, silent
from minipeft.runs.subject import Estimate, Subject
from minipeft.runs.workers import PAUSE, Queue
from minipeft.training.hardware import machine
from minipeft.training.stopping import Stopped, stop_between_steps

MINI_PARAMETERS = 7e6  # whose times the budgets' estimates are
ESTIMATED = ("core_seconds", "test_core_seconds", "seeds")  # what decides nothing that a cell finds


@dataclass
class Request:
    """What a user asked a comparison for.

    Attributes:
        datasets, methods: names; `methods` may be ["all"].
        seeds: how many, from 0 on.
        shared: the options that all runs share: base model, device, how files are read.
        changes: fields that replace every budget's.
        train_sizes: by dataset, a size that replaces its budget's.
        tuned: whether settings are tried first; else the defaults of runs/defaults.py are trained.
        best: also train lora and full without the budget.
        few_examples: also train some methods on fewer and fewer examples: see `budget.FewExamples`.
        every_seed: all seeds for all methods, also where a budget has fewer.
        retry: run again what failed. replace: delete cells of other terms.
        workers: processes at a time; None: one for each core, one on a GPU.
    """

    datasets: list[str]
    methods: list[str]
    seeds: int = 1
    shared: Options = field(default_factory=Options)
    changes: dict[str, Any] = field(default_factory=dict)
    train_sizes: dict[str, int] = field(default_factory=dict)
    tuned: bool = True
    best: bool = False
    few_examples: bool = False
    every_seed: bool = False
    retry: bool = False
    replace: bool = False
    workers: int | None = None
    results_dir: Path | None = None
    output: Path = CHECKPOINTS


def compare(request: Request, command: Callable[[Job], list[str]], say: Say = silent) -> int:
    """Run what is missing of a comparison, and write comparison.json.

    Args:
        command: what runs a job in a process of its own.
        say: prints the estimate, a line for each cell that has ended, and the tables.

    Returns:
        How many cells failed.

    Raises:
        MinipeftError: whatever is wrong with the request, before the first run.
        Stopped: a signal; the same request goes on from there.
    """
    check(request)
    subjects = [_subject(request, dataset) for dataset in request.datasets]
    folder = _folder(request, subjects)
    by_name = {subject.name: subject for subject in subjects}
    tracks = [track for subject in subjects for track in subject.tracks]

    def job(cell: Cell) -> Job:
        subject = by_name[cell.dataset]
        return job_of(cell, subject.options, subject.budget, subject.terms, folder, request.output)

    def score(cell: Cell) -> float | None:
        found = queue.result(cell)
        return None if found is None else score_of(found)

    def cells() -> list[Cell]:
        return [cell for track in tracks for cell in wanted(track, score, queue.ended)]

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    device = subjects[0].terms["device"]
    workers = request.workers or (cores if device == "cpu" else 1)
    estimate, threads = Estimate(by_name), max(1, cores // workers)
    queue = Queue(job, cells, lambda cell: estimate.cost(cell, queue.results), lambda: estimate.total(
        tracks, cells(), queue.results), command, workers, threads, say, request.retry, measuring=folder / "cells")
    if nothing := [subject.name for subject in subjects if request.best and not any(
            track.best for track in subject.tracks)]:
        say(f"best       nothing on {', '.join(nothing)}: BEST in minipeft/runs/budget.py names none of these methods")
    say(_plan_in_words(queue, cells(), tracks, folder, workers, estimate))
    queue.run()
    write_comparison(folder)  # should the costs be interrupted
    with alone(folder, request.output, say):
        last = timed(_trained(folder, subjects))
        _keep_one_machine(list(map(job, last)), request.retry)
        timing = Queue(job, lambda: last, estimate.beforehand, lambda: sum(map(estimate.beforehand, last)), command,
                       workers=1, threads=1, say=say, retry=request.retry)
        timing.run()
    return _conclude(folder, subjects, queue.failed | timing.failed, say)


@contextmanager
def alone(folder: Path, output: Path, say: Say) -> Iterator[None]:
    """Wait until no other start is at work here, and keep others waiting for the length of the block: of two that
    measure at once, each slows the other down.

    The lock comes first: while it is held, no queue starts anything, so what is at work then is all there is.

    Raises:
        Stopped: a signal.
    """
    def taken() -> bool:
        with suppress(InUseError):
            held.enter_context(locked(folder / "cells"))
            return True
        return False

    def at_work() -> bool:
        return any(LOCK_FILE in files and is_locked(place) for place, _, files in os.walk(output / "cells"))

    with ExitStack() as held:
        with stop_between_steps() as signal_that_came:
            is_ours = has_waited = False
            while not signal_that_came() and (not (is_ours := is_ours or taken()) or at_work()):
                if not has_waited:
                    say("waiting for another start to end, as the costs are measured with nothing else running")
                has_waited = True
                time.sleep(PAUSE)
            if signal_that_came():
                raise Stopped(signal_that_came())
        yield


def _conclude(folder: Path, subjects: list[Subject], failed: dict[Cell, str], say: Say) -> int:
    """Write comparison.json, and say what it holds and what failed.

    Returns:
        How many cells failed.
    """
    found = write_comparison(folder)
    for subject in subjects:
        if content := found["datasets"].get(subject.name):
            say(f"\n{subject.name}\n\n{table_of(content)}")
    say(f"\nwrote {folder / COMPARISON_FILE}")
    for cell, reason in failed.items():
        say(f"{cell} failed: {reason} (--retry runs it again)")
    return len(failed)


def check(request: Request) -> None:
    """Refuse what can be seen to be wrong before any data is read.

    Raises:
        ConfigError: an unknown method, a dataset named twice, or a number out of range.
    """
    request.methods = list(dict.fromkeys(ALL if request.methods == ["all"] else request.methods))
    for method in request.methods:
        check_method(method, also=("baseline",))
    names = [name_of(dataset) for dataset in request.datasets]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--datasets names {', '.join(sorted(twice))} twice")
    numbers = {"--seeds": request.seeds, "--workers": request.workers, **request.train_sizes, **request.changes}
    for option, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"{option} must be a positive integer, got {number}")
    if unknown := request.train_sizes.keys() - {*request.datasets, *names}:
        raise ConfigError(f"--train-size names {', '.join(sorted(unknown))}, which is not among --datasets")


def _subject(request: Request, dataset: str) -> Subject:
    """A dataset, looked into once: what its cells will all have in common."""
    name = name_of(dataset)
    budget = dataclasses.replace(BUDGETS.get(name, OWN_FILE), **request.changes)
    size = request.train_sizes.get(dataset, request.train_sizes.get(name))
    if size is not None:
        budget = dataclasses.replace(budget, train_size=size)
    options = dataclasses.replace(request.shared, dataset=dataset, full=True, subset_seed=0)
    plan = choose(dataclasses.replace(options, method="lora", train_size=budget.train_size, test_size=budget.test_size,
                                      validation_size=budget.validation_size))
    model = plan.data.task.load_model(plan.model_name, plan.data.label_names)
    room = model.config.n_positions - VIRTUAL_TOKENS
    asked = options.max_length or budget.max_length
    if (asked or 1) > room:
        raise ConfigError(f"{plan.model_name} has {model.config.n_positions} positions, of which a comparison keeps "
                          f"{VIRTUAL_TOKENS} for virtual tokens: max_length can be at most {max(0, room)}")
    length = asked or min(plan.data.task.max_length, room)
    options = dataclasses.replace(options, model=plan.model_name, max_length=length)
    task = plan.data.task.name
    rules = {key: value for key, value in dataclasses.asdict(budget).items() if key not in ESTIMATED}
    terms = {"dataset": {"name": plan.data.name, "fingerprints": plan.fingerprints, "sizes": plan.sizes},
             "base_model": {"name": plan.model_name, "fingerprint": fingerprint(model)}, "task": task,
             "budget": {**rules, "max_length": length, "tuned": request.tuned}, "device": plan.device.type,
             "precision": dtype_name(plan.precision), "truncation": options.truncation,
             "max_new_tokens": options.max_new_tokens, "dropout": options.dropout}
    if options.matmul_precision not in (None, "highest"):  # torch's own
        terms["matmul_precision"] = options.matmul_precision
    seeded = dataclasses.replace(budget, seeds=None) if request.every_seed else budget
    sizes = tuple(size for size in FEW_EXAMPLES.sizes if size < plan.sizes["train"]) * request.few_examples
    tracks = tracks_of(plan.data.name, plan.data.task, request.methods, request.seeds, request.tuned, request.best,
                       seeded, sizes)
    return Subject(plan.data.name, options, budget, json.loads(json.dumps(terms)), plan.whole_sizes, tracks,
                   trainable_parameters(model).total / MINI_PARAMETERS)


def _folder(request: Request, subjects: list[Subject]) -> Path:
    """The results folder: the one that is named; else `results` or, in a clone, the published cells or results/mine.

    Raises:
        OutputError: it holds cells of other terms, or cannot be written.
    """
    folder = request.results_dir or own_results()
    if request.results_dir is None and all(_holds_all(RESULTS, subject, request.output) for subject in subjects):
        folder = RESULTS  # nothing is to be trained, so nothing published is changed
    for subject in subjects:
        others = _of_other_terms(folder, subject)
        if others and not request.replace:
            noted = next(iter(others.values()))["terms"]
            found = [name for name in noted | subject.terms if noted.get(name) != subject.terms.get(name)]
            raise OutputError(f"{folder / 'cells' / subject.name} holds cells of another comparison "
                              f"({', '.join(found)} differ): give this one another --results-dir, or replace "
                              "them with --overwrite")
        for file in others:
            file.unlink()
    check_writable(folder)
    return folder


def _trained(folder: Path, subjects: list[Subject]) -> list[Cell]:
    """The cells of the first seed, also those of methods that only an earlier request named."""
    cells = [cell_in(content) for subject in subjects for file, content in _cells_in(folder, subject).items()
             if file.name.endswith("_seed0.json")]
    return sorted(cells, key=lambda cell: ALL.index(cell.method))


def _keep_one_machine(jobs: list[Job], retry: bool) -> None:
    """Delete what was measured of a dataset's costs on another machine, where some are still to be measured: they are
    compared with each other, so all are measured on this one then."""
    this = machine()
    for dataset in {job.cell.dataset for job in jobs}:
        its = [job for job in jobs if job.cell.dataset == dataset]
        if any(job.found() is None and (retry or not job.error_file.is_file()) for job in its):
            for file in [job.file for job in its if job.file.is_file()]:
                if read_json_file(file)["machine"] != this:
                    file.unlink()


def _holds_all(folder: Path, subject: Subject, output: Path) -> bool:
    """Whether nothing of a dataset is left to run there, its costs included, and all is of the same terms. What failed
    there is left to run."""
    def found(cell: Cell) -> dict[str, Any] | None:
        return job_of(cell, subject.options, subject.budget, subject.terms, folder, output).found()

    def score(cell: Cell) -> float | None:
        content = found(cell)
        return None if content is None else score_of(content)

    if _of_other_terms(folder, subject):
        return False
    asked = [cell for track in subject.tracks for cell in wanted(track, score, lambda cell: found(cell) is not None)]
    return all(found(cell) is not None for cell in asked + timed(_trained(folder, [subject])))


def _cells_in(folder: Path, subject: Subject) -> dict[Path, dict[str, Any]]:
    """The files of a dataset's cells, and what they hold.

    Raises:
        OutputError: a file among them is none of a cell.
    """
    found = {file: read_json_file(file) for file in sorted((folder / "cells" / subject.name).rglob("*.json"))}
    for file, content in found.items():
        if not (isinstance(content.get("cell"), dict) and isinstance(content.get("terms"), dict)):
            raise OutputError(f"{file} is no cell of a comparison: move it away, or name another --results-dir")
    return {file: content for file, content in found.items() if content["cell"].get("dataset") == subject.name}


def _of_other_terms(folder: Path, subject: Subject) -> dict[Path, dict[str, Any]]:
    return {file: content for file, content in _cells_in(folder, subject).items()
            if content["terms"] != subject.terms}


def _plan_in_words(queue: Queue, known: list[Cell], tracks: list[Track], folder: Path, workers: int,
                   estimate: Estimate) -> str:
    """What is about to happen, and what it takes."""
    there = sum(map(queue.ended, known + timed(known)))
    cells = sum(track.trials + track.seeds * (1 + len(track.sizes)) + (track.best is not None) + track.turns
                for track in tracks)
    tuned = any(track.trials for track in tracks)
    took = sum(estimate.cost(cell, queue.results) for cell in queue.results)
    left = max(0.0, estimate.total(tracks, known, queue.results) - took)
    lines = [f"cells      {cells}{', or a few more where a best rate is at an end' if tuned else ''}; {there} of them "
             f"there; {workers} at a time",
             f"estimate   {left / 3600:.2f} core hours, about {left / 60 / workers:.0f} minutes",
             f"results    {folder}"]
    return "\n".join(lines)
