"""benchmark.png: bars of what was measured against peft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from labels import BOTH_TIMES, Cells, rows_of

from minipeft.runs.results import blank_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"ours": "#d9822b", "peft": "#9aa5b1", "before": "#e8c39e", "after": "#d9822b"}


def draw_benchmark(results: Cells, path: str | Path) -> None:
    """Bars for each device that was measured: reviews per second and memory of ours and of peft's, and how many times
    as fast ours is with the same micro-batches, before the work on speed and after it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    columns = [(name, results[name]) for name in ("cpu", "cuda") if "training" in results.get(name, {})]
    if not columns:
        return
    figure = blank_figure(8.4, 8.4 * len(columns), layout="constrained")  # one under the other, to be read 800 px wide
    axes = figure.subplots(3 * len(columns), 1).reshape(-1, 3)
    sides = {"ours": "minipeft", "peft": "transformers + peft"}
    for (device, column), (speed, memory, equal) in zip(columns, axes):
        rows = column["training"]
        for axis, title, value in (
                (speed, "reviews per second", lambda cells: cells["samples_per_second"]),
                (memory, "peak memory in GiB", lambda cells: cells["peak_memory_bytes"] / 2**30)):
            _draw_bars(axis, f"{title}, {device}", list(rows), {
                side: (label, {name: value(cells[side]) for name, cells in rows.items()})
                for side, label in sides.items()})
        speedups = {}
        for when in BOTH_TIMES:
            if rows := rows_of(column, "same_micro_batches", when):
                speedups[when] = (f"{when} the work on speed", {name: cells["speedup"] for name, cells in rows.items()})
        names = sorted({name for _, heights in speedups.values() for name in heights})
        _draw_bars(equal, f"times as fast as peft with the same micro-batches, {device}", names, speedups, "%.2f")
        equal.axhline(1, color="#555555", linewidth=0.8)
    figure.savefig(path, dpi=120)


def _draw_bars(axis: Axes, title: str, names: list[str], bars_of: dict[str, tuple[str, dict[str, float]]],
               shown: str = "%.1f") -> None:
    """For each name bars beside each other.

    Args:
        bars_of: by color, their label and their heights by name; where one was not measured there is no bar.
    """
    width = 0.8 / max(1, len(bars_of))
    for number, (color, (label, heights)) in enumerate(bars_of.items()):
        places = [place for place, name in enumerate(names) if name in heights]
        bars = axis.bar([place + (number - (len(bars_of) - 1) / 2) * width for place in places],
                        [heights[names[place]] for place in places], 0.95 * width, color=COLORS[color], label=label)
        axis.bar_label(bars, fmt=shown, fontsize=9)
    axis.set_xticks(range(len(names)), [_in_lines(*name.split()) for name in names])
    axis.set_title(title)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.3)  # room for the legend
    if bars_of:
        axis.legend(frameon=False)


def _in_lines(kind: str, tokens: str, dropout: str | None = None) -> str:
    return f"{kind}\n{tokens} tokens" + (f"\ndropout {dropout}" if dropout else "")
