"""What a run was asked for, noted beside what it left; and that no run takes the place of another one's unasked.

The request is all that decides what a run finds: two runs of one request differ by rounding and in time. It stands in
the results file, in minipeft.json and in the state to resume from. A run of the same request replaces all three;
another one is refused before anything is trained, unless --overwrite is given.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from minipeft.data.datasets import KNOWN, SPLITS
from minipeft.errors import OutputError, first_few
from minipeft.files import read_json_file
from minipeft.methods import METHODS
from minipeft.methods.folder import CONFIG_FILE as ADAPTER_CONFIG_FILE
from minipeft.methods.folder import DETAILS_FILE, TENSORS_FILE, read_details
from minipeft.model.hub import find
from minipeft.model.weights import CONFIG_FILE, WEIGHTS_FILE
from minipeft.runs.places import RESULTS, is_bundled, own_results
from minipeft.runs.plan import RunPlan, Say, dtype_name, silent, task_values
from minipeft.settings import SEED
from minipeft.tasks import task_name
from minipeft.training.loop import TrainingConfig
from minipeft.training.state import saved_settings

STATE_FOLDER = "training_state"
_MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, ADAPTER_CONFIG_FILE, TENSORS_FILE)


def request_of(plan: RunPlan, base_fingerprint: str) -> dict[str, Any]:
    """The request that a plan is made from. Lengths are those asked for: what fits follows from base and method."""
    options, data = plan.options, plan.data
    trains = plan.method_config is not None
    task = data.task(plan.tokenizer, data.label_names, **task_values(data.task, options))
    request = {
        "method": plan.name, "base_fingerprint": base_fingerprint,
        "method_config": dataclasses.asdict(plan.method_config) if trains else {},
        "training_config": dataclasses.asdict(plan.training) if trains else {"seed": plan.training.seed},
        "dataset": {"name": data.name, "fingerprints": plan.fingerprints, "sizes": plan.sizes}, "task": task.details(),
        "dropout": options.dropout, "precision": dtype_name(plan.precision),
        "matmul_precision": options.matmul_precision}
    return json.loads(json.dumps(request, default=str))  # as it reads after a trip through a file


def request_in(results: dict[str, Any]) -> dict[str, Any]:
    """The request that a results file or minipeft.json notes; of results written before that, as much as they say.

    Empty for the content of any other file, and where what is noted is no request.
    """
    if "request" in results:
        return _part(results, "request")
    try:
        dataset = dict(results["dataset"])
        name, sizes = dataset.pop("name"), dataset.pop("sizes")
        dataset.pop("source")
        return {"method": results["method"], "base_fingerprint": results["base_model"]["fingerprint"],
                "method_config": results.get("method_config", {}),
                "training_config": results.get("training_config", {"seed": results["seed"]}),
                "dataset": {"name": name, "sizes": sizes}, "precision": results["precision"],
                "task": {"task": task_name(results.get("task", "classification")), **dataset}}
    except (KeyError, TypeError, ValueError):
        return {}


def fingerprints_in(results: dict[str, Any]) -> dict[str, str] | None:
    """The splits' fingerprints that a request notes; None where it does not."""
    found = _part(_part(request_in(results), "dataset"), "fingerprints")
    whole = all(isinstance(found.get(split), str) and re.fullmatch("[0-9a-f]{16}", found[split]) for split in SPLITS)
    return found if whole else None


def seed_in(results: dict[str, Any]) -> int:
    """The seed that a request notes, or else the default."""
    seed = _part(request_in(results), "training_config").get("seed")
    return seed if type(seed) is int and SEED.holds(seed) else TrainingConfig().seed


def _part(content: dict[str, Any], key: str) -> dict[str, Any]:
    """An object within a file's content; empty where something else is there."""
    found = content.get(key)
    return found if isinstance(found, dict) else {}


def differences(stored: dict[str, Any], request: dict[str, Any]) -> list[str]:
    """How a noted request differs from the one that is made, in words: what there is, and what is asked for."""
    try:
        found = _other_subject(stored, request)
        if not found:
            there, asked = _settings(stored), _settings(request)
            found = [f"{name} {there.get(name)}, not {value}" for name, value in asked.items()
                     if there.get(name) != value]
        return found
    except (KeyError, TypeError, ValueError, AttributeError):
        return ["it does not say what it was asked for"]


