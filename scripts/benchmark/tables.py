"""benchmark.json for readers: the figures asked for first, tables in Markdown, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minipeft.runs.results import blank_figure, markdown_table, replace_blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cells = dict[str, Any]
WRITER = "scripts/benchmark/benchmark.py"  # as the markers of its block in a Markdown file have it
CONDITIONS = {"matched": "float32, the same batches", "default": "each as used by default",
              "best": "bfloat16, compiled, grouped by length"}
# What a run does beside arithmetic: benchmark.json's word for it, and the tables'.
ASIDE = {"tokenising": "tokenizing", "bucketing": "bucketing", "saving": "saving"}
COLORS = {"ours": "#d9822b", "peft": "#9aa5b1"}


def benchmark_headline(results: Cells) -> Cells:
    """The figures asked for first, from what was measured on the CPU, else on the GPU; the worse of two lengths.

    Args:
        results: benchmark.json's content, "cpu" and "cuda" each holding the parts measured there.
    """
    column = results.get("cpu") or results.get("cuda") or {}
    found: Cells = {}
    rows = column.get("training", {})
    for key, row, figure, worst in (("speedup_vs_peft", "default", "speedup", min),
                                    ("speedup_vs_peft_matched", "matched", "speedup", min),
                                    ("speedup_vs_peft_best", "best", "speedup", min),
                                    ("memory_ratio_vs_peft", "default", "memory_ratio", max),
                                    ("memory_ratio_vs_peft_matched", "matched", "memory_ratio", max)):
        if values := [cells[figure] for name, cells in rows.items() if name.startswith(row)]:
            found[key] = worst(values)
    if "methods" in column:
        lora = column["methods"]["fp32"]["lora"]
        found |= {"lora_speedup_vs_full": lora["speedup_vs_full"],
                  "lora_memory_ratio_vs_full": lora["memory_ratio_vs_full"]}
    if "limit" in column:
        found["mfu"] = column["limit"]["fp32"]["mfu"]
    for key, row in (("generation_speedup", "default"), ("generation_speedup_matched", "matched")):
        if values := [cells["speedup"] for name, cells in column.get("inference", {}).items()
                      if name.startswith(f"generation {row}")]:
            found[key] = min(values)
    if "start_up" in column:
        found["start_up_seconds"] = column["start_up"]["seconds"]
    return found


# --- the section in a page for readers --------------------------------------------------------------------------------

def write_speed(text: str, results: Cells) -> str:
    """The text of a Markdown file with its block of results on speed made anew.

    Raises:
        OutputError: it has none.
    """
    return replace_blocks(text, WRITER, lambda subject: speed_section(results))


def speed_section(results: Cells) -> str:
    """benchmark.json for readers: its comparisons in one Markdown table, and in words what has nothing beside it."""
    column = results["cpu"]
    where = f"{column['machine']['processor']}, {column['machine']['cores']} cores"
    shares = {precision: f"{100 * cells['mfu']:.1f} %" for precision, cells in column["limit"].items()}
    growth = column["growth"]
    most_aside = max(cells["share_aside"] for cells in growth["reviews"].values())

    def from_to(kind: str, figure: str, factor: float = 1) -> str:
        (first, few), *_, (last, many) = _by_number(growth[kind])
        return f"from {first} to {last}: {factor * few[figure]:.2f} to {factor * many[figure]:.2f}"

    return f"""{speed_table(results)}

A LoRA step computes at {shares["fp32"]} of the rate of plain matrix products of its sizes in float32 (MFU), and at
{shares["bf16"]} in bfloat16 ({where}).
From starting Python to the end of the first training step with `mini`: {column["start_up"]["seconds"]:.2f} s.

What a unit of work costs as there is more of it:

