"""A comparison's tables and findings, as they stand in Markdown files."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from minipeft.errors import OutputError
from minipeft.files import read_json_file
from minipeft.report.choices import choices
from minipeft.report.families import best_baseline, sized
from minipeft.report.findings import Finding, findings
from minipeft.runs.comparison import (
    COMPARISON_FILE,
    TUNING_FILE,
    metric_of,
    shown_cost,
    shown_forgotten,
    shown_interval,
    shown_rank,
    shown_seconds,
    shown_share,
    shown_with_deviation,
    table_of,
)
from minipeft.runs.results import (
    WRITER,
    markdown_table,
    replace_blocks,
    results_block,
    shown_parameters,
)

# Not measured here: reported elsewhere on IMDb's test reviews, by other code and on other terms, as results/README.md
# says.
ELSEWHERE = {"imdb": (
    ("reported elsewhere: GPT-2 124M with an untrained head", 0.4988),
    ("reported elsewhere: GPT-2 124M, zero-shot by prompt", 0.7078),
    ("reported elsewhere: GPT-2 124M, LoRA through standard libraries", 0.7550),
    ("reported elsewhere: TF-IDF and logistic regression", 0.8885),
    ("reported elsewhere: GPT-2 124M, LoRA on its last two blocks", 0.9107),
    ("reported elsewhere: GPT-2 124M, full fine-tuning", 0.9188),
    ("reported elsewhere: GPT-2 124M, its last two blocks", 0.9236))}
IN_SHORT = ("prompt", "adapter", "full", "lora")  # README's rows, beside zero-shot
BY = "all datasets by "  # a method's name follows
PICTURES = "comparison"  # the folder, beside comparison.json
SEEN_ONCE_HEADING = "Seen as well, with one seed, and not tested:"


def read_comparison(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What comparison.json and comparison_tuning.json of a results folder hold, of datasets with trained methods.

    Raises:
        OutputError: there is no comparison, or it holds nothing but baselines.
    """
    if not (folder / COMPARISON_FILE).is_file():
        raise OutputError(f"{folder} holds no {COMPARISON_FILE}: run scripts/compare.py, or name a --results-dir")
    tuning = folder / TUNING_FILE
    trained = {name: content for name, content in _datasets_in(folder / COMPARISON_FILE).items() if content["methods"]}
    if not trained:
        raise OutputError(f"{folder / COMPARISON_FILE} holds baselines alone: compare some methods")
    return {"datasets": trained}, {"datasets": _datasets_in(tuning) if tuning.is_file() else {}}


def _datasets_in(path: Path) -> dict[str, dict[str, Any]]:
    """What a file of a comparison holds on each dataset.

    Raises:
        OutputError: it is another file.
    """
    found = read_json_file(path).get("datasets")
    if not isinstance(found, dict) or not all(isinstance(content, dict) and "methods" in content
                                              for content in found.values()):
        raise OutputError(f"{path} holds no comparison: make it anew by scripts/compare.py, or name a --results-dir")
    return found


class Comparison:
    """What `read_comparison` gives for a folder: read when it is first asked for, and once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def found(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return read_comparison(self.folder)


def replace_tables(text: str, folder: Path) -> str:
    """`text` of a Markdown file with all that scripts/report.py writes made anew from the results in `folder`.

    Raises:
        OutputError: there is no such place in it, or there are no results for one.
    """
    comparison = Comparison(folder)
    return replace_blocks(text, WRITER,
                          lambda subject: block(subject, comparison) or results_block(subject, folder))


def block(subject: str, comparison: Comparison) -> str | None:
    """What a marker of a Markdown file asks for: "findings", "choices", "all datasets", or of a dataset "NAME
    compared", "NAME in short", "NAME costs", "NAME by examples" or "NAME without the budget", of a method "all
    datasets by NAME"; None for another subject.

    Raises:
        OutputError: there is no comparison, or it does not hold it.
    """
    if subject == "findings":
        return findings_block(*comparison.found)
    if subject == "choices":
        return advice(comparison.found[0])
    if subject == "all datasets":
        return overview(comparison.found[0])
    kinds: dict[str, Callable[[str, dict[str, Any]], str]] = {
        " compared": lambda name, content: table_of(content, ("methods",), ELSEWHERE.get(name, ())),
        " in short": in_short, " costs": costs, " by examples": by_examples,
        " without the budget": lambda name, content: table_of(content, ("best",))}
    if subject.startswith(BY):
        return one_method(comparison.found[0], subject.removeprefix(BY))
    for ending, table in kinds.items():
        if subject.endswith(ending):
            dataset = subject.removesuffix(ending)
            return table(dataset, _content_on(dataset, comparison))
    return None


def _content_on(dataset: str, comparison: Comparison) -> dict[str, Any]:
    """What a comparison found on one dataset.

    Raises:
        OutputError: it holds nothing on it.
    """
    datasets = comparison.found[0]["datasets"]
    if dataset not in datasets:
        raise OutputError(f"{comparison.folder / COMPARISON_FILE} holds nothing on {dataset!r}: its datasets are "
                          f"{', '.join(datasets)}")
    return datasets[dataset]


def findings_block(comparison: dict[str, Any], tuning: dict[str, Any]) -> str:
    """A numbered list, each finding with the pictures that show it, and what was seen once."""
    supported, seen = findings(comparison, tuning)
    lines = [f"{number}. {_with_pictures(finding)}" for number, finding in enumerate(supported, start=1)]
    if seen:
        lines += ["", SEEN_ONCE_HEADING, "", *(f"- {_with_pictures(finding)}" for finding in seen)]
    return "\n".join(lines)


def _with_pictures(finding: Finding) -> str:
    links = ", ".join(f"[{'picture' if len(finding.pictures) == 1 else name}]({PICTURES}/{name}.png)"
                      for name in finding.pictures)
    return f"{finding.text} ({links})"


def advice(comparison: dict[str, Any]) -> str:
    """What to take for what."""
    return markdown_table(["you want", "take", "measured"], [
        [choice.wish, ", ".join(choice.methods), choice.measured] for choice in choices(comparison)])


def overview(comparison: dict[str, Any]) -> str:
    """Every method's headline on every dataset, with deviations and ranks, those that train most at the top."""
    datasets = comparison["datasets"]
    methods = {method: row for content in datasets.values() for method, row in content["methods"].items()}
    header = ["method", *(f"{_headline(name, content)}; rank" for name, content in datasets.items())]
    return markdown_table(header, [
        [method, *(_mean_and_rank(content, method) for content in datasets.values())]
        for method in sorted(methods, key=lambda method: -methods[method]["trained_parameters"])], figures=True)


