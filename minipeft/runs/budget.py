"""What every method of a comparison gets alike: how much to learn from, how many steps, and which settings to try.

    tuning   five learning rates over two decades, around the one in runs/defaults.py, and one step further, twice at
             most, where the best is at an end; then, at the best rate, two other sizes (`SIZES`); fewer examples and
             steps than training has, judged on the validation split, one seed
    training the best of these, on as many examples, for as many steps, with as long texts, for every method
    costs    of a short training with the same settings: all methods in turn, on one machine, nothing else running

Nothing here reads data or trains. `wanted` is the order of events: from what is known to what is to be run next; then
come the cells of `timed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from minipeft.methods import METHODS
from minipeft.runs import defaults
from minipeft.tasks.task import Task

COMPARED = ("baseline", "full", "lora", "prefix", "prompt", "adapter", "ia3", "bitfit")
ALL = ("baseline", *METHODS)
EVERY_SEED = ("lora", "full")  # the methods that a budget's `seeds` does not limit
RATES, STEP, MOST_WIDENINGS = 5, 10 ** 0.5, 2


@dataclass(frozen=True)
class Budget:
    """How much of a dataset every method gets.

    Attributes:
        epochs, train_size: of training; None is all examples.
        evaluations_per_epoch: of training; the best validation's values are tested. A trial has one an epoch.
        tuning_epochs, tuning_size: of a trial.
        max_length: tokens of a text, for all methods; None is the task's. `VIRTUAL_TOKENS` have to fit beside it.
        validation_size, test_size: None is all examples.
        seeds: at most so many, but for `EVERY_SEED`; None is all that are asked for.
        core_seconds, test_core_seconds: what 1,000 examples take about, trained by LoRA and tested, with mini: for an
            estimate before anything is measured.
    """

    epochs: int = 3
    train_size: int | None = None
    tuning_epochs: int = 2
    tuning_size: int | None = 2000
    max_length: int | None = None
    validation_size: int | None = None
    test_size: int | None = None
    batch_size: int = 16
    evaluations_per_epoch: int = 2
    seeds: int | None = None
    core_seconds: float = 20.0
    test_core_seconds: float = 8.0


OWN_FILE = Budget()
BUDGETS = {
    "sample": Budget(epochs=3, tuning_epochs=2, tuning_size=400, core_seconds=7.0, test_core_seconds=2.0),
    # 10,000 reviews: all 22,500 would take more than ten hours on two cores. Half of the validation reviews, as a third
    # of the time would otherwise go into looking, not learning.
    "imdb": Budget(epochs=2, train_size=10_000, tuning_epochs=1, tuning_size=3000, validation_size=1250,
                   evaluations_per_epoch=1, core_seconds=47.0, test_core_seconds=15.0),
    "sst2": Budget(epochs=3, tuning_epochs=2, tuning_size=3000, batch_size=32, core_seconds=5.0, test_core_seconds=2.0),
    "wnut_17": Budget(epochs=3, tuning_epochs=3, tuning_size=1700, core_seconds=6.2, test_core_seconds=3.0),
    "scitldr": Budget(epochs=3, tuning_epochs=2, tuning_size=1000, seeds=1, core_seconds=56.0, test_core_seconds=110.0),
    "multi30k": Budget(epochs=1, tuning_epochs=1, tuning_size=6000, seeds=1, core_seconds=12.0,
                       test_core_seconds=40.0)}
# What a method takes of LoRA's time, for the estimate.
SHARE_OF_TIME = {"baseline": 0.0, "full": 1.1, "head": 0.4, "dora": 1.8, "vera": 1.5, "adapter": 0.9, "bitfit": 0.85,
                 "ia3": 0.95, "prompt": 0.95, "ptuning": 0.95, "prefix": 0.9}

# The one number by which a method has more or less to train: each entry is a trial, the middle one is the default.
# LoRA's scale lora_alpha / r stays.
_RANKS = ({"r": 2, "lora_alpha": 4}, {"r": 8, "lora_alpha": 16}, {"r": 32, "lora_alpha": 64})
VIRTUAL_TOKENS = 80
_TOKENS = tuple({"num_virtual_tokens": number} for number in (5, 20, VIRTUAL_TOKENS))
SIZES: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": _RANKS, "dora": _RANKS, "vera": ({"r": 16}, {"r": 64}, {"r": 256}),
    "adapter": ({"reduction_factor": 32}, {"reduction_factor": 8}, {"reduction_factor": 2}),
    "prompt": _TOKENS, "ptuning": _TOKENS, "prefix": _TOKENS}
NO_SIZE = "no size to choose"


def default_size(method: str) -> dict[str, Any]:
    """The field that makes a method larger or smaller, with its default; nothing where there is none."""
    sizes = SIZES.get(method, ())
    return dict(list(sizes[len(sizes) // 2].items())[:1]) if sizes else {}


# The best that these reach without the budget, on all examples: trials, as `minipeft tune` takes them.
_LONGER = {"epochs": 2, "evaluations_per_epoch": 2, "max_length": 512}
BEST: dict[str, dict[str, dict[str, Any]]] = {
    "imdb": {"lora": {"learning_rate": 1e-3, **_LONGER}, "full": {"learning_rate": 3e-4, **_LONGER}},
    "sample": {"lora": {"epochs": 5}, "full": {"epochs": 5}}}


# A method's costs are measured so many times, in turn with the others', each time on about so many examples.
TURNS, TIMED_EXAMPLES = 3, 512


@dataclass(frozen=True)
class FewExamples:
    """How a method is trained on less and less, with the settings that were chosen for all examples.

    Few examples are seen more often, in smaller batches: a handful of steps would teach nothing. Each seed draws its
    own examples. Of these many runs each is validated and tested on a part of the split.
    """

    sizes: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    methods: tuple[str, ...] = ("lora", "full", "head", "prompt")
    validation_size: int = 200
    test_size: int = 2500

    def training(self, size: int, budget: Budget) -> dict[str, int]:
        """Epochs and batch size for so many examples: at least the budget's epochs, at most 20, about 320 steps."""
        batch_size = 4 if size < 256 else budget.batch_size
        return {"epochs": max(budget.epochs, min(20, 320 * batch_size // size)), "batch_size": batch_size,
                "evaluations_per_epoch": 1}


FEW_EXAMPLES = FewExamples()


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: a dataset, a method, a seed and a purpose.

    Attributes:
        seed: of a cell that measures costs, its turn.
        kind: "tuning", "final", "best", "size", which is trained on so many examples, or "costs".
        size: of examples, of that kind.
        values: what replaces the method's defaults: fields of its configuration or of TrainingConfig.
    """

    dataset: str
    method: str
    seed: int
    kind: str
    values: tuple[tuple[str, Any], ...] = ()
    size: int | None = None

    @property
    def name(self) -> str:
        """Its file's name without the ending, below the dataset's folder."""
        if self.kind == "tuning":
            shown = "_".join(f"{value:.3g}" for key, value in self.values if key != "lora_alpha")
            return f"tuning/{self.method}_{shown}"
        if self.kind == "size":
            return f"size/{self.method}_{self.size}_seed{self.seed}"
        if self.kind == "costs":
            return f"costs/{self.method}_turn{self.seed}"
        return f"{'best_' if self.kind == 'best' else ''}{self.method}_seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.dataset}/{self.name}"


@dataclass(frozen=True)
class Track:
    """All that is run of one method on one dataset, in order: trials, training with each seed, on fewer examples.

    Attributes:
        rate: the learning rate in the middle of the grid.
        seeds: how many.
        tuned: whether settings are tried; else the defaults are trained.
        best: the trial of a run without the budget; None for none.
        sizes: numbers of training examples besides the budget's.
    """

    dataset: str
    method: str
    rate: float
    seeds: int
    tuned: bool = True
    best: tuple[tuple[str, Any], ...] | None = None
    sizes: tuple[int, ...] = ()

    @property
    def trials(self) -> int:
        """How many trials there are if the best rate is at no end."""
        return (RATES + max(0, len(SIZES.get(self.method, ())) - 1)) if self.tuned else 0

    @property
    def turns(self) -> int:
        """How often its costs are measured."""
        return 0 if self.method == "baseline" else TURNS


Score = Callable[[Cell], float | None]
Values = tuple[tuple[str, Any], ...]


def tracks_of(dataset: str, task: type[Task], methods: list[str], seeds: int, tuned: bool, best: bool,
              budget: Budget, sizes: tuple[int, ...] = ()) -> list[Track]:
    """One dataset's tracks. A baseline has no settings, and one seed; a head is trained alone only if it is new."""
    found = []
    for method in methods:
        if method == "head" and not getattr(task.model_class, "has_new_head", False):
            continue
        own = seeds if method in EVERY_SEED or budget.seeds is None else min(seeds, budget.seeds)
        values = BEST.get(dataset, {}).get(method) if best else None
        found.append(Track(dataset, method, 0.0, 1, tuned=False) if method == "baseline" else
                     Track(dataset, method, defaults.table(method, task.name)["training"]["learning_rate"], own, tuned,
                           None if values is None else tuple(values.items()),
                           sizes if method in FEW_EXAMPLES.methods else ()))
    return found


def grid(rate: float) -> list[float]:
    """`RATES` learning rates over two decades, around this one."""
    return [stepped(rate, number - RATES // 2) for number in range(RATES)]


def stepped(rate: float, steps: int) -> float:
    """A learning rate so many half decades above another one, in three digits."""
    return float(f"{rate * STEP ** steps:.3g}")


def wanted(track: Track, score: Score, ended: Callable[[Cell], bool]) -> list[Cell]:
    """The cells of a track that are known by now, in order; what follows depends on how these end.

    Args:
        score: how good a trial was found, higher is better; None for one that failed or is not there yet.
        ended: whether a cell is there, or has failed.
    """
    best = [] if track.best is None else [Cell(track.dataset, track.method, 0, "best", track.best)]
    if not track.tuned:
        return _finals(track, ()) + best
    trials, chosen = tuning_of(track, score, ended)
    return trials + ([] if chosen is None else _finals(track, chosen)) + best


def tuning_of(track: Track, score: Score, ended: Callable[[Cell], bool]) -> tuple[list[Cell], Values | None]:
    """The trials of a track that are known by now, and the values of the best one, of equals the first. These are None
    while a trial is left to run, or if all have failed."""
    steps = list(range(-(RATES // 2), RATES // 2 + 1))
    rates = {step: _trial(track, step) for step in steps}
    for _ in range(MOST_WIDENINGS):
        found = _best(rates, score)
        if not all(map(ended, rates.values())) or found not in (min(rates), max(rates)):
            break
        beyond = found + (1 if found == max(rates) else -1)
        rates[beyond] = _trial(track, beyond)
    cells = list(rates.values())
    if not all(map(ended, cells)) or _best(rates, score) is None:
        return cells, None
    step = _best(rates, score)
    sizes = {number: _trial(track, step, size) for number, size in enumerate(SIZES.get(track.method, ()))}
    if not sizes:
        return cells, rates[step].values
    sizes[len(sizes) // 2] = rates[step]  # the default size was tried with the rates
    cells += [cell for cell in sizes.values() if cell != rates[step]]
    return cells, sizes[_best(sizes, score)].values if all(map(ended, sizes.values())) else None


def timed(cells: list[Cell]) -> list[Cell]:
    """The cells that measure costs of what these train, dataset by dataset, the methods in turn: a machine that is slow
    for a while is slow for all."""
    trained = [cell for cell in cells if (cell.kind, cell.seed) == ("final", 0) and cell.method != "baseline"]
    return [replace(cell, kind="costs", seed=turn) for dataset in dict.fromkeys(cell.dataset for cell in trained)
            for turn in range(TURNS) for cell in trained if cell.dataset == dataset]


def _trial(track: Track, step: int, size: dict[str, Any] | None = None) -> Cell:
    values = {"learning_rate": stepped(track.rate, step), **(size or {})}
    return Cell(track.dataset, track.method, 0, "tuning", tuple(values.items()))


def _best(cells: dict[int, Cell], score: Score) -> int | None:
    """The key of the best trial; None if all have failed."""
    scores = {key: found for key, cell in cells.items() if (found := score(cell)) is not None}
    return max(scores, key=scores.__getitem__) if scores else None


def _finals(track: Track, values: tuple[tuple[str, Any], ...]) -> list[Cell]:
    return [Cell(track.dataset, track.method, seed, "final", values) for seed in range(track.seeds)] + [
        Cell(track.dataset, track.method, seed, "size", values, size)
        for size in track.sizes for seed in range(track.seeds)]
