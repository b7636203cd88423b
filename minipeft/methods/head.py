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

from minipeft.errors import InjectionError
from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan


@dataclass
class HeadConfig(MethodConfig):
    """Head-only training has nothing to choose. Its adapter files are this library's own: peft has no such method."""

    method: ClassVar[str] = "head"
    peft_type: ClassVar[str] = "MINIPEFT_HEAD"


def plan(model: nn.Module, config: HeadConfig) -> Plan:
    """Train the new head, which every method does, and nothing else.

    Raises:
        InjectionError: a model without a new head.
    """
    if not getattr(model, "has_new_head", False):
        raise InjectionError(f"{type(model).__name__} has no classification head to train")
    return Plan()
