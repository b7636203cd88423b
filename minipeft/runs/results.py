"""From results files to tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipeft.errors import ConfigError, OutputError
from minipeft.files import read_json_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Where a table stands in a Markdown file: between a line that names a dataset, several of them or "speed", and an end.
TABLE_START, TABLE_END = "<!-- results on {}: written by scripts/report.py -->", "<!-- end of results -->"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], figures: bool = False) -> str:
    """A table in Markdown; `figures` aligns all columns but the first to the right."""
    rule = ["---", *["---:" if figures else "---"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def blank_figure(width: float, height: float, **more: Any) -> Figure:
    """A matplotlib figure of so many inches, without the state that pyplot keeps.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install 'minipeft[plots]'") from error
    return Figure(figsize=(width, height), **more)


# The figures of each task that a table shows, the first one with its interval: key, heading, factor, unit.
FIGURES = {
    "classification": (("accuracy", "test accuracy", 100, " %"), ("f1", "F1", 100, " %")),
    "tagging": (("f1", "entity F1", 100, " %"), ("precision", "precision", 100, " %"), ("recall", "recall", 100, " %")),
    "summarisation": (("rougeL", "ROUGE-L", 1, ""), ("rouge1", "ROUGE-1", 1, ""), ("rouge2", "ROUGE-2", 1, "")),
    "translation": (("bleu", "BLEU", 1, ""), ("chrf", "chrF", 1, ""))}
BASELINES = {
    "untrained_head": "untrained head", "zero_shot": "zero-shot by prompt", "untrained_base": "base, untrained",
    "most_frequent_tag": "each word's most frequent tag", "lead_1": "first sentence (lead-1)",
    "copy_source": "copy of the source", "word_dictionary": "word-by-word dictionary"}
COUNTED_ON_TRAIN = ("most_frequent_tag", "word_dictionary")  # baselines that need the training examples


def results_table(folder: Path, dataset: str = "imdb") -> str:
    """A Markdown table of every results file about `dataset` in `folder`, baselines first, then from worse to better.

    Raises:
        OutputError: there is none.
    """
    found = _results_on(folder, [dataset])
    figures = _figures(found[0])
    rows = []
    for results in found:
        for name, test, examples in _tests(results):
            parameters = results["parameters"]
            share = f"{parameters['trainable']:,} ({100 * parameters['trainable'] / parameters['total']:.2f} %)"
            train, on_cores = (results["seconds"].get(key) for key in ("train", "train_on_cores"))
            time = f"{on_cores / 60:.1f} core minutes" if on_cores else f"{train / 60:.1f} min" if train else "-"
            values = [f"{test[key] * factor:.2f}{unit}" for key, _, factor, unit in figures]
            key, _, factor, unit = figures[0]
            interval = " to ".join(f"{bound * factor:.2f}" for bound in test.get(f"{key}_95_interval", []))
            rows.append((train is not None, test[key], [
                name, results["base_model"]["name"], share if parameters["trainable"] else "0",
                f"{examples:,}", str(results["training_config"]["epochs"]) if train else "-",
                values[0], f"{interval}{unit}" if interval else "-", *values[1:], time]))
    header = ["method", "base", "trained parameters", f"training {'reviews' if dataset == 'imdb' else 'examples'}",
              "epochs", figures[0][1], "95 % interval", *(heading for _, heading, *_ in figures[1:]), "training time"]
    return markdown_table(header, [row for _, _, row in sorted(rows, key=lambda row: row[:2])])


def _results_on(folder: Path, datasets: Sequence[str]) -> list[dict[str, Any]]:
    """The content of every results file on these datasets, one dataset after the other.

    Raises:
        OutputError: there is none on one of them.
    """
    files = [read_json_file(path) for path in sorted(folder.glob("*_results.json"))]
    found = {dataset: [results for results in files if results["dataset"]["name"] == dataset] for dataset in datasets}
    if missing := [dataset for dataset in datasets if not found[dataset]]:
        raise OutputError(f"{folder} holds no results on {', '.join(missing)}")
    return [results for dataset in datasets for results in found[dataset]]


