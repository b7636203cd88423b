"""benchmark.md: every figure of benchmark.json in tables."""

from __future__ import annotations

import itertools

from aims import aims_table
from labels import BOTH_TIMES, EQUAL_SIDES, FORMATS, RATES, Cells, equal_label, inference_label, rows_of, training_label
from tables import by_number

from minipeft.runs.results import markdown_table

# What a run does beside arithmetic: benchmark.json's word for it, and the tables'.
ASIDE = {"tokenising": "tokenizing", "bucketing": "bucketing", "saving": "saving"}
NOTES = "benchmark_notes.md"  # beside the page, written by hand
SHOWN = 12  # operators of a profile, the longest ones before and after


def benchmark_tables(results: Cells) -> str:
    """benchmark.json as Markdown, a section for each device that was measured, and where the notes are."""
    sections = [f"### {title}\n\n{_column(results[device])}" for device, title in (("cpu", "CPU"), ("cuda", "GPU"))
                if device in results]
    aims = [f"### Bars\n\n{table}"] if (table := aims_table(results)) else []
    return "\n\n".join([*aims, *sections, f"What was tried and did not pay: [notes]({NOTES})."]) + "\n"


def _column(column: Cells) -> str:
    """What was measured on one device."""
    machine, model = column["machine"], column["model"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    text = [f"{where}; GPT-2 with {model['parameters'] / 1e6:.0f}M {model['weights']} weights, batches of "
            f"{column['batch_size']} reviews. Median of the turns, in brackets the fastest and the slowest. After a "
            "colon: what differs between the sides, and what is made equal."]
    if rows := column.get("training"):
        text.append(_peft_table("LoRA on `c_attn`", {training_label(name): cells for name, cells in rows.items()}))
    text += _equal_tables(column)
    text += [_methods_table(precision, rows) for precision, rows in column.get("methods", {}).items()]
    if rows := column.get("limit"):
        text.append(_limit_table(rows))
    if rows := column.get("inference"):
        text.append(_inference_table(rows))
    text += _growth_tables(column.get("growth", {}))
    if "start_up" in column:
        text.append(f"From starting Python to the end of the first training step (mini): "
                    f"{column['start_up']['seconds']:.2f} s.")
    return "\n\n".join([*text, *_profile_tables(column)])


def _peft_table(title: str, rows: Cells) -> str:
    lines = [(name, f"{cells['ours']['samples_per_second']:.2f}", f"{cells['peft']['samples_per_second']:.2f}",
              f"**{cells['speedup']:.2f}**", _spread(cells["ours"]), _spread(cells["peft"]), _gib(cells["ours"]),
              _gib(cells["peft"]), f"**{cells['memory_ratio']:.2f}**", f"{cells['ours']['mean_loss']:.4f}",
              f"{cells['peft']['mean_loss']:.4f}") for name, cells in rows.items()]
    return markdown_table((title, "ours, reviews/s", "peft, reviews/s", "times as fast", "ours, s per turn",
                           "peft, s per turn", "ours, GiB", "peft, GiB", "of its memory", "our loss", "peft's loss"),
                          lines)


def _equal_tables(column: Cells) -> list[str]:
    """The rows on equal terms, before and after the work on speed."""
    tables = []
    for part, when in itertools.product(EQUAL_SIDES, BOTH_TIMES):
        if rows := rows_of(column, part, when):
            title = f"{when} the work on speed ({column[part][when]['commit']})"
            labelled = {equal_label(part, name): cells for name, cells in rows.items()}
            tables.append(_mini_table(title, labelled) if part == "mini" else _peft_table(title, labelled))
    return tables


def _mini_table(title: str, rows: Cells) -> str:
    lines = [(name, _spread(cells["lora"]), _spread(cells["full"]), f"**{cells['speedup']:.2f}**", _gib(cells["lora"]),
              _gib(cells["full"]), f"**{cells['memory_ratio']:.2f}**") for name, cells in rows.items()]
    steps = {cells["steps"] for cells in rows.values()}
    return markdown_table((title, f"lora, s per {max(steps)} steps", "full", "times as fast", "lora, GiB", "full, GiB",
                           "of its memory"), lines)


def _profile_tables(column: Cells) -> list[str]:
    """Where a LoRA step's time goes, before and after: the longest operators of either, then what is copied and cast.

    An operator that takes next to nothing is not kept: it has a dash.
    """
    times = [when for when in BOTH_TIMES if rows_of(column, "profile", when)]
    tables = []
    for name in dict.fromkeys(name for when in times for name in rows_of(column, "profile", when)):
        steps = {when: rows_of(column, "profile", when)[name] for when in times
                 if name in rows_of(column, "profile", when)}
        operators = {when: {row["name"]: row for row in step["operators"]} for when, step in steps.items()}
        shown = dict.fromkeys(row["name"] for step in steps.values() for row in step["operators"][:SHOWN])
        lines = [(f"`{operator}`", *(cell for when in steps for cell in _operator(operators[when].get(operator))))
                 for operator in shown]
        lines += [(f"{what} in all", *(cell for step in steps.values() for cell in
                                    (f"{step[what]['calls']:,}", f"{step[what]['seconds']:.3f}", "")))
                  for what in ("copies", "casts")]  # casts are copies, too
        lines.append(("all operators", *(cell for step in steps.values() for cell in
                                         ("", f"{step['self_seconds']:.3f}", "100.0 %"))))
        base, precision = name.split()
        step = next(iter(steps.values()))
        tables.append(markdown_table((f"profile of a LoRA step, {base}, {FORMATS[precision]}, {step['texts']} texts of "
                                      f"{step['tokens']} tokens", *(f"{what} {when}" for when in steps for what in
                                                                    ("calls", "seconds", "share"))), lines))
    return tables


def _operator(row: Cells | None) -> tuple[str, str, str]:
    return (f"{row['calls']:,}", f"{row['seconds']:.3f}", f"{100 * row['share']:.1f} %") if row else ("-", "-", "-")


def _methods_table(precision: str, rows: Cells) -> str:
    lines = [(name, _spread(cells), f"{cells.get('speedup_vs_full', 1):.2f}", _gib(cells),
              f"{cells.get('memory_ratio_vs_full', 1):.2f}", f"{cells['trained_parameters']:,}",
              f"{cells['optimiser_state_bytes'] / 1e6:.2f}", f"{cells['saved_bytes'] / 1e6:.2f}")
             for name, cells in sorted(rows.items(), key=lambda item: item[1]["seconds"])]
    return markdown_table((f"one step, {precision}", "seconds", "times as fast as full", "GiB", "of full's memory",
                           "trained", "optimizer, MB", "file, MB"), lines)


def _limit_table(rows: Cells) -> str:
    return markdown_table(("LoRA step", "GFLOP/s", "plain matrix products, GFLOP/s", "share of the fastest (MFU)"),
                          [(name, f"{cells['achieved_flops'] / 1e9:.0f}", _products(cells), f"**{cells['mfu']:.3f}**")
                           for name, cells in rows.items()])


def _products(cells: Cells) -> str:
    """The rate of plain products, by each of the libraries that torch has."""
    rates = cells.get("products_flops_by", {"torch": cells["products_flops"]})
    return ", ".join(f"{by}: {rate / 1e9:.0f}" for by, rate in rates.items())


def _inference_table(rows: Cells) -> str:
    lines = []
    for name, cells in rows.items():
        rate, _ = RATES[name.split()[0]]
        lines.append((inference_label(name), f"{cells['ours'][rate]:.1f}", f"{cells['transformers'][rate]:.1f}",
                      f"**{cells['speedup']:.2f}**"))
    return markdown_table(("inference", "ours, texts or tokens/s", "transformers", "times as fast"), lines)


def _growth_tables(growth: Cells) -> list[str]:
    tables = []
    for kind, title in (("length", "LoRA step of 4 texts, tokens"), ("batch_size", "LoRA step of 128 tokens, texts")):
        if rows := growth.get(kind):
            tables.append(markdown_table((title, "seconds", "seconds per TFLOP", "GiB"),
                                         [(name, f"{cells['seconds']:.3f}", f"{cells['seconds_per_tflop']:.2f}",
                                           _gib(cells)) for name, cells in by_number(rows)]))
    if rows := growth.get("reviews"):
        tables.append(markdown_table(
            ("LoRA on mini, reviews", "seconds", "milliseconds per review", *(f"{word}, s" for word in ASIDE.values()),
             "share of the three", "GiB"),
            [(name, f"{cells['seconds']:.2f}", f"{1000 * cells['seconds_per_review']:.2f}",
              *(f"{cells[key]:.3f}" for key in ASIDE), f"{100 * cells['share_aside']:.2f} %", _gib(cells))
             for name, cells in by_number(rows)]))
    return tables


def _spread(cells: Cells) -> str:
    return f"{cells['seconds']:.3f} ({cells['seconds_low']:.3f} to {cells['seconds_high']:.3f})"


def _gib(cells: Cells) -> str:
    return f"{cells['peak_memory_bytes'] / 2**30:.2f}"
