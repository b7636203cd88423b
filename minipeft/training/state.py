"""The state to resume a run from: one file of trained values, the optimizer's moments, random state and step.

What else a run has to remember (its curve, its settings) goes along as JSON in the file's header, so that a process
killed at any moment leaves one whole state, the old one or the new one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save_file

from minipeft.errors import OutputError, WeightsError
from minipeft.files import replacing_folder
from minipeft.model.weights import open_tensors
from minipeft.training import distributed as parallel
from minipeft.training.sharding import spread_like, whole_tensors

STATE_FILE = "training_state.safetensors"


def save_training_state(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int,
                        extra: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write what resuming needs. Of several processes all must call, and the first one writes.

    Args:
        model: its parameters that require a gradient are stored, under "model/".
        optimizer: its state of these is stored, under "optimizer/".
        step: how many optimizer steps have been taken.
        extra: more to remember, as JSON.
        tensors: more tensors to remember, under "extra/".

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
    if (device := _device(trained)).type == "cuda":
        state["random/cuda"] = torch.cuda.get_rng_state(device)
    state = whole_tensors(state, first=parallel.rank() == 0)
    if parallel.rank() > 0:
        return
    with replacing_folder(folder) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / STATE_FILE,
                  metadata={"state": json.dumps({"step": step, "extra": extra})})


def load_training_state(folder: str | Path, model: nn.Module,
                        optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any], dict[str, torch.Tensor]]:
    """Restore a saved run into model, optimizer and torch's generators.

    Returns:
        (step, extra, tensors) as they were given to `save_training_state`; (0, {}, {}) where `folder` holds nothing.

    Raises:
        OutputError: the state is damaged, or belongs to a model with other parameters.
    """
    folder = Path(folder)
    if not (folder / STATE_FILE).is_file():
        return 0, {}, {}
    step, extra, random_state, tensors = _read(folder)
    try:
        return step, extra, _restore(folder, model, optimizer, random_state, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from error


def damaged(folder: str | Path, reason: str) -> OutputError:
    """The error of a state that cannot be resumed from, and what to do."""
    return OutputError(f"{folder} holds a damaged training state ({reason}): delete it, or start anew without --resume")


def saved_settings(folder: str | Path) -> dict[str, Any]:
    """The settings of the run whose state a folder holds; empty where it holds none, or a damaged one."""
    try:
        with open_tensors(Path(folder) / STATE_FILE) as file:
            return json.loads(file.metadata()["state"])["extra"]["settings"]
    except (WeightsError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, random_state: torch.Tensor,
             tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put a state's tensors where they belong; those that belong nowhere here are returned."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stored = _part(tensors, "model")
    if {name: t.shape for name, t in stored.items()} != {name: p.shape for name, p in trained.items()}:
        raise OutputError(f"{folder} holds the state of a run with other parameters: delete it or use another folder")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(spread_like(parameter, stored[name]))
    for key, tensor in _part(tensors, "optimizer").items():
        entry, _, name = key.partition("/")
        if tensor.dim() and tensor.shape != trained[name].shape:
            raise ValueError(f"{key} is {tuple(tensor.shape)}, the parameter is {tuple(trained[name].shape)}")
        optimizer.state[trained[name]][entry] = spread_like(trained[name], tensor)
    torch.set_rng_state(random_state)
    if "random/cuda" in tensors and (device := _device(trained)).type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], device)
    return _part(tensors, "extra")


def _read(folder: Path) -> tuple[int, dict[str, Any], torch.Tensor, dict[str, torch.Tensor]]:
    """(step, extra, random state, all other tensors) of a state file.

    Raises:
        OutputError: the file is damaged.
    """
    try:
        with open_tensors(folder / STATE_FILE) as file:
            saved = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        step, extra, random_state = saved["step"], saved["extra"], tensors.pop("random/cpu")
        if type(step) is not int or step < 0 or not isinstance(extra, dict):
            raise ValueError(f"step is {step!r}, extra is {type(extra).__name__}")
        return step, extra, random_state, tensors
    except (WeightsError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(folder, str(error)) from error


def _device(trained: dict[str, torch.nn.Parameter]) -> torch.device:
    """Where a model is trained: elsewhere nothing random is drawn for it, and no device is woken up to be asked."""
    return next((parameter.device for parameter in trained.values()), torch.device("cpu"))


def _part(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The tensors of one kind ("model", "optimizer" or "extra"), by what follows it in their names."""
    return {name.removeprefix(f"{kind}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}/")}
