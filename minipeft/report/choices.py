"""Which method to take for what: from comparison.json, by rules that a reader can check against its tables.

    the best result              methods that no other one is significantly better than
    the fewest parameters        of these, the one that trains the fewest
    no extra time afterwards     of the best, all that merge or add nothing; if there are none, of the others that are
                                 worth it (see the next line) the one with the highest mean
    to learn from few examples   the highest mean of a method, or what needs no training, if that is better
    any other wish               of the methods whose interval lies above every baseline (which train nothing), the one
                                 with the least of what is to be saved, and those not told apart from it
                                 (families.py)

Costs are those of the dataset that a comparison shows first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from minipeft.report.families import (
    Cost,
    best_baseline,
    forgotten_of,
    least_of,
    main_of,
    memory_of,
    seconds_of,
    top_of,
)
from minipeft.report.findings import listed
from minipeft.runs.comparison import metric_of, shown_share
from minipeft.runs.results import BASELINES

MOST_EXAMPLES_OF_FEW = 64


class Choice(NamedTuple):
    """What somebody wants, the method or methods that do it, and what was measured."""

    wish: str
    methods: tuple[str, ...]
    measured: str


def choices(comparison: dict[str, Any]) -> list[Choice]:
    """All that a comparison can advise, in a fixed order."""
    datasets = comparison["datasets"]
    content = datasets[main_of(datasets)]
    found = [choice for name, each in datasets.items() for choice in the_best(name, each)]
    return found + [choice for advise in ADVICE for choice in advise(content)]


def the_best(name: str, content: dict[str, Any]) -> Iterator[Choice]:
    """Of one dataset, and the smallest of these; nothing of one method alone. Without tests, the highest mean."""
    rows, metric = content["methods"], metric_of(content)
    if len(rows) < 2:
        return
    top = top_of(content) or sorted(rows, key=lambda method: -rows[method]["mean"])[:1]
    shown = listed(f"{method} {metric.shown(rows[method]['mean'])}" for method in top)
    yield Choice(f"the best result on {name}", tuple(top), f"{metric.heading}: {shown}")
    if len(top) > 1:
        least = min(top, key=lambda method: rows[method]["trained_parameters"])
        yield Choice(f"the fewest trained parameters among the best on {name}", (least,),
                     f"{rows[least]['trained_parameters']:,}")


def no_extra_time(content: dict[str, Any]) -> Iterator[Choice]:
    """What merges, or has nothing to merge, the highest mean first."""
    rows = {method: row for method, row in content["methods"].items()
            if row["inference"]["mergeable"] in ("yes", "nothing to merge")}
    top = [method for method in top_of(content) if method in rows]
    found = top or sorted(rows.keys() & worth_it(content).keys(), key=lambda method: -rows[method]["mean"])[:1]
    if found:
        means = listed(f"{method} {metric_of(content).shown(rows[method]['mean'])}" for method in found)
        merging = listed(f"{method} {shown_share(rows[method]['inference']['extra'])}" for method in found
                         if rows[method]["inference"]["mergeable"] == "yes")
        yield Choice("no extra time once it is trained" + (", among the best" if top else ""), tuple(found),
                     means + (f"; to be merged, else slower: {merging}" if merging else ""))


def small_files(content: dict[str, Any]) -> Iterator[Choice]:
    """A file for each of many tasks or customers."""
    yield from _least(content, "a small file for each of many tasks", lambda row: Cost(
        row["adapter_bytes"]["mean"], 0.0), lambda value: f"{value / 1000:,.0f} kB")


def no_forgetting(content: dict[str, Any]) -> Iterator[Choice]:
    """Least nats forgotten."""
    yield from _least(content, "the least forgotten of the base's own language modelling",
                      forgotten_of, lambda nats: f"{nats:+.3f} nats per token with the adapter in place, "
                                                 f"perplexity times {math.exp(nats):.2f}")


def fast_training(content: dict[str, Any]) -> Iterator[Choice]:
    """Least time."""
    yield from _least(content, "the shortest training", seconds_of, "{:.1f} core seconds per 1,000 examples".format)


def little_memory(content: dict[str, Any]) -> Iterator[Choice]:
    """Least memory."""
    yield from _least(content, "the least memory in training", memory_of, lambda value: f"{value / 2**20:,.0f} MiB")


def few_examples(content: dict[str, Any]) -> Iterator[Choice]:
    """The highest mean with the fewest examples, of those that were trained on them, or what needs no training."""
    metric, baseline = metric_of(content), best_baseline(content)
    points = [(point["train_size"], point["mean"], method) for method, found in content["few_examples"].items()
              for point in found]
    for size in sorted({size for size, _, _ in points if size <= MOST_EXAMPLES_OF_FEW}):
        mean, best = max((mean, method) for its, mean, method in points if its == size)
        compared = listed(sorted({method for its, _, method in points if its == size}))
        said = f"{metric.shown(mean)}, the highest mean of {compared}; settings from more examples"
        if baseline and baseline[1] >= mean:
            best, said = baseline[0], f"{metric.shown(baseline[1])}; with {best} {said}"
            said += "; the prompt was made for film reviews" * (best == BASELINES["zero_shot"])
        yield Choice(f"to learn from {size} examples", (best,), said)


ADVICE: tuple[Callable[[dict[str, Any]], Iterator[Choice]], ...] = (
    no_extra_time, small_files, no_forgetting, fast_training, little_memory, few_examples)


def worth_it(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods whose interval, or mean where there is none, lies above all that needs no training."""
    best = best_baseline(content)
    bar = best[1] if best else float("-inf")
    return {method: row for method, row in content["methods"].items()
            if (row["interval_95"] or [row["mean"]])[0] > bar}


def _least(content: dict[str, Any], wish: str, of: Callable[[dict[str, Any]], Cost | None],
           shown: Callable[[float], str]) -> Iterator[Choice]:
    rows, metric = content["methods"], metric_of(content)
    costs = {method: cost for method, row in worth_it(content).items() if (cost := of(row)) is not None}
    if least := least_of(costs):
        yield Choice(wish, tuple(least), "; ".join(
            f"{f'{method}: ' if len(least) > 1 else ''}{shown(costs[method].mean)}, "
            f"{metric.shown(rows[method]['mean'])}" for method in least))
