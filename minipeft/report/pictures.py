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
from minipeft.report.drawing import (
    DPI,
    INK,
    SOFT,
    WIDTH,
    draw_baseline,
    line_of,
    name_ends,
    name_points,
    new_axes,
    quality_axis,
)
from minipeft.report.families import (
    FAMILIES,
    SIZES_SHOWN,
    Cost,
    family_of,
    forgotten_of,
    in_figures,
    main_of,
    memory_of,
    picture_of,
    seconds_of,
    sized,
)
from minipeft.runs.comparison import metric_of
from minipeft.runs.results import blank_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = dict[str, dict[str, Any]]


def draw_comparison(comparison: dict[str, Any], tuning: dict[str, Any], folder: Path) -> list[str]:
    """Draw what there is of each dataset into `folder`. Pictures that an earlier comparison left there, and this one
    has not, are deleted.

    Returns:
        The pictures' names, without endings.

    Raises:
        ConfigError: matplotlib is not installed.
        OutputError: the folder cannot be written.
    """
    datasets, figures = comparison["datasets"], {}
    for name in sorted(datasets, key=lambda name: name != main_of(datasets)):
        drawn = pictures_of(name, datasets[name], tuning["datasets"].get(name, {}).get("methods", {}))
        figures |= {picture_of(kind, name, datasets): figure for kind, figure in drawn.items() if figure is not None}
    with replacing_folder(folder) as temporary, _same_each_time():
        for name, figure in figures.items():
            figure.savefig(temporary / f"{name}.png", dpi=DPI, facecolor="white")
            figure.savefig(temporary / f"{name}.svg", facecolor="white", metadata={"Date": None})
    for path in (path for kind in ("png", "svg") for path in folder.glob(f"*.{kind}") if path.stem not in figures):
        path.unlink()
    return list(figures)


def pictures_of(name: str, content: dict[str, Any], tuned: Rows) -> dict[str, Figure | None]:
    """A dataset's pictures by kind; of one method alone, none."""
    if len(content["methods"]) < 2:
        return {}
    return {"parameters": parameters(name, content), "forgetting": forgetting(name, content),
            "few_examples": few_examples(name, content), "curves": curves(name, content),
            "costs": costs(name, content), "tuning": rates(name, content, tuned), "sizes": sizes(name, content, tuned)}


def _same_each_time() -> AbstractContextManager[None]:
    """Within it the parts of an SVG have the same names whenever it is drawn."""
    from matplotlib import rc_context
    return rc_context({"svg.hashsalt": "minipeft"})


# --- quality beside something -----------------------------------------------------------------------------------------

def parameters(name: str, content: dict[str, Any]) -> Figure:
    """Quality against trained parameters, with each seed's, and the methods that no other one's mean beats in both."""
    figure, axes = new_axes(f"{name}: quality and trained parameters", "trained parameters", quality_axis(content))
    axes.set_xscale("log")
    points = _scatter(axes, content, lambda row: row["trained_parameters"])
    for method, row in content["methods"].items():
        scores = [in_figures(content, score) for score in row["scores"]]
        axes.scatter([row["trained_parameters"]] * len(scores), scores, 26, family_of(method).color, "_", zorder=3)
    axes.scatter([], [], 26, SOFT, "_", label="a seed")
    front, best = [], -math.inf
    for x, y, _ in sorted(points):
        if y > best:
            front.append((x, y))
            best = y
    for method, row in content["best"].items():
        axes.plot([row["trained_parameters"]], [in_figures(content, row["mean"])], family_of(method).marker,
                  color=family_of(method).color, markersize=9, fillstyle="none", zorder=3)
    axes.plot(*zip(*front), color=SOFT, linewidth=1, linestyle="--", zorder=1, label="highest mean so far")
    draw_baseline(axes, content)
    _finish(axes, points)
    return figure


def forgetting(name: str, content: dict[str, Any]) -> Figure:
    """Quality against what the base has forgotten of its own language modelling, with deviations over seeds."""
    figure, axes = new_axes(f"{name}: quality and forgetting", "forgotten, in nats per token of held-out text",
                            quality_axis(content))
    axes.axvline(0, color=SOFT, linewidth=1, zorder=1)
    for method, row in content["methods"].items():
        lost = forgotten_of(row)
        axes.errorbar([lost.mean], [in_figures(content, row["mean"])], xerr=lost.deviation, linewidth=1.4, alpha=0.6,
                      color=family_of(method).color, zorder=2)
    axes.scatter([], [], 144, SOFT, "_", label="one standard deviation over seeds")
    _finish(axes, _scatter(axes, content, lambda row: row["forgetting"]["nats"]))
    return figure


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


