"""What sentences, pictures and the page have in common: families of methods, with a color and a marker each, and what
costs differ in.

The colors are of Okabe and Ito's palette, which people of every color vision tell apart; no family is told by its color
alone. Costs of two methods are told apart if they differ by more than both deviations, over seeds or turns, together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from minipeft.runs.comparison import metric_of
from minipeft.runs.results import BASELINES


class Cost(NamedTuple):
    """The mean of a cost and its deviation, over seeds or turns; 0 where there was one."""

    mean: float
    deviation: float

    def is_apart_from(self, other: Cost) -> bool:
        """Whether the two differ by more than both deviations together."""
        return abs(self.mean - other.mean) > self.deviation + other.deviation


class Family(NamedTuple):
    """Methods that change the same thing."""

    name: str
    methods: tuple[str, ...]
    color: str
    marker: str  # matplotlib's


FAMILIES = (
    Family("values of the base itself", ("full", "head", "bitfit"), "#55555f", "D"),
    Family("low-rank updates", ("lora", "dora", "vera"), "#0072b2", "o"),
    Family("layers and factors inside", ("adapter", "ia3"), "#d55e00", "s"),
    Family("virtual tokens", ("prompt", "ptuning", "prefix"), "#007a5a", "^"))
MAIN = "imdb"
# How a size is shown, by its field.
SIZES_SHOWN = {"r": "r {:g}", "num_virtual_tokens": "{:g} tokens", "reduction_factor": "reduction {:g}"}


def family_of(method: str) -> Family:
    """The family of one of this library's methods."""
    return next(family for family in FAMILIES if method in family.methods)


def sized(method: str, size: dict[str, Any]) -> str:
    """A method's name with its size, by field, on which its costs depend: "lora (r 8)", "prompt (80 tokens)"."""
    shown = ", ".join(SIZES_SHOWN[name].format(value) for name, value in size.items())
    return f"{method} ({shown})" if shown else method


def main_of(datasets: dict[str, Any]) -> str:
    """The dataset that is shown first and most: the one with the most methods; of several `MAIN`, or the first."""
    return max(datasets, key=lambda name: (len(datasets[name]["methods"]), name == MAIN))


def top_of(content: dict[str, Any]) -> list[str]:
    """The methods of a dataset that none is significantly better than, the highest mean first; none without tests."""
    rows = content["methods"]
    return sorted((method for method, row in rows.items() if row.get("rank", [0])[0] == 1),
                  key=lambda method: -rows[method]["mean"])


def best_baseline(content: dict[str, Any]) -> tuple[str, float] | None:
    """The best of what needs no training on a dataset, as tables call it, and its headline; None without any."""
    key, found = metric_of(content).key, content["baselines"]
    if not found:
        return None
    best = max(found, key=lambda name: found[name][key])
    return BASELINES.get(best, best), found[best][key]


def seconds_of(row: dict[str, Any]) -> Cost | None:
    """Core seconds of training on 1,000 examples; None if they were not measured."""
    return _cost(row["core_seconds_per_1000_examples"])


def memory_of(row: dict[str, Any]) -> Cost | None:
    """Bytes that training adds; None if they were not measured."""
    return _cost(row["training_memory_bytes"])


def forgotten_of(row: dict[str, Any]) -> Cost:
    """Nats per token that the base has lost of its own language modelling."""
    return Cost(row["forgetting"]["nats"], row["forgetting"]["deviation"] or 0.0)


def _cost(found: dict[str, float | None]) -> Cost | None:
    return None if found["mean"] is None else Cost(found["mean"], found["deviation"] or 0.0)


def least_of(costs: dict[str, Cost]) -> list[str]:
    """The method with the least of a cost, and those that are not told apart from it, in order."""
    order = sorted(costs, key=lambda method: costs[method].mean)
    return [method for method in order if not costs[method].is_apart_from(costs[order[0]])]


def most_of(costs: dict[str, Cost]) -> list[str]:
    """The method with the most, and those that are not told apart from it, in order."""
    return least_of({method: Cost(-cost.mean, cost.deviation) for method, cost in costs.items()})


def picture_of(kind: str, name: str, datasets: dict[str, Any]) -> str:
    """The name of a dataset's picture: of the one that is shown first, the kind alone."""
    return kind if name == main_of(datasets) else f"{kind}_{name}"


def in_figures(content: dict[str, Any], value: float) -> float:
    """A headline as tables and axes show it: a share in percent."""
    return round(100 * value, 6) if metric_of(content).share else value
