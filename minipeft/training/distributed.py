"""Several processes, one model each: data-parallel training and evaluation under torchrun.

    torchrun --nproc-per-node 4 scripts/train.py --method lora

Every process reads the same data and cuts each batch into equal shares, so the global batch, and with it the loss
curve, is what one process would have seen. After the backward pass the gradients of the trained parameters are averaged
(DistributedDataParallel; Li et al. 2020, "PyTorch Distributed", arXiv 2006.15704): with LoRA a few hundred kilobytes
travel where full fine-tuning sends the whole model. `full` can instead keep weights, gradients and optimiser state in
shards (FSDP2; Zhao et al. 2023, arXiv 2304.11277): each process then holds 1/N of them.

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
    whole = [None] * count
    for part, its_numbers in everyone:
        for number, item in zip(its_numbers, part):
            whole[number] = torch.from_numpy(item) if isinstance(item, np.ndarray) else item
    return whole


# --- the model --------------------------------------------------------------------------------------------------------

def shard(model: nn.Module) -> None:
    """Spread weights, gradients and optimiser state over the processes, block by block, in place (FSDP2).

    Raises:
        HardwareError: there is only one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    if world_size() == 1:
        raise HardwareError("--shard spreads a model over processes: start it with torchrun --nproc-per-node N")
    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def synchronised(model: nn.Module) -> nn.Module:
    """The model to call in training: one whose backward pass averages gradients over the processes."""
    if world_size() == 1 or any(map(is_sharded, model.parameters())):
        return model  # alone, or sharded: FSDP averages by itself
    return DistributedDataParallel(model)  # without device_ids, so that it moves no input: see Batch.to


def without_sending(model: nn.Module, more_to_come: bool) -> AbstractContextManager[None]:
    """While gradients of one step are still being accumulated, they need not travel."""
    held_back = more_to_come and isinstance(model, DistributedDataParallel)
    return model.no_sync() if held_back else nullcontext()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of it."""
    return hasattr(tensor, "full_tensor")  # asked so that a single process need not import torch's DTensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor as if it had never been sharded. Every process must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def spread_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor on the parameter's device and, where the parameter is sharded, sharded as it is.

    A single number, such as an optimiser's count of steps, is never sharded.
    """
    value = value.to(parameter.device)
    if not is_sharded(parameter) or value.dim() == 0:
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def reshard(model: nn.Module) -> None:
    """Forget whole tensors gathered for an evaluation: after the parameters were overwritten they are out of date."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
