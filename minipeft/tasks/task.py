"""What a task is: texts become token ids and labels, a head predicts the labels, metrics judge the predictions.

The loop, the methods and the scripts know nothing else about a task. A new one is a new class in a new file:
`scripts/train.py --task my_task.py` finds it there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minipeft.data.examples import Examples
from minipeft.errors import ConfigError, DataError
from minipeft.model.tokenizer import Tokenizer
from minipeft.settings import POSITIVE_INTEGER, Settings, setting

MAX_LENGTH = 384  # tokens of one text; compared on IMDb's validation split, first mini (results/tuning_*.json)


def check_label_names(names: Sequence[str], where: str) -> None:
    """Refuse names that could not be told apart, or that would break a line or command the terminal it is printed on.

    Raises:
        DataError: naming the label.
    """
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"{where}: two labels have the name {twice[:40]!r}")
    for name in names:
        if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
            raise DataError(f"{where}: the label {name[:40]!r} holds a character that cannot be printed in a line")


@dataclass
class Encoded:
    """Examples as a model reads them: N sequences of T token ids each.

    Attributes:
        examples: what they were made from.
        ids: N arrays, (T,).
        labels: N numbers or, where tokens are labeled, N arrays (T,), IGNORED_LABEL at a token without a label.
        owners: for each sequence the number of its example, where a long example makes several sequences.
    """

    examples: Examples
    ids: list[np.ndarray]
    labels: list[Any]
    owners: list[int] | None = None


@dataclass
class Task(Settings, ABC):
    """A task, set up for one model: a subclass sets the class variables and fills in the methods.

    Attributes:
        tokenizer: of the model.
        label_names: names of the labels by number; empty where labels are texts.
        max_length: tokens of one sequence.

    Raises:
        ConfigError: a value out of range.
        DataError: a label's name that `check_label_names` refuses.
    """

    tokenizer: Tokenizer
    label_names: list[str]
    max_length: int = setting(MAX_LENGTH, within=POSITIVE_INTEGER)

    name: ClassVar[str]                                     # what --task, results and adapter folders call it
    model_class: ClassVar[type[nn.Module]]                  # the model with this task's head
    columns: ClassVar[tuple[str, str]] = ("text", "label")  # of a user's own file, unless others are named
    one_label_each: ClassVar[bool] = False                  # whether a label is one of a few, for a whole text
    best_by: ClassVar[str] = "accuracy"                     # the metric of `evaluate` that training keeps the best by
    headline: ClassVar[str] = "accuracy"                    # the metric of `test` that is reported first
    beside: ClassVar[tuple[str, ...]] = ()                  # the metrics of `test` that are reported beside it
    metric_package: ClassVar[str | None] = None             # a package that nothing but `test` needs

    def check(self) -> None:
        super().check()
        check_label_names(self.label_names, "label_names")

    @classmethod
    def load_model(cls, name_or_folder: str | Path, label_names: list[str], **config: Any) -> nn.Module:
        """A base model with this task's head, as wide as there are labels; arguments as `from_pretrained`."""
        labels = {"num_labels": len(label_names)} if label_names else {}
        return cls.model_class.from_pretrained(name_or_folder, **labels, **config)

    @classmethod
    def check_installed(cls) -> None:
        """Find out before training whether the metrics can be computed after it.

        Raises:
            ConfigError: their package is not installed.
        """
        if cls.metric_package is not None and importlib.util.find_spec(cls.metric_package) is None:
            raise ConfigError(f"{cls.name} is judged by the package {cls.metric_package}, which is not installed: pip "
                              "install 'minipeft[metrics]'")

    @classmethod
    @abstractmethod
    def read(cls, texts: list[Any], labels: list[Any], where: str,
             label_names: list[str] | None = None) -> tuple[Examples, list[str]]:
        """Two columns of a file, checked, as examples.

        Args:
            where: what to call the file in an error.
            label_names: the labels' names by number, where they are known; else they are found in the column.

        Returns:
            (examples, label names).

        Raises:
            DataError: naming the first row that cannot be used, counted from 1.
        """

    @abstractmethod
    def encode(self, examples: Examples) -> Encoded:
        """Token ids and labels of examples."""

    @staticmethod
    def loss_sum(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, summed over what is labeled: logits (N, K), targets (N,).

        Where K is a vocabulary it is called for some of a batch's tokens at a time.

        Args:
            weights: (K,), by which an example's loss is multiplied, by its label; None: 1. In training alone.
        """
        return F.cross_entropy(logits.float(), targets, weights, reduction="sum")

    @abstractmethod
    def evaluate(self, model: nn.Module, encoded: Encoded, device: torch.device, precision: torch.dtype,
                 progress: str | None = None) -> dict[str, Any]:
        """Metrics on the validation split, "loss", "accuracy" and `best_by` among them.

        Args:
            progress: title of a progress bar; None shows none.
        """

    def test(self, model: nn.Module, examples: Examples, device: torch.device, precision: torch.dtype,
             progress: str | None = None) -> dict[str, Any]:
        """Metrics on the test split, `headline` and its 95 % interval among them."""
        return self.evaluate(model, self.encode(examples), device, precision, progress)

    def test_each(self, model: nn.Module, examples: Examples, device: torch.device, precision: torch.dtype,
                  progress: str | None = None) -> tuple[dict[str, Any], np.ndarray | None]:
        """The metrics of `test`, and what each example adds to the headline: (N, S) whole numbers, none negative.

        By these, two models are compared example by example: `headline_of` makes the headline of any of the examples
        from their sums. None, where a task does not say.
        """
        return self.test(model, examples, device, precision, progress), None

    @classmethod
    def headline_of(cls, sums: np.ndarray, examples: int) -> np.ndarray:
        """The headline of examples whose numbers (see `test_each`) have these sums: (..., S) -> (...).

        Args:
            examples: how many they are.
        """
        return sums[..., 0] / examples

    @abstractmethod
    def predict(self, model: nn.Module, texts: Sequence[str], device: torch.device,
                precision: torch.dtype) -> Iterator[str]:
        """What `scripts/predict.py` prints: a line for each text, in order; a line may come in several pieces."""

    def table(self, model: nn.Module, texts: Sequence[str], device: torch.device, precision: torch.dtype,
              progress: str | None = None) -> dict[str, list[Any]]:
        """What is predicted for each text, as columns of a table: "prediction", and more where there is more.

        Args:
            progress: title of a progress bar; None shows none.
        """
        lines = "".join(self.predict(model, texts, device, precision)).split("\n")
        return {"prediction": lines[:len(texts)]}

    def baselines(self, train: Examples, test: Examples) -> dict[str, dict[str, Any]]:
        """Metrics on the test split of guesses that need no model, by name."""
        return {}

    @classmethod
    def imbalance(cls, train: Examples, label_names: Sequence[str]) -> str | None:
        """In words that labels are of very different frequency, if they are and that matters to the metrics."""
        return None

    @classmethod
    def balanced_weights(cls, train: Examples, label_names: Sequence[str]) -> list[float]:
        """A weight for each label's loss, so that all labels count the same.

        Raises:
            ConfigError: the task knows none.
        """
        raise ConfigError(f"class_weights means nothing to {cls.name}: it is for labels of whole texts")

    def details(self) -> dict[str, Any]:
        """What an adapter folder notes, so that `from_details` gives this task again."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["tokenizer"]
        return {"task": self.name, **values}

    @classmethod
    def from_details(cls, tokenizer: Tokenizer, details: dict[str, Any]) -> Task:
        """The task that an adapter folder was trained for; what is not noted has its default."""
        known = {field.name for field in dataclasses.fields(cls)} - {"tokenizer"}
        return cls(tokenizer, **{key: value for key, value in details.items() if key in known})
