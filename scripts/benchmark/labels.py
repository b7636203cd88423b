"""What the rows of benchmark.json compare, in words: what is measured, and what differs between the sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Cells = dict[str, Any]
FORMATS = {"fp32": "float32", "bf16": "bfloat16", "auto": "the default precision"}
TRAINING = {"matched": "float32: same batches, only ours in micro-batches",
            "default": "each as used by default: only ours in bfloat16, in micro-batches and with similar lengths "
                       "together",
            "best": "bfloat16, compiled, similar lengths together: only ours in micro-batches and with frozen weights "
                    "cast once"}
INFERENCE = {"classification matched": "float32: same batches",
             "classification default": "each as used by default: only ours in bfloat16 and with similar lengths "
                                       "together",
             "generation matched": "float32: same batches",
             "generation default": "each as used by default: only ours in bfloat16"}
RATES = {"classification": ("texts_per_second", "reviews/s"), "generation": ("tokens_per_second", "tokens/s")}
BOTH_TIMES = ("before", "after")
# The two sides of each part that is kept before and after the work on speed.
EQUAL_SIDES = {"same_micro_batches": ("ours", "peft"), "language_model": ("ours", "peft"), "mini": ("lora", "full")}


class Comparison(NamedTuple):
    """Something measured against something else: what, by which two sides, in which unit, and all that was found."""

    what: str
    unit: str
    ours: float
    theirs: float
    cells: Cells


def rows_of(column: Cells, part: str, when: str = "after") -> Cells:
    """The rows of a part that is kept twice, as they were before the work on speed or are after it."""
    return column.get(part, {}).get(when, {}).get("rows", {})


def training_label(name: str) -> str:
    """Of a row of `training`, such as "matched 256"."""
    row, length = name.split()
    return f"LoRA, {length} tokens, {TRAINING[row]}"


def equal_label(part: str, name: str) -> str:
    """Of a row of a part on equal terms, such as "fp32 256 0.1" of `same_micro_batches`."""
    precision, *more = name.split()
    number_format = FORMATS[precision] + ", frozen weights cast once" * (precision == "bf16")
    if part == "mini":
        return f"LoRA on all linear layers of mini, {number_format}: same micro-batches"
    if part == "language_model":
        return f"language model, {number_format}: same micro-batches, each library's own dropout 0.1"
    length, dropout = more
    own = f"each library's own dropout {dropout}" if float(dropout) else "no dropout"
    return f"LoRA, {length} tokens, {number_format}: same micro-batches, {own}"


def inference_label(name: str) -> str:
    """Of a row of `inference`, such as "generation matched 8"."""
    kind, row, *number = name.split()
    return f"{kind}{''.join(f', {size} at a time' for size in number)}, {INFERENCE[f'{kind} {row}']}"


def comparisons(column: Cells) -> Iterator[Comparison]:
    """All that was measured on a device against something else."""
    for name, cells in column.get("training", {}).items():
        yield _against_peft(training_label(name), cells)
    for part in ("same_micro_batches", "language_model"):
        for name, cells in rows_of(column, part).items():
            yield _against_peft(equal_label(part, name), cells)
    for name, cells in rows_of(column, "mini").items():
        lora, full = (cells[method]["seconds"] / cells["steps"] for method in EQUAL_SIDES["mini"])
        yield Comparison(f"a step of {equal_label('mini', name)}; full", "s", lora, full, cells)
    methods = column.get("methods", {}).get("fp32", {})
    for name, cells in methods.items():
        if name != "full":
            ratios = {key: cells[f"{key}_vs_full"] for key in ("speedup", "memory_ratio")}
            yield Comparison(f"a step of {name}, float32: same micro-batches; full", "s", cells["seconds"],
                             methods["full"]["seconds"], ratios)
    for name, cells in column.get("inference", {}).items():
        rate, unit = RATES[name.split()[0]]
        yield Comparison(f"{inference_label(name)}; transformers", unit, cells["ours"][rate],
                         cells["transformers"][rate], cells)


def _against_peft(what: str, cells: Cells) -> Comparison:
    return Comparison(f"{what}; peft", "reviews/s", cells["ours"]["samples_per_second"],
                      cells["peft"]["samples_per_second"], cells)
