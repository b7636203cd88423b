"""What a comparison found, in plain sentences: each is computed from comparison.json, and says what tests support.

A sentence about quality rests on the paired tests (runs/significance.py). Of costs, methods are named together that
their deviations do not tell apart (families.py). What one seed alone has shown stands in a list of its own. Where a
comparison does not hold what a sentence needs, there is no such sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any, NamedTuple

from minipeft.report.families import (
    Cost,
    best_baseline,
    forgotten_of,
    least_of,
    main_of,
    memory_of,
    most_of,
    picture_of,
    seconds_of,
    sized,
    top_of,
)
from minipeft.runs.budget import STEP
from minipeft.runs.comparison import metric_of
from minipeft.runs.results import Metric


class Finding(NamedTuple):
    """A sentence or two, and the pictures in which it is seen."""

    text: str
    pictures: tuple[str, ...]


class Found(NamedTuple):
    """Both files: all datasets, the first one of them, which sentences are about if they name none, and its trials."""

    datasets: dict[str, dict[str, Any]]
    name: str
    content: dict[str, Any]
    tuning: dict[str, dict[str, Any]]

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        return self.content["methods"]

    @property
    def top(self) -> list[str]:
        """See `top_of`."""
        return top_of(self.content)

    def shown(self, method: str) -> str:
        """A method's mean as the tables show it."""
        return metric_of(self.content).shown(self.methods[method]["mean"])


def findings(comparison: dict[str, Any], tuning: dict[str, Any]) -> tuple[list[Finding], list[Finding]]:
    """All that can be said, in a fixed order: what intervals support, and what one seed alone has shown."""
    datasets = comparison["datasets"]
    name = main_of(datasets)
    found = Found(datasets, name, datasets[name], tuning["datasets"].get(name, {}).get("methods", {}))
    supported, seen = ([finding for say in sentences for finding in say(found)] for sentences in (SENTENCES, SEEN_ONCE))
    return supported, seen


def listed(names: Any) -> str:
    """a, b and c."""
    *first, last = list(names) or ["none"]
    return f"{', '.join(first)} and {last}" if first else last


def difference(metric: Metric, value: float) -> str:
    """How far two values of a metric are apart: shares in percentage points."""
    return f"{100 * value:.2f} percentage points" if metric.share else metric.shown(value)


# --- quality ----------------------------------------------------------------------------------------------------------

def the_top(found: Found) -> Iterator[Finding]:
    """Which methods nothing is significantly better than."""
    top = found.top
    tested = [method for method, row in found.methods.items() if "rank" in row]
    if not top or len(tested) < 2:
        return
    worse = [method for method in tested if method not in top]
    if len(top) == 1 and len(found.methods[top[0]]["better_than"]) == len(worse):
        said = f"On {found.name} {top[0]} is significantly better than all others ({found.shown(top[0])})"
    else:
        said = (f"On {found.name} no method is significantly better than any of {listed(top)} "
                f"({found.shown(top[0])} to {found.shown(top[-1])})")
        if worse:
            said += f"; each other method ({', '.join(worse)}) is significantly worse than at least one"
    yield Finding(f"{said}.", ("parameters",))


def beside_full(found: Found) -> Iterator[Finding]:
    """On each dataset, what is better and what is worse than full fine-tuning."""
    said, pictures = [], []
    for name, content in found.datasets.items():
        full = content["methods"].get("full", {})
        if "rank" not in full:
            continue
        better, worse = full["worse_than"], full["better_than"]
        equal = [method for method, row in content["methods"].items()
                 if "rank" in row and method not in (*better, *worse, "full")]
        said.append(f"on {name} better: {listed(better)}, worse: {listed(worse)}, no difference shown: {listed(equal)}")
        pictures.append(picture_of("parameters", name, found.datasets))
    if said:
        yield Finding(f"Significantly, against full fine-tuning: {'; '.join(said)}.", tuple(pictures))


def fewest_parameters(found: Found) -> Iterator[Finding]:
    """The smallest method at the top."""
    if not found.top:
        return
    smallest = min(found.top, key=lambda method: found.methods[method]["trained_parameters"])
    row = found.methods[smallest]
    yield Finding(f"The smallest of the methods that none is significantly better than on {found.name} is {smallest}: "
                  f"it trains {row['trained_parameters']:,} parameters, {100 * row['trained_share']:.2f} % of all.",
                  ("parameters",))


