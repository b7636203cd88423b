"""A comparison's pictures: quality beside what it costs, curves, and how much settings matter.

Each is 800 pixels wide as a PNG, and an SVG beside it. Methods are named in the picture itself; color and marker tell
the family (families.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from minipeft.files import replacing_folder
from minipeft.report.families import FAMILIES, best_baseline, family_of, in_figures, main_of, sized
from minipeft.runs.comparison import metric_of
from minipeft.runs.results import blank_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI, INK, SOFT = 8.0, 100, "#26262b", "#8a8a94"
LINES = ("-", "--", ":")  # of the methods of a family

Rows = dict[str, dict[str, Any]]


def draw_comparison(comparison: dict[str, Any], tuning: dict[str, Any], folder: Path) -> list[str]:
    """Draw what there is into `folder`: of the main dataset all, of the others "parameters". Pictures that an earlier
    comparison left there, and this one has not, are deleted.

    Returns:
        The pictures' names, without endings.

    Raises:
        ConfigError: matplotlib is not installed.
        OutputError: the folder cannot be written.
    """
    datasets = comparison["datasets"]
    main = main_of(datasets)
    content = datasets[main]
    drawn: dict[str, Figure | None] = {
        "parameters": parameters(main, content), "forgetting": forgetting(main, content),
        "few_examples": few_examples(main, content), "curves": curves(main, content), "costs": costs(main, content),
        "tuning": sensitivity(main, content, tuning["datasets"].get(main, {}).get("methods", {}))}
    drawn |= {f"parameters_{name}": parameters(name, other) for name, other in datasets.items() if name != main}
    figures = {name: figure for name, figure in drawn.items() if figure is not None}
    with replacing_folder(folder) as temporary, _same_each_time():
        for name, figure in figures.items():
            figure.savefig(temporary / f"{name}.png", dpi=DPI, facecolor="white")
            figure.savefig(temporary / f"{name}.svg", facecolor="white", metadata={"Date": None})
    for path in (path for kind in ("png", "svg") for path in folder.glob(f"*.{kind}") if path.stem not in figures):
        path.unlink()
    return list(figures)


def _same_each_time() -> AbstractContextManager[None]:
    """Within it the parts of an SVG have the same names whenever it is drawn."""
    from matplotlib import rc_context
    return rc_context({"svg.hashsalt": "minipeft"})


# --- quality beside something -----------------------------------------------------------------------------------------

def parameters(name: str, content: dict[str, Any]) -> Figure | None:
    """Quality against trained parameters, with the methods that no other one's mean beats in both; None of one method.
    """
    if len(content["methods"]) < 2:
        return None
    figure, axes = _axes(f"{name}: quality and trained parameters", "trained parameters", _quality(content))
    axes.set_xscale("log")
    points = _scatter(axes, content, lambda row: row["trained_parameters"])
    front, best = [], -math.inf
    for x, y, _ in sorted(points):
        if y > best:
            front.append((x, y))
            best = y
    for method, row in content["best"].items():
        axes.plot([row["trained_parameters"]], [in_figures(content, row["mean"])], family_of(method).marker,
                  color=family_of(method).color, markersize=9, fillstyle="none", zorder=3)
    axes.plot(*zip(*front), color=SOFT, linewidth=1, linestyle="--", zorder=1, label="highest mean so far")
    _baseline(axes, content)
    _finish(axes, points)
    return figure


def forgetting(name: str, content: dict[str, Any]) -> Figure:
    """Quality against what the base has forgotten of its own language modelling."""
    figure, axes = _axes(f"{name}: quality and forgetting", "forgotten, in nats per token of held-out text",
                         _quality(content))
    axes.axvline(0, color=SOFT, linewidth=1, zorder=1)
    _finish(axes, _scatter(axes, content, lambda row: row["forgetting"]["nats"]))
    return figure


def _quality(content: dict[str, Any]) -> str:
    metric = metric_of(content)
    return metric.heading + (" in %" if metric.share else "")


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = blank_figure(WIDTH, 5.2, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#ececf0", zorder=0)
    return figure, axes


def _scatter(axes: Axes, content: dict[str, Any], x_of: Callable[[dict[str, Any]], float]) \
        -> list[tuple[float, float, str]]:
    """A point for each method, with its interval; returns (x, y, name) of each."""
    points = []
    for method, row in content["methods"].items():
        family, y = family_of(method), in_figures(content, row["mean"])
        points.append((x_of(row), y, method))
        if row["interval_95"]:
            low, high = (in_figures(content, bound) for bound in row["interval_95"])
            axes.plot([x_of(row)] * 2, [low, high], color=family.color, linewidth=1.4, alpha=0.6, zorder=2)
        axes.plot([x_of(row)], [y], family.marker, color=family.color, markersize=8, zorder=3)
    return points


def _baseline(axes: Axes, content: dict[str, Any]) -> None:
    """A line at the best score without training, if it is in reach of the methods'."""
    if best := best_baseline(content):
        axes.axhline(in_figures(content, best[1]), color=SOFT, linewidth=1, linestyle=":", zorder=1,
                     label="best without training")


