"""A trained model at work: tested on a dataset, or predicting for a user's texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from minipeft.data.datasets import NAMED, SPLITS, Dataset, column_names, is_one_file, load_dataset, load_whole
from minipeft.data.examples import check_text, together
from minipeft.errors import ConfigError, DataError
from minipeft.runs import defaults
from minipeft.runs.places import is_bundled, newest_trained
from minipeft.runs.plan import DATA_OPTIONS, Options, Say, silent, where_data_are
from minipeft.runs.request import fingerprints_in, seed_in
from minipeft.runs.trained import details_of, load_finetuned
from minipeft.settings import SEED
from minipeft.tasks import task_for
from minipeft.tasks.generation import Generation, source_text
from minipeft.tasks.task import Task
from minipeft.training.hardware import cast_frozen, choose_device, choose_precision, matmul_precision


@dataclass
class Trained:
    """A trained model on its device, its weights in the precision that it computes in."""

    folder: Path
    model: nn.Module
    task: Task
    device: torch.device
    precision: torch.dtype


def chosen_adapter(named: str | Path | None, say: Say = silent) -> Path:
    """The folder of the trained model to use: the one that is named or, said in a line, the one written last; before
    anything was trained, the bundled one.

    Raises:
        AdapterError: none is named, and there is none.
    """
    if named is not None:
        return Path(named)
    newest = newest_trained()
    why = "bundled; nothing has been trained here yet" if is_bundled(newest) else f"the newest in {newest.parent}"
    say(f"adapter    {newest} ({why})")
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
    """Test a trained model on a dataset's test split, or on all rows of a single file of the user's own.

    Of the very file that the model was trained on only the rows that were held out are tested.

    Args:
        options: which dataset, by default the one it was trained on, and how much of it.
        say: prints which dataset was chosen, and why.

    Raises:
        DataError: the dataset cannot be read or found again, or has other labels.
    """
    details = details_of(trained.folder)
    own = options.dataset is None
    options = _where_it_was_trained(trained.folder, details, options) if own else options
    say(f"dataset    {options.dataset} ({'which the model was trained on' if own else 'asked for'})")
    if not own and options.dataset not in NAMED and columns_noted(trained):
        noted = columns_noted(trained, column_names(options.dataset, options))
        if noted := {key: column for key, column in noted.items() if getattr(options, key) is None}:
            options = dataclasses.replace(options, **noted)
            say(f"columns    {', '.join(noted.values())} (as in training)")
    data, what = _to_test(trained, details, options, own)
    for remark in data.remarks.items():
        say("{:10} {}".format(*remark))
    task = trained.task
    task.check_installed()
    if "label_names" not in details and len(data.label_names) == len(task.label_names) and (
            data.label_names != task.label_names):
        task.label_names = data.label_names
        say(f"labels     {', '.join(f'{i} = {label}' for i, label in enumerate(data.label_names))} (in the dataset's "
            "order: the model's folder does not name them)")
    if data.label_names != task.label_names:
        raise DataError(f"{options.dataset} has the labels {', '.join(data.label_names)}, but {trained.folder} was "
                        f"trained for {', '.join(task.label_names)}")
    if what:
        say(f"tested     {what}")
    small = trained.device.type == "cpu" and not options.full and options.dataset in NAMED
    test = data.test.subset(options.test_size or (defaults.CPU_SIZES["test"] if small else None),
                            _subset_seed(details, options))
    with matmul_precision(options.matmul_precision):
        metrics = task.test(trained.model, test, trained.device, trained.precision, progress="testing")
    return Evaluation(options.dataset, len(test), len(data.test), metrics)


def _subset_seed(details: dict[str, Any], options: Options) -> int:
    """Which examples a size takes: those that the training took by its seed, if no other is asked for."""
    return seed_in(details) if options.subset_seed is None else options.subset_seed


def columns_noted(trained: Trained, among: Sequence[str] | None = None) -> dict[str, str]:
    """The `text_column` and `label_column` that a user named in training.

    Args:
        among: a file's columns; others are left out.
    """
    noted = details_of(trained.folder).get("data")
    found = {key: noted.get(key) for key in ("text_column", "label_column")} if isinstance(noted, dict) else {}
    return {key: column for key, column in found.items()
            if isinstance(column, str) and (among is None or column in among)}


def _where_it_was_trained(folder: Path, details: dict[str, Any], options: Options) -> Options:
    """The options with the dataset that a model was trained on, and with how that was read.

    Raises:
        DataError: its folder does not say.
    """
    name, noted = details.get("dataset"), details.get("data")
    if name in NAMED:
        return dataclasses.replace(options, dataset=name)
    if isinstance(noted, dict) and "dataset" in noted and noted.keys() <= set(DATA_OPTIONS):
        return dataclasses.replace(options, **{**noted, **where_data_are(options)})
    what = f"was trained on {name}, a file of your own" if name else "does not say what it was trained on"
    raise DataError(f"{folder} {what}: name {'it' if name else 'a dataset'} with --dataset")


def _to_test(trained: Trained, details: dict[str, Any], options: Options, own: bool) -> tuple[Dataset, str]:
    """The dataset whose test split is tested, and in words which rows these are, of a file of the user's own.

    Args:
        own: whether it is to be the one that the model was trained on.

    Raises:
        DataError: it cannot be read, or is to be the model's own and has another content.
    """
    name, task = options.dataset, task_for(options.dataset, options.task or trained.task.name)
    label_names = trained.task.label_names if details.get("label_names") else None
    trained_on = fingerprints_in(details)
    held_out = "the rows held out when the model was trained on the others"
    if not own and is_one_file(name, options):
        whole = load_whole(name, task, label_names, options)
        train, validation, test = (trained_on[split] for split in SPLITS) if trained_on else [""] * 3
        fingerprint = whole.test.fingerprint()
        if trained_on and fingerprint in (together((train, test)), together((train, validation, test))):
            data = load_dataset(name, task, label_names=label_names, reading=options)
            if data.test.fingerprint() == test:
                return data, held_out
            return whole, "all rows, most of which the model was trained on (they stand in another order now)"
        seen = trained_on and fingerprint in (train, validation, together((train, validation)))
        return whole, "all rows" + ", which the model was trained on" * bool(seen)
    data = load_dataset(name, task, options.data_dir, label_names=label_names, reading=options)
    if own and trained_on is not None and data.fingerprints() != trained_on:
        if name not in NAMED:
            raise DataError(f"{name} has changed since {trained.folder} was trained on it: name it with --dataset to "
                            "test all of its rows")
        return data, "its test split, which has changed since the model was trained"
    carved = is_one_file(name, options) and data.fingerprints() == trained_on
    return data, held_out * carved


def predict(trained: Trained, texts: Sequence[str], **decoding: Any) -> Iterator[str]:
    """What the model predicts for each text, piece by piece, a line for each.

    Args:
        decoding: of a task that writes: max_new_tokens, num_beams, length_penalty, temperature, top_k, top_p, and the
            seed of sampling. Greedy without any.

    Raises:
        ConfigError: a value out of range, or one that means nothing to the task or beside the others.
        DataError: what is no text, or an empty one.
    """
    task, decoding = _decoding(trained, decoding)
    texts = _checked(texts)
    if not texts:
        return iter(())
    request = (trained.model, texts, trained.device, trained.precision)
    if decoding.get("num_beams", 1) != 1:
        return (text + "\n" for text in task.generate_texts(*request, **decoding))
    return task.predict(*request, **decoding)


def predict_table(trained: Trained, texts: Sequence[str], progress: str | None = None,
                  **decoding: Any) -> dict[str, list[Any]]:
    """What the model predicts for each text as columns of a table: "prediction", and what the task adds.

    Args:
        progress: title of a progress bar; None shows none.
        decoding: as `predict`.

    Raises:
        ConfigError, DataError: as `predict`.
    """
    task, decoding = _decoding(trained, decoding)
    texts = _checked(texts)
    if not texts:
        return {"prediction": []}
    return task.table(trained.model, texts, trained.device, trained.precision, progress, **decoding)


def _checked(texts: Iterable[Any]) -> list[Any]:
    """The texts as a list; of a task that finds tags a text may be a list of words.

    Raises:
        DataError: a single text, or one among them that is none.
    """
    if isinstance(texts, str):
        raise DataError("predict takes a list of texts, and got one text: put it between [ and ]")
    texts = list(texts)
    for number, text in enumerate(texts, start=1):
        check_text(source_text(text), f"text {number} of {len(texts)}")
    return texts


def _decoding(trained: Trained, decoding: dict[str, Any]) -> tuple[Task, dict[str, Any]]:
    """The task and the arguments of its `predict` that ways of writing mean."""
    task = trained.task
    if not isinstance(task, Generation):
        if decoding:
            raise ConfigError(f"{trained.folder} was trained for {task.name}, which writes no text: "
                              f"--{next(iter(decoding)).replace('_', '-')} means nothing to it")
        return task, {}
    if "max_new_tokens" in decoding:  # the source has the other tokens
        task = dataclasses.replace(task, max_new_tokens=decoding.pop("max_new_tokens"))
    if "top_k" in decoding or "top_p" in decoding:
        decoding.setdefault("temperature", 1.0)
    seed, beams = decoding.pop("seed", None), decoding.get("num_beams", 1)
    if seed is not None and not SEED.holds(seed):
        raise ConfigError(f"seed must be {SEED.words}, got {seed}")
    if seed is not None and (beams != 1 or not decoding.get("temperature")):
        raise ConfigError("--seed is for sampling: add --temperature, --top-k or --top-p, and no --num-beams")
    if beams == 1 and decoding.get("length_penalty", 1.0) != 1.0:
        raise ConfigError("--length-penalty is for beam search: add --num-beams")
    if beams == 1:
        decoding.pop("length_penalty", None)
        decoding["generator"] = torch.Generator(trained.device).manual_seed(seed or 0)
    return task, decoding
