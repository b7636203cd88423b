"""What a task is: texts become token ids and labels, a head predicts the labels, a metric judges the predictions.

The loop, the methods and the scripts know nothing else about a task. A new one is a new class in a new file:
`scripts/train.py --task my_task.py` finds it there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minipeft.data.batches import Batch, in_order_of_length
from minipeft.errors import ConfigError, DataError
from minipeft.model.tokenizer import Tokenizer
from minipeft.runs import defaults
from minipeft.training import distributed as parallel
from minipeft.training.hardware import computing_in

# A text this long is a book or a mistake: a model that reads a few hundred tokens of it would judge something else.
MAX_CHARACTERS = 100_000


@dataclass
class Examples:
    """What is read and what is to be said of it, in one order.

    Attributes:
        texts: a text each or, where words are labelled, a list of words.
        labels: a label's number, a tag's number for each word, or the texts that may be written.
    """

    texts: list[Any]
    labels: list[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at `indices`, in that order."""
        return Examples([self.texts[i] for i in indices], [self.labels[i] for i in indices])

    def classes(self) -> np.ndarray:
        """A class for each example, (N,), so that splits can take of each its share; one for all without labels."""
        one_number_each = all(isinstance(label, int) for label in self.labels)
        return np.asarray(self.labels) if one_number_each else np.zeros(len(self), dtype=np.int64)

    def subset(self, size: int | None, seed: int) -> Examples:
        """`size` examples, each label in its own share; all of them where there are no more."""
        if size is None or size >= len(self):
            return self
        labels, rng = self.classes(), np.random.default_rng(seed)
        place = np.empty(len(labels))  # each label's examples evenly spaced in [0, 1), in random order
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
        return self.take(rng.permutation(np.argsort(place, kind="stable")[:size]).tolist())


@dataclass
class Encoded:
    """Examples as a model sees them, N sequences of T token ids each.

    Attributes:
        examples: what they were made from.
        ids: N arrays, (T,).
        labels: N numbers or, where tokens are labelled, N arrays (T,), IGNORED_LABEL where nothing is to be predicted.
        owners: for each sequence the number of its example, where long examples make several.
    """

    examples: Examples
    ids: list[np.ndarray]
    labels: list[Any]
    owners: list[int] | None = None


@dataclass
class Task(ABC):
    """A task, set up for one model: a subclass says what the class variables say, and fills in the methods.

    Attributes:
        tokenizer: of the model.
        label_names: names of the labels by number; empty where labels are texts.
        max_length: tokens of one sequence.
    """

    tokenizer: Tokenizer
    label_names: list[str]
    max_length: int = defaults.MAX_LENGTH

    name: ClassVar[str]                                     # what --task, results and adapter folders call it
    model_class: ClassVar[type[nn.Module]]                  # the head
    columns: ClassVar[tuple[str, str]] = ("text", "label")  # of a user's own file, unless others are named
    best_by: ClassVar[str] = "accuracy"                     # the figure of `evaluate` that training keeps the best by
    headline: ClassVar[str] = "accuracy"                    # the figure of `test` that is reported first
    metric_package: ClassVar[str | None] = None             # what `test` imports beyond this library's own needs

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be.

        Raises:
            ConfigError: max_length below 1.
        """
        if self.max_length < 1:
            raise ConfigError(f"max_length must be at least 1, got {self.max_length}")

    @classmethod
    def load_model(cls, name_or_folder: str | Path, label_names: list[str], **config: Any) -> nn.Module:
        """A base model with this task's head, as wide as there are labels; arguments as `from_pretrained`."""
        labels = {"num_labels": len(label_names)} if label_names else {}
        return cls.model_class.from_pretrained(name_or_folder, **labels, **config)

    @classmethod
    def check_installed(cls) -> None:
        """Find out before training whether the metric can be computed after it.

        Raises:
            ConfigError: its package is not installed.
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
    def loss_sum(logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy in nats, summed over what is labelled: logits (N, K), batch.targets (N,)."""
        return F.cross_entropy(logits.float(), batch.targets, reduction="sum")

    @abstractmethod
    def evaluate(self, model: nn.Module, encoded: Encoded, device: torch.device, precision: torch.dtype,
                 progress: str | None = None) -> dict[str, Any]:
        """Figures on the validation split, "loss", "accuracy" and `best_by` among them.

        Args:
            progress: title of a progress bar; None shows none.
        """

    def test(self, model: nn.Module, examples: Examples, device: torch.device, precision: torch.dtype,
             progress: str | None = None) -> dict[str, Any]:
        """Figures on the test split, `headline` and its 95 % interval among them."""
        return self.evaluate(model, self.encode(examples), device, precision, progress)

    @abstractmethod
    def answers(self, model: nn.Module, texts: Sequence[str], device: torch.device,
                precision: torch.dtype) -> Iterator[str]:
        """What `scripts/predict.py` prints for texts: a line for each, in order, perhaps in pieces."""

    def baselines(self, train: Examples, test: Examples) -> dict[str, dict[str, Any]]:
        """Figures on the test split of guesses that need no model, by name."""
        return {}

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