def _finish(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Names at the points, and a legend of the families that are there."""
    from matplotlib.lines import Line2D
    axes.margins(x=0.12, y=0.14)
    handles = [Line2D([], [], marker=family.marker, color=family.color, linestyle="", label=family.name)
               for family in FAMILIES if any(name in family.methods for _, _, name in points)]
    handles += [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    if any(len(line.get_xdata()) == 2 and line.get_label().startswith("_") for line in axes.get_lines()):
        handles.append(Line2D([], [], marker="|", markersize=12, color=SOFT, linestyle="", label="95 % interval"))
    if any(line.get_fillstyle() == "none" for line in axes.get_lines()):
        handles.append(Line2D([], [], marker="o", markersize=9, color=SOFT, linestyle="", fillstyle="none",
                              label="without the budget"))
    axes.figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    _name_points(axes, points)


def _name_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Each name beside its point, where it covers no other point or name."""
    axes.figure.draw_without_rendering()
    places = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    for line in axes.get_lines():  # and beside the intervals
        if len(line.get_xdata()) == 2 and not line.get_label().startswith("best"):
            (x, low), (_, high) = axes.transData.transform(line.get_xydata())
            taken.append((x - 5, low, x + 5, high))
    for (x, y), (_, _, name) in zip(places, points):
        width, height = 7.2 * len(name), 12.0
        options = [(dx if dx > 0 else dx - width if dx < 0 else -width / 2, dy) for distance in (12, 20, 32)
                   for dx, dy in ((distance, -6), (0, distance - 2), (0, -distance - 10), (-distance, -6),
                                  (distance, distance - 6), (distance, -distance - 4), (-distance, distance - 6),
                                  (-distance, -distance - 4))]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in options]
        box = min(boxes, key=lambda box: sum(_shared(box, other) for other in taken))
        taken.append(box)
        axes.annotate(name, (x, y), ((box[0] - x) * 72 / DPI, (box[1] - y + 2) * 72 / DPI), xycoords="figure pixels",
                      textcoords="offset points", fontsize=10, color=family_of(name).color, zorder=4,
                      path_effects=_halo())


def _halo() -> list[Any]:
    """A white edge, by which a name stays readable where a line passes behind it."""
    from matplotlib.patheffects import withStroke
    return [withStroke(linewidth=3, foreground="white")]


def _shared(a: Sequence[float], b: Sequence[float]) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


# --- lines ------------------------------------------------------------------------------------------------------------

def few_examples(name: str, content: dict[str, Any]) -> Figure | None:
    """Quality against the number of training examples."""
    if not content["few_examples"]:
        return None
    figure, axes = _axes(f"{name}: quality and number of training examples", "training examples", _quality(content))
    axes.set_xscale("log", base=2)
    for method, rows in content["few_examples"].items():
        sizes = [row["train_size"] for row in rows]
        means = [in_figures(content, row["mean"]) for row in rows]
        spread = [in_figures(content, row["deviation"] or 0.0) for row in rows]
        family = family_of(method)
        axes.fill_between(sizes, [m - s for m, s in zip(means, spread)], [m + s for m, s in zip(means, spread)],
                          color=family.color, alpha=0.12, linewidth=0)
        axes.plot(sizes, means, color=family.color, marker=family.marker, markersize=5, linestyle=_line(method))
    sizes = sorted({row["train_size"] for rows in content["few_examples"].values() for row in rows})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    _name_ends(axes, {method: (rows[-1]["train_size"], in_figures(content, rows[-1]["mean"]))
                      for method, rows in content["few_examples"].items()})
    _baseline(axes, content)
    axes.fill_between([], [], [], color=SOFT, alpha=0.25, linewidth=0, label="one standard deviation over seeds")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def curves(name: str, content: dict[str, Any]) -> Figure:
    """Validation loss while training, the mean over seeds."""
    figure, axes = _axes(f"{name}: loss on validation examples while training (mean over seeds)",
                         "optimizer steps", "validation loss, nats")
    ends = {}
    for method, row in content["methods"].items():
        steps = sorted({point["step"] for curve in row["curves"] for point in curve})
        means = [fmean(found) if (found := [point["validation_loss"] for curve in row["curves"] for point in curve
                                            if point["step"] == step and point["validation_loss"] is not None])
                 else math.nan for step in steps]
        family = family_of(method)
        axes.plot(steps, means, color=family.color, marker=family.marker, markersize=4, linewidth=1.3,
                  linestyle=_line(method))
        ends[method] = (steps[-1], means[-1])
    _name_ends(axes, ends)
    return figure


def _line(method: str) -> str:
    """The line style by which a method is told from others of its family."""
    return LINES[family_of(method).methods.index(method)]


