"""A trained model on disk: an adapter folder or, where all weights were trained, a whole model. Written, and loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from minipeft.errors import AdapterError, ConfigError, DataError, WeightsError, first_few
from minipeft.files import digests, file_digest, read_json_file, replacing_folder, write_json
from minipeft.methods.folder import CONFIG_FILE as ADAPTER_CONFIG_FILE
from minipeft.methods.folder import (
    DETAILS_FILE,
    check_one_save,
    clear,
    read_contents,
    read_details,
    read_together,
    written_before,
)
from minipeft.methods.injection import active_injections, positions_left
from minipeft.methods.saving import adapter_parts, head_of, load_adapter, save_adapter
from minipeft.methods.wrappers import without_wrappers
from minipeft.model.config import GPT2Config
from minipeft.model.hub import find
from minipeft.model.tokenizer import VOCABULARY_FILE, Tokenizer, get_tokenizer
from minipeft.model.weights import CONFIG_FILE, WEIGHTS_FILE, read_config, stored_tensors
from minipeft.tasks import TASKS, find_task, task_name
from minipeft.tasks.task import Task
from minipeft.training import distributed as parallel
from minipeft.training.sharding import whole_tensors


def save_finetuned(model: nn.Module, folder: Path, details: dict[str, Any]) -> None:
    """Write an adapter folder or, where all weights were trained, a whole model with its vocabulary.

    Of several processes all must call, and the first one writes.

    Args:
        model: from `from_pretrained`, so that it knows its name.
        details: what prediction needs to know, for minipeft.json.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    first = parallel.rank() == 0
    if active_injections(model)[-1].config.saves_adapter:
        if first:
            save_adapter(model, folder, details)
        return
    tensors = whole_tensors(model.state_dict(), first)
    if not first:
        return
    earlier = written_before(folder)
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=tensors)
        files = digests(temporary)
        write_json(temporary / DETAILS_FILE, {"method": "full", "base_model": model.name_or_path, "files": files,
                                              **details})
    clear(earlier, folder, {folder / name for name in (*files, DETAILS_FILE)})


def load_finetuned(folder: str | Path, model_name: str | None = None, device: torch.device | None = None,
                   task: str | None = None) -> tuple[nn.Module, Task]:
    """A model and its task from what `finetune` left, an adapter folder on its base or a whole model; or from an
    adapter folder that peft or transformers' Trainer left, or that holds several methods.

    Args:
        model_name: the base to put an adapter on; default is the one it was trained on.
        device: default the CPU.
        task: a name in TASKS or the path of a .py file; default is what the folder was trained for or, where it does
            not say, the one whose head it holds. Without names, labels are called 0, 1, ...

    Returns:
        (model in eval mode, task).

    Raises:
        AdapterError: neither an adapter nor a model folder, an adapter of another base, a model that lacks its task's
            head, a damaged minipeft.json, or a folder for a user's own task whose file is not given: no code is run
            because a folder says so.
        ConfigError: an unknown task.
    """
    folder = Path(folder)
    parts = adapter_parts(folder)
    is_adapter = (parts[0] / ADAPTER_CONFIG_FILE).is_file()
    if not is_adapter and not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{folder} holds neither {ADAPTER_CONFIG_FILE} nor {CONFIG_FILE}: train first, or name "
                           f"{_adapters_below(folder) or 'the folder that training printed'}")
    details = details_of(folder)
    # Whether an adapter holds the head that its notes speak of, `load_adapter` sees.
    shapes = {} if is_adapter and {"task", "label_names"} <= details.keys() else _shapes(parts[0], is_adapter)
    task_class = _task_class(folder, details, head_of(shapes), task)
    base = (model_name or _base_model(parts[0], details)) if is_adapter else folder
    finetuned_task = _task(folder, details, shapes, task_class, base)
    if not is_adapter:
        _check_whole_model(folder, shapes, task_class)
    model = task_class.load_model(base, finetuned_task.label_names)
    if is_adapter:
        model = load_adapter(model, folder)
    check_vocabulary(finetuned_task.tokenizer, model)
    if "max_length" not in details and finetuned_task.max_length > positions_left(model):  # virtual tokens take some
        finetuned_task = dataclasses.replace(finetuned_task, max_length=positions_left(model))
    return model.to(device or torch.device("cpu")), finetuned_task


def details_of(folder: str | Path) -> dict[str, Any]:
    """What a folder notes for prediction; of an adapter of several methods, what the first one's folder does.

    Raises:
        AdapterError: a damaged account.
    """
    return read_details(adapter_parts(folder)[0])


