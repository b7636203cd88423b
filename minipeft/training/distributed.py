"""Several processes, one model each: data-parallel training and evaluation under torchrun.

    torchrun --nproc-per-node 4 scripts/train.py --method lora

Every process reads the same data and cuts each batch into equal shares, so the global batch, and with it the loss
curve, is what one process would have seen. After the backward pass the gradients of the trained parameters are averaged
(DistributedDataParallel; Li et al. 2020, "PyTorch Distributed", arXiv 2006.15704): with LoRA a few hundred kilobytes
travel where full fine-tuning sends the whole model. `full` can instead be sharded: see sharding.py.

In a single process every function here does nothing, at no cost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from minipeft.data.batches import IGNORED_LABEL, Batch
from minipeft.errors import HardwareError
from minipeft.training.sharding import is_sharded


@contextmanager
def processes(device: str | None = None) -> Iterator[None]:
    """Join the processes that torchrun started, for the length of the block; alone, do nothing.

    Args:
        device: "cpu" or "cuda" as a user gave it; None takes CUDA where there is one. Each process takes its own GPU.

    Raises:
        HardwareError: more processes on this machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise HardwareError(f"{os.environ['LOCAL_WORLD_SIZE']} processes were started on a machine with "
                                f"{torch.cuda.device_count()} GPUs: use --nproc-per-node {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number; 0 writes files and prints."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def share(batch: Batch) -> Batch:
    """This process's rows of a batch: every world_size-th. A process left without one gets a row that does not count.

    The length stays the global batch's, so that all processes compute as long.
    """
    if world_size() == 1:
        return batch
    ids, mask, labels = (tensor[rank()::world_size()]
                         for tensor in (batch.input_ids, batch.attention_mask, batch.labels))
    if len(ids) == 0:
        ids, mask = batch.input_ids[:1], batch.attention_mask[:1]
        labels = torch.full_like(batch.labels[:1], IGNORED_LABEL)
    return Batch(ids, mask, labels)


def share_of(examples: int) -> list[int]:
    """The numbers of this process's examples, out of so many: each belongs to somebody.

    All processes get equally many, since a sharded model only computes in step; so the first few are computed once
    more by another process. `gathered` counts each once.
    """
    each = -(-examples // world_size())
    return [number % examples for number in range(rank(), each * world_size(), world_size())]


def total(values: Tensor) -> list[float]:
    """The sums over all processes of each number of a tensor, (n,)."""
    sums = values.to(torch.float64, copy=True)
    if world_size() > 1:
        distributed.all_reduce(sums)
    return sums.tolist()


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether it holds in any process: all must leave a loop in the same step."""
    return flag if world_size() == 1 else total(torch.tensor([flag], device=device))[0] > 0


def gathered(items: Sequence[Any], numbers: Sequence[int], count: int) -> list[Any]:
    """All processes' items in one list: item numbers[i] of it is this process's items[i].

    Args:
        items: n results, one for each of this process's examples; tensors lie on the CPU.
        numbers: n example numbers.
        count: examples in all processes together; each appears once in the result.
    """
    everyone: list[Any] = [(items, numbers)]
    if world_size() > 1:
        everyone = [None] * world_size()
        # A tensor that is a view would be sent with all that it is a view of; an array is sent by itself.
        plain = [item.numpy() if isinstance(item, Tensor) else item for item in items]
        distributed.all_gather_object(everyone, (plain, list(numbers)))
    together = [None] * count
    for part, its_numbers in everyone:
        for number, item in zip(its_numbers, part):
            together[number] = torch.from_numpy(item) if isinstance(item, np.ndarray) else item
    return together


# --- the model --------------------------------------------------------------------------------------------------------

def synchronized(model: nn.Module) -> nn.Module:
    """The model to call in training: one whose backward pass averages gradients over the processes."""
    if world_size() == 1 or any(map(is_sharded, model.parameters())):
        return model  # alone, or sharded: FSDP averages by itself
    wrapped = DistributedDataParallel(model)  # without device_ids, so that it moves no input: see Batch.to
    wrapped.broadcast_buffers = False  # none changes in training: VeRA's A and B would travel in every step
    return wrapped


def without_sending(model: nn.Module, more_to_come: bool) -> AbstractContextManager[None]:
    """While gradients of one step are still being added up, they need not travel."""
    held_back = more_to_come and isinstance(model, DistributedDataParallel)
    return model.no_sync() if held_back else nullcontext()


def seed_by_rank(seed: int) -> None:
    """Give each process but the first a random state of its own: their rows of a batch must not share dropout."""
    if rank() > 0:
        torch.manual_seed(seed + rank())
