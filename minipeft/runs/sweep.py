"""Several runs compared: settings of one method on the validation split, or methods on one dataset's test split.

Both refuse what is wrong with any of their runs before the first one begins, keep what each run found as soon as it has
ended, and go on from there when they are called again.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipeft.data.datasets import name_of
from minipeft.errors import ConfigError
from minipeft.files import check_writable, read_json_file, write_json_file
from minipeft.methods import METHODS
from minipeft.runs.finetune import Run, prepare, train
from minipeft.runs.plan import Options, Say, check_method, check_options, choose, silent
from minipeft.runs.record import results_path
from minipeft.runs.results import results_table
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
        The content of results/tuning_<method>.json, to which the trials are appended.

    Raises:
        MinipeftError: whatever is wrong with the request or a trial, before the first is trained.
        Stopped: Ctrl-C or a like signal; the trials that had ended are in the file.
    """
    check_options(options)
    requests = [_with(options, trial) for trial in trials]
    for request in requests:
        check_options(request)
    path = Path(options.results_dir) / f"tuning_{options.method}.json"
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
            "truncation": getattr(task, "truncation", None), "base_fingerprint": run.base_fingerprint,
            "dataset": plan.data.name, "sizes": plan.sizes, "machine": machine()}


# --- methods on one dataset -------------------------------------------------------------------------------------------

def compare(methods: Sequence[str], dataset: str, command: Sequence[str], model: str | None = None,
            output: Path = Path("checkpoints"), results_dir: Path = Path("results"), say: Say = silent) -> int:
    """Train and test several methods on one dataset, one after the other, each in a process of its own.

    A method whose results file is there already is not run again, and a run that was cut off is resumed.

    Args:
        methods: names in METHODS, and "baseline".
        command: what starts a run, as scripts/train.py does, with the options that all of them share.
        model: the base; None for the default.
        output: where adapters go, each to `<dataset>_<method>` in it.
        say: prints a line before each run, and at the end the table of all results on the dataset.

    Returns:
        The exit code of the run that failed or was interrupted, the rest not being run; else 0.

    Raises:
        ConfigError: an unknown method, or a results file about another base model.
    """
    for method in methods:
        check_method(method, also=("baseline",))
    name = name_of(dataset)
    for method in methods:
        path = results_path(results_dir, "baseline" if method == "baseline" else f"fine_tuned_{method}", name)
        if path.is_file():
            say(f"{method}: {path} is there ({_about(path, model)})")
            continue
        say(f"\n--- {method}")
        code = _run([*command, "--method", method, "--dataset", dataset, "--results-dir", str(results_dir), "--output",
                     str(output / f"{name}_{method}"), "--resume", *(["--model", model] if model else [])])
        if code:
            return code
    say(f"\n{results_table(results_dir, name)}")
    return 0


def _about(path: Path, model: str | None) -> str:
    """What a results file is about, in words.

    Raises:
        ConfigError: another base model than the one that is asked for.
    """
    results = read_json_file(path)
    base, examples = results["base_model"]["name"], results["dataset"]["sizes"]["train"]
    if model not in (None, base):
        raise ConfigError(f"{path} is about {base}, not about {model}: give this comparison its own --results-dir")
    return f"{base}, {examples:,} training examples"


def _run(command: list[str]) -> int:
    """Run a command to its end; its exit code."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt as stopped:  # a terminal's Ctrl-C reaches the process, too: it saves its state first
            if getattr(stopped, "number", signal.SIGINT) == signal.SIGTERM:
                process.terminate()
            return process.wait()
