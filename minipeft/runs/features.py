"""What the loop trains on: texts, or in head-only training the features that the frozen base makes of them.

    feature = h_last (C,), the last real token's hidden state        logits = feature W^T, W (K, C) trained

Nothing below the head changes, so the base reads each text once, however many epochs follow. A text's feature takes the
place of its token ids in the batches, the head that of the model, and a validation scores features alone. Everything
that knows of this is here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from minipeft.data.batches import Batch, BucketedBatches
from minipeft.model.gpt2 import last_real_token
from minipeft.runs.plan import RunPlan
from minipeft.tasks.classification import Classification, metrics
from minipeft.tasks.evaluation import predictions
from minipeft.tasks.task import Encoded, Task


@dataclass
class Material:
    """What the loop trains, on which batches, and how a validation judges it.

    Attributes:
        model: the model or, on features, its head alone.
        validate: the metrics of the model as it stands, on the validation split.
        seconds, core_seconds: what computing the features took.
    """

    model: nn.Module
    batches: BucketedBatches
    validate: Callable[[], dict[str, Any]]
    seconds: float = 0.0
    core_seconds: float = 0.0


def material_of(plan: RunPlan, task: Task, model: nn.Module, training: Encoded, validation: Encoded) -> Material:
    """What a run trains on: features, where they are all that training needs, else texts.

    Tagging would need a feature for each token, more than a memory holds; with dropout in the base a text's features
    are others each time; and a user's own task may do anything.
    """
    size, seed, options = plan.training.batch_size, plan.training.seed, plan.options
    if options.method != "head" or type(task) is not Classification or options.recompute_features or options.dropout:
        return Material(model, BucketedBatches(training.ids, training.labels, size, seed),
                        partial(task.evaluate, model, validation, plan.device, plan.precision))
    started, core_started = time.perf_counter(), time.process_time()
    features, validation_features = (
        pooled_features(model, split.ids, plan.device, plan.precision, progress=f"{name} features")
        for name, split in (("training", training), ("validation", validation)))
    head = HeadOnFeatures(model)
    return Material(head, FeatureBatches(features, training.labels, size, seed),
                    partial(validate_head, head, validation_features, validation.labels, plan.device, task.label_names),
                    time.perf_counter() - started, time.process_time() - core_started)


class HeadOnFeatures(nn.Module):
    """A model's head alone, called as the whole model is, with the texts' features in place of their token ids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.score = model.score

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.score(input_ids)                                                            # (B, C) -> (B, K)


class FeatureBatches(BucketedBatches):
    """Batches of feature vectors, all of one length, in another random order each epoch: `ids` is (N, C)."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch number `first` on."""
        labels = torch.tensor(self.labels)
        for rows in map(torch.from_numpy, self.order(epoch)[first:]):
            yield Batch(self.ids[rows], torch.ones(len(rows), 1), labels[rows])


@torch.inference_mode()
def validate_head(head: HeadOnFeatures, features: Tensor, labels: Sequence[int], device: torch.device,
                  label_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Metrics of a head on features, (N, C)."""
    return metrics(head(features.to(device)).float().cpu(), labels, label_names)


def pooled_features(model: nn.Module, ids: Sequence[np.ndarray], device: torch.device, precision: torch.dtype,
                    batch_size: int | None = None, progress: str | None = None) -> Tensor:
    """What the head of a sequence classifier sees of every text: (N, C), in the given order.

    Args:
        batch_size: texts per forward pass; default what suits the device.
        progress: title of a progress bar; None shows none.
    """
    def pooled(batch: Batch) -> Tensor:
        hidden = model.transformer(batch.input_ids, attention_mask=batch.attention_mask)                 # (B, T, C)
        return last_real_token(hidden, batch.attention_mask).float().cpu()                               # (B, C)

    found = predictions(model, pooled, ids, [0] * len(ids), device, precision, batch_size, progress)
    return torch.stack(found)  # outside of inference mode: a head is trained on it
