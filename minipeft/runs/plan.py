"""Choosing: from what a user asked for to the plan of a run, each choice with its reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from minipeft.data.datasets import SPLITS, Dataset, choose_dataset, load_dataset
from minipeft.data.tables import Reading
from minipeft.errors import ConfigError
from minipeft.methods import METHODS
from minipeft.methods.injection import positions_left
from minipeft.model.config import GPT2Config
from minipeft.model.hub import find
from minipeft.model.tokenizer import Tokenizer, get_tokenizer
from minipeft.model.weights import read_config
from minipeft.runs import defaults
from minipeft.runs.places import default_folder, own_results, results_path
from minipeft.runs.trained import check_vocabulary
from minipeft.settings import POSITIVE, POSITIVE_INTEGER, PROBABILITY, SEED, setting
from minipeft.tasks import task_for
from minipeft.tasks.task import Task
from minipeft.training.hardware import (
    MATMUL_PRECISIONS,
    choose_device,
    choose_precision,
)
from minipeft.training.loop import TrainingConfig

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Say nothing: what `say` is where nobody listens."""


@dataclass
class Options(Reading):
    """What a user asked for, of how to read files of their own and of all else; None means: choose, and say why.

    `subset_seed` says which examples a size takes; None: training's seed. `dropout` is the base model's, in place of
    what its config.json says: without it LoRA learned more with every seed (results/dropout/tuning_lora.json).

    Raises:
        ConfigError: a value of the wrong type, or out of range.
    """

    method: str = "lora"
    model: str | None = None
    dataset: str | None = None
    task: str | None = None
    data_dir: str | Path | None = None
    full: bool = False
    train_size: int | None = setting(None, within=POSITIVE_INTEGER)
    validation_size: int | None = setting(None, within=POSITIVE_INTEGER)
    test_size: int | None = setting(None, within=POSITIVE_INTEGER)
    subset_seed: int | None = setting(None, within=SEED)
    max_length: int | None = None
    truncation: str | None = None
    max_new_tokens: int | None = None
    dropout: float = setting(0.0, within=PROBABILITY)
    device: str | None = None
    precision: str = "auto"
    matmul_precision: str | None = setting(None, choices=(None, *MATMUL_PRECISIONS))
    compile: bool = False
    gradient_checkpointing: bool = False
    recompute_features: bool = False
    shard: bool = False
    resume: bool = False
    save_minutes: float = setting(10.0, within=POSITIVE)
    output: str | Path | None = None
    results_dir: str | Path | None = None
    overwrite: bool = False
    method_values: dict = setting({})
    training_values: dict = setting({})


DATA_OPTIONS = ("dataset", *(field.name for field in dataclasses.fields(Reading)))


@dataclass(frozen=True)
class RunPlan:
    """Everything that is decided before a model exists.

    Attributes:
        options: what the user asked for.
        model_name: name or folder of the base model.
        precision: of matrix products.
        data: the dataset, each split cut to its size in `sizes`.
        fingerprints, whole_sizes: of the whole dataset's splits.
        tokenizer: of the base model.
        method_config: the method's configuration; None for a baseline, which has no method.
        training: how to train; a baseline takes its seed.
        best_by: the metric of a validation that the best model is kept by.
        folder: of the best model so far and of the state to resume from; None keeps nothing.
        choices: in words what was chosen, and why.
    """

    options: Options
    model_name: str
    device: torch.device
    precision: torch.dtype
    data: Dataset
    fingerprints: dict[str, str]
    whole_sizes: dict[str, int]
    sizes: dict[str, int]
    tokenizer: Tokenizer
    method_config: Any
    training: TrainingConfig
    best_by: str
    folder: Path | None
    choices: dict[str, str]

    @property
    def name(self) -> str:
        """The method's name, or "baseline"."""
        return "baseline" if self.method_config is None else self.options.method

    @property
    def results_file(self) -> Path:
        """Where the run's results go."""
        return results_path(self.options.results_dir or own_results(), self.name, self.data.name)