def _name_ends(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Names at the right ends of lines, moved apart where they would cover each other, each with a thin line to it."""
    axes.margins(y=0.08)
    axes.figure.draw_without_rendering()
    order = sorted(ends, key=lambda method: ends[method][1])
    heights = [float(axes.transData.transform(ends[method])[1]) for method in order]
    for _ in range(200):  # neighbors push each other apart
        for number in range(len(heights) - 1):
            short = 14 - (heights[number + 1] - heights[number])
            if short > 0:
                heights[number] -= short / 2
                heights[number + 1] += short / 2
    right = max(float(axes.transData.transform(end)[0]) for end in ends.values())
    for method, height in zip(order, heights):
        x, y = axes.transData.transform(ends[method])
        axes.annotate(method, ends[method], ((right - x + 24) * 72 / DPI, (height - y) * 72 / DPI), xycoords="data",
                      textcoords="offset points", va="center", fontsize=10, color=family_of(method).color,
                      annotation_clip=False, zorder=4, path_effects=_halo(),
                      arrowprops={"arrowstyle": "-", "color": "#c4c4cc", "linewidth": 0.7})


# --- costs and settings -----------------------------------------------------------------------------------------------

def costs(name: str, content: dict[str, Any]) -> Figure | None:
    """Bars: time and memory of training, extra time at inference; None where they were not measured."""
    columns = (("core seconds per\n1,000 examples", lambda row: row["core_seconds_per_1000_examples"]["mean"]),
               ("MiB that\ntraining adds", lambda row: _or_nan(row["training_memory_bytes"]["mean"]) / 2**20),
               ("% slower at inference,\nnot merged", lambda row: 100 * _or_nan(row["inference"]["extra"])))
    rows = {method: row for method, row in content["methods"].items() if row["core_seconds_per_1000_examples"]["mean"]}
    if not rows:
        return None
    order = sorted(rows, key=lambda method: -rows[method]["core_seconds_per_1000_examples"]["mean"])
    figure = blank_figure(WIDTH, 1.2 + 0.34 * len(order), layout="constrained")
    figure.suptitle(f"{name}: what a method costs", x=0.01, ha="left", fontsize=12, color=INK)
    for axes, (title, value) in zip(figure.subplots(1, len(columns), sharey=True), columns):
        values = [value(rows[method]) for method in order]
        bars = axes.barh([sized(method, rows[method]["size"]) for method in order], values, height=0.7,
                         color=[family_of(method).color for method in order])
        axes.bar_label(bars, ["not known" if math.isnan(value) else f"{value:.0f}" for value in values], fontsize=9,
                       padding=2)
        axes.set_title(title, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.18)
        axes.tick_params(axis="x", labelsize=8)
    return figure


def _or_nan(value: float | None) -> float:
    """Not a number where a value is not known: then there is no bar."""
    return math.nan if value is None else value


def sensitivity(name: str, content: dict[str, Any], tuned: Rows) -> Figure | None:
    """One small panel for each method: validation score against learning rate, and at the best rate by size."""
    methods = [method for method in content["methods"] if method in tuned]
    if not methods:
        return None
    columns, lines = 4, math.ceil(len(methods) / 4)
    figure = blank_figure(WIDTH, 0.9 + 1.75 * lines, layout="constrained")
    figure.suptitle(f"{name}: validation against learning rate (line) and, at the best rate, size (crosses)",
                    x=0.01, ha="left", fontsize=11, color=INK)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes, method in zip(panels, methods):
        _draw_trials(axes, content, method, tuned[method])
    for axes in panels[len(methods):]:
        axes.axis("off")
    figure.supxlabel("learning rate", fontsize=9)
    by = tuned[methods[0]]["best_by"]
    in_percent = " in %" if metric_of(content).share and by != "loss" else ""
    figure.supylabel(f"validation {by.replace('_', ' ')}{in_percent}", fontsize=9)
    return figure


def _draw_trials(axes: Axes, content: dict[str, Any], method: str, tuned: dict[str, Any]) -> None:
    """A line over the learning rates, and a cross with its number for each other size."""
    trials = [trial for trial in tuned["trials"] if trial["score"] is not None]
    by_loss = tuned["best_by"] == "loss"  # a score by loss is its negative
    points = [(trial["learning_rate"], -trial["score"] if by_loss else in_figures(content, trial["score"]),
               trial["size"]) for trial in trials]
    color = family_of(method).color
    axes.plot([x for x, _, size in points if size is None], [y for _, y, size in points if size is None], "-o",
              color=color, markersize=4)
    for x, y, size in (point for point in points if point[2] is not None):
        axes.plot([x], [y], "x", color=INK, markersize=6)
        left = tuned["default_size"] is not None and size < tuned["default_size"]  # so that two names do not meet
        axes.annotate(f"{size:g}", (x, y), (-5 if left else 5, -3), textcoords="offset points", fontsize=8, color=INK,
                      ha="right" if left else "left", path_effects=_halo())
    title = sized(method, {} if tuned["default_size"] is None else {tuned["size"]: tuned["default_size"]})
    axes.set_xscale("log")
    axes.set_yscale("log" if by_loss else "linear")
    axes.set_title(title, fontsize=9, loc="left", color=color)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.15, y=0.1)