- seconds for 10^12 floating-point operations, tokens per text {from_to("length", "seconds_per_tflop")};
- the same, texts per batch {from_to("batch_size", "seconds_per_tflop")};
- milliseconds per review (`mini`), training reviews {from_to("reviews", "seconds_per_review", 1000)}; tokenizing,
  sorting into batches and saving take {100 * most_aside:.2f} % of the time at most."""


def speed_table(results: Cells) -> str:
    """The comparisons of benchmark.json in one Markdown table; what no GPU has measured says so."""
    rows = []
    for row in _comparisons(results["cpu"]):
        on_gpu: Any = results.get("cuda", {})
        for key in row.place:
            on_gpu = on_gpu.get(key, {})
        speedup = _ratio(on_gpu, "speedup")
        rows.append([row.what, f"{row.ours:.2f} {row.unit}", f"{row.theirs:.2f} {row.unit}",
                     f"{_ratio(row.cells, 'speedup'):.2f}", f"{_ratio(row.cells, 'memory_ratio'):.2f}",
                     "not measured" if speedup is None else f"{speedup:.2f} times as fast"])
    return markdown_table(["ours; theirs", "ours", "theirs", "times as fast", "of the memory", "on a GPU"], rows,
                          figures=True)


class Comparison(NamedTuple):
    """A row of the table on speed. `place` is where its cells are in what was measured on a device."""

    what: str
    unit: str
    ours: float
    theirs: float
    cells: Cells
    place: tuple[str, ...]


def _comparisons(column: Cells) -> Iterator[Comparison]:
    """All that was measured against something else."""
    for name, cells in column["training"].items():
        row, length = name.split()
        yield Comparison(f"LoRA, {length} tokens, {CONDITIONS[row]}; peft", "reviews/s",
                         cells["ours"]["samples_per_second"], cells["peft"]["samples_per_second"], cells,
                         ("training", name))
    methods = column["methods"]["fp32"]
    for name, cells in methods.items():
        if name != "full":
            yield Comparison(f"a step of {name}, float32; of full", "s", cells["seconds"],
                             methods["full"]["seconds"], cells, ("methods", "fp32", name))
    for name, cells in column["inference"].items():
        kind, row, *number = name.split()
        rate, unit = {"classification": ("texts_per_second", "reviews/s"),
                      "generation": ("tokens_per_second", "tokens/s")}[kind]
        at_a_time = "".join(f", {size} at a time" for size in number)
        yield Comparison(f"{kind}{at_a_time}, {CONDITIONS[row]}; transformers", unit, cells["ours"][rate],
                         cells["transformers"][rate], cells, ("inference", name))


def _ratio(cells: Cells, name: str) -> float | None:
    """Ours against theirs, or a method against full fine-tuning; None where it was not measured."""
    return cells.get(name, cells.get(f"{name}_vs_full"))


def _by_number(rows: Cells) -> list[tuple[str, Any]]:
    """The rows of a growth table in order: a JSON file's keys are sorted as words, 1024 before 128."""
    return sorted(rows.items(), key=lambda row: int(row[0]))


# --- benchmark.md: every figure ---------------------------------------------------------------------------------------

def benchmark_tables(results: Cells) -> str:
    """benchmark.json as Markdown; what no GPU has measured says so."""
    return "\n\n".join(f"### {title}\n\n{_column(results[device]) if device in results else 'not measured'}"
                       for device, title in (("cpu", "CPU"), ("cuda", "GPU"))) + "\n"


