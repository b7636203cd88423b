"""Several runs compared: settings of one method on the validation split, or methods on one dataset's test split.

Both refuse what is wrong with any of their runs before the first one begins, keep what each run found as soon as it has
ended, and go on from there when they are called again.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minipeft.errors import ConfigError
from minipeft.files import check_writable, read_json_file, write_json_file
from minipeft.methods import METHODS
from minipeft.methods.injection import fingerprint
from minipeft.runs.finetune import Run, prepare, train
from minipeft.runs.places import own_results
from minipeft.runs.plan import Options, Say, check_options, choose, for_method, silent
from minipeft.runs.request import check_places, has_results, request_of
from minipeft.runs.results import table_of
from minipeft.training.hardware import machine
from minipeft.training.loop import TrainingConfig
from minipeft.training.progress import History
from minipeft.training.stopping import Stopped

COMPARED = ("baseline", "full", "lora", "prefix", "prompt", "adapter", "ia3", "bitfit")


# --- settings of one method -------------------------------------------------------------------------------------------

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
    requests = [_with(options, trial) for trial in trials]
    for request in requests:
        check_options(request)
    path = Path(options.results_dir or own_results()) / f"tuning_{options.method}.json"
    check_writable(path.parent)
    results = read_json_file(path) if path.is_file() else {"trials": []}
    for trial, request in zip(trials, requests):
        run = prepare(dataclasses.replace(choose(request), folder=None))
        history = train(run)
        if history.stopped_by:
            raise Stopped(history.stopped_by)
        results["trials"].append({"trial": trial, **_described(run, history)})
        write_json_file(path, results)
        say(f"{history.best[run.plan.best_by]:.4f} after {history.core_seconds:.0f} core seconds: {trial}")
    return results


def _with(options: Options, trial: dict[str, Any]) -> Options:
    """`options` with the values of a trial put where they belong."""
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


def _described(run: Run, history: History) -> dict[str, Any]:
    """What a tuning file says of one trial."""
    plan, task = run.plan, run.task
    return {"validation": history.best, "core_seconds": round(history.core_seconds, 1),
            "method_config": dataclasses.asdict(plan.method_config),
            "training_config": dataclasses.asdict(plan.training), "max_length": task.max_length,
            "truncation": getattr(task, "truncation", None), "base_fingerprint": run.request["base_fingerprint"],
            "dataset": plan.data.name, "sizes": plan.sizes, "machine": machine()}


# --- methods on one dataset -------------------------------------------------------------------------------------------

def compare(requests: Mapping[str, Options], commands: Mapping[str, Sequence[str]], say: Say = silent) -> int:
    """Train and test several methods on one dataset, one after the other, each in a process of its own.

    A method whose results file is of its very request is not run again; a run that was cut off is resumed.

    Args:
        requests: by method, or "baseline"; they differ in nothing else.
        commands: what runs each of them, as `minipeft train` does.
        say: prints a line before each run, and at the end the table of the results of these requests.

    Returns:
        The exit code of the run that failed or was interrupted, the rest not being run; else 0.

    Raises:
        ConfigError: an unknown method, or a bad value.
        MinipeftError: what is wrong with any of the requests, or a results file or a folder of another request: before
            the first run.
    """
    standing = _standing(requests)
    for method, (file, is_done) in standing.items():
        if is_done:
            results = read_json_file(file)
            base, examples = results["base_model"]["name"], results["dataset"]["sizes"]["train"]
            say(f"{method}: {file} is there ({base}, {examples:,} training examples)")
            continue
        say(f"\n--- {method}")
        if code := _run(commands[method]):
            return code
    say(f"\n{table_of([read_json_file(file) for file, _ in standing.values()])}")
    return 0


def _standing(requests: Mapping[str, Options]) -> dict[str, tuple[Path, bool]]:
    """Each request's results file, and whether it is there already; whatever is wrong with any is refused here."""
    for method, options in requests.items():
        check_options(options, baseline=method == "baseline")
    first, found = next(iter(requests)), {}
    shared = choose(requests[first], baseline=first == "baseline")
    base_fingerprint = fingerprint(shared.data.task.load_model(shared.model_name, shared.data.label_names))
    for method, options in requests.items():
        plan = for_method(shared, options, baseline=method == "baseline")
        request = request_of(plan, base_fingerprint)
        is_done = has_results(plan, request)
        if not is_done:
            check_places(plan, request)
        found[method] = (plan.results_file, is_done)
    return found


def _run(command: list[str]) -> int:
    """Run a command to its end; its exit code."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt as stopped:  # a terminal's Ctrl-C reaches the process, too: it saves its state first
            if getattr(stopped, "number", signal.SIGINT) == signal.SIGTERM:
                process.terminate()
            return process.wait()
