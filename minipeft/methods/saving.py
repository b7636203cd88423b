"""Adapter folders in peft's format: written, checked, and loaded into a base model; `folder.py` keeps their files.

What peft has no place for stands in `minipeft.json`: the base model's fingerprint, and what prediction needs (label
names, length).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save_file

from minipeft.errors import AdapterError, ConfigError, InjectionError, first_few
from minipeft.files import digests, replacing_folder, write_json
from minipeft.methods import METHODS, inject
from minipeft.methods.config import MethodConfig
from minipeft.methods.folder import (
    CONFIG_FILE,
    DETAILS_FILE,
    PICKLED_FILE,
    TENSORS_FILE,
    clear,
    parts_of,
    read_contents,
    tensors_file,
    written_before,
)
from minipeft.methods.injection import (
    Injection,
    active_injections,
    all_injections,
    base_dtype,
    base_parameters,
    fingerprint,
)
from minipeft.methods.switch import activate, adapter_names, check_can_leave, deactivate, remove
from minipeft.methods.turn import surgery
from minipeft.methods.wrappers import check_is_bare, seeing_through
from minipeft.model.pretrained import PretrainedModel

logger = logging.getLogger(__name__)

# Keys of peft's adapter_config.json that do not change what the model computes, whatever they say.
_HARMLESS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
             "peft_version", "modules_to_save", "fan_in_fan_out", "runtime_config"}


# --- save -------------------------------------------------------------------------------------------------------------

@seeing_through
def save_adapter(model: nn.Module, folder: str | Path, details: dict[str, Any] | None = None) -> None:
    """Write the trained tensors and the configuration of the active adapter; peft loads the folder where it knows the
    method. A combination of methods becomes one sub-folder each, named by the method.

    Args:
        model: carries one injection or more.
        folder: created if absent. What an earlier save wrote there is replaced once all new files are written; other
            files, such as those of another adapter in a sub-folder, stay.
        details: more for `minipeft.json`, such as label names.

    Raises:
        AdapterError: nothing is injected, the adapter is merged, the method trains the whole model, or a combination's
            sub-folder holds an adapter of its own.
        OutputError: the folder cannot be written, or the disk is full.
    """
    active = active_injections(model)
    if not active:
        raise AdapterError("this model carries no adapter to save: inject a method first")
    if any(injection.merged for injection in active):
        raise AdapterError("the adapter is merged into the weights: unmerge it, or use save_pretrained")
    for injection in active:
        if not injection.config.saves_adapter:
            raise AdapterError(f"{injection.method} has no adapter to save: use save_pretrained")
    folder = Path(folder)
    earlier = written_before(folder)
    parts = [folder / injection.method for injection in active] if len(active) > 1 else []
    for part in parts:
        if (part / CONFIG_FILE).is_file() and part / CONFIG_FILE not in earlier:
            raise AdapterError(f"{part} holds an adapter of its own, and would be one of this combination's folders: "
                               "choose another folder")
    with replacing_folder(folder) as temporary:
        for injection in active:
            part = temporary / injection.method if len(active) > 1 else temporary
            part.mkdir(exist_ok=True)
            _write(model, injection, part, details or {})
        if parts:
            write_json(temporary / DETAILS_FILE, {"parts": [part.name for part in parts]})
        written = {folder / file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file()}
    clear(earlier, folder, written)


def _write(model: nn.Module, injection: Injection, folder: Path, details: dict[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _stored(model, injection).items()}
    config = dataclasses.asdict(injection.config) | injection.config.to_saved(model, injection.layers)
    # peft looks for a new head under these two names, whichever the model has.
    new_heads = ["classifier", "score"] if getattr(model, "has_new_head", False) else None
    config |= {"peft_type": injection.config.peft_type, "task_type": _task_type(model), "inference_mode": True,
               "base_model_name_or_path": getattr(model, "name_or_path", None), "modules_to_save": new_heads}
    save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, config)
    write_json(folder / DETAILS_FILE, {
        "files": digests(folder), "base_fingerprint": injection.fingerprint or None,  # None: injected on meta
        "base_dtype": str(injection.base_dtype), "base_model": getattr(model, "name_or_path", None),
        "method": injection.method, **details})


def _task_type(model: nn.Module) -> str:
    """What peft calls the task of a model; a model that is none of this library's has no particular one."""
    return getattr(model, "task_type", "FEATURE_EXTRACTION")


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


