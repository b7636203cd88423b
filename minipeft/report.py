"""What was measured: results files, where they were measured, and intervals around a proportion."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from minipeft.errors import OutputError


def machine() -> dict[str, Any]:
    """The machine's description for a results file."""
    description: dict[str, Any] = {
        "system": platform.system(), "processor": _processor(), "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)}
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
    return description


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("minipeft", "torch", "tiktoken", "safetensors", "numpy", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


# --- tables -----------------------------------------------------------------------------------------------------------

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