def _check_whole_model(folder: Path, shapes: dict[str, tuple[int, ...]], task_class: type[Task]) -> None:
    """Refuse a model whose files are of two saves, or whose head would be a random one.

    Raises:
        AdapterError: saying which.
    """
    *_, others = read_together(folder, (CONFIG_FILE, WEIGHTS_FILE), read=file_digest, digest_of=str)
    check_one_save(folder, others)
    head = task_class.model_class.head
    if task_class.model_class.has_new_head and not any(name.startswith(f"{head}.") for name in shapes):
        raise AdapterError(f"{folder} holds no {head}, which a model for {task_class.name} has: train first, or name "
                           "the folder that training printed")


def _adapters_below(folder: Path) -> str:
    """The sub-folders that hold an adapter, such as a trainer's checkpoints."""
    found = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG_FILE}"))
    return f"one of {first_few(list(map(str, found)))}" if found else ""


def _shapes(folder: Path, is_adapter: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in an adapter's or a model's folder, by name.

    Raises:
        AdapterError, WeightsError: its file cannot be read.
    """
    if is_adapter:
        return {name: tuple(tensor.shape) for name, tensor in read_contents(folder).tensors.items()}
    return {without_wrappers(tensor.name): tensor.shape for tensor in stored_tensors(find(folder) / WEIGHTS_FILE)}


def _task_class(folder: Path, details: dict[str, Any], head: type[nn.Module] | None, asked: str | None) -> type[Task]:
    """The task a folder was trained for, which is also the one that is asked for, if one is.

    Args:
        head: the model class whose head it holds.
    """
    trained_for = details.get("task", next((name for name, kind in TASKS.items() if kind.model_class is head), None))
    if asked is None and trained_for is None:
        writing = [name for name, kind in TASKS.items() if not kind.model_class.has_new_head]
        raise AdapterError(f"{folder} does not say what it was trained for, and holds no head that would: name the "
                           f"task with --task {' or '.join(writing)}")
    trained_for = task_name(str(trained_for))
    if asked is None and trained_for not in TASKS:
        raise AdapterError(f"{folder} was trained for the task {trained_for!r}, which is not one of "
                           f"{', '.join(TASKS)}: name the .py file that defines it with --task")
    task_class = find_task(asked or trained_for)
    if "task" in details and task_class.name != trained_for:
        raise AdapterError(f"{folder} was trained for {trained_for}, not for {task_class.name}")
    return task_class


def _base_model(folder: Path, details: dict[str, Any]) -> str:
    """The base model that an adapter says it belongs to."""
    name = details.get("base_model")
    if name is None:
        noted = read_json_file(folder / ADAPTER_CONFIG_FILE, AdapterError).get("base_model_name_or_path")
        hint = f"; whoever trained it noted {noted!r}" if noted else ""
        raise AdapterError(f"{folder} does not say which base model it belongs to: name it with --model{hint}")
    if not isinstance(name, str):
        raise AdapterError(f"{folder / DETAILS_FILE}: base_model must be str, got {name!r}")
    return name


def _task(folder: Path, details: dict[str, Any], shapes: dict[str, tuple[int, ...]], task_class: type[Task],
          base: str | Path) -> Task:
    """The task with a folder's details; what they do not say follows from the head and the base.

    Raises:
        AdapterError: details that make no task, or a head that does not fit the base.
    """
    config = GPT2Config.from_dict(read_config(find(base)))
    has_labels = task_class.model_class.has_new_head
    known = {"max_length": min(task_class.max_length, config.n_positions), "label_names": [], **details}
    if has_labels and "label_names" not in details:
        weight = f".{task_class.model_class.head}.weight"
        shape = next((shape for name, shape in shapes.items() if f".{name}".endswith(weight)),
                     (config.num_labels, config.n_embd))
        if len(shape) != 2 or not shape[0] or shape[1] != config.n_embd:
            raise AdapterError(f"{folder}: {weight[1:]} is {shape}, which should be {config.n_embd} numbers for each "
                               "label")
        known["label_names"] = [str(i) for i in range(shape[0])]
    try:
        task = task_class.from_details(get_tokenizer(find(base)), known)
    except (ConfigError, DataError) as error:
        raise AdapterError(f"{folder / DETAILS_FILE}: {error}") from error
    if has_labels and not task.label_names:
        raise AdapterError(f"{folder / DETAILS_FILE}: label_names is empty")
    return task


def check_vocabulary(tokenizer: Tokenizer, model: nn.Module) -> None:
    """Refuse a vocabulary that is not the model's: too many entries, or another end-of-text token, which comes last.

    Raises:
        WeightsError: saying which.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise WeightsError(f"the vocabulary has {tokenizer.vocab_size:,} entries, the model only "
                           f"{model.config.vocab_size:,}: put the model's own {VOCABULARY_FILE} beside its weights")
    end_of_text = model.config.eos_token_id
    if end_of_text not in (None, tokenizer.eos_token_id):
        raise WeightsError(f"the vocabulary's end-of-text token is {tokenizer.eos_token_id}, the model's "
                           f"{end_of_text}: the {VOCABULARY_FILE} beside its weights is cut off, or another model's")