# --- for tasks to use -------------------------------------------------------------------------------------------------

def check_texts(texts: Sequence[Any], where: str, what: str = "text") -> None:
    """Refuse what cannot be read: nothing at all, an empty text, or one of over MAX_CHARACTERS characters.

    Args:
        what: what a text is called in an error.

    Raises:
        DataError: naming the first such text's row, counted from 1.
    """
    if not texts:
        raise DataError(f"{where}: there is no {what} at all")
    for row, text in enumerate(texts, start=1):
        check_text(text, f"{where}, row {row}", what)


def check_text(text: Any, where: str, what: str = "text") -> None:
    """Refuse what cannot be read: something else than text, nothing, or more than MAX_CHARACTERS characters.

    Raises:
        DataError: saying where, and what is wrong.
    """
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: the {what} {str(text)[:40]!r} is {type(text).__name__}, not text"
                        + ("; is the file encoded in UTF-8?" if isinstance(text, bytes) else ""))
    if text is None or not text.strip():
        raise DataError(f"{where}: the {what} is empty")
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"{where}: the {what} has {len(text):,} characters, the limit is {MAX_CHARACTERS:,}; cut it "
                        "into parts")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a character, as a byte that is not UTF-8 becomes on its way in
        raise DataError(f"{where}: the {what} is not valid UTF-8: {error.reason}") from error


@torch.inference_mode()
def for_each(compute: Callable[[Batch], Sequence[Any]], ids: Sequence[np.ndarray], labels: Sequence[Any],
             device: torch.device, precision: torch.dtype, batch_size: int | None = None,
             progress: str | None = None) -> list[Any]:
    """One result for each sequence, in the given order, computed in batches of similar length, longest first.

    Several processes share the sequences, and each gets all results.

    Args:
        compute: batch -> one result a row; tensors must be on the CPU.
        batch_size: sequences per call; default what suits the device.
        progress: title of a progress bar; None shows none.
    """
    batch_size = batch_size or defaults.EVALUATION_BATCH_SIZE[device.type]
    own = parallel.share_of(len(ids))
    results: list[Any] = []
    numbers: list[int] = []
    with tqdm(total=len(own), desc=progress, unit="text", mininterval=1,
              disable=progress is None or parallel.rank() > 0) as bar:
        for rows, batch in in_order_of_length([ids[i] for i in own], [labels[i] for i in own], batch_size):
            with computing_in(precision, device):
                results += compute(batch.to(device))
            numbers += [own[row] for row in rows]
            bar.update(len(rows))
    return parallel.gathered(results, numbers, len(ids))


def bootstrap_interval(figure: Callable[[np.ndarray], float], examples: int, samples: int = 1000,
                       seed: int = 0) -> list[float]:
    """A 95 % interval of a figure of the whole test split, from as many examples drawn with replacement, again and
    again (Efron 1979).

    Args:
        figure: numbers of examples, (N,) -> their figure.

    Returns:
        [2.5th percentile, 97.5th percentile].
    """
    rng = np.random.default_rng(seed)
    drawn = [figure(rng.integers(0, examples, examples)) for _ in range(samples)]
    return [round(float(bound), 6) for bound in np.percentile(drawn, (2.5, 97.5))]
