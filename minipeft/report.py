"""From results files to the table in the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minipeft.errors import OutputError

TABLE_START, TABLE_END = "<!-- results: written by scripts/report.py -->", "<!-- end of results -->"


def results_table(folder: Path, dataset: str = "imdb") -> str:
    """A Markdown table of every results file about `dataset` in `folder`, baselines first, then by accuracy."""
    rows = []
    for path in sorted(folder.glob("*_results.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["dataset"]["name"] != dataset:
            continue
        for name, found in _tests(results):
            parameters = results["parameters"]
            share = f"{parameters['trainable']:,} ({100 * parameters['trainable'] / parameters['total']:.2f} %)"
            train = results["seconds"].get("train")
            rows.append((train is not None, found["accuracy"], [
                name, results["base_model"]["name"], share if parameters["trainable"] else "0",
                f"{results['dataset']['sizes']['train']:,}" if train else "0",
                f"{100 * found['accuracy']:.2f} %",
                "{:.2f} to {:.2f} %".format(*(100 * bound for bound in found["accuracy_95_interval"])),
                f"{100 * found['f1']:.2f} %", f"{train / 60:.1f} min" if train else "-"]))
    header = ["method", "base", "trained parameters", "training reviews", "test accuracy", "95 % interval", "F1",
              "training time"]
    lines = [header, ["---"] * len(header), *(row for _, _, row in sorted(rows, key=lambda row: row[:2]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _tests(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if results["method"] != "baseline":
        return [(results["method"], results["metrics"]["test"])]
    names = {"untrained_head": "baseline: untrained head", "zero_shot": "baseline: zero-shot by prompt"}
    return [(names[key], found) for key, found in results["metrics"].items()]


def replace_table(text: str, table: str) -> str:
    """`text` with the lines between the two markers replaced by `table`.

    Raises:
        OutputError: the markers are not there.
    """
    before, start, rest = text.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if not start or not end:
        raise OutputError(f"there is no {TABLE_START} ... {TABLE_END} to write between")
    return f"{before}{start}\n{table}\n{end}{after}"