def _column(column: Cells) -> str:
    """What was measured on one device."""
    machine, model = column["machine"], column["model"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    text = [f"{where}; GPT-2 with {model['parameters'] / 1e6:.0f}M {model['weights']} weights, batches of "
            f"{column['batch_size']} reviews. Median of the turns, in brackets the fastest and the slowest."]
    if rows := column.get("training"):
        text.append(_training_table(rows))
    text += [_methods_table(precision, rows) for precision, rows in column.get("methods", {}).items()]
    if rows := column.get("limit"):
        text.append(_limit_table(rows))
    if rows := column.get("inference"):
        text.append(_inference_table(rows))
    text += _growth_tables(column.get("growth", {}))
    if "start_up" in column:
        text.append(f"From starting Python to the end of the first training step (mini): "
                    f"{column['start_up']['seconds']:.2f} s.")
    return "\n\n".join(text)


def _training_table(rows: Cells) -> str:
    lines = [(name, f"{cells['ours']['samples_per_second']:.2f}", f"{cells['peft']['samples_per_second']:.2f}",
              f"**{cells['speedup']:.2f}**", _spread(cells["ours"]), _spread(cells["peft"]), _gib(cells["ours"]),
              _gib(cells["peft"]), f"**{cells['memory_ratio']:.2f}**", f"{cells['ours']['mean_loss']:.4f}",
              f"{cells['peft']['mean_loss']:.4f}") for name, cells in rows.items()]
    return markdown_table(("LoRA training, tokens", "ours, reviews/s", "peft, reviews/s", "times as fast",
                           "ours, s per turn", "peft, s per turn", "ours, GiB", "peft, GiB", "of its memory",
                           "our loss", "peft's loss"), lines)


def _methods_table(precision: str, rows: Cells) -> str:
    lines = [(name, _spread(cells), f"{cells.get('speedup_vs_full', 1):.2f}", _gib(cells),
              f"{cells.get('memory_ratio_vs_full', 1):.2f}", f"{cells['trained_parameters']:,}",
              f"{cells['optimiser_state_bytes'] / 1e6:.2f}", f"{cells['saved_bytes'] / 1e6:.2f}")
             for name, cells in sorted(rows.items(), key=lambda item: item[1]["seconds"])]
    return markdown_table((f"one step, {precision}", "seconds", "times as fast as full", "GiB", "of full's memory",
                           "trained", "optimizer, MB", "file, MB"), lines)


def _limit_table(rows: Cells) -> str:
    return markdown_table(("LoRA step", "GFLOP/s", "plain matrix products, GFLOP/s", "share (MFU)"),
                          [(name, f"{cells['achieved_flops'] / 1e9:.0f}", f"{cells['products_flops'] / 1e9:.0f}",
                            f"**{cells['mfu']:.3f}**") for name, cells in rows.items()])


def _inference_table(rows: Cells) -> str:
    unit = {"classification": "texts_per_second", "generation": "tokens_per_second"}
    lines = []
    for name, cells in rows.items():
        rate = unit[name.split()[0]]
        lines.append((name, f"{cells['ours'][rate]:.1f}", f"{cells['transformers'][rate]:.1f}",
                      f"**{cells['speedup']:.2f}**"))
    return markdown_table(("inference", "ours, texts or tokens/s", "transformers", "times as fast"), lines)


def _growth_tables(growth: Cells) -> list[str]:
    tables = []
    for kind, title in (("length", "LoRA step of 4 texts, tokens"), ("batch_size", "LoRA step of 128 tokens, texts")):
        if rows := growth.get(kind):
            tables.append(markdown_table((title, "seconds", "seconds per TFLOP", "GiB"),
                                         [(name, f"{cells['seconds']:.3f}", f"{cells['seconds_per_tflop']:.2f}",
                                           _gib(cells)) for name, cells in _by_number(rows)]))
    if rows := growth.get("reviews"):
        tables.append(markdown_table(
            ("LoRA on mini, reviews", "seconds", "milliseconds per review", *(f"{word}, s" for word in ASIDE.values()),
             "share of the three", "GiB"),
            [(name, f"{cells['seconds']:.2f}", f"{1000 * cells['seconds_per_review']:.2f}",
              *(f"{cells[key]:.3f}" for key in ASIDE), f"{100 * cells['share_aside']:.2f} %", _gib(cells))
             for name, cells in _by_number(rows)]))
    return tables


def _spread(cells: Cells) -> str:
    return f"{cells['seconds']:.3f} ({cells['seconds_low']:.3f} to {cells['seconds_high']:.3f})"


def _gib(cells: Cells) -> str:
    return f"{cells['peak_memory_bytes'] / 2**30:.2f}"


# --- a picture --------------------------------------------------------------------------------------------------------

def draw_benchmark(results: Cells, path: str | Path) -> None:
    """Bars: reviews per second and memory of ours and of peft's, on each device that was measured.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    columns = [(name, results[name]["training"]) for name in ("cpu", "cuda") if "training" in results.get(name, {})]
    if not columns:
        return
    figure = blank_figure(11, 4.2 * len(columns), layout="constrained")
    axes = figure.subplots(len(columns), 2, squeeze=False)
    for (device, rows), (speed, memory) in zip(columns, axes):
        _draw_bars(speed, f"reviews per second, {device}", rows, lambda cells: cells["samples_per_second"])
        _draw_bars(memory, f"peak memory in GiB, {device}", rows, lambda cells: cells["peak_memory_bytes"] / 2**30)
    figure.savefig(path, dpi=120)


def _draw_bars(axis: Axes, title: str, rows: Cells, value: Callable[[Cells], float]) -> None:
    """Two bars for each row, ours and peft's."""
    for offset, side, label in ((-0.2, "ours", "minipeft"), (0.2, "peft", "transformers + peft")):
        heights = [value(cells[side]) for cells in rows.values()]
        bars = axis.bar([place + offset for place in range(len(rows))], heights, 0.38, color=COLORS[side], label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=9)
    axis.set_xticks(range(len(rows)), [name.replace(" ", "\n") for name in rows])
    axis.set_title(title)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