def against_no_training(found: Found) -> Iterator[Finding]:
    """Which methods the zero-shot baseline is inside or above the interval of."""
    key = metric_of(found.content).key
    score = found.content["baselines"].get("zero_shot", {}).get(key)
    if score is None:
        return
    known = {method: row["interval_95"][0] for method, row in found.methods.items() if row["interval_95"]}
    if not known:
        return
    below = [method for method, low in known.items() if low <= score]
    shown = metric_of(found.content).shown(score)
    yield Finding("Asked by a prompt, which was chosen on IMDb's validation reviews, the base without any training is "
                  f"right on {shown} of {found.name}. "
                  + (f"The intervals of {listed(below)} do not lie above that." if below else
                     "The intervals of all methods lie above that."), ("parameters",))


def seeds_and_methods(found: Found) -> Iterator[Finding]:
    """How large seeds' differences are beside those of methods."""
    deviations = {method: row["deviation"] for method, row in found.methods.items() if row["deviation"] is not None}
    if not deviations and found.content["tests"]:
        yield Finding(f"On {found.name} each method was trained with one seed: the tests speak of these runs, and not "
                      "of what another seed would give.", ("parameters",))
    if len(deviations) < 2 or not found.content["tests"]:
        return
    most = max(deviations, key=deviations.__getitem__)
    tested, metric = found.content["tests"], metric_of(found.content)
    equal, one = sum(not test["significant"] for test in tested), difference(metric, deviations[most])
    yield Finding(f"Seeds move a method on {found.name} by {difference(metric, fmean(deviations.values()))} on average "
                  f"(one standard deviation), most of all {most} ({one}). {equal} of {len(tested)} pairs of methods "
                  "stay without a significant difference.", ("parameters",))


# --- costs ------------------------------------------------------------------------------------------------------------

def forgetting(found: Found) -> Iterator[Finding]:
    """On each dataset, in training for which most and least of the base was forgotten."""
    said, pictures = [], []
    for name, content in found.datasets.items():
        lost = {method: forgotten_of(row) for method, row in content["methods"].items()}
        if len(lost) < 2:
            continue
        ends = [listed(f"{method} ({lost[method].mean:+.3f})" for method in methods)
                for methods in (most_of(lost), least_of(lost))]
        said.append(f"on {name} {ends[0]} forgot the most, {ends[1]} the least")
        pictures.append(picture_of("forgetting", name, found.datasets))
    if said:
        yield Finding("Of the base's own language modelling, in nats per token with the adapter in place: "
                      f"{'; '.join(said)}.", tuple(pictures))


def time_of_training(found: Found) -> Iterator[Finding]:
    """Seconds, beside full fine-tuning's."""
    yield from _beside_full(found, seconds_of, "core seconds per 1,000 examples", "{:.1f}")


def memory_of_training(found: Found) -> Iterator[Finding]:
    """Memory that training adds, beside full fine-tuning's."""
    yield from _beside_full(found, memory_of, "MiB of memory for training", "{:,.0f}", 2**20)


def _beside_full(found: Found, of: Callable[[dict[str, Any]], Cost | None], unit: str, form: str,
                 one: int = 1) -> Iterator[Finding]:
    costs = {method: cost for method, row in found.methods.items() if (cost := of(row)) is not None}
    if "full" not in costs or len(costs) < 2:
        return
    full = costs.pop("full")
    order = sorted(costs, key=lambda method: costs[method].mean)
    groups: dict[str, list[str]] = {"Less": [], "not told apart from it": [], "more": []}
    for method in order:
        cost = costs[method]
        place = ("not told apart from it" if not cost.is_apart_from(full) else
                 "Less" if cost.mean < full.mean else "more")
        groups[place].append(f"{_named(found, method)} {cost.mean / full.mean:.2f}")
    said = "; ".join(f"{place}: {listed(methods)}" for place, methods in groups.items())
    yield Finding(f"Full fine-tuning takes {form.format(full.mean / one)} ± {form.format(full.deviation / one)} {unit} "
                  f"on {found.name}. {said} (of full fine-tuning's).", ("costs",))


def inference(found: Found) -> Iterator[Finding]:
    """What an adapter costs where it is used."""
    extra = {method: row["inference"] for method, row in found.methods.items() if row["inference"]["extra"] is not None}
    slower = {kind: sorted((method for method, row in extra.items() if row["mergeable"] == kind),
                           key=lambda method: extra[method]["extra"]) for kind in ("yes", "no")}
    merged = [extra[method]["extra_merged"] for method in slower["yes"] if extra[method]["extra_merged"] is not None]
    if not all(slower.values()) or not merged:
        return
    apart, stay = (listed(f"{_named(found, method)} {max(0.0, 100 * extra[method]['extra']):.0f} %"
                          for method in methods) for methods in slower.values())
    most = 100 * max(merged)
    by = f"by {most:.0f} % at most" if most >= 0.5 else "by less than 1 %"
    yield Finding(f"On {found.name}, what can merge makes the base slower while it is apart ({apart}), and {by} once "
                  f"it is merged. What cannot merge stays as it is: {stay}.", ("costs",))