def choose(options: Options, say: Say = silent, baseline: bool = False) -> RunPlan:
    """Decide what a run does, say it, and read its data.

    Args:
        say: prints a line: each choice with its reason, before the work that follows from it.
        baseline: plan a test without any training: `options.method` and its values do not matter.

    Raises:
        MinipeftError: whatever is wrong with the request.
    """
    check_options(options, baseline)
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    default = "gpt2" if device.type == "cuda" else "mini"
    model_name = default if options.model is None else options.model
    dataset, why = choose_dataset(options.data_dir) if options.dataset is None else (options.dataset, "asked for")
    folder = find(model_name)
    choices = {"device": _because(device.type, options.device, "what this machine has"),
               "precision": _because(dtype_name(precision), options.precision != "auto", "best here"),
               "model": _because(model_name, options.model, f"default on {device.type}"),
               "dataset": f"{dataset} ({why})"}
    own = GPT2Config.from_dict(read_config(folder)).resid_pdrop
    if not baseline and own != options.dropout:
        choices["dropout"] = f"{options.dropout:g} in the base (its config.json: {own:g})"
    if options.matmul_precision is not None:
        choices["matmul"] = f"{options.matmul_precision} (asked for)"
    say("\n".join(_line(*choice) for choice in choices.items()))

    tokenizer = get_tokenizer(folder)
    whole = _load(dataset, options, tokenizer)
    data, sizes_in_words = _cut(whole, options, small=device.type == "cpu" and not options.full)
    remarks = {"task": data.task.name, **data.remarks}
    best_by, imbalance = data.task.best_by, data.task.imbalance(data.train, data.label_names)
    if imbalance:
        best_by = "macro_f1" if best_by == "accuracy" else best_by
        remarks["imbalance"] = (f"{imbalance}; the best is kept by {best_by}; --class-weights balanced makes all "
                                "labels count the same in training")
    remarks["sizes"] = sizes_in_words
    choices.update(remarks)
    say("\n".join(_line(*remark) for remark in remarks.items()))
    whole_sizes, sizes = ({split: len(getattr(some, split)) for split in SPLITS} for some in (whole, data))
    plan = RunPlan(options, model_name, device, precision, data, whole.fingerprints(), whole_sizes, sizes, tokenizer,
                   None, TrainingConfig(), best_by, None, choices)
    return for_method(plan, options, say, baseline)


def for_method(plan: RunPlan, options: Options, say: Say = silent, baseline: bool = False) -> RunPlan:
    """What a plan becomes for the method of `options`, which ask for the same data and model otherwise."""
    data, choices = plan.data, dict(plan.choices)
    method_config, training = _configs(options, data.task.name, baseline)
    if training.class_weights != "none":
        weights = data.task.balanced_weights(data.train, data.label_names)
        choices["weights"] = ", ".join(f"{name!r} {weight:.3g}" for name, weight in zip(data.label_names, weights))
        say(_line("weights", choices["weights"]))
    best_by = plan.best_by
    if not baseline:
        training, best_by, chosen = _for_its_size(training, options, data.task, plan.sizes["train"], best_by)
        choices.update(chosen)
        for choice in chosen.items():
            say(_line(*choice))
    folder = None if baseline else Path(options.output or default_folder(options.method, data.name))
    return dataclasses.replace(plan, options=options, method_config=method_config, training=training, best_by=best_by,
                               folder=folder, choices=choices)


def where_data_are(options: Options) -> dict[str, Any]:
    """The options that a user found and read a dataset by: by them it is found again."""
    given = {name: getattr(options, name) for name in DATA_OPTIONS}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items() if value}


def check_options(options: Options, baseline: bool = False) -> None:
    """Refuse what can be seen to be wrong before any data is read.

    Args:
        baseline: the method and its values do not matter.

    Raises:
        ConfigError: an unknown method, or a bad value.
    """
    options.check()
    if not baseline:
        if options.shard and options.method != "full":
            raise ConfigError("--shard is for full fine-tuning: what the other methods train is too small to be "
                              "worth it")
        check_method(options.method, also=("baseline",))
    _configs(options, "classification", baseline)


def check_method(method: str, also: Sequence[str] = ()) -> None:
    """Refuse a name that is neither a method's nor among the others.

    Raises:
        ConfigError: saying which names there are.
    """
    if method not in (*also, *METHODS):
        raise ConfigError(f"unknown method {method!r}: use {', '.join((*also, *METHODS))}")


def make_task(plan: RunPlan, model: nn.Module) -> Task:
    """The dataset's task, set up for this model: texts as long as asked for, else as fit beside its virtual tokens.

    Raises:
        ConfigError: more tokens than fit.
        WeightsError: a vocabulary that is larger than the model's.
    """
    check_vocabulary(plan.tokenizer, model)
    task, asked, left = plan.data.task, plan.options.max_length, positions_left(model)
    if asked is not None and asked > left:
        taken = model.config.n_positions - left
        raise ConfigError(f"max_length={asked} is more than the model's {model.config.n_positions} positions"
                          f"{f', of which {taken} hold virtual tokens: {left} tokens fit' if taken else ''}")
    values = {"max_length": min(task.max_length, left), **task_values(task, plan.options)}
    return task(plan.tokenizer, plan.data.label_names, **values)


