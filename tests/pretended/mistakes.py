"""Mistakes with devices, such as anybody makes, planted in the library one at a time: the pretended GPU must notice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipeft.data.batches import Batch
from minipeft.methods.lora import LoRALinear
from minipeft.methods.prefix import Prefix
from minipeft.model import gpt2
from minipeft.tasks.task import Task
from minipeft.training import loop, state


class Planted(NamedTuple):
    """A mistake: in whose attribute, what stands there instead, and in which run it shows."""

    owner: Any
    attribute: str
    wrong: Callable
    method: str = "lora"
    task: str = "classification"
    resumes: bool = False

    def change(self):
        return patch.object(self.owner, self.attribute, self.wrong)


# --- tensors left behind ----------------------------------------------------------------------------------------------

def ids_stay(batch, device):
    return Batch(batch.input_ids, batch.attention_mask, batch.labels.to(device, non_blocking=True))


def labels_stay(batch, device):
    return Batch(batch.input_ids.to(device, non_blocking=True), batch.attention_mask, batch.labels)


forward = gpt2.GPT2Model.forward


def positions_counted_on_the_cpu(model, input_ids, attention_mask=None, position_ids=None, *others, **named):
    return forward(model, input_ids, attention_mask, torch.arange(input_ids.shape[1]), *others, **named)


def mask_made_on_the_cpu(attention_mask, T, past, device):
    return torch.ones(T, past + T, dtype=torch.bool).tril(past)


initialize = LoRALinear.__init__


def scaling_that_does_not_move_with_its_layer(layer, base_layer, r, *others):
    initialize(layer, base_layer, r, *others)
    layer.scaling = torch.full((r,), layer.scaling)


keys_and_values = Prefix.keys_and_values


def prefix_on_the_cpu(prefix, *arguments):
    return [(key.cpu(), value.cpu()) for key, value in keys_and_values(prefix, *arguments)]


def noise_from_the_cpus_generator(logits, targets):
    generator = torch.Generator().manual_seed(0)
    return loss_sum(logits + torch.randn(logits.shape, device=logits.device, generator=generator), targets)


def moments_left_where_they_were_read(parameter, value):
    return value


# --- waiting ----------------------------------------------------------------------------------------------------------

loss_sum = Task.loss_sum


def loss_read_in_each_step(logits, targets):
    loss = loss_sum(logits, targets)
    loss.item()
    return loss


def targets_chosen_by_a_mask(logits, targets):
    counts = targets >= 0
    return F.cross_entropy(logits[counts].float(), targets[counts], reduction="sum")


def batch_copied_while_the_host_waits(batch, device):
    moved = Batch(batch.input_ids.to(device), batch.attention_mask, batch.labels.to(device))
    return moved


clip = functools.partial(nn.utils.clip_grad_norm_, error_if_nonfinite=True)


def index_made_on_the_cpu(x, attention_mask):
    last = attention_mask.sum(dim=1) - 1
    return x[torch.arange(len(x)), last]


# --- wrong without any wait -------------------------------------------------------------------------------------------

def logits_read_before_they_have_come(logits, targets):
    logits.detach().to("cpu", non_blocking=True).max()
    return loss_sum(logits, targets)


def autocast_of_another_device(precision, device):
    return torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32)


def random_state_of_the_gpu_forgotten(trained):
    return torch.device("cpu")


PLANTED = {
    "ids stay on the CPU": Planted(Batch, "to", ids_stay),
    "labels stay on the CPU": Planted(Batch, "to", labels_stay),
    "positions are counted on the CPU": Planted(gpt2.GPT2Model, "forward", positions_counted_on_the_cpu),
    "the attention mask is made on the CPU": Planted(gpt2, "attention_mask_for", mask_made_on_the_cpu),
    "a layer's tensor does not move": Planted(LoRALinear, "__init__", scaling_that_does_not_move_with_its_layer),
    "a prefix lies on the CPU": Planted(Prefix, "keys_and_values", prefix_on_the_cpu, method="prefix"),
    "noise comes from the CPU's generator": Planted(Task, "loss_sum", staticmethod(noise_from_the_cpus_generator)),
    "moments stay on the CPU": Planted(state, "spread_like", moments_left_where_they_were_read, resumes=True),
    "the loss is read in each step": Planted(Task, "loss_sum", staticmethod(loss_read_in_each_step)),
    "targets are chosen by a mask": Planted(Task, "loss_sum", staticmethod(targets_chosen_by_a_mask)),
    "a batch is copied while the host waits": Planted(Batch, "to", batch_copied_while_the_host_waits),
    "the gradients' norm is looked at": Planted(nn.utils, "clip_grad_norm_", clip),
    "an index is made on the CPU": Planted(gpt2, "last_real_token", index_made_on_the_cpu),
    "logits are read before they have come": Planted(Task, "loss_sum", staticmethod(logits_read_before_they_have_come)),
    "autocast is for another device": Planted(loop, "computing_in", autocast_of_another_device),
    "the GPU's random state is forgotten": Planted(state, "_device", random_state_of_the_gpu_forgotten, resumes=True),
}
