"""BitFit: training the bias terms, and nothing else.

The weight matrices stay as they are; every vector that is added somewhere is trained. The variant "layer_norm" trains
the LayerNorms' gains and offsets instead.

    y = x W^T + b          b (out,) of every linear layer and LayerNorm is trained, W is frozen

Papers: Ben Zaken, Ravfogel, Goldberg (2021), "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models", arXiv 2106.10199. Qi, Ruan, Zuo, Li (2022), "Parameter-Efficient Tuning on Layer
Normalization for Pre-trained Language Models", 2211.08682, for the variant.
Trained: the biases (or the LayerNorms) and the classification head; the base's values are kept to go back to.
Costs: L (11 C) + C parameters at an inner width of 4 C (or L (4 C) + 2 C): for GPT-2 102,144 (or 38,400).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn as nn

from minipeft.methods.config import MethodConfig
from minipeft.methods.injection import Plan
from minipeft.methods.targets import base_modules, bias_names
from minipeft.settings import setting


@dataclass
class BitFitConfig(MethodConfig):
    """Which of the vectors to train. Its adapter files are this library's own: peft has no such method.

    Raises:
        ConfigError: an unknown choice, when injected.
    """

    method: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "MINIPEFT_BITFIT"

    train: str = setting("bias", "what to train", choices=("bias", "layer_norm"))


def plan(model: nn.Module, config: BitFitConfig) -> Plan:
    """Train the base model's bias vectors, or its LayerNorms; no layer is replaced."""
    if config.train == "bias":
        return Plan(trained=bias_names(model))
    layer_norms = [name for name, module in base_modules(model).items() if isinstance(module, nn.LayerNorm)]
    return Plan(trained=[f"{name}.{tensor}" for name in layer_norms for tensor in ("weight", "bias")])
