"""What is written while and after training: adapter folders in peft's format, and the state to resume a run from.

An adapter folder holds `adapter_config.json` and `adapter_model.safetensors`, which peft reads and writes too, and
`minipeft.json`, which peft ignores: the base model's fingerprint, and what prediction needs (label names, length).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save_file

from minipeft.errors import AdapterError, ConfigError, InjectionError, MinipeftError, OutputError, WeightsError
from minipeft.files import read_json_file, replacing_folder, write_json
from minipeft.methods import METHODS, inject
from minipeft.methods.injection import (
    Injection,
    base_fingerprint,
    base_of,
    base_parameters,
    injections,
)
from minipeft.methods.switch import adapter_names, put_in_force, put_out_of_force, remove
from minipeft.model.weights import open_tensors
from minipeft.training import distributed as parallel

CONFIG_FILE, TENSORS_FILE, DETAILS_FILE = "adapter_config.json", "adapter_model.safetensors", "minipeft.json"
STATE_FILE = "training_state.safetensors"
_TASK_TYPES = {None: "FEATURE_EXTRACTION", "lm_head": "CAUSAL_LM", "score": "SEQ_CLS", "classifier": "TOKEN_CLS"}
# Keys of peft's adapter_config.json that do not change what the model computes, whatever they say.
_HARMLESS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
             "peft_version", "modules_to_save", "fan_in_fan_out", "runtime_config"}
# With bias="all" peft writes a token classifier's bias twice more, once as trained and once as it was before.
_IGNORED_TENSORS = {f"base_model.model.classifier.{kind}.bias" for kind in ("modules_to_save", "original_module")}


# --- adapter folders --------------------------------------------------------------------------------------------------

def save_adapter(model: nn.Module, folder: str | Path, details: dict[str, Any] | None = None) -> None:
    """Write the trained tensors and the configuration of what is in force; peft loads the folder where it knows the
    method. A combination of methods becomes one sub-folder each, named by the method.

    Args:
        model: carries one injection or more.
        folder: created if absent; files of an earlier adapter are replaced once all new ones are written.
        details: more for `minipeft.json`, such as label names.

    Raises:
        AdapterError: nothing is injected, the adapter is merged, or the method trains the whole model.
        OutputError: the folder cannot be written, or the disk is full.
    """
    in_force = injections(model)
    if not in_force:
        raise AdapterError("this model carries no adapter to save: inject a method first")
    if any(injection.merged for injection in in_force):
        raise AdapterError("the adapter is merged into the weights: unmerge it, or use save_pretrained")
    for injection in in_force:
        if not hasattr(injection.config, "peft_type"):
            raise AdapterError(f"{injection.method} has no adapter to save: use save_pretrained")
    folder = Path(folder)
    with replacing_folder(folder) as temporary:
        for injection in in_force:
            part = temporary / injection.method if len(in_force) > 1 else temporary
            part.mkdir(exist_ok=True)
            _write(model, injection, part, details or {})
    written = {folder / injection.method for injection in in_force} if len(in_force) > 1 else {folder}
    for earlier in {folder, *(folder / method for method in METHODS)} - written:
        for file in (CONFIG_FILE, TENSORS_FILE, DETAILS_FILE):  # an adapter of before must not be taken for this one
            (earlier / file).unlink(missing_ok=True)


def _write(model: nn.Module, injection: Injection, folder: Path, details: dict[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _stored(model, injection).items()}
    head = getattr(model, "head", None)
    config = dataclasses.asdict(injection.config) | injection.config.to_saved(model, injection.layers)
    config |= {"peft_type": injection.config.peft_type, "task_type": _TASK_TYPES[head], "inference_mode": True,
               "base_model_name_or_path": getattr(model, "name_or_path", None),
               "modules_to_save": ["classifier", "score"] if head in ("score", "classifier") else None}
    save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, config)
    write_json(folder / DETAILS_FILE, {
        "base_fingerprint": injection.fingerprint, "base_dtype": str(base_of(model).wte.weight.dtype),
        "base_model": getattr(model, "name_or_path", None), "method": injection.method, **details})


def _stored(model: nn.Module, injection: Injection) -> dict[str, torch.Tensor]:
    """What an adapter file holds of one injection: its layers' tensors, and the base's own that it trains."""
    tensors = {}
    for name, layer in injection.layers.items():
        tensors |= layer.stored(name)
    parameters, prefix = base_parameters(model), injection.config.base_prefix
    for name in injection.trained_base:
        module, _, parameter = name.rpartition(".")
        # The bias of a layer that this very method replaced is found, in peft's names, in the layer it keeps.
        key = f"{module}.base_layer.{parameter}" if module in injection.layers else name
        tensors[prefix + key] = parameters[name]
    return tensors


def read_details(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's minipeft.json; empty for an adapter that peft wrote."""
    path = Path(folder) / DETAILS_FILE
    return read_json_file(path, AdapterError) if path.is_file() else {}


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> nn.Module:
    """Inject the method saved in `folder` into a base model and load its trained tensors.

    The configuration, the base's fingerprint (where the folder has one) and every tensor's name, shape and values are
    checked; on any error the model is left as it was.

    Args:
        model: a base model. It may carry adapters under other names: they stay, out of force (see `set_adapter`).
        folder: an adapter folder, ours or peft's, or one with a sub-folder for each of several methods.
        name: of the loaded adapter.

    Returns:
        The same model, in eval mode, with the loaded adapter in force.

    Raises:
        AdapterError: no adapter there, a damaged one, another base's, another head's, or tensors missing or left over.
        ConfigError: a field that changes the numbers and is not implemented here.
        InjectionError: the model already carries a method under this name.
    """
    folder = Path(folder)
    parts = [folder / method for method in METHODS if (folder / method / CONFIG_FILE).is_file()]
    if (folder / CONFIG_FILE).is_file() or not parts:
        parts = [folder]
    prepared = [_prepare(model, part) for part in parts]
    if name in adapter_names(model):
        raise InjectionError(f"this model already carries an adapter {name!r}: remove it, or load under another name")
    earlier = put_out_of_force(model, injections(model))
    try:
        for part, (config, tensors) in zip(parts, prepared):
            random_state = torch.get_rng_state()  # loading draws initial values that it then overwrites
            inject(model, config, name)
            torch.set_rng_state(random_state)
            _fill(model, injections(model)[-1], tensors, part)
    except MinipeftError:
        if name in adapter_names(model):
            remove(model, name)
        put_in_force(model, earlier)
        raise
    return model.eval()