# --- load -------------------------------------------------------------------------------------------------------------

@surgery
def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> nn.Module:
    """Inject the method saved in `folder` into a base model and load its trained tensors.

    The configuration, the base's fingerprint (where the folder has one) and every tensor's name, shape and values are
    checked; on any error the model is left as it was. What the configuration says and the tensors do not bear out is
    ignored, and logged as a warning in one line.

    Args:
        model: a base model. It may carry adapters under other names: they stay, inactive (see `set_adapter`).
        folder: an adapter folder, ours or peft's, whose tensors may be pickled (adapter_model.bin); other files in it,
            such as a trainer's, do not matter. Or one with a sub-folder for each of several methods.
        name: of the loaded adapter.

    Returns:
        The same model, in eval mode, with the loaded adapter active.

    Raises:
        AdapterError: no adapter there, a damaged one, another base's, another head's, or tensors missing or left over.
        ConfigError: a field that changes the numbers and is not implemented here.
        InjectionError: the model already carries a method under this name, or full fine-tuning, is wrapped, or is on
            the meta device.
    """
    check_is_bare(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InjectionError("this model is on the meta device and has no values: load its weights first")
    parts = adapter_parts(folder)
    prepared = [_prepare(model, part) for part in parts]
    check_can_leave(model, active_injections(model))
    if name in adapter_names(model):
        raise InjectionError(f"this model already carries an adapter {name!r}: remove it, or load under another name")
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    earlier = deactivate(model, active_injections(model))
    try:
        for part, (config, tensors, _) in zip(parts, prepared):
            with torch.random.fork_rng(devices):  # loading draws initial values that it then overwrites
                inject(model, config, name)
            _fill(model, active_injections(model)[-1], tensors, part)
    except BaseException:  # also where memory ran out, or by Ctrl-C
        if name in adapter_names(model):
            remove(model, name)
        activate(model, earlier)
        raise
    for part, (*_, notes) in zip(parts, prepared):
        if notes:
            logger.warning("%s: %s", part, "; ".join(notes))
    return model.eval()


def adapter_parts(folder: str | Path) -> list[Path]:
    """The folders that hold one method each of the adapter in `folder`; of one method that is the folder itself.

    Raises:
        AdapterError: a damaged account.
    """
    parts = parts_of(Path(folder))
    if parts == [Path(folder)] and not (parts[0] / CONFIG_FILE).is_file():  # a combination from before the accounts
        return [parts[0] / name for name in METHODS if (parts[0] / name / CONFIG_FILE).is_file()] or parts
    return parts


def _prepare(model: nn.Module, folder: Path) -> tuple[Any, dict[str, torch.Tensor], list[str]]:
    """What an adapter folder holds, checked as far as it can be before the model is touched: its configuration, its
    tensors, and what to say of it."""
    saved, tensors, details = read_contents(folder)
    config = _parse_config(saved, folder, model)
    notes = [*_check_task(saved, tensors, folder, model, config.needs_task), *_ignored(saved, tensors, folder)]
    known = details.get("base_fingerprint")
    earlier = all_injections(model)  # the fingerprint is of the base before the first, in the format that it had then
    if known and details.get("base_dtype") == str(earlier[0].base_dtype if earlier else base_dtype(model)):
        found = fingerprint(model)
        if found not in ("", known):
            raise AdapterError(f"{folder} was trained on another base model ({details.get('base_model')}, fingerprint "
                               f"{known}); this one has fingerprint {found}")
    return config, tensors, notes


def head_of(tensors: Iterable[str]) -> type[PretrainedModel] | None:
    """The model class whose new head is among tensors of these names, an adapter's or a model's; None where none is."""
    heads = {model_class.head: model_class for model_class in PretrainedModel.__subclasses__()
             if model_class.has_new_head}
    modules = {name.removeprefix("base_model.").removeprefix("model.").partition(".")[0] for name in tensors}
    return next((heads[module] for module in sorted(modules) if module in heads), None)


def _check_task(saved: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path, model: nn.Module,
                needed: bool) -> list[str]:
    """What to say where an adapter does not say that it is for the model's task. The tensors decide: many adapters in
    public were saved with another task_type than their model's.

    Args:
        needed: the method has a meaning for one task only.

    Raises:
        AdapterError: it is for another task.
    """
    says, task, head = saved.get("task_type"), _task_type(model), head_of(tensors)
    if says == task:
        return []
    if says is None and needed:
        raise AdapterError(f"{folder} does not say its task_type, and virtual tokens have a meaning for one task only")
    fits = head.task_type == task if head else not (needed or getattr(model, "has_new_head", False))
    if not fits and (says is not None or head is not None):
        raise AdapterError(f"{folder} was trained for {head.task_type if head else says}, this model is for {task}")
    held = f"holds the {head.head} of" if head else "fits"
    return [f"task_type {says or 'null'} is ignored, since the adapter {held} a {task} model"]


def _ignored(saved: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> list[str]:
    """What to say of what is there and is not read."""
    named = saved.get("modules_to_save") or []
    named = list(dict.fromkeys(map(str, named if isinstance(named, list) else [named])))
    lacking = [name for name in named if not any(f".{name}." in key for key in tensors)]
    if len(lacking) < len(named):  # peft names both heads, whichever the model has
        lacking = [name for name in lacking if name not in ("classifier", "score")]
    notes = [f"modules_to_save {', '.join(lacking)} is ignored, since {tensors_file(folder)} holds no such module"
             ] if lacking else []
    if saved.get("auto_mapping"):
        notes.append("auto_mapping is ignored, since the model is there already")
    if (folder / TENSORS_FILE).is_file() and (folder / PICKLED_FILE).is_file():
        notes.append(f"{PICKLED_FILE} is ignored, since {TENSORS_FILE} is there")
    return notes


def _parse_config(saved: dict[str, Any], folder: Path, model: nn.Module) -> Any:
    """A configuration object from peft's JSON; anything that would change the numbers unnoticed is refused."""
    by_type: dict[str, type[MethodConfig]] = {}
    for config_class in (method.config_class for method in METHODS.values() if method.config_class.saves_adapter):
        by_type.setdefault(config_class.peft_type, config_class)  # LORA is LoraConfig, which can also say use_dora
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
    # With bias="all" peft writes a token classifier's bias twice more, once as trained and once as it was before.
    twins = {f"base_model.model.{getattr(model, 'head', None)}.{kind}.bias"
             for kind in ("modules_to_save", "original_module")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in twins}
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [f"{name} is {tuple(tensors[name].shape)}, this model needs {tuple(parameter.shape)}"
                 for name, parameter in wanted.items() if name in tensors and tensors[name].shape != parameter.shape]
    problems += [f"{name} holds {tensor.dtype}, not floating point" for name, tensor in tensors.items()
                 if not tensor.is_floating_point()]
    problems += [f"{name} holds NaN or infinity" for name, tensor in tensors.items()
                 if not torch.isfinite(tensor.float()).all()]
    if problems:
        raise AdapterError(f"{folder / tensors_file(folder)} does not fit this model: {first_few(problems)}")
    layer_tensors = set()
    for name, layer in injection.layers.items():
        layer_tensors |= layer.stored(name).keys()
        layer.restore(name, tensors)
    for name, parameter in wanted.items():
        if name not in layer_tensors:
            parameter.copy_(tensors[name])