def dtype_name(dtype: torch.dtype) -> str:
    """"float32" rather than "torch.float32"."""
    return str(dtype).removeprefix("torch.")


# --- one choice each --------------------------------------------------------------------------------------------------

def _load(dataset: str, options: Options, tokenizer: Tokenizer) -> Dataset:
    """The whole dataset. What its task refuses is known before any data is read.

    Raises:
        ConfigError: a bad value of the task's, a package missing for its metric, or a task that --shard is not for.
    """
    task = task_for(dataset, options.task)
    task(tokenizer, [], **task_values(task, options))
    task.check_installed()
    if options.shard and task.model_class.head == "lm_head":
        raise ConfigError("--shard is not for tasks that write: processes finish their texts at different times, and a "
                          "sharded model computes in step")
    return load_dataset(dataset, task, options.data_dir, reading=options)


def task_values(task: type[Task], options: Options) -> dict[str, Any]:
    """The fields of a task that a user gave.

    Raises:
        ConfigError: one that this task does not have.
    """
    given = {name: getattr(options, name) for name in ("max_length", "truncation", "max_new_tokens")}
    values = {name: value for name, value in given.items() if value is not None}
    for name in values:
        if name not in task.__dataclass_fields__:
            raise ConfigError(f"{name} means nothing to {task.name}")
    return values


def _cut(data: Dataset, options: Options, small: bool) -> tuple[Dataset, str]:
    """The dataset with as many examples as were asked for or, if `small`, as take minutes; and in words how many."""
    cut, not_all = {}, False
    seed = options.training_values.get("seed", 0) if options.subset_seed is None else options.subset_seed
    for split in SPLITS:
        examples, asked = getattr(data, split), getattr(options, f"{split}_size")
        size = asked or (defaults.CPU_SIZES[split] if small else None)
        cut[split] = examples.subset(size, seed)
        not_all |= asked is None and len(cut[split]) < len(examples)
    words = ", ".join(f"{len(examples):,} {split}" for split, examples in cut.items())
    return (dataclasses.replace(data, **cut),
            f"{words} (a subset, as this is a CPU; --full takes everything)" if not_all else words)


def _configs(options: Options, task: str, baseline: bool) -> tuple[Any, TrainingConfig]:
    """The configurations of method and training: a user's values on top of the table's."""
    known = [field.name for field in dataclasses.fields(TrainingConfig)]
    if unknown := sorted(options.training_values.keys() - set(known)):
        raise ConfigError(f"training has no {', '.join(unknown)}; it has {', '.join(known)}")
    if baseline:
        return None, TrainingConfig(**options.training_values)
    table = defaults.table(options.method, task)
    return (METHODS[options.method].config(**{**table["method"], **options.method_values}),
            TrainingConfig(**{**table["training"], **options.training_values}))


def _for_its_size(config: TrainingConfig, options: Options, task: type[Task], examples: int,
                  best_by: str) -> tuple[TrainingConfig, str, dict[str, str]]:
    """How to train on so many examples, where a user does not say.

    Returns:
        (the configuration, the metric that the best model is kept by, in words what was chosen).
    """
    given, choices = options.training_values, {}
    few = examples < defaults.FEW_EXAMPLES and task.name == "classification"
    if few and best_by == "accuracy":
        best_by = "loss"
        choices["best"] = "the lowest validation loss, as examples are few"
    if few and "learning_rate" not in given and options.method in defaults.RATES_ON_FEW:
        config = dataclasses.replace(config, learning_rate=defaults.RATES_ON_FEW[options.method])
    if "epochs" not in given:
        steps = -(-examples // (config.batch_size * config.gradient_accumulation))
        enough = -(-(defaults.MINIMUM_STEPS_ON_FEW if few else defaults.MINIMUM_STEPS) // steps)
        config = dataclasses.replace(config, epochs=max(config.epochs, min(defaults.MAXIMUM_EPOCHS, enough)))
        choices["epochs"] = str(config.epochs)
        if few and "patience" not in given:
            config = dataclasses.replace(config, patience=defaults.PATIENCE_ON_FEW)
            choices["epochs"] += f", fewer if {config.patience} validations in a row are no better"
    return config, best_by, choices


def _because(value: str, asked: Any, why: str) -> str:
    return f"{value} ({'asked for' if asked else why})"


def _line(what: str, choice: str) -> str:
    return f"{what:10} {choice}"