def _prepare(model: nn.Module, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """What an adapter folder holds, checked as far as it can be before the model is touched."""
    for file in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / file).is_file():
            raise AdapterError(f"{folder} holds no {file}: it is not an adapter folder")
    saved = read_json_file(folder / CONFIG_FILE, AdapterError)
    config = _parse_config(saved, folder, model)
    task = _TASK_TYPES[getattr(model, "head", None)]
    if saved.get("task_type") not in (None, task):
        raise AdapterError(f"{folder} was trained for {saved['task_type']}, this model is for {task}")
    if saved.get("task_type") is None and config.needs_task:
        raise AdapterError(f"{folder} does not say its task_type, and virtual tokens have a meaning for one task only")
    details = read_details(folder)
    if "base_fingerprint" in details and details.get("base_dtype") == str(base_of(model).wte.weight.dtype):
        found = base_fingerprint(model)
        if found != details["base_fingerprint"]:
            raise AdapterError(f"{folder} was trained on another base model ({details.get('base_model')}, fingerprint "
                               f"{details['base_fingerprint']}); this one has fingerprint {found}")
    try:
        with open_tensors(folder / TENSORS_FILE) as file:
            return config, {name: file.get_tensor(name) for name in file.keys()}
    except WeightsError as error:
        raise AdapterError(str(error)) from error


