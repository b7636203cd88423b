"""What the work on speed was to reach, what it reached, and why where it did not."""

from __future__ import annotations

from typing import NamedTuple

from labels import Cells

from minipeft.runs.results import markdown_table


class Aim(NamedTuple):
    """A bar for a figure of benchmark.json, the aim beyond it, and the reason if it is missed.

    Attributes:
        key: of benchmark.json, and of one precision of it, if it has two.
        least: whether the figure is to be at least so large; else at most.
    """

    what: str
    key: tuple[str, ...]
    bar: float
    aim: float
    least: bool = True
    reason: str = ""


OF_MINI = ("What LoRA saves are the gradients of W and the optimizer's step. At C = 256 they are a small part of a "
           "step, and LoRA's own thin products, bound by memory, take most of that. The same work made full "
           "fine-tuning faster, too.")
AIMS = (
    Aim("124M, float32, same micro-batches: times as fast as peft", ("speedup_vs_peft_same_microbatches",), 1.2, 1.35),
    Aim("the same in bfloat16", ("speedup_vs_peft_same_microbatches_bf16",), 1.35, 1.6),
    Aim("the same: of its memory", ("memory_vs_peft_same_microbatches",), 0.5, 0.4, least=False),
    Aim("mini, bfloat16: LoRA's step, times as fast as full's", ("mini_lora_speedup_vs_full", "bf16"), 1.3, 1.45,
        reason=OF_MINI),
    Aim("mini, float32: the same", ("mini_lora_speedup_vs_full", "fp32"), 1.2, 1.35, reason=OF_MINI),
    Aim("language model, 50,257 entries: of peft's memory", ("lm_memory_vs_peft",), 0.5, 0.3, least=False),
    Aim("generation, one text, float32: times as fast as transformers", ("generation_speedup_fp32",), 1.25, 1.5),
    Aim("seconds per operation, 1,024 tokens over 128", ("length_growth",), 1.08, 1.03, least=False,
        reason="Products with matrices became about twice as fast, and attention's did not: torch has batches of "
               "products in float32 from MKL alone. So attention, whose share grows with the length, weighs more."),
    Aim("compiled bfloat16: times as fast as peft", ("speedup_vs_peft_best",), 1.2, 1.35,
        reason="The compiler writes much the same kernels for both sides, and what is written by hand here gives way "
               "to it. What stays is the memory."))


def aims_table(results: Cells) -> str:
    """Each bar beside what was measured, and the reasons for those that are missed."""
    rows, reasons = [], {}
    for aim in AIMS:
        found = results
        for key in aim.key:
            found = found.get(key, {})
        if not isinstance(found, float):
            continue
        met = found >= aim.bar if aim.least else found <= aim.bar
        if not met:
            reasons.setdefault(aim.reason, []).append(aim.what)
        rows.append([aim.what, f"{aim.bar:g}", f"{aim.aim:g}", f"**{found:.2f}**", "yes" if met else
                     f"no, by {abs(found - aim.bar):.2f}"])
    if not rows:
        return ""
    table = markdown_table(["what was to be reached", "bar", "aim", "measured", "reached"], rows)
    return "\n\n".join([table, *(f"{' and '.join(missed)}: {reason}" for reason, missed in reasons.items())])
