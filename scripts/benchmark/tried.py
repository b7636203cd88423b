"""What was tried to make a CPU faster, each beside what is used now; writes results/benchmark_notes.md.

    python scripts/benchmark/tried.py          # a minute on two cores, idle otherwise
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.commands.start import run
from minipeft.errors import ConfigError
from minipeft.files import check_writable, write_text_file
from minipeft.methods.lora import LoraConfig, LoRALinear
from minipeft.model.attention import _InBlocks
from minipeft.model.dropout import dropout
from minipeft.model.linear import Linear, linear, onednn_multiplies
from minipeft.runs.results import markdown_table
from minipeft.training.hardware import machine

Way = Callable[[], object]
INTRODUCTION = """# Speed: tried, and did not pay

What was measured is in [benchmark.md](benchmark.md). Here is what was tried to make this library faster on a CPU,
beside what is used now and what torch does by itself. The ways of a comparison take turns; each figure is the median of
{turns} of them. Written by `python scripts/benchmark/tried.py` on: {processor}, {cores} cores.
"""
NOT_TIMED = """
Not timed here, and left out:

- Attention over 1,024 tokens head by head, with oneDNN's products and P computed again: no faster than torch's fused
  kernel as a whole, as the softmax remains. On weights that are not contiguous oneDNN is many times as slow.
- Attention in blocks inside a compiled model, in bfloat16: less memory, and slower than torch's kernel there.
- Packing short texts into one row: batches hold texts of similar length, so that there is little padding to save.
- Dropout's mask made again from its seed in the backward pass: saves a byte per element and draws all numbers twice.
- Freed memory that stays with the process, by glibc's `mmap_threshold` and `trim_threshold`: only the environment that
  a process starts in can ask for it. Pretraining does (scripts/pretraining/README.md).
- W + s B A put together once per step, so that the forward pass needs no thin product: in bfloat16 small updates would
  be rounded away, and nothing merges inside a forward pass here.
"""


class Comparison(NamedTuple):
    """Ways to compute one thing; the one that is used is marked, and `verdict` says why the others are not."""

    what: str
    ways: dict[str, Way]
    used: str
    verdict: str


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, also with weights that it has reordered."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def products() -> Iterator[Comparison]:
    """Float32 products with the weight of GPT-2's c_fc, for a micro-batch and for one token."""
    x, weight = torch.randn(1024, 768), torch.randn(3072, 768)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1024)
    yield Comparison("float32 product, 1,024 tokens, 768 to 3,072", {
        "MKL, as torch does": lambda: F.linear(x, weight), "oneDNN": lambda: linear(x, weight),
        "oneDNN, weights reordered": lambda: onednn(x, packed)}, "oneDNN",
        "reordered weights gain little and are a second copy")
    rows, weights = torch.randn(1, 768), [torch.randn(3072, 768) for _ in range(24)]  # more than the caches hold
    turned = [weight.T.contiguous() for weight in weights]
    yield Comparison("float32 product, 1 token, 24 matrices", {
        "MKL, as torch does": lambda: [F.linear(rows, weight) for weight in weights],
        "MKL, stored (in, out)": lambda: [rows @ weight for weight in turned],
        "oneDNN": lambda: [linear(rows, weight) for weight in weights]}, "oneDNN",
        "with oneDNN the layout (out, in) may stay")


