"""Parts on equal terms: peft with this library's micro-batches, LoRA beside full on mini, and where the time goes.

What these parts find is kept twice, "before" and "after": before the work on speed, and as the library is now.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from parts import METHOD_VALUES, ROUNDS_OF_LONG, Benchmark, against, report
from turns import Side, take_turns

from minipeft import GPT2LMHeadModel, LoraConfig, inject, save_adapter
from minipeft.model.tokenizer import get_tokenizer
from minipeft.runs.defaults import table
from minipeft.tasks.task import MAX_LENGTH

DROPOUT = 0.1  # GPT-2's own, three times: after the embeddings, on attention's shares, after each sub-layer
PRECISIONS = ("fp32", "bf16")


def rows_of_same_micro_batches(lengths: tuple[int, ...]) -> list[tuple[str, int, float]]:
    """Precision, tokens and dropout of each row: at the longer length with GPT-2's dropout only, to save time."""
    return [(precision, length, dropout) for length, dropout, precision in
            itertools.product(lengths, (DROPOUT, 0.0), PRECISIONS) if length == lengths[0] or dropout]


def full_texts(benchmark: Benchmark, ids: list[np.ndarray], count: int, length: int) -> dict[str, Any]:
    """What a job says of `count` batches of texts that are all cut to `length` tokens, so that nothing is padded."""
    size = benchmark.batch_size
    long_enough = [row[:length] for row in ids if len(row) >= length][:count * size]
    numbers = (list(range(len(long_enough))) * (1 + count * size // len(long_enough)))[:count * size]
    return {"texts": benchmark.write_texts(f"full_{length}", long_enough), "length": length,
            "batches": [numbers[start:start + size] for start in range(0, len(numbers), size)]}


def equal_sides(benchmark: Benchmark, precision: str, length: int, rounds: int, **values: Any) -> dict[str, Any]:
    """Ours and peft's: one step on the same full texts a turn, in the same micro-batches, frozen weights cast once."""
    job = {"precision": precision, "steps": 1, "micro_batch_size": benchmark.micro_batch_size(length),
           "cast_base": precision == "bf16", **full_texts(benchmark, benchmark.ids, rounds + 1, length), **values}
    found = take_turns({"ours": Side(**benchmark.job("train_ours", **job)),
                        "peft": Side(**benchmark.job("train_peft", **job))}, rounds, last=True)
    for side in found.values():
        side["samples_per_second"] = round(benchmark.batch_size / side["seconds"], 3)
    return {**found, **against(found["ours"], found["peft"]), "micro_batch_size": job["micro_batch_size"]}


def same_micro_batches(benchmark: Benchmark) -> dict[str, Any]:
    """LoRA on c_attn against peft, with GPT-2's dropout (each library's own) and without."""
    rows = {}
    lengths = benchmark.lengths[:1] if benchmark.options.quick else benchmark.lengths
    for precision, length, dropout in rows_of_same_micro_batches(lengths):
        name = f"{precision} {length} {dropout}"
        if name.startswith(benchmark.options.only):
            rows[name] = equal_sides(benchmark, precision, length, benchmark.rounds_at(length), dropout=dropout,
                                     adapter=str(benchmark.folder / "adapter"))
            report(f"same micro-batches, {name}", rows[name])
    return rows


def language_model(benchmark: Benchmark) -> dict[str, Any]:
    """The same for a language model: the loss of every token over GPT-2's vocabulary."""
    model = inject(GPT2LMHeadModel.from_pretrained(benchmark.folder / "base"), LoraConfig(**METHOD_VALUES["lora"]))
    save_adapter(model, benchmark.folder / "language_model")
    rows = {}
    for precision in PRECISIONS:
        if precision.startswith(benchmark.options.only):
            rows[precision] = equal_sides(benchmark, precision, benchmark.lengths[0],
                                          min(benchmark.rounds, ROUNDS_OF_LONG), dropout=DROPOUT, language_model=True,
                                          adapter=str(benchmark.folder / "language_model"))
            report(f"language model, {precision}", rows[precision])
    return rows


# --- this library alone -----------------------------------------------------------------------------------------------

def mini_job(benchmark: Benchmark, method: str, precision: str, steps: int, rounds: int) -> dict[str, Any]:
    """A method on the bundled base, with the settings that a run has by default, and texts of the default length."""
    ids = [np.asarray(row, dtype=np.int64) for row in get_tokenizer("mini").encode_batch(benchmark.reviews)]
    length = benchmark.lengths[0] if benchmark.options.quick else MAX_LENGTH
    return benchmark.job("train_ours", base="mini", method=method, method_values=table(method)["method"], steps=steps,
                         precision=precision, **full_texts(benchmark, ids, steps * (rounds + 1), length))


def mini(benchmark: Benchmark) -> dict[str, Any]:
    """LoRA as IMDb is trained with it by default, on all linear layers, against full fine-tuning, on mini."""
    steps, rows = 2, {}
    for precision in PRECISIONS:
        if precision.startswith(benchmark.options.only):
            found = take_turns({method: Side(**mini_job(benchmark, method, precision, steps, benchmark.rounds))
                                for method in ("lora", "full")}, benchmark.rounds, last=True)
            rows[precision] = {**found, **against(found["lora"], found["full"]), "steps": steps}
            report(f"mini, lora against full, {precision}", rows[precision])
    return rows


def profile(benchmark: Benchmark) -> dict[str, Any]:
    """One LoRA step by operator: of mini as it is trained by default, and of GPT-2's shape with GPT-2's dropout."""
    rows = {}
    length = benchmark.lengths[0]
    for base, precision in itertools.product(("mini", benchmark.shape), PRECISIONS):
        name = f"{base} {precision}"
        if not name.startswith(benchmark.options.only):
            continue
        job = (mini_job(benchmark, "lora", precision, 1, rounds=1) if base == "mini" else benchmark.job(
            "train_ours", adapter=str(benchmark.folder / "adapter"), precision=precision, steps=1, dropout=DROPOUT,
            **full_texts(benchmark, benchmark.ids, 2, length)))
        rows[name] = found = take_turns({"step": Side(**{**job, "profiled": True})}, rounds=1)["step"]
        rows[name]["texts"], rows[name]["tokens"] = benchmark.batch_size, job["length"]
        print(f"{name}: {found['step_seconds']} s; {found['copies']['calls']} copies {found['copies']['seconds']} s, "
              + ", ".join(f"{row['name']} {100 * row['share']:.1f} %" for row in found["operators"][:6]), flush=True)
    return rows
