"""Sharding (FSDP2): each process keeps 1/N of the weights, gradients and optimizer state of `full`.

    torchrun --nproc-per-node 4 scripts/train.py --method full --shard

A block's weights are gathered just before it computes and let go after it (Zhao et al. 2023, arXiv 2304.11277). A
sharded parameter is a DTensor; everything that the rest of the library must know about one is here.
"""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from minipeft.errors import HardwareError


def shard(model: nn.Module, processes: int) -> None:
    """Spread weights, gradients and optimizer state over the processes, block by block, in place.

    Args:
        model: a GPT-2, on its device.
        processes: how many there are.

    Raises:
        HardwareError: there is only one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    if processes == 1:
        raise HardwareError("--shard spreads a model over processes: start it with torchrun --nproc-per-node N")
    mesh = init_device_mesh(next(model.parameters()).device.type, (processes,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of it."""
    return hasattr(tensor, "full_tensor")  # asked so that a single process need not import torch's DTensor


def whole_tensors(tensors: dict[str, Tensor], first: bool) -> dict[str, Tensor]:
    """Tensors as if they had never been sharded, on the CPU. Every process must ask, and the first one gets them.

    One tensor is gathered at a time: a GPU might not hold all of them at once, nor the machine a copy for each process.

    Args:
        first: whether this is the first process.
    """
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if is_sharded(tensor) else tensor
        if first:
            found[name] = whole.detach().cpu()
        del whole  # before the next one comes
    return found


def spread_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor on the parameter's device and, where the parameter is sharded, sharded in the same way.

    A single number, such as an optimizer's count of steps, is never sharded.
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
