"""Trained models on disk: an adapter folder, or a whole model where all weights were trained, and back."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from minipeft.errors import AdapterError, WeightsError
from minipeft.files import replacing_folder, write_json
from minipeft.methods.injection import injections
from minipeft.methods.saving import CONFIG_FILE as ADAPTER_CONFIG_FILE
from minipeft.methods.saving import DETAILS_FILE, load_adapter, read_details, save_adapter
from minipeft.methods.saving import TENSORS_FILE as ADAPTER_TENSORS_FILE
from minipeft.model.tokenizer import VOCABULARY_FILE, Tokenizer, get_tokenizer
from minipeft.model.weights import find
from minipeft.tasks import TASKS, find_task
from minipeft.tasks.task import Task
from minipeft.training import distributed as parallel


def save_finetuned(model: nn.Module, folder: Path, base: str, details: dict[str, Any]) -> None:
    """Write an adapter folder or, where all weights were trained, a whole model with its vocabulary.

    Of several processes all must call, and the first one writes.
    """
    first = parallel.rank() == 0
    if hasattr(injections(model)[-1].config, "peft_type"):
        if first:
            save_adapter(model, folder, details)
        return
    vocabulary = find(base) / VOCABULARY_FILE
    with replacing_folder(folder) if first else nullcontext(folder) as temporary:
        model.save_pretrained(temporary)
        if not first:
            return
        if vocabulary.is_file():
            shutil.copyfile(vocabulary, temporary / VOCABULARY_FILE)
        write_json(temporary / DETAILS_FILE, {"method": "full", "base_model": base, **details})
    for file in (ADAPTER_CONFIG_FILE, ADAPTER_TENSORS_FILE):  # an adapter that was there before is not this model's
        (folder / file).unlink(missing_ok=True)


def load_finetuned(folder: str | Path, model_name: str | None = None, device: torch.device | None = None,
                   task: str | None = None) -> tuple[nn.Module, Task]:
    """A model and its task from what `finetune` left: an adapter folder on its base, or a whole model.

    Args:
        model_name: the base to put an adapter on; default is the one it was trained on.
        task: a name in TASKS or the path of a .py file; default is what the folder was trained for, and
            classification where it does not say.

    Returns:
        (model in eval mode, task).

    Raises:
        AdapterError: neither an adapter nor a model folder, an adapter of another base, or one for a user's own task
            whose file is not given: no code is run because a folder says so.
        ConfigError: an unknown task.
    """
    folder = Path(folder)
    details = read_details(folder)
    trained_for = str(details.get("task", "classification"))
    if task is None and trained_for not in TASKS:
        raise AdapterError(f"{folder} was trained for the task {trained_for!r}, which is not one of "
                           f"{', '.join(TASKS)}: name the .py file that defines it with --task")
    task_class = find_task(task or trained_for)
    if "task" in details and task_class.name != trained_for:
        raise AdapterError(f"{folder} was trained for {trained_for}, not for {task_class.name}")
    _check(details, folder, task_class)
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        if not (folder / "config.json").is_file():
            raise AdapterError(f"{folder} holds neither {ADAPTER_CONFIG_FILE} nor config.json: train first, or name "
                               "the folder that training printed")
        model = task_class.model_class.from_pretrained(folder)
        tokenizer = get_tokenizer(folder)
    else:
        name = model_name or details.get("base_model")
        if name is None:
            raise AdapterError(f"{folder} does not say which base model it belongs to: name it with --model")
        model = load_adapter(task_class.load_model(name, details.get("label_names", [])), folder)
        tokenizer = get_tokenizer(find(name))
    check_vocabulary(tokenizer, model)
    model.to(device or torch.device("cpu"))
    if not details.get("label_names"):
        details["label_names"] = [] if model.head == "lm_head" else [str(i) for i in range(model.config.num_labels)]
    details.setdefault("max_length", min(task_class.max_length, model.config.n_positions))
    return model, task_class.from_details(tokenizer, details)


def _check(details: dict[str, Any], folder: Path, task: type[Task]) -> None:
    """Refuse a minipeft.json whose values are not of the types that are needed.

    Raises:
        AdapterError: naming the first one.
    """
    names = details.get("label_names", ["one", "two"])
    enough = bool(names) or task.model_class.head == "lm_head"  # which has no labels
    good = {"label_names": isinstance(names, list) and all(isinstance(name, str) for name in names) and enough,
            "max_length": type(details.get("max_length", 1)) is int,
            "max_new_tokens": type(details.get("max_new_tokens", 1)) is int, "base_model": isinstance(
                details.get("base_model") or "", str)}
    wrong = [key for key, value in good.items() if not value]
    if wrong:
        raise AdapterError(f"{folder / DETAILS_FILE} has an unusable {wrong[0]}: {details[wrong[0]]!r}")


def check_vocabulary(tokenizer: Tokenizer, model: nn.Module) -> None:
    """Refuse a vocabulary with entries that the model has no embedding for.

    Raises:
        WeightsError: there are such.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise WeightsError(f"the vocabulary has {tokenizer.vocab_size:,} entries, the model only "
                           f"{model.config.vocab_size:,}: put the model's own {VOCABULARY_FILE} beside its weights")
