"""From cells to comparison.json and comparison_tuning.json: what a report needs, made from the cells' files alone.

comparison.json

    {"datasets": {NAME: {
        "terms":       what all cells of the dataset have in common: see `cells.py`
        "headline":    the metric that counts, such as "accuracy"; higher is better
        "task"
        "machine", "versions": with which times and memory were measured; empty if they have not been
        "sizes":       {"train", "validation", "test"}: examples
        "baselines":   {NAME: metrics}, without training; empty if none were run
        "methods":     {METHOD: ROW}
        "tests":       every pair of methods, smallest p first: see `significance.compared`; empty where a task does not
                       count example by example
        "best":        {METHOD: ROW}, trained without the budget; not in "tests", no ranks
        "few_examples": {METHOD: [{"train_size", "test_size", "seeds", "scores", "mean", "deviation"}]}, smallest first,
                       the last one with all examples of the budget; of the methods that were trained on fewer}}}

    ROW = {
        "settings":    {"learning_rate", and what else was chosen}, of the method's and the training's configuration
        "size":        {FIELD: value} of the field that was tried as the method's size; empty where there is none
        "seeds":       [0, 1, 2];  "cells": their files, relative to comparison.json;  "adapters": folders
        "scores":      the headline on the test split, for each seed
        "mean", "deviation" (n - 1; None with one seed), "interval_95" of the mean: see `significance.py`
        "metrics":     {METRIC: mean over seeds} of all metrics that are numbers
        "trained_parameters", "trained_share" (of all parameters)
        "core_seconds_per_1000_examples", "training_memory_bytes" (what training adds to the process), "adapter_bytes":
                       {"mean", "deviation"} each
        "inference":   {"extra": share of the base's time that the adapter adds, unmerged, the median of the turns;
                        "extra_merged";
                        "mergeable": "yes", "no" or "nothing to merge"}; 0 where nothing is added, None where not known
                        or, as all times and memory, not measured: of "best", and until all runs have ended
        "forgetting":  {"before", "after", "nats" (after - before; above 0 is forgotten), "deviation" of it, "tokens",
                        "texts"}
        "curves":      for each seed its validations: step, train_loss, validation_loss, seconds, ...
        "better_than", "worse_than", "rank": see `significance.ranks`; in "methods", if there are several}

comparison_tuning.json

    {"datasets": {NAME: {"terms", "failed": trials without a result, by the names of their files, "methods": {METHOD: {
        "best_by":     the metric on the validation split; "loss" is the lower the better
        "size":        the name of the size that was tried, or `NO_SIZE`; "default_size": its value with the rates
        "trials":      [{"learning_rate", "size": its value, None for the default, "validation": {metrics}, "score":
                       higher is better, None for what is no number, "core_seconds", "curve"}], rates first
        "chosen":      {"learning_rate", ...}: of the best trial, see `budget.tuning_of`; None until all have ended}}}}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from minipeft.errors import OutputError
from minipeft.files import read_json_file, without_nan, write_json_file
from minipeft.runs.budget import ALL, NO_SIZE, Track, default_size, tuning_of
from minipeft.runs.cells import cell_in, score_of, unpacked
from minipeft.runs.defaults import table
from minipeft.runs.results import BASELINES, METRICS, Metric, markdown_table, shown_parameters
from minipeft.runs.significance import compared, interval, ranks, resampled
from minipeft.tasks import TASKS

COMPARISON_FILE, TUNING_FILE = "comparison.json", "comparison_tuning.json"


def write_comparison(folder: Path) -> dict[str, Any]:
    """Make both files anew from the cells below `folder`.

    Returns:
        The content of comparison.json.

    Raises:
        OutputError: the cells of a dataset are of different terms, or a file cannot be read or written.
    """
    found = comparison(folder)
    write_json_file(folder / COMPARISON_FILE, found)
    write_json_file(folder / TUNING_FILE, tuning(folder))
    return found


def comparison(folder: Path) -> dict[str, Any]:
    """The content of comparison.json, from the cells below `folder`."""
    datasets = {}
    for place in _places(folder):
        cells = [(path, read_json_file(path)) for path in sorted(place.glob("*.json"))]
        if cells:
            sized = [(path, read_json_file(path)) for path in sorted((place / "size").glob("*.json"))]
            timed = [(path, read_json_file(path)) for path in sorted((place / "costs").glob("*.json"))]
            _terms(cells + sized + timed)
            content = _dataset(folder, cells, [results for _, results in timed])
            datasets[place.name] = {**content, "few_examples": _few_examples(
                [(path, results) for path, results in cells if results["cell"]["kind"] == "final"], sized)}
    return without_nan({"datasets": datasets})


def _dataset(folder: Path, cells: Sequence[tuple[Path, dict[str, Any]]],
             timed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What comparison.json says of one dataset."""
    terms, some = _terms(cells), cells[0][1]
    by_kind: dict[str, dict[str, list[tuple[Path, dict[str, Any]]]]] = {"final": {}, "best": {}}
    for path, results in cells:
        by_kind[results["cell"]["kind"]].setdefault(results["method"], []).append((path, results))
    (_, baseline), = by_kind["final"].pop("baseline", [(None, {"metrics": {}})])
    rows = {kind: {method: _row(folder, found, some["headline"], timed if kind == "final" else ())
                   for method, found in sorted(methods.items(), key=lambda item: ALL.index(item[0]))}
            for kind, methods in by_kind.items()}
    pairs, counted = [], next((results["counted_as"] for _, results in cells if "counted_as" in results), some["task"])
    for kind, methods in by_kind.items():
        each = {method: [unpacked(results["each"]) for _, results in methods[method]] for method in rows[kind]
                if all(results.get("each") for _, results in methods[method])}
        if counted not in TASKS or not each:
            continue
        samples = resampled(each, TASKS[counted].headline_of)
        for method in each:
            rows[kind][method]["interval_95"] = interval(samples[method])
        if kind == "final" and len(each) > 1:
            pairs = compared({method: rows[kind][method]["mean"] for method in each}, samples)
            for method, place in ranks(list(each), pairs).items():
                rows[kind][method] |= place
    return {"terms": terms, "task": some["task"], "headline": some["headline"], "sizes": terms["dataset"]["sizes"],
            **{key: timed[0][key] if timed else {} for key in ("machine", "versions")},
            "baselines": baseline["metrics"], "methods": rows["final"], "tests": pairs, "best": rows["best"]}


