"""One fine-tuning run, from names to results: choose, load, inject, train, test, write.

This is what `scripts/train.py` calls. The library's pieces (inject, train, save_adapter) can be used without it.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from minipeft.data.batches import BucketedBatches, FeatureBatches
from minipeft.data.datasets import Dataset, choose_dataset, load_dataset
from minipeft.errors import ConfigError
from minipeft.files import check_writable, write_json_file
from minipeft.methods import METHODS, inject
from minipeft.methods.head import HeadOnFeatures
from minipeft.methods.injection import ParameterCount, fingerprint, positions_left, trainable_parameters
from minipeft.model.gpt2 import GPT2LMHeadModel
from minipeft.model.tokenizer import VOCABULARY_FILE, Tokenizer, get_tokenizer
from minipeft.model.weights import find
from minipeft.runs import defaults
from minipeft.runs.trained import check_vocabulary, save_finetuned
from minipeft.tasks import classification
from minipeft.tasks.task import Task
from minipeft.training import distributed as parallel
from minipeft.training.hardware import (
    cast_frozen,
    choose_device,
    choose_precision,
    machine,
    peak_memory_bytes,
    tokens_per_pass,
    versions,
)
from minipeft.training.loop import History, TrainingConfig, train

Say = Callable[[str], None]


@dataclass
class Options:
    """What a user asked for; None means: choose for me, and say why."""

    method: str = "lora"
    model: str | None = None
    dataset: str | None = None
    task: str | None = None
    data_dir: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    full: bool = False
    train_size: int | None = None
    validation_size: int | None = None
    test_size: int | None = None
    max_length: int | None = None
    truncation: str | None = None
    max_new_tokens: int | None = None
    dropout: float | None = None
    device: str | None = None
    precision: str = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    recompute_features: bool = False
    shard: bool = False
    resume: bool = False
    output: str | None = None
    results_dir: str = "results"
    method_values: dict[str, Any] = field(default_factory=dict)
    training_values: dict[str, Any] = field(default_factory=dict)


@dataclass
class Setup:
    """Everything a run needs before a model exists, with the reason for each choice."""

    model_name: str
    device: torch.device
    precision: torch.dtype
    data: Dataset
    tokenizer: Tokenizer
    choices: dict[str, str]
    sizes: dict[str, int]


def set_up(options: Options, say: Say) -> Setup:
    """Choose model, dataset, sizes and device; print each choice and its reason; read the data."""
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    classification.check_length(defaults.MAX_LENGTH if options.max_length is None else options.max_length,
                                options.truncation or defaults.TRUNCATION)
    choices = {"device": f"{device.type} ({'asked for' if options.device else 'what this machine has'})",
               "precision": f"{_name(precision)} ({'asked for' if options.precision != 'auto' else 'best here'})"}
    model_name = options.model
    if model_name is None:
        model_name = "gpt2" if device.type == "cuda" else "mini"
    choices["model"] = f"{model_name} ({'asked for' if options.model else f'default on {device.type}'})"
    if options.dataset is not None:
        dataset, why = options.dataset, "asked for"
    else:
        dataset, why = choose_dataset(options.data_dir)
    choices["dataset"] = f"{dataset} ({why})"
    folder = find(model_name)
    say("\n".join(f"{key:10} {value}" for key, value in choices.items()))

    seed = options.training_values.get("seed", 0)
    data = load_dataset(dataset, options.data_dir, options.text_column, options.label_column, seed=0, task=options.task)
    data.task.check_installed()
    if options.shard and data.task.model_class.head == "lm_head":
        raise ConfigError("--shard is not for tasks that write: processes finish their texts at different times, and a "
                          "sharded model computes in step")
    choices["task"] = data.task.name
    say(f"{'task':10} {choices['task']}")
    limits = {"train": options.train_size, "validation": options.validation_size, "test": options.test_size}
    small = device.type == "cpu" and not options.full
    cpu_sizes = {"train": defaults.CPU_TRAIN_SIZE, "validation": defaults.CPU_VALIDATION_SIZE,
                 "test": defaults.CPU_TEST_SIZE}
    sizes, cut = {}, False
    for split, limit in limits.items():
        if limit is not None and limit < 1:
            raise ConfigError(f"{split}_size must be at least 1, got {limit}")
        examples = getattr(data, split)
        chosen = examples.subset(limit or (cpu_sizes[split] if small else None), seed)
        cut |= limit is None and len(chosen) < len(examples)
        setattr(data, split, chosen)
        sizes[split] = len(chosen)
    choices["sizes"] = (", ".join(f"{size:,} {split}" for split, size in sizes.items())
                        + (" (a subset, as this is a CPU; --full takes everything)" if cut else ""))
    say(f"{'sizes':10} {choices['sizes']}")
    tokenizer = get_tokenizer(folder if (folder / VOCABULARY_FILE).is_file() else "gpt2")
    return Setup(model_name, device, precision, data, tokenizer, choices, sizes)


@dataclass
class Fitted:
    """A trained model and what training it was like."""

    model: nn.Module
    task: Task
    method_config: Any
    config: TrainingConfig
    history: History
    counts: ParameterCount
    base_fingerprint: str
    tokenising_seconds: float
    feature_seconds: float
    feature_core_seconds: float


def fit(options: Options, setup: Setup, say: Say, folder: Path | None = None) -> Fitted:
    """Load, inject and train as `options` say, on the training split, validating on the validation split.

    Args:
        setup: from `set_up`; its tables are read and its choices added to.
        folder: where the best model so far and the state to resume from are kept; None keeps nothing.
    """
    method, table = METHODS[options.method], defaults.table(options.method, setup.data.task.name)
    method_config = method.config(**{**table["method"], **options.method_values})
    config = TrainingConfig(**{**table["training"], **options.training_values})
    if "epochs" not in options.training_values:
        config = dataclasses.replace(config, epochs=_epochs(config, setup.sizes["train"]))
        setup.choices["epochs"] = str(config.epochs)
        say(f"{'epochs':10} {config.epochs}")
    torch.manual_seed(config.seed)
    model = setup.data.task.load_model(setup.model_name, setup.data.label_names, **_dropouts(options.dropout))
    base_fingerprint = fingerprint(model)
    inject(model, method_config)
    counts = trainable_parameters(model)  # before a tied head gets weights of its own
    cast_frozen(model.to(setup.device), setup.precision)
    model.transformer.gradient_checkpointing = options.gradient_checkpointing
    say(f"{'method':10} {options.method}: {counts}")
    if options.shard:
        parallel.shard(model)
    task = _task(setup, options, model)
    if folder is not None and parallel.rank() == 0:  # several at once would clear away each other's folders
        for place in (folder, options.results_dir):
            check_writable(place)  # known before training, not after
    details = {**task.details(), "dataset": setup.data.name}
    started = time.perf_counter()
    encoded, validation = task.encode(setup.data.train), task.encode(setup.data.validation)
    tokenising_seconds, feature_seconds, feature_core_seconds = time.perf_counter() - started, 0.0, 0.0
    inputs, trained_model, batches = encoded.ids, model, BucketedBatches
    if options.method == "head" and type(task) is classification.Classification and not options.recompute_features:
        started, core_started = time.perf_counter(), time.process_time()
        inputs, validation_features = (
            classification.pooled_features(model, ids, setup.device, setup.precision, progress=f"{split} features")
            for split, ids in (("training", encoded.ids), ("validation", validation.ids)))
        feature_seconds = time.perf_counter() - started
        feature_core_seconds = time.process_time() - core_started
        trained_model, batches = HeadOnFeatures(model), FeatureBatches

    def validate() -> dict[str, Any]:
        if trained_model is not model:
            logits = classification.head_logits(trained_model, validation_features, setup.device)
            return classification.metrics(logits, validation.labels)
        return task.evaluate(model, validation, setup.device, setup.precision)

    history = train(
        trained_model, batches(inputs, encoded.labels, config.batch_size, config.seed),
        task.loss_sum, validate, config, setup.precision, options.compile,
        save_best=lambda: folder and save_finetuned(model, folder, setup.model_name, details),
        state_folder=folder and folder / "training_state", resume=options.resume,
        request={"method": options.method, "method_config": dataclasses.asdict(method_config), "base": base_fingerprint,
                 "dataset": [setup.data.name, setup.data.source, setup.sizes], **task.details(),
                 "dropout": options.dropout}, best_by=task.best_by,
        # A sharded model computes in step, and processes may have a row more or less.
        tokens_per_pass=None if options.shard else tokens_per_pass(setup.device, model.config.n_embd))
    model.eval()
    return Fitted(model, task, method_config, config, history, counts, base_fingerprint, tokenising_seconds,
                  feature_seconds, feature_core_seconds)


def finetune(options: Options, say: Say = lambda line: None) -> dict[str, Any]:
    """Fine-tune a model as `options` say, test it once, and write the adapter folder and the results file.

    Under torchrun all processes call this; the first one prints and writes.

    Args:
        say: where progress lines go; silent by default.

    Returns:
        The content of the results file, or {} when Ctrl-C ended the training.

    Raises:
        MinipeftError: whatever is wrong with the request, before anything is written.
    """
    say = say if parallel.rank() == 0 else lambda line: None
    check_method(options)
    setup = set_up(options, say)
    folder = Path(options.output or f"checkpoints/{options.method}_finetuned")
    fitted = fit(options, setup, say, folder)
    history = fitted.history
    if history.interrupted:
        say(f"interrupted: {folder} holds the best model so far; --resume goes on from here")
        return {}
    task = fitted.task
    say(f"trained in {history.seconds:.0f} s, best validation {task.best_by} {history.best[task.best_by]:.4f}; testing")
    test, test_seconds = _test(fitted.model, task, setup)
    results = {
        "method": options.method, "method_config": dataclasses.asdict(fitted.method_config),
        "training_config": dataclasses.asdict(fitted.config),
        **_describe(setup, options, task, fitted.base_fingerprint),
        "metrics": {"test": test, "best_validation": history.best},
        "parameters": {"trainable": fitted.counts.trainable, "total": fitted.counts.total},
        "seconds": {"tokenising": round(fitted.tokenising_seconds, 2), "features": round(fitted.feature_seconds, 2),
                    "train": round(history.seconds, 2),
                    "train_on_cores": round(history.core_seconds + fitted.feature_core_seconds, 2),
                    "test": round(test_seconds, 2)},
        "samples_per_second": {"train": round(history.samples / (history.seconds + fitted.feature_seconds), 2),
                               "test": round(setup.sizes["test"] / test_seconds, 2)},
        "peak_memory_bytes": peak_memory_bytes(setup.device), "curve": history.curve}
    path = results_path(options.results_dir, f"fine_tuned_{options.method}", setup.data.name)
    if parallel.rank() == 0:
        write_json_file(path, results)
        shutil.rmtree(folder / "training_state", ignore_errors=True)  # a run cut off in its test can go on from there
    say(f"test {headline(task, test)}; wrote {folder} and {path}")
    return results


def headline(task: Task, figures: dict[str, Any]) -> str:
    """The figure of a test that counts most, with its interval where there is one, as a line for people."""
    low, high = figures.get(f"{task.headline}_95_interval", (None, None))
    interval = "" if low is None else f" (95 % interval {low:.4f} to {high:.4f})"
    return f"{task.headline} {figures[task.headline]:.4f}{interval}"


def check_method(options: Options) -> None:
    """Refuse an unknown method, or values that make no configuration, before any data is read."""
    if options.shard and options.method != "full":
        raise ConfigError("--shard is for full fine-tuning: what the other methods train is too small to be worth it")
    if options.method not in METHODS:
        raise ConfigError(f"unknown method {options.method!r}: use baseline, {', '.join(METHODS)}")
    table = defaults.table(options.method)
    METHODS[options.method].config(**{**table["method"], **options.method_values})
    TrainingConfig(**{**table["training"], **options.training_values})


def baseline(options: Options, say: Say = lambda line: None) -> dict[str, Any]:
    """Test what needs no training: the base model as it is, simple guesses, and zero-shot by the language model.

    Returns:
        The content of the results file.
    """
    say = say if parallel.rank() == 0 else lambda line: None
    TrainingConfig(**options.training_values)
    setup = set_up(options, say)
    if parallel.rank() == 0:
        check_writable(options.results_dir)
    torch.manual_seed(options.training_values.get("seed", 0))
    model = setup.data.task.load_model(setup.model_name, setup.data.label_names)
    task = _task(setup, options, model)
    base_fingerprint = fingerprint(model)
    model.to(setup.device)
    untrained = "untrained_head" if setup.data.label_names else "untrained_base"
    found, seconds = task.baselines(setup.data.train, setup.data.test), {}
    found[untrained], untrained_seconds = _test(model, task, setup)
    seconds[untrained] = round(untrained_seconds, 2)
    if tuple(setup.data.label_names) == tuple(classification.ZERO_SHOT_WORDS):
        language_model = GPT2LMHeadModel.from_pretrained(setup.model_name).to(setup.device)
        started = time.perf_counter()
        logits = classification.zero_shot_logits(language_model, setup.tokenizer, setup.data.test.texts, setup.device,
                                                 setup.precision, task.max_length, progress="zero-shot")
        seconds["zero_shot"] = round(time.perf_counter() - started, 2)
        found["zero_shot"] = classification.metrics(logits, setup.data.test.labels)
    for name, figures in found.items():
        say(f"{name.replace('_', ' ')}: {headline(task, figures)}")
    results = {"method": "baseline", **_describe(setup, options, task, base_fingerprint), "metrics": found,
               "parameters": {"trainable": 0, "total": trainable_parameters(model).total}, "seconds": seconds,
               "samples_per_second": {name: round(setup.sizes["test"] / max(taken, 0.01), 2)
                                      for name, taken in seconds.items()},
               "peak_memory_bytes": peak_memory_bytes(setup.device)}
    if "zero_shot" in found:
        results["zero_shot"] = {"prompt": classification.ZERO_SHOT_PROMPT, "words": classification.ZERO_SHOT_WORDS}
    path = results_path(options.results_dir, "baseline", setup.data.name)
    if parallel.rank() == 0:
        write_json_file(path, results)
    say(f"wrote {path}")
    return results


def results_path(folder: str | Path, name: str, dataset: str) -> Path:
    """`results/<name>_results.json`, with the dataset's name before `_results` unless it is IMDb."""
    return Path(folder) / f"{name}{'' if dataset == 'imdb' else f'_{dataset}'}_results.json"