def one_method(comparison: dict[str, Any], method: str) -> str:
    """A method on every dataset, beside the best baseline and full fine-tuning, and how to read it.

    Raises:
        OutputError: the method was not compared.
    """
    datasets = comparison["datasets"]
    known = list(dict.fromkeys(name for content in datasets.values() for name in content["methods"]))
    if method not in known:
        raise OutputError(f"the comparison has no {method}: its methods are {', '.join(known)}")
    methods = dict.fromkeys(("full", method))
    rows = []
    for name, content in datasets.items():
        best = best_baseline(content)
        rows.append([_headline(name, content), f"{best[0]}: {metric_of(content).shown(best[1])}" if best else "-",
                     *(_mean_and_rank(content, method) for method in methods)])
    table = markdown_table(["dataset", "best without training", *(f"{method}; rank" for method in methods)], rows)
    return (f"{table}\n\nMeans over seeds ± their standard deviation; rank \"2 to 4\" is second, third or fourth of "
            "all methods: tests do not say which. On a dataset each method had the same examples, and settings chosen "
            "in the same way.")


def _headline(name: str, content: dict[str, Any]) -> str:
    """A dataset and what is measured on it."""
    return f"{name}: {metric_of(content).heading.removeprefix('test ')}"


def _mean_and_rank(content: dict[str, Any], method: str) -> str:
    row = content["methods"].get(method)
    return "-" if row is None else f"{shown_with_deviation(metric_of(content), row)}; {shown_rank(row)}"


def in_short(name: str, content: dict[str, Any]) -> str:
    """A few rows with a few columns: the best baseline, and `IN_SHORT` from worse to better."""
    metric, rows = metric_of(content), []
    if best := best_baseline(content):
        rows.append([f"baseline: {best[0]}", "0", "-", metric.shown(best[1]), "-", "-"])
    for method, row in sorted(content["methods"].items(), key=lambda item: item[1]["mean"]):
        if method in IN_SHORT:
            rows.append([sized(method, row["size"]), shown_parameters(row["trained_parameters"], row["trained_share"]),
                         str(len(row["seeds"])), shown_with_deviation(metric, row), shown_interval(metric, row),
                         shown_rank(row)])
    return markdown_table(["method", "trained parameters", "seeds", metric.heading, "95 % interval", "rank"], rows)


def costs(name: str, content: dict[str, Any]) -> str:
    """What each method costs beside its quality, the fastest to train first."""
    header = ["method", "core s per 1,000 examples", "MiB that training adds", "adapter, kB", "extra inference",
              "merged", "merges", "forgotten, nats"]
    def seconds(item: tuple[str, dict[str, Any]]) -> float:
        mean = item[1]["core_seconds_per_1000_examples"]["mean"]
        return math.inf if mean is None else mean

    rows = sorted(content["methods"].items(), key=seconds)
    return markdown_table(header, [_costs_of(method, row) for method, row in rows], figures=True)


def _costs_of(method: str, row: dict[str, Any]) -> list[str]:
    inference = row["inference"]
    return [sized(method, row["size"]), shown_seconds(row),
            shown_cost(row["training_memory_bytes"], lambda value: f"{value / 2**20:,.0f}"),
            f"{row['adapter_bytes']['mean'] / 1000:,.0f}", shown_share(inference["extra"]),
            shown_share(inference["extra_merged"]), inference["mergeable"] or "-", shown_forgotten(row)]


def by_examples(name: str, content: dict[str, Any]) -> str:
    """The headline by how many examples a method learned from, a column for each number.

    Raises:
        OutputError: nothing was trained on fewer examples.
    """
    points = {method: {point["train_size"]: point for point in found}
              for method, found in content["few_examples"].items()}
    if not points:
        raise OutputError(f"the comparison has no runs on fewer examples of {name}: scripts/compare.py --few-examples")
    sizes = sorted(set().union(*points.values()))
    metric = metric_of(content)
    return markdown_table(["method", *(f"{size:,}" for size in sizes)], [
        [method, *(shown_with_deviation(metric, found[size]) if size in found else "-" for size in sizes)]
        for method, found in points.items()], figures=True)