def _row(folder: Path, cells: Sequence[tuple[Path, dict[str, Any]]], headline: str,
         timed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is said of one method on one dataset, of one kind of cells; of costs, those of the settings it has now."""
    runs = sorted((results for _, results in cells), key=lambda results: results["seed"])
    tested, costs = [run["metrics"]["test"] for run in runs], [run["costs"] for run in runs]
    scores, first = [metrics[headline] for metrics in tested], runs[0]
    numbers = [key for key in tested[0] if all(isinstance(metrics.get(key), (int, float)) for metrics in tested)]
    _check_settings(cells)
    turns = [turn["costs"] for turn in timed
             if (turn["method"], turn["cell"]["values"]) == (first["method"], first["cell"]["values"])]
    lost = [run["forgetting"]["after"] - run["forgetting"]["before"] for run in costs]
    chosen = dict(first["cell"]["values"])
    return {
        "settings": {"learning_rate": first["training_config"]["learning_rate"], **chosen},
        "size": {name: chosen.get(name, value) for name, value in default_size(first["method"]).items()},
        "seeds": [run["seed"] for run in runs], "adapters": [run["adapter_folder"] for run in runs],
        "cells": sorted(path.relative_to(folder).as_posix() for path, _ in cells),
        **_scores(scores), "interval_95": None,
        "metrics": {key: round(fmean(metrics[key] for metrics in tested), 6) for key in numbers},
        "trained_parameters": first["parameters"]["trainable"],
        "trained_share": first["parameters"]["trainable"] / first["parameters"]["total"],
        **{key: _spread([turn[key] for turn in turns])
           for key in ("core_seconds_per_1000_examples", "training_memory_bytes")},
        "adapter_bytes": _spread([run["adapter_bytes"] for run in costs]),
        "inference": _inference([turn["inference"] for turn in turns]),
        "forgetting": {"before": costs[0]["forgetting"]["before"],
                       "after": round(fmean(run["forgetting"]["after"] for run in costs), 5),
                       "nats": round(fmean(lost), 5), "deviation": _deviation(lost),
                       "tokens": costs[0]["forgetting"]["tokens"], "texts": costs[0]["forgetting"]["texts"]},
        "curves": [run["curve"] for run in runs]}


def _check_settings(cells: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Refuse a mean over runs of one method that were not trained alike.

    Raises:
        OutputError: they have different settings.
    """
    if len({_settings_in(run) for _, run in cells}) > 1:
        path, run = cells[0]
        raise OutputError(f"the seeds of {run['method']} below {path.parent} were trained with different settings: "
                          "run scripts/compare.py again, which trains those anew that are not the best's")


def _settings_in(run: dict[str, Any]) -> str:
    """All that a cell says it was trained with, but for its seed."""
    training = {key: value for key, value in run.get("training_config", {}).items() if key != "seed"}
    return json.dumps([run["cell"]["values"], run.get("method_config"), training], sort_keys=True)


def _few_examples(finals: Sequence[tuple[Path, dict[str, Any]]],
                  sized: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """The headline by how many examples a method was trained on."""
    found: dict[str, dict[int, list[tuple[Path, dict[str, Any]]]]] = {}
    methods = {results["method"] for _, results in sized}
    for path, results in (*sized, *finals):
        if results["method"] in methods:
            size = results["dataset"]["sizes"]["train"]
            found.setdefault(results["method"], {}).setdefault(size, []).append((path, results))
    return {method: [_of_size(size, cells) for size, cells in sorted(sizes.items())]
            for method, sizes in sorted(found.items())}


def _of_size(size: int, cells: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """What is said of one method that was trained on so many examples."""
    _check_settings(cells)
    runs = [run for _, run in cells]
    return {"train_size": size, "test_size": runs[0]["dataset"]["sizes"]["test"],
            "seeds": [run["seed"] for run in runs],
            **_scores([run["metrics"]["test"][run["headline"]] for run in runs])}


def _scores(scores: Sequence[float]) -> dict[str, Any]:
    return {"scores": list(scores), "mean": round(fmean(scores), 6), "deviation": _deviation(scores)}


def _inference(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Extra time at inference: over turns the median of each one's share. A machine that is busy with other things in
    one of them does not count then."""
    def extra(key: str) -> float | None:
        shares = [run[key] / run["base_seconds"] - 1 for run in runs if run[key] and run["base_seconds"]]
        return round(median(shares), 4) if shares else None

    mergeable = runs[0]["mergeable"] if runs else None
    nothing = mergeable == "nothing to merge"  # the base's own modules, with other values
    return {"extra": 0.0 if nothing else extra("seconds"), "extra_merged": 0.0 if nothing else extra("merged_seconds"),
            "mergeable": mergeable}


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and deviation; None where a value is not known."""
    known = [value for value in values if value is not None]
    return {"mean": round(fmean(known), 4) if known else None, "deviation": _deviation(known)}


def _deviation(values: Sequence[float]) -> float | None:
    return round(stdev(values), 6) if len(values) > 1 else None


# --- tuning -----------------------------------------------------------------------------------------------------------

def tuning(folder: Path) -> dict[str, Any]:
    """The content of comparison_tuning.json, from the cells below `folder`."""
    datasets = {}
    for place in _places(folder):
        cells = [(path, read_json_file(path)) for path in sorted((place / "tuning").glob("*.json"))]
        if cells:
            methods: dict[str, list[dict[str, Any]]] = {}
            for _, results in cells:
                methods.setdefault(results["cell"]["method"], []).append(results)
            datasets[place.name] = {
                "terms": _terms(cells), "failed": sorted(path.stem for path in (place / "tuning").glob("*.error")),
                "methods": {method: _tuned(place, method, trials) for method, trials in methods.items()}}
    return without_nan({"datasets": datasets})


def _tuned(place: Path, method: str, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    (size, default), = default_size(method).items() or ((None, None),)
    trials = [{"learning_rate": cell["trial"]["learning_rate"], "size": cell["trial"].get(size),
               "validation": cell["validation"], "score": score_of(cell), "core_seconds": cell["core_seconds"],
               "curve": cell["curve"]} for cell in cells]
    trials.sort(key=lambda trial: (trial["size"] is not None, trial["size"], trial["learning_rate"]))
    scores = {cell_in(cell): score_of(cell) for cell in cells}
    _, chosen = tuning_of(
        Track(place.name, method, table(method, cells[0]["terms"]["task"])["training"]["learning_rate"], 1), scores.get,
        lambda cell: cell in scores or any((place / "tuning").glob(f"{Path(cell.name).name}-*.error")))
    return {"best_by": cells[0]["best_by"], "size": size or NO_SIZE,
            "default_size": default, "trials": trials,
            "chosen": None if chosen is None else dict(chosen)}


def _places(folder: Path) -> list[Path]:
    """The folders of datasets."""
    return sorted(path for path in (folder / "cells").glob("*") if path.is_dir())


def _terms(cells: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """What the cells have in common.

    Raises:
        OutputError: they differ.
    """
    (first, results), *others = cells
    for path, other in others:
        if other["terms"] != results["terms"]:
            raise OutputError(f"{path} and {first} are of different data, base models or budgets, which no table can "
                              "compare: move one of them away")
    return results["terms"]


# --- for people -------------------------------------------------------------------------------------------------------

def metric_of(content: dict[str, Any]) -> Metric:
    """How tables show the headline of a dataset of comparison.json."""
    return next((metric for metric in METRICS.get(content["task"], ()) if metric.key == content["headline"]),
                Metric(content["headline"], content["headline"], False))


def table_of(content: dict[str, Any], kinds: Sequence[str] = ("methods", "best"),
             others: Sequence[tuple[str, float]] = ()) -> str:
    """One dataset of comparison.json as a Markdown table, from worse to better.

    Args:
        kinds: "methods" with the baselines before them, "best", or both.
        others: a name and a headline each, for rows at the top.
    """
    metric = metric_of(content)
    header = ["method", "settings", "trained parameters", metric.heading, "95 % interval", "rank",
              "core s per 1,000", "forgotten, nats", "extra inference"]

    def untrained(found: Sequence[tuple[str, float]], parameters: str) -> list[list[str]]:
        return [[name, "-", parameters, metric.shown(value), "-", "-", "-", "-", "-"]
                for name, value in sorted(found, key=lambda item: item[1])]

    rows = untrained(others, "-")
    if "methods" in kinds:
        rows += untrained([(BASELINES.get(name, name), values[metric.key])
                           for name, values in content["baselines"].items()], "0")
    for kind in kinds:
        named = "{}" if kind == "methods" else "{}, best without the budget"
        rows += [_cells_of(named.format(name), row, metric) for name, row in sorted(
            content[kind].items(), key=lambda item: item[1]["mean"])]
    return markdown_table(header, rows)


def shown_with_deviation(metric: Metric, row: dict[str, Any]) -> str:
    """A row's mean over seeds, and its deviation if there are several."""
    mean = metric.shown(row["mean"])
    return mean if row["deviation"] is None else f"{mean} ± {metric.shown(row['deviation'])}"


def shown_interval(metric: Metric, row: dict[str, Any]) -> str:
    """The interval of a row's mean, or "-" where there is none."""
    return metric.shown(*row["interval_95"]) if row["interval_95"] else "-"


def shown_settings(row: dict[str, Any]) -> str:
    """What was chosen for a row, by name."""
    return ", ".join(f"{key} {value:g}" for key, value in row["settings"].items())


def shown_rank(row: dict[str, Any]) -> str:
    """The rank that tests leave open: "3", "1 to 4", or "-" where there were none."""
    low, high = row.get("rank", (None, None))
    return "-" if low is None else str(low) if low == high else f"{low} to {high}"


def _cells_of(name: str, row: dict[str, Any], metric: Metric) -> list[str]:
    return [name, shown_settings(row), shown_parameters(row["trained_parameters"], row["trained_share"]),
            shown_with_deviation(metric, row), shown_interval(metric, row), shown_rank(row),
            shown_seconds(row), shown_forgotten(row), shown_share(row["inference"]["extra"])]


def shown_seconds(row: dict[str, Any]) -> str:
    """Core seconds that training takes for 1,000 examples, or "-" where they were not measured."""
    return shown_cost(row["core_seconds_per_1000_examples"], "{:.1f}".format)


def shown_forgotten(row: dict[str, Any]) -> str:
    """Nats per token that the base has lost."""
    spread, nats = row["forgetting"]["deviation"], row["forgetting"]["nats"]
    return f"{nats:+.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def shown_cost(cost: dict[str, float | None], shown: Callable[[float], str]) -> str:
    """A cost's mean and, of several seeds or turns, its deviation; "-" where it was not measured."""
    if cost["mean"] is None:
        return "-"
    return " ± ".join(shown(value) for value in (cost["mean"], cost["deviation"]) if value is not None)


def shown_share(value: float | None) -> str:
    """A share that is added or, below 0, saved; "-" where it is not known."""
    return "-" if value is None else f"{100 * value:+.0f} %"
