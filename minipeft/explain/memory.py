"""What training costs, before anything is trained: arithmetic in operations, memory in bytes, traffic in bytes.

Memory is not estimated from a formula. One training step of the real model runs on fake tensors, which have a shape, a
dtype and a device but no values, and every tensor's bytes are counted from its first use to its last. So the count
knows what each method, precision and checkpointing keep, and needs neither memory nor weights: GPT-2 XL takes seconds.

Notation as in gpt2.py: B batch, T tokens, C channels, r rank.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from minipeft.data.batches import number_of_micro_batches
from minipeft.errors import ConfigError
from minipeft.explain.anatomy import injected
from minipeft.methods import METHODS
from minipeft.methods.injection import positions_left, trainable_parameters
from minipeft.model.config import GPT2Config
from minipeft.runs.results import markdown_table
from minipeft.tasks.task import MAX_LENGTH
from minipeft.training.hardware import PRECISIONS, cast_frozen, computing_in, tokens_per_micro_batch
from minipeft.training.optimizer import adamw


@dataclass
class Memory:
    """Bytes of one training step.

    Attributes:
        weights: the model's, frozen ones too.
        gradients: of the trained parameters.
        optimizer: AdamW's two running means of each.
        activations: what a forward pass keeps for the backward pass, lower-precision copies of weights included.
        peak: the most that is alive at once, temporary values included. It is not the sum: gradients come while
            activations go. What Python, PyTorch and a GPU's driver take for themselves comes on top.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int

    def in_gib(self) -> str:
        """A row of a table."""
        weights, gradients, optimizer, activations, peak = (size / 2**30 for size in dataclasses.astuple(self))
        return f"{weights:9.3f}{gradients:11.4f}{optimizer:11.4f}{activations:13.3f}{peak:9.3f}"


