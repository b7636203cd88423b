"""What a comparison's pictures have in common: axes, names that cover nothing, and how a method is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minipeft.report.families import best_baseline, family_of, in_figures
from minipeft.runs.comparison import metric_of
from minipeft.runs.results import blank_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI, INK, SOFT = 8.0, 100, "#26262b", "#8a8a94"
LINES = ("-", "--", ":")  # of the methods of a family


def quality_axis(content: dict[str, Any]) -> str:
    """What an axis with a dataset's headline is called."""
    metric = metric_of(content)
    return metric.heading + (" in %" if metric.share else "")


def new_axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """A picture of its own, and its only axes, with what they are called."""
    figure = blank_figure(WIDTH, 5.2, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=12, color=INK, parse_math=False)  # a file's name may hold a $
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#ececf0", zorder=0)
    return figure, axes


def draw_baseline(axes: Axes, content: dict[str, Any]) -> None:
    """A line at the best score without training, if it is in reach of the methods'."""
    if best := best_baseline(content):
        axes.axhline(in_figures(content, best[1]), color=SOFT, linewidth=1, linestyle=":", zorder=1,
                     label="best without training")


def name_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
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
                      path_effects=halo())


def halo() -> list[Any]:
    """A white edge, by which a name stays readable where a line passes behind it."""
    from matplotlib.patheffects import withStroke
    return [withStroke(linewidth=3, foreground="white")]


def _shared(a: Sequence[float], b: Sequence[float]) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def line_of(method: str) -> str:
    """The line style by which a method is told from others of its family."""
    return LINES[family_of(method).methods.index(method)]


def name_ends(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
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
                      annotation_clip=False, zorder=4, path_effects=halo(),
                      arrowprops={"arrowstyle": "-", "color": "#c4c4cc", "linewidth": 0.7})
