"""What training costs, before anything is trained: arithmetic in operations, memory in bytes, traffic in bytes.

Memory is not estimated from a formula. One training step of the real model runs on fake tensors, which have a shape, a
dtype and a device but no values, and every tensor's bytes are counted from its first use to its end. So the ledger
knows what each method, precision and checkpointing keep, and needs neither memory nor weights: GPT-2 XL takes seconds.

Notation as in gpt2.py: B batch, T tokens, C channels, r rank.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minipeft.data.batches import number_of_passes
from minipeft.explain.anatomy import injected
from minipeft.methods import METHODS
from minipeft.methods.injection import trainable_parameters
from minipeft.model.config import GPT2Config
from minipeft.runs.results import markdown_table
from minipeft.training.hardware import cast_frozen, computing_in
from minipeft.training.optimizer import adamw


@dataclass
class Memory:
    """Bytes of one training step.

    Attributes:
        weights: the model's, frozen ones too.
        gradients: of the trained parameters.
        optimiser: AdamW's two running means of each.
        activations: what a forward pass keeps for the backward pass, lower-precision copies of weights included.
        peak: the most that is alive at once, passing values included; not the sum, as gradients come while activations
            go. What Python, PyTorch and a GPU's driver take for themselves comes on top.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor that comes out of an operation, until nothing refers to them any more."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.references: dict[int, weakref.ref] = {}

    def count(self, tensor: Tensor) -> None:
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
        results = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return results


def training_memory(config: GPT2Config, method: str, batch_size: int, length: int,
                    precision: torch.dtype = torch.float32, gradient_checkpointing: bool = False,
                    device: str = "cpu", tokens_per_pass: int | None = None, **values: Any) -> Memory:
    """The memory that one training step of a classifier takes, from the second step on.

    Args:
        method: a name in METHODS, by default configured as in defaults.py.
        length: T, with nothing padded: a batch of longest texts.
        precision: of the forward pass; trained parameters, gradients and optimiser are float32.
        device: "cpu" for what this library does there; "cuda" for flash attention throughout.
        tokens_per_pass: as in training; None computes the batch at once.
        values: fields of the method's configuration.

    Raises:
        ConfigError: a bad value.
    """
    passes = number_of_passes(batch_size, length, tokens_per_pass)
    model = injected(config, method, **values)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = cast_frozen(model.to_empty(device="cpu"), precision).train()
        model.transformer.gradient_checkpointing = gradient_checkpointing
        if device == "cuda":
            for block in model.transformer.h:  # a GPU's flash kernel drops out without storing; a CPU's cannot
                block.attn.longest_by_formula, block.attn.attn_pdrop = 0, 0.0
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = adamw(trained, model, learning_rate=1e-3)
        input_ids = torch.zeros(batch_size, length, dtype=torch.long)            # (B, T)
        labels = torch.zeros(batch_size, dtype=torch.long)                       # (B,)
        with LiveBytes() as bytes_now:
            for tensor in (*model.parameters(), *model.buffers()):
                bytes_now.count(tensor)
            weights = bytes_now.live
            for _ in range(2):  # the first step makes the optimiser's state
                bytes_now.peak, activations = bytes_now.live, 0
                for ids, targets in zip(input_ids.tensor_split(passes), labels.tensor_split(passes)):
                    before_pass = bytes_now.live
                    with computing_in(precision, torch.device("cpu")):
                        logits = model(ids)                                      # (B / passes, K)
                    loss = F.cross_entropy(logits.float(), targets, reduction="sum") / batch_size
                    activations = max(activations, bytes_now.live - before_pass)
                    loss.backward()
                    del logits, loss
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        optimiser = sum(state.nbytes for p in optimizer.state.values() for state in p.values())
    return Memory(weights, sum(p.numel() * p.element_size() for _, p in trained), optimiser, activations,
                  bytes_now.peak)


def training_operations(config: GPT2Config, batch_size: int, length: int, r: int) -> int:
    """Floating-point operations of one training step with LoRA on c_attn (multiply and add counted as two).

    A frozen product costs 2 in out a token forwards and as much backwards, for the gradient of its input; a trained
    one as much again, for its own. Attention looks back only, so half of its T x T scores count, and its backward pass
    twice. Not counted are elementwise work and the embeddings; nothing is computed below the first trained parameter.
    """
    C, tokens = config.n_embd, batch_size * length
    linear = C * 3 * C + C * C + 2 * C * config.inner_size                      # numbers in a block's four matrices
    lora = r * (C + 3 * C)
    attention = 2 * length * C                                                  # a token: q k^T and the sum over v
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