class LiveBytes(FakeTensorMode):
    """Fake tensors, of which the bytes are counted until nothing refers to them any more."""

    def __init__(self, on_a_cpu: bool = True) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.carried_out_here = on_a_cpu  # else what this library does for a CPU's speed is not done
        self.live, self.peak, self.within = 0, 0, False
        self.references: dict[int, weakref.ref] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage once, however many views there are of it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.references:
            return

        def freed(_: Any) -> None:
            self.live -= size
            del self.references[key]

        self.references[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.within:  # an operation that is made of others: what they make is gone when it ends
            return super().__torch_dispatch__(operation, types, args, kwargs)
        self.within = True
        try:
            results = super().__torch_dispatch__(operation, types, args, kwargs)
        finally:
            self.within = False
        for tensor in (results,) if isinstance(results, Tensor) else tree_leaves(results):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return results


def training_memory(config: GPT2Config, method: str, batch_size: int, length: int,
                    precision: torch.dtype = torch.float32, gradient_checkpointing: bool = False,
                    device: str = "cpu", tokens_at_once: int | None = None, **values: Any) -> Memory:
    """The memory that one training step of a classifier takes, from the second step on.

    Args:
        method: a name in METHODS, by default configured as in defaults.py.
        length: T, with nothing padded: a batch of longest texts.
        precision: of the forward pass; trained parameters, gradients and optimizer are float32.
        device: "cpu" for what this library does there; "cuda" for flash attention throughout.
        tokens_at_once: larger batches are cut into micro-batches, as in training; None computes a batch at once.
        values: fields of the method's configuration.

    Raises:
        ConfigError: a bad value.
    """
    if device == "cuda":  # a GPU's flash kernel drops out without storing what it dropped; a CPU's does not
        config = dataclasses.replace(config, attn_pdrop=0.0)
    model = injected(config, method, **values)
    with _without_searching_garbage(), LiveBytes(on_a_cpu=device == "cpu") as count:
        model = cast_frozen(model.to_empty(device="cpu"), precision).train()
        model.transformer.gradient_checkpointing = gradient_checkpointing
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = adamw(trained, model, learning_rate=1e-3)
        for tensor in (*model.parameters(), *model.buffers()):
            count.add(tensor)
        weights = count.live
        input_ids = torch.zeros(batch_size, length, dtype=torch.long)            # (B, T)
        parts = _largest(input_ids.tensor_split(number_of_micro_batches(batch_size, length, tokens_at_once)))
        _set_gradients(optimizer)
        optimizer.step()  # of an earlier step nothing is left but the optimizer's state
        optimizer.zero_grad(set_to_none=True)
        count.peak, activations = count.live, 0
        for part, beside_gradients in parts:
            if beside_gradients:
                _set_gradients(optimizer)
            activations = max(activations, _backward(model, part, precision, count))
        optimizer.step()
        state = sum(tensor.nbytes for tensors in optimizer.state.values() for tensor in tensors.values())
    return Memory(weights, sum(p.numel() * p.element_size() for p in trained), state, activations, count.peak)


@contextmanager
def _without_searching_garbage() -> Iterator[None]:
    """Fake tensors are many small objects: a fifth of the time would go into looking for dead ones."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _set_gradients(optimizer: torch.optim.Optimizer) -> None:
    """What a backward pass leaves: a gradient for each trained parameter."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)


def _largest(parts: Sequence[Tensor]) -> list[tuple[Tensor, bool]]:
    """Of a batch's micro-batches, (b, T), those that can need the most; and whether earlier ones left gradients.

    They take seconds each for a large model, and a smaller one, or one more of the same kind, changes no number.
    """
    first, *later = parts
    if not later:
        return [(first, False)]
    return [(first, False)][:len(first) > len(later[0])] + [(later[0], True)]


def _backward(model: nn.Module, input_ids: Tensor, precision: torch.dtype, count: LiveBytes) -> int:
    """Forward and backward pass of a micro-batch, (B, T); the bytes that were kept between them."""
    before = count.live
    with computing_in(precision, torch.device("cpu")):
        logits = model(input_ids)                                                # (B, K)
    loss = F.cross_entropy(logits.float(), torch.zeros(len(input_ids), dtype=torch.long))
    kept = count.live - before
    loss.backward()
    return kept


def memory_table(config: GPT2Config, model_name: str, method: str, values: dict[str, Any], batch_size: int,
                 length: int | None, device: str) -> str:
    """The predicted memory of a training step in each precision, with and without checkpointing, beside `full`.

    Args:
        model_name: what to call the model.
        values: fields of the method's configuration.
        length: tokens of each text; None for as many as training keeps by default.

    Raises:
        ConfigError: a bad value, sizes below 1, or a length beyond the model's positions.
    """
    left = positions_left(injected(config, method, **values))
    length = min(MAX_LENGTH, left) if length is None else length
    if batch_size < 1 or length < 1:
        raise ConfigError(f"batch_size and length must be at least 1, got {batch_size} and {length}")
    if length > left:
        raise ConfigError(f"length={length} is more than the {left} tokens that fit {model_name} with {method}")
    tokens = tokens_per_micro_batch(torch.device(device), config.n_embd)
    parts = number_of_micro_batches(batch_size, length, tokens)
    lines = [f"one training step of {model_name}, {batch_size} texts of {length} tokens"
             f"{f' in {parts} micro-batches' if parts > 1 else ''}, {device}; GiB",
             f"{'':28}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'peak':>9}"]
    precisions = [name for name in PRECISIONS if (name, device) != ("fp16", "cpu")]
    found: dict[tuple[str, int, bool], Memory] = {}
    for trained, precision, checkpointing in product(dict.fromkeys((method, "full")), precisions, (False, True)):
        case = trained, PRECISIONS[precision].itemsize, checkpointing  # bf16 and fp16 take the same
        if case not in found:
            found[case] = training_memory(config, trained, batch_size, length, PRECISIONS[precision], checkpointing,
                                          device, tokens, **(values if trained == method else {}))
        lines.append(f"{trained}, {precision}{', checkpointing' if checkpointing else ''}".ljust(28)
                     + found[case].in_gib())
    return "\n".join([*lines, "peak: the most alive at once; Python, PyTorch and drivers take their own on top"])


def training_operations(config: GPT2Config, batch_size: int, length: int, r: int) -> int:
    """Floating-point operations of one training step with LoRA on c_attn (multiply and add counted as two).

    A frozen product costs 2 in out per token forwards and as much backwards, for the gradient of its input; a trained
    one as much again, for its own. Attention looks back only, so half of its T x T scores count, and its backward pass
    twice. Not counted are elementwise work and the embeddings; nothing is computed below the first trained parameter.
    """
    C, tokens = config.n_embd, batch_size * length
    linear = C * 3 * C + C * C + 2 * C * config.inner_size                      # numbers in a block's four matrices
    lora = r * (C + 3 * C)
    attention = 2 * length * C                                                  # per token: q k^T and the sum over v
    forward = 2 * linear + 2 * lora + attention
    backward = 2 * linear + 4 * lora + 2 * attention
    below_first = 2 * C * 3 * C + 2 * r * C                                     # input of the first block's c_attn
    return tokens * (config.n_layer * (forward + backward) - below_first)


def bytes_sent(trained_parameters: int, processes: int, bytes_each: int = 4) -> float:
    """What each of several processes sends in one data-parallel step: its share of a ring all-reduce of gradients.

    Every gradient is summed on its way round the ring and handed round once more: 2 (N - 1) / N times its size.
    """
    return 2 * (processes - 1) / processes * trained_parameters * bytes_each


def traffic_table(config: GPT2Config, processes: tuple[int, ...] = (8, 64, 512)) -> str:
    """A Markdown table: the megabytes each GPU sends in one step of each method, in its default configuration."""
    rows = []
    for method in METHODS:
        trained = trainable_parameters(injected(config, method)).trainable
        cells = [trained * 4, *(bytes_sent(trained, number) for number in processes)]
        rows.append([method, *(f"{cell / 1e6:,.2f} MB" for cell in cells)])
    return markdown_table(["method", "gradients", *(f"{number} GPUs" for number in processes)], rows, figures=True)
