"""What a comparison found, in plain sentences: each is computed from comparison.json, and says what tests support.

A sentence about quality rests on the paired tests (runs/significance.py). A sentence about costs gives what was
measured. Where a comparison does not hold what a sentence needs, there is no such sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any, NamedTuple

from minipeft.report.families import best_baseline, main_of, sized, top_of
from minipeft.runs.budget import STEP
from minipeft.runs.comparison import metric_of
from minipeft.runs.results import Metric


class Finding(NamedTuple):
    """A sentence or two, and the picture in which it is seen."""

    text: str
    picture: str


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


def findings(comparison: dict[str, Any], tuning: dict[str, Any]) -> list[Finding]:
    """All that can be said, in a fixed order."""
    datasets = comparison["datasets"]
    name = main_of(datasets)
    found = Found(datasets, name, datasets[name], tuning["datasets"].get(name, {}).get("methods", {}))
    return [finding for say in SENTENCES for finding in say(found)]


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
    yield Finding(f"{said}.", "parameters")


def beside_full(found: Found) -> Iterator[Finding]:
    """On each dataset, what is better and what is worse than full fine-tuning."""
    said = []
    for name, content in found.datasets.items():
        full = content["methods"].get("full", {})
        if "rank" not in full:
            continue
        better, worse = full["worse_than"], full["better_than"]
        equal = [method for method, row in content["methods"].items()
                 if "rank" in row and method not in (*better, *worse, "full")]
        said.append(f"on {name} better: {listed(better)}, worse: {listed(worse)}, no difference shown: {listed(equal)}")
    if said:
        yield Finding(f"Significantly, against full fine-tuning: {'; '.join(said)}.", "parameters")


def fewest_parameters(found: Found) -> Iterator[Finding]:
    """The smallest method at the top."""
    if not found.top:
        return
    smallest = min(found.top, key=lambda method: found.methods[method]["trained_parameters"])
    row = found.methods[smallest]
    yield Finding(f"The smallest of the methods that none is significantly better than on {found.name} is {smallest}: "
                  f"it trains {row['trained_parameters']:,} parameters, {100 * row['trained_share']:.2f} % of all.",
                  "parameters")


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
                     "The intervals of all methods lie above that."), "parameters")


def seeds_and_methods(found: Found) -> Iterator[Finding]:
    """How large seeds' differences are beside those of methods."""
    deviations = {method: row["deviation"] for method, row in found.methods.items() if row["deviation"] is not None}
    if not deviations and found.content["tests"]:
        yield Finding(f"On {found.name} each method was trained with one seed: the tests speak of these runs, and not "
                      "of what another seed would give.", "parameters")
    if len(deviations) < 2 or not found.content["tests"]:
        return
    most = max(deviations, key=deviations.__getitem__)
    tested, metric = found.content["tests"], metric_of(found.content)
    equal, one = sum(not test["significant"] for test in tested), difference(metric, deviations[most])
    yield Finding(f"Seeds move a method on {found.name} by {difference(metric, fmean(deviations.values()))} on average "
                  f"(one standard deviation), most of all {most} ({one}). {equal} of {len(tested)} pairs of methods "
                  "stay without a significant difference.", "parameters")


# --- costs ------------------------------------------------------------------------------------------------------------

def forgetting(found: Found) -> Iterator[Finding]:
    """What the base forgets, from most to least."""
    lost = {method: row["forgetting"]["nats"] for method, row in found.methods.items()}
    if len(lost) < 2:
        return
    order = sorted(lost, key=lost.__getitem__)
    least, most = order[0], order[-1]
    yield Finding(f"Of the base's own language modelling {most} forgot the most in training on {found.name}, "
                  f"{lost[most]:+.3f} nats per token with the adapter in place, and {least} the least, "
                  f"{lost[least]:+.3f}.", "forgetting")


def time_of_training(found: Found) -> Iterator[Finding]:
    """Seconds, beside full fine-tuning's."""
    yield from _beside_full(found, "core_seconds_per_1000_examples", "core seconds per 1,000 examples", "{:.1f}")


def memory_of_training(found: Found) -> Iterator[Finding]:
    """Memory that training adds, beside full fine-tuning's."""
    yield from _beside_full(found, "training_memory_bytes", "MiB of memory for training", "{:,.0f}", 2**20)


def _beside_full(found: Found, key: str, unit: str, form: str, one: int = 1) -> Iterator[Finding]:
    values = {method: row[key]["mean"] / one for method, row in found.methods.items()
              if row[key]["mean"] is not None}
    if not values.get("full") or len(values) < 2:
        return
    order = sorted((method for method in values if method != "full"), key=values.__getitem__)
    said = listed(f"{_named(found, method)} {values[method] / values['full']:.2f}" for method in order)
    yield Finding(f"Full fine-tuning takes {form.format(values['full'])} {unit} on {found.name}. Of this the others "
                  f"take: {said}.", "costs")


def inference(found: Found) -> Iterator[Finding]:
    """What an adapter costs where it is used."""
    extra = {method: row["inference"] for method, row in found.methods.items() if row["inference"]["extra"] is not None}
    merging = [method for method, row in extra.items() if row["mergeable"] == "yes"]
    staying = [method for method, row in extra.items() if row["mergeable"] == "no"]
    if not merging or not staying:
        return
    before, after = (100 * fmean(extra[method][key] for method in merging if extra[method][key] is not None)
                     for key in ("extra", "extra_merged"))
    stay = listed(f"{_named(found, method)} {max(0.0, 100 * extra[method]['extra']):.0f} %" for method in staying)
    yield Finding(f"What can merge ({', '.join(merging)}) makes the base on average {before:.0f} % slower while it is "
                  f"apart, and {after:.0f} % once merged. What cannot merge stays as it is: {stay}.", "costs")


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
                  "the two sides the worse one; one seed, not tested).", "tuning")


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
                  f"of the sizes tried), and least for {others}: {_score(found, least)} (one seed, not tested).",
                  "tuning")


def few_examples(found: Found) -> Iterator[Finding]:
    """Who is best with little data, and from where on another one is."""
    rows = {method: {row["train_size"]: row["mean"] for row in points}
            for method, points in found.content["few_examples"].items()}
    counts = sorted(set.intersection(*(set(points) for points in rows.values()))) if rows else []
    if len(counts) < 2:
        return
    best = [max(rows, key=lambda method: rows[method][count]) for count in counts]
    metric = metric_of(found.content)
    said = [f"{count:,}: {method} ({metric.shown(rows[method][count])})" for count, method in zip(counts, best)]
    yield Finding(f"The highest mean by number of training examples of {found.name}, among {listed(rows)}: "
                  f"{'; '.join(said)}.{_untrained(found)} Settings were chosen on more examples, and the step to stop "
                  "at on labelled validation examples.", "few_examples")


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
                      "parameters")


SENTENCES: tuple[Callable[[Found], Iterator[Finding]], ...] = (
    the_top, beside_full, fewest_parameters, against_no_training, seeds_and_methods, forgetting, time_of_training,
    memory_of_training, inference, learning_rates, sizes, few_examples, without_the_budget)
