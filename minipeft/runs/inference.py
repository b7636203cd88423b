"""A trained model at work: tested on a dataset, or predicting for a user's texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from minipeft.data.datasets import KNOWN, choose_dataset, load_dataset
from minipeft.errors import ConfigError, DataError
from minipeft.runs import defaults
from minipeft.runs.places import newest_trained
from minipeft.runs.plan import Options, Say, silent
from minipeft.runs.trained import details_of, load_finetuned
from minipeft.settings import SEED
from minipeft.tasks import task_for
from minipeft.tasks.generation import Generation
from minipeft.tasks.task import Task
from minipeft.training.hardware import cast_frozen, choose_device, choose_precision


@dataclass
class Trained:
    """A trained model on its device, its weights in the precision that it computes in."""

    folder: Path
    model: nn.Module
    task: Task
    device: torch.device
    precision: torch.dtype


def chosen_adapter(named: str | Path | None, say: Say = silent) -> Path:
    """The folder of the trained model to use: the one that is named or, said in a line, the one written last.

    Raises:
        AdapterError: none is named, and there is none.
    """
    if named is not None:
        return Path(named)
    newest = newest_trained()
    say(f"adapter    {newest} (the newest in {newest.parent})")
    return newest


def load(folder: str | Path, options: Options) -> Trained:
    """What `finetune` left in a folder, ready to predict.

    Args:
        options: which base (`model`), task, device and precision.

    Raises:
        MinipeftError: as `load_finetuned`, or a device that this machine lacks.
    """
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    model, task = load_finetuned(folder, options.model, device, options.task)
    return Trained(Path(folder), cast_frozen(model.requires_grad_(False), precision), task, device, precision)


@dataclass
class Evaluation:
    """What a test came to.

    Attributes:
        dataset: its name.
        examples: how many were tested.
        available: how many the test split has.
        metrics: by name.
    """

    dataset: str
    examples: int
    available: int
    metrics: dict[str, Any]


def evaluate(trained: Trained, options: Options, say: Say = silent) -> Evaluation:
    """Test a trained model on a dataset's test split.

    Args:
        options: which dataset, by default the one it was trained on, and how much of it.
        say: prints which dataset was chosen, and why.

    Raises:
        DataError: the dataset cannot be read, or has other labels.
    """
    name, why = (options.dataset, "asked for") if options.dataset is not None else _dataset(trained, options)
    say(f"dataset    {name} ({why})")
    task, named = trained.task, "label_names" in details_of(trained.folder)
    data = load_dataset(name, task_for(name, options.task or task.name), options.data_dir,
                        label_names=(named and task.label_names) or None, reading=options)
    for remark in data.remarks.items():
        say("{:10} {}".format(*remark))
    task.check_installed()
    if not named and len(data.label_names) == len(task.label_names) and data.label_names != task.label_names:
        task.label_names = data.label_names
        say(f"labels     {', '.join(f'{i} = {label}' for i, label in enumerate(data.label_names))} (in the dataset's "
            "order: the model's folder does not name them)")
    if data.label_names != task.label_names:
        raise DataError(f"{name} has the labels {', '.join(data.label_names)}, but {trained.folder} was trained for "
                        f"{', '.join(task.label_names)}")
    small = trained.device.type == "cpu" and not options.full
    test = data.test.subset(options.test_size or (defaults.CPU_SIZES["test"] if small else None), seed=0)
    metrics = task.test(trained.model, test, trained.device, trained.precision, progress="testing")
    return Evaluation(name, len(test), len(data.test), metrics)


def _dataset(trained: Trained, options: Options) -> tuple[str, str]:
    """The dataset to test on where none is named, and why that one."""
    trained_on = details_of(trained.folder).get("dataset")
    if trained_on in (*KNOWN, "sample"):
        return trained_on, "which the model was trained on"
    if trained.task.name != "classification":
        if trained_on is None:
            raise DataError(f"{trained.folder} does not say what it was trained on: name a dataset with --dataset")
        raise DataError(f"{trained.folder} was trained on {trained_on}, a file of your own: name it with --dataset")
    return choose_dataset(options.data_dir)


def predict(trained: Trained, texts: Sequence[str], **decoding: Any) -> Iterator[str]:
    """What the model predicts for each text, piece by piece, a line for each.

    Args:
        decoding: of a task that writes: max_new_tokens, num_beams, length_penalty, temperature, top_k, top_p, and the
            seed of sampling. Greedy without any.

    Raises:
        ConfigError: a value out of range, or one that means nothing to the task or beside the others.
    """
    task, request = trained.task, (trained.model, texts, trained.device, trained.precision)
    if not isinstance(task, Generation):
        if decoding:
            raise ConfigError(f"{trained.folder} was trained for {task.name}, which writes no text: "
                              f"--{next(iter(decoding)).replace('_', '-')} means nothing to it")
        return task.predict(*request)
    if "max_new_tokens" in decoding:  # the source has the other tokens
        task = dataclasses.replace(task, max_new_tokens=decoding.pop("max_new_tokens"))
    if "top_k" in decoding or "top_p" in decoding:
        decoding.setdefault("temperature", 1.0)
    seed, beams = decoding.pop("seed", None), decoding.get("num_beams", 1)
    if seed is not None and not SEED.holds(seed):
        raise ConfigError(f"seed must be {SEED.words}, got {seed}")
    if seed is not None and (beams != 1 or not decoding.get("temperature")):
        raise ConfigError("--seed is for sampling: add --temperature, --top-k or --top-p, and no --num-beams")
    if beams != 1:
        return (text + "\n" for text in task.generate_texts(*request, **decoding))
    generator = torch.Generator(trained.device).manual_seed(seed or 0)
    return task.predict(*request, generator=generator, **decoding)
