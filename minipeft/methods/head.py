"""Head-only training: the base model is a fixed feature extractor, and a linear classifier is trained on its output.

Since nothing below the head changes, each text's feature need be computed only once, however many epochs follow.

    logits = h_last W^T        h_last (B, C): the last real token's hidden state, constant; W (K, C) trained

Also known as linear probing: Alain and Bengio (2016), "Understanding intermediate layers using linear classifier
probes", arXiv 1610.01644.
Trained: the head alone. Costs: C K parameters; one pass over the texts, and next to nothing per epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn as nn
from torch import Tensor

from minipeft.errors import InjectionError
from minipeft.methods.config import SavedConfig
from minipeft.methods.injection import begin, record


@dataclass
class HeadConfig(SavedConfig):
    """Head-only training has nothing to choose. Its adapter files are this library's own: peft has no such method."""

    peft_type: ClassVar[str] = "MINIPEFT_HEAD"


class HeadOnFeatures(nn.Module):
    """A model's head alone, called as the whole model is, with the texts' features in place of their token ids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.score = model.score

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.score(input_ids)                                           # (B, C) -> (B, K)


def inject(model: nn.Module, config: HeadConfig, name: str = "default") -> nn.Module:
    """Freeze everything but the classification head.

    Raises:
        InjectionError: a model without one.
    """
    if getattr(model, "head", None) not in ("score", "classifier"):
        raise InjectionError(f"{type(model).__name__} has no classification head to train")
    return record(model, begin(model, "head", config, name))