def _other_subject(stored: dict[str, Any], request: dict[str, Any]) -> list[str]:
    """Another method, base model or dataset, in words."""
    found, name = [], request["dataset"]["name"]
    if stored["method"] != request["method"]:
        found.append(f"method {stored['method']}, not {request['method']}")
    if stored["base_fingerprint"] != request["base_fingerprint"]:
        found.append("another base model")
    if not same_content(stored["dataset"], request["dataset"]):
        other = stored["dataset"]["name"]
        found.append(f"another content of {name}" if other == name else f"dataset {other}, not {name}")
    return found


def same_content(stored: dict[str, Any], dataset: dict[str, Any]) -> bool:
    """Whether two requests' datasets hold the same, whatever they are called.

    A file that was written before fingerprints were noted is about a known dataset, or about one that cannot be told.
    """
    if "fingerprints" in stored:
        return stored["fingerprints"] == dataset["fingerprints"]
    return stored["name"] == dataset["name"] and dataset["name"] in KNOWN


def _settings(request: dict[str, Any]) -> dict[str, Any]:
    """All numbers and choices of a request by the name of their option; those that are not noted have their default."""
    found = {f"{split}_size": size for split, size in request["dataset"]["sizes"].items()} | request["task"]
    defaults = [TrainingConfig()] + [METHODS[name].config_class() for name in METHODS if name == request["method"]]
    for config in defaults:
        found |= dataclasses.asdict(config)
    found |= {**request["training_config"], **request["method_config"]}
    found |= {name: value for name, value in request.items()
              if not isinstance(value, dict) and name not in ("method", "base_fingerprint")}
    return found | {"dropout": found.get("dropout") or 0.0}  # earlier versions noted None, or nothing, for no dropout


# --- nothing is replaced unasked --------------------------------------------------------------------------------------

def has_results(plan: RunPlan, request: dict[str, Any]) -> bool:
    """Whether the results file is there, of this very request.

    Raises:
        OutputError: it is damaged.
    """
    return plan.results_file.is_file() and not differences(request_in(read_json_file(plan.results_file)), request)


def check_places(plan: RunPlan, request: dict[str, Any], say: Say = silent) -> None:
    """Refuse to take the place of what a run of another request left, unless that is asked for.

    Where results go is said in a clone of this project if no folder is named (see `own_results`); and, if it is to be
    resumed, that the run has ended.

    Raises:
        OutputError: naming the places, the differences, and the ways out; or a folder that `check_is_ours` refuses.
    """
    if plan.folder is not None:
        check_is_ours(plan.folder, plan.model_name)
        if is_bundled(plan.folder):
            say(f"output     {plan.folder} (in place of the bundled adapter; git restore {plan.folder} undoes that)")
    if plan.options.results_dir is None and own_results() != RESULTS:
        say(f"results    {own_results()} ({RESULTS} holds the published ones)")
    if plan.options.resume and plan.folder and not saved_settings(plan.folder / STATE_FOLDER) and (
            has_results(plan, request)):
        say(f"this run has ended: {plan.results_file} holds what it found")
    if plan.options.overwrite:
        return
    noted = {(plan.folder, "--output"): noted_in(plan.folder)} if plan.folder is not None else {}
    if plan.results_file.is_file():
        noted[plan.results_file, "--results-dir"] = request_in(read_json_file(plan.results_file))
    others = {where: found for where, stored in noted.items()
              if stored is not None and (found := differences(stored, request))}
    if others:
        places, options = zip(*others)
        found = next(iter(others.values()))
        raise OutputError(f"{' and '.join(map(str, places))} hold{'s' * (len(places) == 1)} another run "
                          f"({first_few(found, 4)}): give this one another {' and '.join(options)}, or replace that "
                          "one with --overwrite")


def check_is_ours(folder: Path, model_name: str) -> None:
    """Refuse to write into the folder of the run's own base model, or of a model or adapter of anybody else's.

    What training writes is noted in minipeft.json.

    Raises:
        OutputError: saying which.
    """
    if folder.resolve() == find(model_name).resolve():
        raise OutputError(f"{folder} is the base model of this run: choose another --output")
    details = read_details(folder)
    ours = _part(details, "files") or (_MODEL_FILES if details else ())
    if foreign := [name for name in _MODEL_FILES if (folder / name).exists() and name not in ours]:
        raise OutputError(f"{folder} holds {' and '.join(foreign)}, which no training here wrote: choose another "
                          "--output")


def noted_in(folder: Path) -> dict[str, Any] | None:
    """The request that a folder's state or trained model is of; None where there is neither, or a bundled model.

    Raises:
        AdapterError: minipeft.json is damaged.
    """
    if of_state := saved_settings(folder / STATE_FOLDER):
        return of_state
    ours = (folder / DETAILS_FILE).is_file() and not is_bundled(folder)
    return request_in(read_details(folder)) if ours else None
