"""Batches of texts of similar length, padded on the right: what the loop and every evaluation iterate over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minipeft.errors import DataError

IGNORED_LABEL = -100  # of a token that has no label: cross-entropy leaves it out
Row = Sequence[int] | np.ndarray  # a text's ids, or its tokens' labels


@dataclass
class Batch:
    """Texts of similar length, padded on the right to the longest: ids and mask (B, T).

    Labels are one per text, (B,), or one per token, (B, T), with IGNORED_LABEL at a token without a label.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, copied to a GPU while it computes.

        What follows from the batch's values is found before it travels: to look at a value on a GPU is to wait for the
        GPU. So the mask stays, as the model looks at it first.
        """
        def there(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        moved = Batch(there(self.input_ids), self.attention_mask, there(self.labels))
        if self.positions is not None:
            moved.positions, moved.targets = there(self.positions), there(self.targets)
            moved.targets_of_rows = self.targets_of_rows
        return moved

    @cached_property
    def positions(self) -> Tensor | None:
        """Which tokens have a label, (N,): their numbers in the batch, row after row; None if labels are one per text.

        The token in row b and column t has the number b T + t.
        """
        return None if self.labels.dim() == 1 else (self.labels != IGNORED_LABEL).flatten().nonzero()[:, 0]

    @cached_property
    def targets(self) -> Tensor:
        """The labels that count, (N,): one per text, or one per token at `positions`."""
        return self.labels if self.positions is None else self.labels.flatten()[self.positions]

    @cached_property
    def targets_of_rows(self) -> list[int]:
        """How many labels count in each row: B numbers."""
        return self.labels.ne(IGNORED_LABEL).reshape(len(self.labels), -1).sum(dim=1).tolist()

    def micro_batches(self, tokens: int | None) -> list[Batch]:
        """The batch in parts that are computed one after the other: see `number_of_micro_batches`."""
        return self.parts(number_of_micro_batches(*self.attention_mask.shape, tokens))

    def parts(self, number: int) -> list[Batch]:
        """The batch's rows in so many batches, of equally many rows but for one."""
        if number == 1:
            return [self]
        parts = (tensor.tensor_split(number) for tensor in (self.input_ids, self.attention_mask, self.labels))
        return [Batch(*part) for part in zip(*parts)]

    def arguments(self) -> dict[str, Tensor]:
        """What a model is called with. A head computes only where there is a label: most of a text has none."""
        found = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return found if self.positions is None else {**found, "positions": self.positions}


def number_of_micro_batches(rows: int, length: int, tokens: int | None) -> int:
    """Into how many parts a batch is cut if each is to hold at most so many tokens, or one row; None: no limit."""
    return 1 if tokens is None else -(-rows // max(1, tokens // length))


def rounded(length: int, to: int = 32) -> int:
    """A multiple of 32 for lengths beyond 128: training meets a tenth of the shapes, for 4 % more tokens on IMDb.

    Each new shape costs: a CPU's library keeps a prepared kernel in the middle of the heap, which then fits nothing
    large any more, and a compiler compiles anew.
    """
    return length if length <= 4 * to else -(-length // to) * to


def collate(ids: Sequence[Row], labels: Sequence[Any], length: int | None = None) -> Batch:
    """Pad on the right with id 0, which is a real token too: the mask alone tells them apart.

    Args:
        labels: a number for each text, or an array of numbers, one for each of its tokens.
        length: T; default that of the longest.
    """
    longest = length or max(len(row) for row in ids)
    mask = padded([np.ones(len(row), dtype=np.int64) for row in ids], longest, with_value=0)
    a_token_each = isinstance(labels[0], np.ndarray)
    return Batch(padded(ids, longest, with_value=0), mask,
                 padded(labels, longest, with_value=IGNORED_LABEL) if a_token_each else torch.tensor(labels))


def check_rows(ids: Sequence[Row], labels: Sequence[Any]) -> None:
    """Refuse texts without a token, and labels that are more or fewer than texts.

    Raises:
        DataError: saying which.
    """
    if len(ids) != len(labels):
        raise DataError(f"{len(ids):,} texts have {len(labels):,} labels")
    if empty := [number for number, row in enumerate(ids) if len(row) == 0]:
        raise DataError(f"text {empty[0]}, counted from 0, has no token")


def padded(rows: Sequence[Row], length: int, with_value: int) -> Tensor:
    """Rows of different lengths as one int64 tensor (B, length), filled up on the right."""
    result = np.full((len(rows), length), with_value, dtype=np.int64)            # (B, length)
    for number, row in enumerate(rows):
        result[number, :len(row)] = row
    return torch.from_numpy(result)


@dataclass
class BucketedBatches:
    """Batches of texts of similar length, in another random order each epoch.

    The examples are shuffled, cut into pools of `pool` batches, sorted by length within a pool, cut into batches, and
    the batches shuffled: little padding, and still a random walk through the data. `epoch(n)` depends on the seed and n
    alone, so that a resumed run sees what it would have seen. A batch's length is `rounded`.
    """

    ids: Sequence[Row]
    labels: Sequence[Any]
    batch_size: int
    seed: int = 0
    pool: int = 50

    def __post_init__(self) -> None:
        check_rows(self.ids, self.labels)

    def __len__(self) -> int:
        return -(-len(self.ids) // self.batch_size)

    def order(self, epoch: int) -> list[np.ndarray]:
        """The example numbers of each batch of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.ids))
        lengths = np.array([len(row) for row in self.ids])
        size = self.pool * self.batch_size
        pools = [order[start:start + size] for start in range(0, len(order), size)]
        order = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in pools])
        batches = [order[start:start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch number `first` on."""
        longest = max(map(len, self.ids))  # what a model has room for may be no multiple of anything
        for rows in self.order(epoch)[first:]:
            ids = [self.ids[i] for i in rows]
            yield collate(ids, [self.labels[i] for i in rows], min(longest, rounded(max(map(len, ids)))))


def in_order_of_length(ids: Sequence[Row], labels: Sequence[Any],
                       batch_size: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """All examples once, longest first so that memory runs out at once or never, with their numbers: for evaluation."""
    order = np.argsort([-len(row) for row in ids], kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        yield rows, collate([ids[i] for i in rows], [labels[i] for i in rows])
