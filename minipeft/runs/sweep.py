"""Comparing settings of a method on the validation split."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from minipeft.errors import ConfigError
from minipeft.files import check_writable, read_json_file, write_json_file
from minipeft.methods import METHODS
from minipeft.runs.finetune import Options, Say, check_method, fit, set_up
from minipeft.training.hardware import machine
from minipeft.training.loop import TrainingConfig


def tune(options: Options, trials: list[dict[str, Any]], say: Say = lambda line: None) -> dict[str, Any]:
    """Train once for each trial and compare on the validation split; the test split is not read.

    Args:
        options: what all trials share. Nothing is saved but the comparison.
        trials: values that replace fields of the method's configuration, of TrainingConfig, or of `options`.

    Returns:
        The content of results/tuning_<method>.json, to which the trials are appended.

    Raises:
        MinipeftError: whatever is wrong with the request or a trial, before the first is trained.
    """
    check_method(options)
    requests = [_with(options, trial) for trial in trials]
    path = Path(options.results_dir) / f"tuning_{options.method}.json"
    check_writable(path.parent)
    results = read_json_file(path) if path.is_file() else {"trials": []}
    for trial, request in zip(trials, requests):
        setup = set_up(request, lambda line: None)
        fitted = fit(request, setup, lambda line: None)
        if fitted.history.interrupted:
            return results
        results["trials"].append({
            "trial": trial, "validation": fitted.history.best, "core_seconds": round(fitted.history.core_seconds, 1),
            "method_config": dataclasses.asdict(fitted.method_config),
            "training_config": dataclasses.asdict(fitted.config), "max_length": fitted.task.max_length,
            "truncation": getattr(fitted.task, "truncation", None), "base_fingerprint": fitted.base_fingerprint,
            "dataset": setup.data.name, "sizes": setup.sizes, "machine": machine()})
        write_json_file(path, results)
        best = fitted.history.best[fitted.task.best_by]
        say(f"{best:.4f} after {fitted.history.core_seconds:.0f} core seconds: {trial}")
    return results


def _with(options: Options, trial: dict[str, Any]) -> Options:
    """`options` with the values of a trial put where they belong."""
    method_fields = {field.name for field in dataclasses.fields(METHODS[options.method].config_class)}
    request = dataclasses.replace(options, method_values=dict(options.method_values),
                                  training_values=dict(options.training_values))
    for key, value in trial.items():
        if key in method_fields:
            request.method_values[key] = value
        elif key in {field.name for field in dataclasses.fields(TrainingConfig)}:
            request.training_values[key] = value
        elif key in ("max_length", "truncation", "dropout"):
            setattr(request, key, value)
        else:
            raise ConfigError(f"a trial cannot set {key!r}: it is no field of {options.method}, of the training, and "
                              "not max_length, truncation or dropout")
    return request