def _parse_config(saved: dict[str, Any], folder: Path, model: nn.Module) -> Any:
    """A configuration object from peft's JSON; anything that would change the numbers unnoticed is refused."""
    by_type = {method.config_class.peft_type: method.config_class for method in METHODS.values()
               if hasattr(method.config_class, "peft_type")}
    kind = saved.get("peft_type")
    if not isinstance(kind, str) or kind not in by_type:
        raise AdapterError(f"{folder / CONFIG_FILE} says peft_type {kind!r}; known are {', '.join(sorted(by_type))}")
    config_class = by_type[kind]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.more_fields)
    harmless = _HARMLESS | set(config_class.harmless)
    refused = sorted(key for key, value in saved.items() if value and key not in known | harmless)
    if refused:
        raise ConfigError(f"{folder / CONFIG_FILE} sets {', '.join(f'{key}={saved[key]!r}' for key in refused)}, which "
                          "minipeft does not implement")
    return config_class.from_saved({key: value for key, value in saved.items()
                                    if key in known and value is not None}, model)


@torch.no_grad()
def _fill(model: nn.Module, injection: Injection, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    wanted = _stored(model, injection)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _IGNORED_TENSORS}
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [f"{name} is {tuple(tensors[name].shape)}, this model needs {tuple(parameter.shape)}"
                 for name, parameter in wanted.items() if name in tensors and tensors[name].shape != parameter.shape]
    problems += [f"{name} holds {tensor.dtype}, not floating point" for name, tensor in tensors.items()
                 if not tensor.is_floating_point()]
    problems += [f"{name} holds NaN or infinity" for name, tensor in tensors.items()
                 if not torch.isfinite(tensor.float()).all()]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise AdapterError(f"{folder / TENSORS_FILE} does not fit this model: {'; '.join(problems[:6])}{more}")
    layer_tensors = set()
    for name, layer in injection.layers.items():
        layer_tensors |= layer.stored(name).keys()
        layer.restore(name, tensors)
    for name, parameter in wanted.items():
        if name not in layer_tensors:
            parameter.copy_(tensors[name])


# --- training state ---------------------------------------------------------------------------------------------------

def save_training_state(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int,
                        extra: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write what resuming needs: trained parameters, the optimiser's moments, random state, step and what is added.

    Of several processes all must call, and the first one writes.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = {f"extra/{name}": tensor for name, tensor in (tensors or {}).items()}
    state |= {f"model/{name}": p.detach() for name, p in trained.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer/{key}/{name}"] = value
    state["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state()
    state = {name: parallel.whole(tensor) for name, tensor in state.items()}
    if parallel.rank() > 0:
        return
    # One file, with step and extra in its header: a process killed at any moment leaves a whole state, old or new.
    with replacing_folder(folder) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, temporary / STATE_FILE,
                  metadata={"state": json.dumps({"step": step, "extra": extra})})


def load_training_state(folder: str | Path, model: nn.Module,
                        optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any], dict[str, torch.Tensor]]:
    """Restore a saved run into model, optimiser and torch's generators.

    Returns:
        (step, extra, tensors) as they were given to `save_training_state`; (0, {}, {}) where `folder` holds nothing.

    Raises:
        OutputError: the state is damaged, or belongs to a model with other parameters.
    """
    folder = Path(folder)
    if not (folder / STATE_FILE).is_file():
        return 0, {}, {}
    try:
        with open_tensors(folder / STATE_FILE) as file:
            saved = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        step, extra, random_state = saved["step"], saved["extra"], tensors["random/cpu"]
    except (WeightsError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{folder} holds a damaged training state ({error}): delete it") from error
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stored = {name.removeprefix("model/"): t.shape for name, t in tensors.items() if name.startswith("model/")}
    if stored != {name: p.shape for name, p in trained.items()}:
        raise OutputError(f"{folder} holds the state of a run with other parameters: delete it or use another folder")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(parallel.spread_like(parameter, tensors[f"model/{name}"]))
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            entry, _, name = rest.partition("/")
            optimizer.state[trained[name]][entry] = parallel.spread_like(trained[name], tensor)
    torch.set_rng_state(random_state)
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])
    others = {name.removeprefix("extra/"): t for name, t in tensors.items() if name.startswith("extra/")}
    return step, extra, others