# --- pieces of a results file -----------------------------------------------------------------------------------------

def _task(setup: Setup, options: Options, model: nn.Module) -> Task:
    """The dataset's task, set up for this model."""
    values: dict[str, Any] = {"max_length": _max_length(setup, options, model)}
    for name in ("truncation", "max_new_tokens"):
        if (value := getattr(options, name)) is not None:
            if name not in setup.data.task.__dataclass_fields__:
                raise ConfigError(f"{name} means nothing to {setup.data.task.name}")
            values[name] = value
    return setup.data.task(setup.tokenizer, setup.data.label_names, **values)


def _max_length(setup: Setup, options: Options, model: nn.Module) -> int:
    check_vocabulary(setup.tokenizer, model)
    left = positions_left(model)
    if options.max_length is not None and options.max_length > left:
        taken = model.config.n_positions - left
        raise ConfigError(f"max_length={options.max_length} is more than the model's {model.config.n_positions} "
                          f"positions{f', of which {taken} hold virtual tokens: {left} tokens fit' if taken else ''}")
    return min(setup.data.task.max_length, left) if options.max_length is None else options.max_length


def _test(model: nn.Module, task: Task, setup: Setup) -> tuple[dict[str, Any], float]:
    started = time.perf_counter()
    found = task.test(model, setup.data.test, setup.device, setup.precision, progress="testing")
    return found, time.perf_counter() - started


def _describe(setup: Setup, options: Options, task: Task, base_fingerprint: str) -> dict[str, Any]:
    return {"base_model": {"name": setup.model_name, "fingerprint": base_fingerprint},
            "task": task.name, "headline": task.headline,
            "dataset": {"name": setup.data.name, "source": setup.data.source, "sizes": setup.sizes,
                        **{key: value for key, value in task.details().items() if key != "task"}},
            "choices": setup.choices, "precision": _name(setup.precision), "compile": options.compile,
            "processes": parallel.world_size(), "sharded": options.shard, "machine": machine(),
            "versions": versions(), "seed": options.training_values.get("seed", 0)}


def _epochs(config: TrainingConfig, examples: int) -> int:
    """The table's epochs or, on little data, as many as make enough steps to learn from."""
    steps = -(-examples // (config.batch_size * config.gradient_accumulation))
    return max(config.epochs, min(defaults.MAXIMUM_EPOCHS, -(-defaults.MINIMUM_STEPS // steps)))


def _dropouts(dropout: float | None) -> dict[str, float]:
    return {} if dropout is None else {name: dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
