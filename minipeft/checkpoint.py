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

from minipeft.errors import AdapterError, ConfigError, MinipeftError, OutputError, WeightsError
from minipeft.files import replacing_folder, write_json
from minipeft.methods import METHODS, Method, inject
from minipeft.methods.surgery import fingerprint, injections, pattern_value, remove
from minipeft.weights import open_tensors

CONFIG_FILE, TENSORS_FILE, DETAILS_FILE = "adapter_config.json", "adapter_model.safetensors", "minipeft.json"
STATE_FILE = "training_state.safetensors"
_PREFIX = "base_model.model."
_TASK_TYPES = {None: "FEATURE_EXTRACTION", "lm_head": "CAUSAL_LM", "score": "SEQ_CLS", "classifier": "TOKEN_CLS"}
# Keys of peft's adapter_config.json that do not change what the model computes, whatever they say.
_HARMLESS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
             "peft_version", "modules_to_save", "fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config",
             "runtime_config", "eva_config", "use_qalora"}
# With bias="all" peft writes a token classifier's bias twice more, once as trained and once as it was before.
_IGNORED_TENSORS = {f"{_PREFIX}classifier.{kind}.bias" for kind in ("modules_to_save", "original_module")}
# Saved values of init_lora_weights that say how training began and nothing about how to load.
_INIT_ONLY = ("eva", "orthogonal", "mica")


# --- adapter folders --------------------------------------------------------------------------------------------------

def save_adapter(model: nn.Module, folder: str | Path, details: dict[str, Any] | None = None) -> None:
    """Write the trained tensors and the configuration of the injected method; peft loads the folder.

    Args:
        model: carries exactly one injection whose method peft knows.
        folder: created if absent; files of an earlier adapter are replaced once all new ones are written.
        details: more for `minipeft.json`, such as label names.

    Raises:
        AdapterError: nothing is injected, the adapter is merged, or peft has no format for the method.
        OutputError: the folder cannot be written, or the disk is full.
    """
    if not injections(model):
        raise AdapterError("this model carries no adapter to save: inject a method first")
    injection = injections(model)[-1]
    if injection.merged:
        raise AdapterError("the adapter is merged into the weights: unmerge it, or use save_pretrained")
    if not hasattr(injection.config, "peft_type"):
        raise AdapterError(f"{injection.method} has no adapter to save: use save_pretrained")
    parameters = dict(model.named_parameters())
    tensors = {_PREFIX + name: parameters[name].detach().cpu().contiguous() for name in injection.trained_names()}
    head = getattr(model, "head", None)
    config = dataclasses.asdict(injection.config)
    if isinstance(config["target_modules"], str) and config["target_modules"].lower() == "all-linear":
        config["target_modules"] = list(injection.layers)
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        # One exact key a module: JSON readers may reorder keys, and then another of two matching ones would count.
        config[pattern] = {name: value for name in injection.layers
                           if (value := pattern_value(config[pattern], name, config[default])) != config[default]}
    config.update(
        peft_type=injection.config.peft_type, task_type=_TASK_TYPES[head], inference_mode=True,
        base_model_name_or_path=getattr(model, "name_or_path", None), fan_in_fan_out=True, use_dora=False,
        lora_bias=False, modules_to_save=["classifier", "score"] if head in ("score", "classifier") else None,
        target_modules=config["target_modules"] or sorted({name.split(".")[-1] for name in injection.layers}))
    base = getattr(model, "transformer", model)
    with replacing_folder(folder) as temporary:
        save_file(tensors, temporary / TENSORS_FILE, metadata={"format": "pt"})
        write_json(temporary / CONFIG_FILE, config)
        write_json(temporary / DETAILS_FILE, {
            "base_fingerprint": injection.fingerprint, "base_dtype": str(base.wte.weight.dtype),
            "base_model": getattr(model, "name_or_path", None), "method": injection.method, **(details or {})})