def _figures(results: dict[str, Any]) -> tuple[tuple[str, str, float, str], ...]:
    """What a table shows of a results file; of a user's own task its headline."""
    headline = results.get("headline", "accuracy")
    return FIGURES.get(results.get("task", "classification"), ((headline, headline, 1, ""),))


def _tests(results: dict[str, Any]) -> list[tuple[str, dict[str, Any], int]]:
    """What a results file tested: names, figures, and from how many training examples."""
    examples = results["dataset"]["sizes"]["train"]
    if results["method"] != "baseline":
        return [(results["method"], results["metrics"]["test"], examples)]
    return [(f"baseline: {BASELINES.get(key, key)}", found, examples if key in COUNTED_ON_TRAIN else 0)
            for key, found in results["metrics"].items()]


def overview_table(folder: Path, datasets: Sequence[str]) -> str:
    """A Markdown table of each method's first figure on each of `datasets`, a column each, and of the baselines'.

    Raises:
        OutputError: there are no results on one of them.
    """
    columns: dict[str, str] = {}
    cells: dict[str, dict[str, str]] = {}
    order = []
    for results in _results_on(folder, datasets):
        key, heading, factor, unit = _figures(results)[0]
        dataset = results["dataset"]["name"]
        columns[dataset] = f"{dataset}: {heading}"
        for name, found, _ in _tests(results):
            cells.setdefault(name, {})[dataset] = f"{found[key] * factor:.2f}{unit}"
            order.append((results["method"] != "baseline", -results["parameters"]["trainable"], name))
    names = list(dict.fromkeys(name for *_, name in sorted(order)))
    return markdown_table(["method", *columns.values()],
                          [[name, *(cells[name].get(dataset, "-") for dataset in columns)] for name in names],
                          figures=True)


def replace_tables(text: str, folder: Path) -> str:
    """`text` with every table between markers made anew from the results in `folder`.

    Raises:
        OutputError: there is no marker, or one without an end.
    """
    start, behind = TABLE_START.split("{}")
    parts = text.split(start)
    if len(parts) == 1:
        raise OutputError(f"there is no {TABLE_START.format('DATASET')} ... {TABLE_END} to write between")
    for number, part in enumerate(parts[1:], start=1):
        named, found, rest = part.partition(behind)
        _, end, after = rest.partition(TABLE_END)
        if not found or not end:
            raise OutputError(f"{start}{part.splitlines()[0]} is not followed by {TABLE_END}")
        datasets = named.split(", ")
        if named == "speed":
            table = speed_section(read_json_file(folder / "benchmark.json"))
        else:
            table = overview_table(folder, datasets) if len(datasets) > 1 else results_table(folder, named)
        parts[number] = f"{named}{behind}\n{table}\n{end}{after}"
    return start.join(parts)


# --- the benchmark ----------------------------------------------------------------------------------------------------

def benchmark_headline(results: dict[str, Any]) -> dict[str, Any]:
    """The figures asked for first, from what was measured on the CPU, else on the GPU; the worse of two lengths.

    Args:
        results: benchmark.json's content, "cpu" and "cuda" each holding the parts measured there.
    """
    column = results.get("cpu") or results.get("cuda") or {}
    found: dict[str, Any] = {}
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


def speed_section(results: dict[str, Any]) -> str:
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

- seconds for 10^12 floating-point operations, tokens a text {from_to("length", "seconds_per_tflop")};
- the same, texts a batch {from_to("batch_size", "seconds_per_tflop")};
- milliseconds a review (`mini`), training reviews {from_to("reviews", "seconds_per_review", 1000)}; tokenising, sorting
  into batches and saving take {100 * most_aside:.2f} % of the time at most."""


def _by_number(rows: dict[str, Any]) -> list[tuple[str, Any]]:
    """The rows of a growth table in order: a JSON file's keys are sorted as words, 1024 before 128."""
    return sorted(rows.items(), key=lambda row: int(row[0]))


