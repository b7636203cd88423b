"""Settings of one method compared on the validation split, trial by trial; the test split is not read."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minipeft.errors import ConfigError, InUseError, OutputError
from minipeft.files import check_writable, locked, read_json_file, write_json_file
from minipeft.methods import METHODS, inject
from minipeft.runs.finetune import Run, prepare, train
from minipeft.runs.places import own_results
from minipeft.runs.plan import Options, RunPlan, Say, check_options, choose, for_method, make_task, silent
from minipeft.training.hardware import machine
from minipeft.training.loop import TrainingConfig
from minipeft.training.progress import History
from minipeft.training.stopping import Stopped

PAUSE = 0.05  # seconds between tries, while another start writes into the same folder


def tune(options: Options, trials: Sequence[dict[str, Any]], say: Say = silent) -> dict[str, Any]:
    """Train once for each trial and compare on the validation split; the test split is not read.

    Args:
        options: what all trials share. Nothing is saved but the comparison.
        trials: values that replace fields of the method's configuration, of TrainingConfig, or of `options`.

    Returns:
        The content of tuning_<method>.json in the results folder, to which the trials are appended. Without a folder it
        is results or, in a clone of this project, results/mine.

    Raises:
        MinipeftError: whatever is wrong with the request or a trial, before the first is trained.
        Stopped: Ctrl-C or a like signal; the trials that had ended are in the file.
    """
    check_options(options)
    requests = [with_trial(options, trial) for trial in trials]
    for request in requests:
        check_options(request)
    path = Path(options.results_dir or own_results()) / f"tuning_{options.method}.json"
    check_writable(path.parent)
    results = _results_in(path)
    check_trials(choose(options), requests)
    scores = []
    for trial, request in zip(trials, requests):
        found = _trained(request)
        results = _append(path, {"trial": trial, **found})
        by, best = found["best_by"], found["validation"]
        broken = not math.isfinite(best["loss"])  # what it guesses may be right by chance
        scores.append(-math.inf if broken else -best[by] if by == "loss" else best[by])
        say(f"validation {by} {best[by]:.4f} after {found['core_seconds']:.0f} core seconds: {trial}"
            + "; its loss is no number" * broken)
    if scores:
        best = trials[scores.index(max(scores))]
        say((f"best: {best}" if max(scores) > -math.inf else "no trial's loss came to a number") + f"; wrote {path}")
    return results


def check_trials(plan: RunPlan, requests: Sequence[Options]) -> None:
    """Refuse trials that the model cannot carry, or whose texts do not fit it.

    Args:
        plan: of what all trials share.

    Raises:
        MinipeftError: what is wrong with the first such trial.
    """
    for request in requests:
        trial = for_method(plan, request)
        make_task(trial, inject(plan.data.task.load_model(plan.model_name, plan.data.label_names), trial.method_config))


def _trained(request: Options) -> dict[str, Any]:
    """What a trial comes to. Nothing is left of its model at the end: two might not fit the GPU.

    Raises:
        Stopped: a signal ended it.
    """
    run = prepare(dataclasses.replace(choose(request), folder=None))
    history = train(run)
    if history.stopped_by:
        raise Stopped(history.stopped_by)
    return described_trial(run, history)


def _results_in(path: Path) -> dict[str, Any]:
    """What a file of trials holds, none where there is no file.

    Raises:
        OutputError: something else.
    """
    results = read_json_file(path) if path.is_file() else {"trials": []}
    if not isinstance(results.get("trials"), list):
        raise OutputError(f"{path} holds no list of trials to append to: move it away, or name another --results-dir")
    return results


def _append(path: Path, trial: dict[str, Any]) -> dict[str, Any]:
    """Add a trial to what the file holds by now, which others may be adding to, and give all of it."""
    while True:
        with suppress(InUseError), locked(path.parent):
            results = _results_in(path)
            results["trials"].append(trial)
            write_json_file(path, results)
            return results
        time.sleep(PAUSE)


def with_trial(options: Options, trial: dict[str, Any]) -> Options:
    """`options` with the values of a trial put where they belong.

    Raises:
        ConfigError: a value that belongs nowhere.
    """
    method_fields = {field.name for field in dataclasses.fields(METHODS[options.method].config_class)}
    training_fields = {field.name for field in dataclasses.fields(TrainingConfig)}
    method_values, training_values, others = dict(options.method_values), dict(options.training_values), {}
    for key, value in trial.items():
        if key in method_fields:
            method_values[key] = value
        elif key in training_fields:
            training_values[key] = value
        elif key in ("max_length", "truncation", "dropout"):
            others[key] = value
        else:
            raise ConfigError(f"a trial cannot set {key!r}: it is no field of {options.method}, of the training, and "
                              "not max_length, truncation or dropout")
    return dataclasses.replace(options, method_values=method_values, training_values=training_values, **others)


def described_trial(run: Run, history: History) -> dict[str, Any]:
    """What a trial comes to, besides its values."""
    plan, task = run.plan, run.task
    return {"validation": history.best, "best_by": plan.best_by, "core_seconds": round(history.core_seconds, 1),
            "method_config": dataclasses.asdict(plan.method_config),
            "training_config": dataclasses.asdict(plan.training), "max_length": task.max_length,
            "truncation": getattr(task, "truncation", None), "base_fingerprint": run.request["base_fingerprint"],
            "dataset": plan.data.name, "sizes": plan.sizes, "machine": machine()}