def _named(found: Found, method: str) -> str:
    return sized(method, found.methods[method]["size"])


# --- settings and data ------------------------------------------------------------------------------------------------

def learning_rates(found: Found) -> Iterator[Finding]:
    """What missing the best rate by half a decade costs, where both sides were tried."""
    lost = {method: value for method, row in found.tuning.items() if (value := _lost_beside_the_best(row)) is not None}
    if len(lost) < 2:
        return
    order = sorted(lost, key=lost.__getitem__)
    yield Finding(f"A learning rate half a decade beside the best one costs {_score(found, lost[order[-1]])} on "
                  f"validation with {order[-1]} and {_score(found, lost[order[0]])} with {order[0]} ({found.name}; of "
                  "the two sides the worse one).", ("tuning",))


def _lost_beside_the_best(row: dict[str, Any]) -> float | None:
    scores = {trial["learning_rate"]: trial["score"] for trial in row["trials"]
              if trial["size"] is None and trial["score"] is not None}
    best = max(scores, key=scores.__getitem__, default=0.0)
    beside = [score for rate, score in scores.items()
              if rate != best and 0.9 * STEP < max(rate, best) / min(rate, best) < 1.1 * STEP]
    return scores[best] - min(beside) if len(beside) == 2 else None


def _score(found: Found, value: float) -> str:
    """A difference of validation scores in its unit."""
    by_loss = any(row["best_by"] == "loss" for row in found.tuning.values())
    return f"{value:.3f} nats" if by_loss else difference(metric_of(found.content), value)


def sizes(found: Found) -> Iterator[Finding]:
    """What the size knob does, at the best rate."""
    said = []
    for method, row in found.tuning.items():
        scores = {row["default_size"]: max((t["score"] for t in row["trials"] if t["size"] is None and
                                            t["score"] is not None), default=None)}
        scores |= {trial["size"]: trial["score"] for trial in row["trials"] if trial["size"] is not None}
        known = [value for value in scores.values() if value is not None]
        if len(known) > 1:
            said.append((max(known) - min(known), method, row["size"]))
    if len(said) < 2:
        return
    (most, method, size), least = max(said), min(said)[0]
    others = listed(f"{other} ({its})" for lost, other, its in said if lost == least)
    yield Finding(f"The size mattered most for {method} ({size}: {_score(found, most)} between the best and the worst "
                  f"of the sizes tried), and least for {others}: {_score(found, least)} ({found.name}).",
                  ("sizes",))


def few_examples(found: Found) -> Iterator[Finding]:
    """Who is best with little data, and from where on another one is."""
    rows = {method: {row["train_size"]: row for row in points}
            for method, points in found.content["few_examples"].items()}
    counts = sorted(set.intersection(*(set(points) for points in rows.values()))) if rows else []
    if len(counts) < 2 or len(rows) < 2:
        return
    groups: dict[tuple[str, ...], list[int]] = {}
    for count in counts:
        groups.setdefault(tuple(sorted(_best_with(count, rows))), []).append(count)
    said = [f"{listed(f'{count:,}' for count in its)}: {'all' if len(methods) == len(rows) else listed(methods)}"
            for methods, its in groups.items()]
    yield Finding(f"Of {listed(rows)}, those that have the highest mean or are not told apart from it by their "
                  f"deviations, by number of training examples of {found.name}: {'; '.join(said)}.{_untrained(found)} "
                  "Settings were chosen on more examples, and the step to stop at on labelled validation examples.",
                  ("few_examples",))


def _best_with(count: int, rows: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """The methods at the top with so many examples."""
    return most_of({method: Cost(points[count]["mean"], points[count]["deviation"] or 0.0)
                    for method, points in rows.items()})


def _untrained(found: Found) -> str:
    """What is reached without training, to stand beside."""
    best = best_baseline(found.content)
    return f" Without training: {best[0]} ({metric_of(found.content).shown(best[1])})." if best else ""


def without_the_budget(found: Found) -> Iterator[Finding]:
    """What lora and full gain by more training."""
    said = []
    metric = metric_of(found.content)
    for method, row in found.content["best"].items():
        if method in found.methods:
            said.append(f"{method} {metric.shown(row['mean'])} in place of {found.shown(method)}")
    if said:
        yield Finding(f"Trained without the common budget on {found.name} (one seed each): {listed(said)}.",
                      ("parameters",))


SENTENCES: tuple[Callable[[Found], Iterator[Finding]], ...] = (
    the_top, beside_full, fewest_parameters, against_no_training, seeds_and_methods, forgetting, time_of_training,
    memory_of_training, inference, few_examples)
SEEN_ONCE: tuple[Callable[[Found], Iterator[Finding]], ...] = (learning_rates, sizes, without_the_budget)