def speed_table(results: dict[str, Any]) -> str:
    """The comparisons of benchmark.json in one Markdown table; what no GPU has measured says so."""
    rows = []

    def add(what: str, unit: str, ours: float, theirs: float, ratios: dict[str, Any], *place: str) -> None:
        on_gpu: Any = results.get("cuda", {})
        for key in place:
            on_gpu = on_gpu.get(key, {})
        speedup = on_gpu.get("speedup", on_gpu.get("speedup_vs_full"))
        memory = ratios.get("memory_ratio", ratios.get("memory_ratio_vs_full"))
        rows.append([what, f"{ours:.2f} {unit}", f"{theirs:.2f} {unit}",
                     f"{ratios.get('speedup', ratios.get('speedup_vs_full')):.2f}", f"{memory:.2f}",
                     "not measured" if speedup is None else f"{speedup:.2f} times as fast"])

    column = results["cpu"]
    conditions = {"matched": "float32, the same batches", "default": "each as used by default",
                  "best": "bfloat16, compiled, grouped by length"}
    for name, cells in column["training"].items():
        row, length = name.split()
        add(f"LoRA, {length} tokens, {conditions[row]}; peft", "reviews/s", cells["ours"]["samples_per_second"],
            cells["peft"]["samples_per_second"], cells, "training", name)
    methods = column["methods"]["fp32"]
    for name in (name for name in methods if name != "full"):
        add(f"a step of {name}, float32; of full", "s", methods[name]["seconds"], methods["full"]["seconds"],
            methods[name], "methods", "fp32", name)
    for name, cells in column["inference"].items():
        kind, row, *number = name.split()
        rate, unit = {"classification": ("texts_per_second", "reviews/s"),
                      "generation": ("tokens_per_second", "tokens/s")}[kind]
        what = f"{kind}{''.join(f', {size} at a time' for size in number)}, {conditions[row]}; transformers"
        add(what, unit, cells["ours"][rate], cells["transformers"][rate], cells, "inference", name)
    return markdown_table(["ours; theirs", "ours", "theirs", "times as fast", "of the memory", "on a GPU"], rows,
                          figures=True)


def benchmark_tables(results: dict[str, Any]) -> str:
    """benchmark.json as Markdown; what no GPU has measured says so."""
    return "\n\n".join(f"### {title}\n\n{_benchmark_column(results[device]) if device in results else 'not measured'}"
                       for device, title in (("cpu", "CPU"), ("cuda", "GPU"))) + "\n"