def _finish(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Names at the points, and a legend of the families that are there."""
    from matplotlib.lines import Line2D
    axes.margins(x=0.12, y=0.14)
    handles = [Line2D([], [], marker=family.marker, color=family.color, linestyle="", label=family.name)
               for family in FAMILIES if any(name in family.methods for _, _, name in points)]
    handles += [line for line in (*axes.get_lines(), *axes.collections) if not line.get_label().startswith("_")]
    if any(len(line.get_xdata()) == 2 and line.get_label().startswith("_") for line in axes.get_lines()):
        handles.append(Line2D([], [], marker="|", markersize=12, color=SOFT, linestyle="", label="95 % interval"))
    if any(line.get_fillstyle() == "none" for line in axes.get_lines()):
        handles.append(Line2D([], [], marker="o", markersize=9, color=SOFT, linestyle="", fillstyle="none",
                              label="without the budget"))
    axes.figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    name_points(axes, points)


# --- lines ------------------------------------------------------------------------------------------------------------

def few_examples(name: str, content: dict[str, Any]) -> Figure | None:
    """Quality against the number of training examples, methods moved a little apart."""
    if not content["few_examples"]:
        return None
    figure, axes = new_axes(f"{name}: quality and number of training examples", "training examples",
                            quality_axis(content))
    axes.set_xscale("log", base=2)
    ends, several = {}, content["few_examples"]
    for number, (method, rows) in enumerate(several.items()):
        moved = 2 ** (0.09 * (number - (len(several) - 1) / 2))
        places = [row["train_size"] * moved for row in rows]
        means = [in_figures(content, row["mean"]) for row in rows]
        family = family_of(method)
        axes.errorbar(places, means, [in_figures(content, row["deviation"] or 0.0) for row in rows], color=family.color,
                      marker=family.marker, markersize=5, linestyle=line_of(method), elinewidth=1.2, capsize=2)
        ends[method] = (places[-1], means[-1])
    counts = sorted({row["train_size"] for rows in several.values() for row in rows})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    name_ends(axes, ends)
    draw_baseline(axes, content)
    axes.scatter([], [], 144, SOFT, "|", label="one standard deviation over seeds")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def curves(name: str, content: dict[str, Any]) -> Figure:
    """Validation loss while training, the mean over seeds."""
    figure, axes = new_axes(f"{name}: loss on validation examples while training (mean over seeds)",
                            "optimizer steps", "validation loss, nats")
    ends = {}
    for method, row in content["methods"].items():
        steps = sorted({point["step"] for curve in row["curves"] for point in curve})
        means = [fmean(found) if (found := [point["validation_loss"] for curve in row["curves"] for point in curve
                                            if point["step"] == step and point["validation_loss"] is not None])
                 else math.nan for step in steps]
        family = family_of(method)
        axes.plot(steps, means, color=family.color, marker=family.marker, markersize=4, linewidth=1.3,
                  linestyle=line_of(method))
        ends[method] = (steps[-1], means[-1])
    name_ends(axes, ends)
    return figure


# --- costs and settings -----------------------------------------------------------------------------------------------

def costs(name: str, content: dict[str, Any]) -> Figure | None:
    """Bars: time and memory of training, with deviations over turns, extra time at inference, apart and merged; None
    where they were not measured."""
    columns = (("core seconds per\n1,000 examples", seconds_of, 1, "not known"),
               ("MiB that\ntraining adds", memory_of, 2**20, "not known"),
               ("% slower at inference,\nnot merged", lambda row: _share(row["inference"]["extra"]), 0.01, "not known"),
               ("% slower at inference,\nmerged", lambda row: _share(row["inference"]["extra_merged"]), 0.01,
                "cannot merge"))
    rows = {method: row for method, row in content["methods"].items() if seconds_of(row)}
    if not rows:
        return None
    order = sorted(rows, key=lambda method: -seconds_of(rows[method]).mean)
    figure = blank_figure(WIDTH, 1.2 + 0.34 * len(order), layout="constrained")
    figure.suptitle(f"{name}: what a method costs", x=0.01, ha="left", fontsize=12, color=INK, parse_math=False)
    panels = figure.subplots(1, len(columns), sharey=True)
    panels[3].sharex(panels[2])
    for axes, (title, of, one, none) in zip(panels, columns):
        known = [of(rows[method]) for method in order]
        bars = axes.barh([sized(method, rows[method]["size"]) for method in order],
                         [cost.mean / one if cost else 0.0 for cost in known], height=0.7,
                         xerr=[cost.deviation / one if cost and cost.deviation else math.nan for cost in known],
                         color=[family_of(method).color for method in order], error_kw={"ecolor": INK, "elinewidth": 1})
        axes.bar_label(bars, [f"{round(cost.mean / one):,}" if cost else none for cost in known], fontsize=9, padding=3)
        axes.set_title(title, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.18)
        axes.tick_params(axis="x", labelsize=8)
    return figure


def _share(value: float | None) -> Cost | None:
    return None if value is None else Cost(value, 0.0)


def rates(name: str, content: dict[str, Any], tuned: Rows) -> Figure | None:
    """One small panel for each method: validation score against learning rate."""
    return _panels(f"{name}: validation against learning rate, of the default size", "learning rate", content, {
        method: (row, [(trial["learning_rate"], trial) for trial in row["trials"] if trial["size"] is None])
        for method, row in tuned.items()})


def sizes(name: str, content: dict[str, Any], tuned: Rows) -> Figure | None:
    """One small panel for each method that has a size: validation score against it, at the best rate."""
    found = {}
    for method, row in tuned.items():
        at_rates = [trial for trial in row["trials"] if trial["size"] is None and trial["score"] is not None]
        others = [(trial["size"], trial) for trial in row["trials"] if trial["size"] is not None]
        if others and at_rates:
            best = max(at_rates, key=lambda trial: trial["score"])
            found[method] = (row, sorted([(row["default_size"], best), *others], key=lambda point: point[0]))
    return _panels(f"{name}: validation against size, at the best learning rate", "size",
                   content, found)


def _panels(title: str, x: str, content: dict[str, Any],
            points: dict[str, tuple[dict[str, Any], list[tuple[float, dict[str, Any]]]]]) -> Figure | None:
    """A panel for each method of what was tuned, with its trials by some number."""
    methods = [method for method in content["methods"] if method in points]
    if not methods:
        return None
    columns, lines = 4, math.ceil(len(methods) / 4)
    figure = blank_figure(WIDTH, 0.9 + 1.75 * lines, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, parse_math=False)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes, method in zip(panels, methods):
        row, trials = points[method]
        _draw_trials(axes, content, method, row, trials)
    for axes in panels[len(methods):]:
        axes.axis("off")
    figure.supxlabel(x, fontsize=9)
    by = points[methods[0]][0]["best_by"]
    in_percent = " in %" if metric_of(content).share and by != "loss" else ""
    figure.supylabel(f"validation {by.replace('_', ' ')}{in_percent}", fontsize=9)
    return figure


def _draw_trials(axes: Axes, content: dict[str, Any], method: str, tuned: dict[str, Any],
                 trials: Sequence[tuple[float, dict[str, Any]]]) -> None:
    """A line over a method's trials."""
    from matplotlib.ticker import NullLocator
    by_loss, family = tuned["best_by"] == "loss", family_of(method)  # a score by loss is its negative
    known = [(x, -trial["score"] if by_loss else in_figures(content, trial["score"])) for x, trial in trials
             if trial["score"] is not None]
    axes.plot(*zip(*known), color=family.color, marker=family.marker, markersize=4) if known else None
    axes.set_xscale("log")
    axes.set_yscale("log" if by_loss else "linear")
    if all(trial["size"] is None for _, trial in trials):
        axes.set_title(sized(method, {} if tuned["default_size"] is None else {tuned["size"]: tuned["default_size"]}),
                       fontsize=9, loc="left", color=family.color)
    else:
        axes.set_title(f"{method}: {SIZES_SHOWN[tuned['size']].format(0).strip('0 ')}", fontsize=9, loc="left",
                       color=family.color)
        axes.set_xticks([x for x, _ in trials], [f"{x:g}" for x, _ in trials])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.15, y=0.1)
