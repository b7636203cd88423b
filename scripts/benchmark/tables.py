"""benchmark.json for readers: the figures asked for first, and the section on speed in a Markdown page."""

from __future__ import annotations

from typing import Any

from labels import BOTH_TIMES, EQUAL_SIDES, Cells, comparisons, equal_label, rows_of

from minipeft.runs.results import markdown_table, replace_blocks

WRITER = "scripts/benchmark/benchmark.py"  # as the markers of its block in a Markdown file have it
# A top-level key, its row in `training` or `inference`, the figure in it, and which of several lengths or sizes counts.
WORST = (("speedup_vs_peft", "training", "default", "speedup", min),
         ("speedup_vs_peft_matched", "training", "matched", "speedup", min),
         ("speedup_vs_peft_best", "training", "best", "speedup", min),
         ("memory_ratio_vs_peft", "training", "default", "memory_ratio", max),
         ("memory_ratio_vs_peft_matched", "training", "matched", "memory_ratio", max),
         ("generation_speedup", "inference", "generation default", "speedup", min),
         ("generation_speedup_matched", "inference", "generation matched", "speedup", min),
         ("generation_speedup_fp32", "inference", "generation matched 1", "speedup", min))


def benchmark_headline(results: Cells) -> Cells:
    """The figures asked for first, from what was measured on the CPU, else on the GPU; the worse of two lengths.

    Args:
        results: benchmark.json's content, "cpu" and "cuda" each holding the parts measured there.
    """
    column = results.get("cpu") or results.get("cuda") or {}
    found: Cells = {}
    for key, part, row, figure, worst in WORST:
        if values := [cells[figure] for name, cells in column.get(part, {}).items() if name.startswith(row)]:
            found[key] = worst(values)
    if "methods" in column:
        lora = column["methods"]["fp32"]["lora"]
        found |= {"lora_speedup_vs_full": lora["speedup_vs_full"],
                  "lora_memory_ratio_vs_full": lora["memory_ratio_vs_full"]}
    if "limit" in column:
        found["mfu"] = column["limit"]["fp32"]["mfu"]
    if length := column.get("growth", {}).get("length"):
        (_, shortest), *_, (_, longest) = by_number(length)
        found["length_growth"] = round(longest["seconds_per_tflop"] / shortest["seconds_per_tflop"], 3)
    if "start_up" in column:
        found["start_up_seconds"] = column["start_up"]["seconds"]
    return found | _equal_terms(column)


def _equal_terms(column: Cells) -> Cells:
    """Those of the parts on equal terms; with peft the rows that have GPT-2's dropout count."""
    found: Cells = {}
    rows = {name: cells for name, cells in rows_of(column, "same_micro_batches").items() if float(name.split()[2])}
    for key, precision in (("speedup_vs_peft_same_microbatches", "fp32"),
                           ("speedup_vs_peft_same_microbatches_bf16", "bf16")):
        if values := [cells["speedup"] for name, cells in rows.items() if name.startswith(precision)]:
            found[key] = min(values)
    if rows:
        found["memory_vs_peft_same_microbatches"] = max(cells["memory_ratio"] for cells in rows.values())
    if rows := rows_of(column, "mini"):
        found["mini_lora_speedup_vs_full"] = {precision: cells["speedup"] for precision, cells in rows.items()}
    if rows := rows_of(column, "language_model"):
        found |= {"lm_memory_vs_peft": max(cells["memory_ratio"] for cells in rows.values()),
                  "lm_speedup_vs_peft": min(cells["speedup"] for cells in rows.values())}
    return found


# --- the section in a page for readers --------------------------------------------------------------------------------

def write_speed(text: str, results: Cells) -> str:
    """The text of a Markdown file with its block of results on speed made anew.

    Raises:
        OutputError: it has none.
    """
    return replace_blocks(text, WRITER, lambda subject: speed_section(results))


def speed_section(results: Cells) -> str:
    """benchmark.json for readers: its comparisons in Markdown tables, and in words what has nothing beside it.

    What a GPU measured has a table of its own.
    """
    column = results["cpu"]
    parts = [speed_table(column), before_and_after(column), _alone(column)]
    if "cuda" in results:
        parts += [f"On a GPU ({results['cuda']['machine']['gpu']}):", speed_table(results["cuda"])]
    return "\n\n".join(part for part in parts if part)


def _alone(column: Cells) -> str:
    """In words: how near to the machine's limit, how long a start takes, and how the cost of work grows."""
    where = f"{column['machine']['processor']}, {column['machine']['cores']} cores"
    shares = {precision: f"{100 * cells['mfu']:.1f} %" for precision, cells in column["limit"].items()}
    growth = column["growth"]
    most_aside = max(cells["share_aside"] for cells in growth["reviews"].values())

    def from_to(kind: str, figure: str, factor: float = 1) -> str:
        (first, few), *_, (last, many) = by_number(growth[kind])
        return f"from {first} to {last}: {factor * few[figure]:.2f} to {factor * many[figure]:.2f}"

    return f"""\
A LoRA step computes at {shares["fp32"]} of the rate of plain matrix products of its sizes in float32 (MFU), and at
{shares["bf16"]} in bfloat16 ({where}).
From starting Python to the end of the first training step with `mini`: {column["start_up"]["seconds"]:.2f} s.

What a unit of work costs as there is more of it:

- seconds for 10^12 floating-point operations, tokens per text {from_to("length", "seconds_per_tflop")};
- the same, texts per batch {from_to("batch_size", "seconds_per_tflop")};
- milliseconds per review (`mini`), training reviews {from_to("reviews", "seconds_per_review", 1000)}; tokenizing,
  sorting into batches and saving take {100 * most_aside:.2f} % of the time at most."""


def speed_table(column: Cells) -> str:
    """The comparisons of one device in a Markdown table."""
    return markdown_table(
        ["measured: what differs; theirs", "ours", "theirs", "times as fast", "of the memory"],
        [[row.what, f"{row.ours:.2f} {row.unit}", f"{row.theirs:.2f} {row.unit}", f"{row.cells['speedup']:.2f}",
          f"{row.cells['memory_ratio']:.2f}"] for row in comparisons(column)], figures=True)


def before_and_after(column: Cells) -> str:
    """The rows on equal terms before the work on speed and after it, as far as they were measured; or nothing."""
    times = [when for when in BOTH_TIMES if any(rows_of(column, part, when) for part in EQUAL_SIDES)]
    lines = []
    for part in EQUAL_SIDES:
        rows = {when: rows_of(column, part, when) for when in times}
        for name in dict.fromkeys(name for when in reversed(times) for name in rows[when]):
            cells = [rows[when].get(name, {}) for when in times]
            lines.append([equal_label(part, name), *(_shown(cell, figure) for figure in ("speedup", "memory_ratio")
                                                     for cell in cells)])
    if not lines:
        return ""
    header = [f"{figure}, {when}" for figure in ("times as fast", "of the memory") for when in times]
    commits = {when: {column[part][when]["commit"] for part in EQUAL_SIDES if when in column.get(part, {})}
               for when in times}
    said = ", ".join(f"{when}: {' '.join(sorted(commits[when]))}" for when in times)
    return (f"{markdown_table(['as above', *header], lines, figures=True)}\n\nThe commits of the library that were "
            f"measured, {said}.")


def _shown(cells: Cells, figure: str) -> str:
    return f"{cells[figure]:.2f}" if cells else ""


def by_number(rows: Cells) -> list[tuple[str, Any]]:
    """The rows of a growth table in order: a JSON file's keys are sorted as words, 1024 before 128."""
    return sorted(rows.items(), key=lambda row: int(row[0]))