def read_details(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's minipeft.json; empty for an adapter that peft wrote."""
    path = Path(folder) / DETAILS_FILE
    return _read_json(path) if path.is_file() else {}


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Inject the method saved in `folder` into a fresh base model and load its trained tensors.

    The configuration, the base's fingerprint (where the folder has one) and every tensor's name, shape and values are
    checked; on any error the model is left as it was.

    Returns:
        The same model, in eval mode.

    Raises:
        AdapterError: no adapter there, a damaged one, another base's, another head's, or tensors missing or left over.
        ConfigError: a field that changes the numbers and is not implemented here.
        InjectionError: the model already carries a method.
    """
    folder = Path(folder)
    for file in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / file).is_file():
            raise AdapterError(f"{folder} holds no {file}: it is not an adapter folder")
    saved = _read_json(folder / CONFIG_FILE)
    config = _parse_config(saved, folder)
    task = _TASK_TYPES[getattr(model, "head", None)]
    if saved.get("task_type") not in (None, task):
        raise AdapterError(f"{folder} was trained for {saved['task_type']}, this model is for {task}")
    details = read_details(folder)
    dtype = str(getattr(model, "transformer", model).wte.weight.dtype)
    if "base_fingerprint" in details and details.get("base_dtype") == dtype and not injections(model):
        found = fingerprint(model)
        if found != details["base_fingerprint"]:
            raise AdapterError(f"{folder} was trained on another base model ({details.get('base_model')}, fingerprint "
                               f"{details['base_fingerprint']}); this one has fingerprint {found}")
    try:
        with open_tensors(folder / TENSORS_FILE) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except WeightsError as error:
        raise AdapterError(str(error)) from error
    random_state = torch.get_rng_state()  # loading draws initial values that it then overwrites
    inject(model, config)
    torch.set_rng_state(random_state)
    try:
        _fill(model, tensors, folder)
    except MinipeftError:
        remove(model)
        raise
    return model.eval()


def _parse_config(saved: dict[str, Any], folder: Path) -> Any:
    """A configuration object from peft's JSON; anything that would change the numbers unnoticed is refused."""
    by_type: dict[str, Method] = {m.config_class.peft_type: m for m in METHODS.values()
                                  if hasattr(m.config_class, "peft_type")}
    kind = saved.get("peft_type")
    if not isinstance(kind, str) or kind not in by_type:
        raise AdapterError(f"{folder / CONFIG_FILE} says peft_type {kind!r}; known are {', '.join(sorted(by_type))}")
    method = by_type[kind]
    known = {field.name: field for field in dataclasses.fields(method.config_class)}
    refused = sorted(key for key, value in saved.items() if value and key not in known and key not in _HARMLESS)
    if refused:
        raise ConfigError(f"{folder / CONFIG_FILE} sets {', '.join(f'{key}={saved[key]!r}' for key in refused)}, which "
                          "minipeft does not implement")
    values = {key: value for key, value in saved.items() if key in known and value is not None}
    if values.get("init_lora_weights") in _INIT_ONLY:
        values["init_lora_weights"] = True
    return method.config(**values)


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    parameters = dict(model.named_parameters())
    wanted = {_PREFIX + name: parameters[name] for name in injections(model)[-1].trained_names()}
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
    for name, parameter in wanted.items():
        parameter.copy_(tensors[name])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path} is not a JSON object")
    return content


# --- training state ---------------------------------------------------------------------------------------------------

def save_training_state(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int,
                        extra: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write what resuming needs: trained parameters, the optimiser's moments, random state, step and what is added.

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
            parameter.copy_(tensors[f"model/{name}"])
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            entry, _, name = rest.partition("/")
            optimizer.state[trained[name]][entry] = tensor.to(trained[name].device)
    torch.set_rng_state(random_state)
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])
    others = {name.removeprefix("extra/"): t for name, t in tensors.items() if name.startswith("extra/")}
    return step, extra, others