def _benchmark_column(column: dict[str, Any]) -> str:
    machine, model = column["machine"], column["model"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    text = [f"{where}; GPT-2 with {model['parameters'] / 1e6:.0f}M {model['weights']} weights, batches of "
            f"{column['batch_size']} reviews. Median of the turns, in brackets the fastest and the slowest."]
    if rows := column.get("training"):
        lines = [(name, f"{cells['ours']['samples_per_second']:.2f}", f"{cells['peft']['samples_per_second']:.2f}",
                  f"**{cells['speedup']:.2f}**", _spread(cells["ours"]), _spread(cells["peft"]),
                  _gib(cells["ours"]), _gib(cells["peft"]), f"**{cells['memory_ratio']:.2f}**",
                  f"{cells['ours']['mean_loss']:.4f}", f"{cells['peft']['mean_loss']:.4f}")
                 for name, cells in rows.items()]
        text.append(markdown_table(("LoRA training, tokens", "ours, reviews/s", "peft, reviews/s", "times as fast",
                                    "ours, s a turn", "peft, s a turn", "ours, GiB", "peft, GiB", "of its memory",
                                    "our loss", "peft's loss"), lines))
    for precision, rows in column.get("methods", {}).items():
        lines = [(name, _spread(cells), f"{cells.get('speedup_vs_full', 1):.2f}", _gib(cells),
                  f"{cells.get('memory_ratio_vs_full', 1):.2f}", f"{cells['trained_parameters']:,}",
                  f"{cells['optimiser_state_bytes'] / 1e6:.2f}", f"{cells['saved_bytes'] / 1e6:.2f}")
                 for name, cells in sorted(rows.items(), key=lambda item: item[1]["seconds"])]
        text.append(markdown_table((f"one step, {precision}", "seconds", "times as fast as full", "GiB",
                                    "of full's memory", "trained", "optimiser, MB", "file, MB"), lines))
    if rows := column.get("limit"):
        text.append(markdown_table(("LoRA step", "GFLOP/s", "plain matrix products, GFLOP/s", "share (MFU)"),
                                   [(name, f"{cells['achieved_flops'] / 1e9:.0f}",
                                     f"{cells['products_flops'] / 1e9:.0f}", f"**{cells['mfu']:.3f}**")
                                    for name, cells in rows.items()]))
    if rows := column.get("inference"):
        unit = {"classification": "texts_per_second", "generation": "tokens_per_second"}
        lines = []
        for name, cells in rows.items():
            rate = unit[name.split()[0]]
            lines.append((name, f"{cells['ours'][rate]:.1f}", f"{cells['transformers'][rate]:.1f}",
                          f"**{cells['speedup']:.2f}**"))
        text.append(markdown_table(("inference", "ours, texts or tokens/s", "transformers", "times as fast"), lines))
    growth = column.get("growth", {})
    for kind, title in (("length", "LoRA step of 4 texts, tokens"), ("batch_size", "LoRA step of 128 tokens, texts")):
        if rows := growth.get(kind):
            text.append(markdown_table((title, "seconds", "seconds per TFLOP", "GiB"),
                                       [(name, f"{cells['seconds']:.3f}", f"{cells['seconds_per_tflop']:.2f}",
                                         _gib(cells)) for name, cells in _by_number(rows)]))
    if rows := growth.get("reviews"):
        aside = ("tokenising", "bucketing", "saving")
        text.append(markdown_table(
            ("LoRA on mini, reviews", "seconds", "milliseconds a review", *(f"{key}, s" for key in aside),
             "share of the three", "GiB"),
            [(name, f"{cells['seconds']:.2f}", f"{1000 * cells['seconds_per_review']:.2f}",
              *(f"{cells[key]:.3f}" for key in aside), f"{100 * cells['share_aside']:.2f} %", _gib(cells))
             for name, cells in _by_number(rows)]))
    if "start_up" in column:
        text.append(f"From starting Python to the end of the first training step (mini): "
                    f"{column['start_up']['seconds']:.2f} s.")
    return "\n\n".join(text)


def _spread(cells: dict[str, Any]) -> str:
    return f"{cells['seconds']:.3f} ({cells['seconds_low']:.3f} to {cells['seconds_high']:.3f})"


def _gib(cells: dict[str, Any]) -> str:
    return f"{cells['peak_memory_bytes'] / 2**30:.2f}"


def draw_benchmark(results: dict[str, Any], path: str | Path) -> None:
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
        names = list(rows)
        for axis, title, value in (
                (speed, f"reviews a second, {device}", lambda cells: cells["samples_per_second"]),
                (memory, f"peak memory in GiB, {device}", lambda cells: cells["peak_memory_bytes"] / 2**30)):
            for offset, side, colour in ((-0.2, "ours", "#d9822b"), (0.2, "peft", "#9aa5b1")):
                heights = [value(rows[name][side]) for name in names]
                bars = axis.bar([i + offset for i in range(len(names))], heights, 0.38, color=colour,
                                label={"ours": "minipeft", "peft": "transformers + peft"}[side])
                axis.bar_label(bars, fmt="%.1f", fontsize=9)
            axis.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
            axis.set_title(title)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