def dropouts() -> Iterator[Comparison]:
    """Dropout on attention's shares: four texts of 256 tokens, 12 heads."""
    x, generator = torch.randn(4, 12, 256, 256), np.random.Generator(np.random.SFC64(0))

    def compared() -> Tensor:
        draws = torch.empty(x.numel() // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16).view(x.shape)
        return torch.where(draws > -26214, x, 0.0).mul_(1 / 0.9)

    def by_numpy() -> Tensor:
        draws = generator.integers(0, 2**64, x.numel() // 4, dtype=np.uint64).view(np.int16)
        kept = torch.from_numpy(draws).view(x.shape).clamp_(-26215, -26214).add_(26215).to(torch.int8)
        return (x * kept.to(x.dtype)).mul_(1 / 0.9)

    yield Comparison("dropout, (4, 12, 256, 256), float32", {
        "a draw per element, as torch does": lambda: F.dropout(x, 0.1), "a draw for four": lambda: dropout(x, 0.1),
        "a draw for four, compared": compared, "a draw for four, by numpy": by_numpy}, "a draw for four",
        "numpy's generator is faster, but would be a second one to seed, to save and to restore")


def attentions() -> Iterator[Comparison]:
    """Attention's forward and backward pass: four texts of 256 tokens, 12 heads."""
    for dtype in filter(onednn_multiplies, (torch.float32, torch.bfloat16)):
        inputs = [torch.randn(4, 12, 256, 64, dtype=dtype, requires_grad=True) for _ in range(3)]

        def both(function: Callable[..., Tensor], inputs: list[Tensor] = inputs) -> object:
            y = function(*inputs)
            return torch.autograd.grad(y, inputs, y.detach())

        for p in (0.0, 0.1):
            exact = p == 0.0 and dtype == torch.float32
            yield Comparison(f"attention, forward and backward, (4, 12, 256, 64), {dtype}, dropout {p}", {
                "torch's": lambda both=both, p=p: both(
                    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)),
                "in blocks": lambda both=both, p=p: both(lambda q, k, v: _InBlocks.apply(q, k, v, None, p))},
                "torch's" if exact else "in blocks",
                "torch's fused kernel is as fast where it has no dropout to do" if exact else
                "P is computed again in the backward pass, and not kept: little time for much memory")
    for queries, keys in ((64, 256), (256, 1024)):
        q, k = torch.randn(12, queries, 64), torch.randn(12, keys, 64)
        yield Comparison(f"q k^T of 12 heads, {queries} queries, {keys:,} keys, float32", {
            "MKL, heads as a batch": lambda q=q, k=k: q @ k.transpose(1, 2),
            "oneDNN, head by head": lambda q=q, k=k: [onednn(a, b) for a, b in zip(q, k)]}, "MKL, heads as a batch",
            "oneDNN has no batches in float32; head by head pays for long texts only, which are rare")


def lora_layers() -> Iterator[Comparison]:
    """A LoRA layer's forward and backward pass: c_fc of mini, 8 texts of 384 tokens."""
    for dtype in filter(onednn_multiplies, (torch.float32, torch.bfloat16)):
        layer = LoRALinear(Linear(256, 1024).requires_grad_(False).to(dtype), 8, 16, LoraConfig())
        plain = LoRALinear(Linear(256, 1024).requires_grad_(False).to(dtype), 8, 16, LoraConfig())
        plain.base_layer.register_forward_hook(lambda *arguments: None)  # where somebody looks, the formula computes
        x = torch.randn(8, 384, 256, requires_grad=True)

        def both(layer: LoRALinear, x: Tensor = x, dtype: torch.dtype = dtype) -> object:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = layer(x)
            return torch.autograd.grad(y, [x, layer.lora_A.weight, layer.lora_B.weight], y.detach())

        yield Comparison(f"LoRA on mini's c_fc, forward and backward, 3,072 tokens, {dtype}", {
            "the formula, by autograd": lambda both=both, plain=plain: both(plain),
            "written out": lambda both=both, layer=layer: both(layer)}, "written out",
            "the formula stays the definition")


def gelus() -> Iterator[Comparison]:
    """gelu's tanh form, also written with a sigmoid, which the pretraining compiles."""
    x = torch.randn(8, 384, 1024)
    yield Comparison("gelu, (8, 384, 1024), float32", {
        "torch's": lambda: F.gelu(x, approximate="tanh"),
        "as a sigmoid": lambda: x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))}, "torch's",
        "one operation after the other, the sigmoid needs six passes over memory")


def measured(comparison: Comparison, turns: int) -> dict[str, float]:
    """Median seconds of each way, after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in comparison.ways}
    for _ in range(turns + 1):
        for name, way in comparison.ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15, help="of each way that count; default 15")
    parser.add_argument("--output", type=Path, default=Path("results/benchmark_notes.md"))
    options = parser.parse_args()
    if options.turns < 1:
        raise ConfigError(f"turns must be at least 1, got {options.turns}")
    check_writable(options.output.parent)
    torch.manual_seed(0)
    rows = []
    for comparisons in (products, dropouts, attentions, lora_layers, gelus):
        for comparison in comparisons():
            for name, seconds in measured(comparison, options.turns).items():
                used = name == comparison.used
                rows.append([comparison.what, f"**{name}**" if used else name, f"{1000 * seconds:.2f}",
                             comparison.verdict if used else ""])
                print(*rows[-1][:3], sep=" | ")
    here = machine()
    table = markdown_table(["what", "way (in bold: used)", "ms", "why"], rows)
    write_text_file(options.output, INTRODUCTION.format(turns=options.turns, **here) + "\n" + table + "\n" + NOT_TIMED)


if __name__ == "__main__":
    run(main)
