"""One dataset of a comparison, and what its cells take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minipeft.data.datasets import SPLITS
from minipeft.runs.budget import FEW_EXAMPLES, SHARE_OF_TIME, TIMED_EXAMPLES, Budget, Cell, Track
from minipeft.runs.plan import Options

STARTING, MEASURING = 5, 15  # core seconds: a process and its data; forgetting, or time at inference


@dataclass(frozen=True)
class Subject:
    """One dataset of a comparison.

    Attributes:
        options: that all its cells share.
        terms: what its cells' files note, so that they are known again; sizes in it are cut to the budget.
        whole_sizes: of the dataset's splits, of which what has no budget trains on all.
        weight: of the base model's parameters, over mini's.
    """

    name: str
    options: Options
    budget: Budget
    terms: dict[str, Any]
    whole_sizes: dict[str, int]
    tracks: list[Track]
    weight: float


class Estimate:
    """What cells take, in core seconds: by the budgets' figures, corrected by what has been measured."""

    def __init__(self, subjects: dict[str, Subject]) -> None:
        self.subjects = subjects
        self._factors: dict[Any, float] = {}
        self._known = -1

    def cost(self, cell: Cell, results: dict[Cell, dict[str, Any]]) -> float:
        """Of one cell; of one that has ended, what it took."""
        if cell in results:
            return results[cell].get("process_core_seconds", 0.0)
        if self._known != len(results):
            self._known, self._factors = len(results), self._measured(results)
        for key in ((cell.dataset, cell.method, cell.kind), (cell.dataset, cell.method), cell.dataset, None):
            if key in self._factors:
                return self._factors[key] * self.beforehand(cell)
        return self.beforehand(cell)

    def total(self, tracks: list[Track], known: list[Cell], results: dict[Cell, dict[str, Any]]) -> float:
        """Of all cells, also of those whose settings are not known yet."""
        counts, costs = {}, 0.0
        for cell in known:
            costs += self.cost(cell, results)
            key = cell.dataset, cell.method, cell.kind, cell.size
            counts[key] = counts.get(key, 0) + 1
        for track in tracks:
            for kind, size, number in (("tuning", None, track.trials), ("final", None, track.seeds),
                                       ("costs", None, track.turns),
                                       *(("size", size, track.seeds) for size in track.sizes)):
                missing = number - counts.get((track.dataset, track.method, kind, size), 0)
                costs += max(0, missing) * self.cost(Cell(track.dataset, track.method, 0, kind, size=size), results)
        return costs

    def beforehand(self, cell: Cell) -> float:
        """Of one cell, by the budget's figures."""
        subject = self.subjects[cell.dataset]
        budget, sizes, values = subject.budget, subject.terms["dataset"]["sizes"], dict(cell.values)
        if cell.kind == "best":
            sizes = {**subject.whole_sizes, "test": sizes["test"]}
        train, validation, test = (sizes[split] / 1000 for split in SPLITS)
        epochs = values.get("epochs", budget.epochs)
        evaluations = values.get("evaluations_per_epoch", budget.evaluations_per_epoch)
        reading = budget.core_seconds / 3  # of 1,000 examples, without a backward pass
        share = SHARE_OF_TIME.get(cell.method, 1.0)
        if cell.kind == "tuning":
            examples = min(train, (budget.tuning_size or sizes["train"]) / 1000)
            work = budget.tuning_epochs * (examples * budget.core_seconds * share + validation * reading)
            return STARTING + subject.weight * work
        if cell.kind == "costs":
            return STARTING + MEASURING + subject.weight * TIMED_EXAMPLES / 1000 * budget.core_seconds * share
        if cell.size is not None:
            epochs = FEW_EXAMPLES.training(cell.size, budget)["epochs"]
            train, test = cell.size / 1000, min(test, FEW_EXAMPLES.test_size / 1000)
            validation = min(validation, FEW_EXAMPLES.validation_size / 1000) / evaluations
        work = epochs * (train * budget.core_seconds * share
                         + evaluations * validation * reading) * (cell.method != "baseline")
        return STARTING + MEASURING + subject.weight * (work + test * budget.test_core_seconds)

    def _measured(self, results: dict[Cell, dict[str, Any]]) -> dict[Any, float]:
        """Measured over estimated, of each dataset, method and kind, and of all together."""
        sums: dict[Any, list[float]] = {}
        for cell, found in results.items():
            took = found.get("process_core_seconds", 0.0)
            for key in ((cell.dataset, cell.method, cell.kind), (cell.dataset, cell.method), cell.dataset, None):
                pair = sums.setdefault(key, [0.0, 0.0])
                pair[0], pair[1] = pair[0] + took, pair[1] + self.beforehand(cell)
        return {key: took / guessed for key, (took, guessed) in sums.items() if took and guessed}
