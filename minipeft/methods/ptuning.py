"""P-tuning (v1): a prompt that a small network produces.

As prompt tuning, but the V vectors are not trained directly: they are what an MLP or an LSTM makes of V trained
embeddings, which ties them together and makes them easier to train. After training only the result is kept.

    P = encoder(E)        E (V, C) trained, encoder an MLP (C, h, h, C) or a bidirectional LSTM and an MLP (2h, 2h, C)
    x = [P; wte[ids]] + wpe[0 .. V + T - 1]

Paper: Liu, Zheng, Du, Ding, Qian, Yang, Tang (2021), "GPT Understands, Too", arXiv 2103.10385.
Trained: E, the encoder, and the classification head. Stored: P alone.
Costs: V C + C h + h^2 + h C + 2 h + C parameters with the MLP; as many as prompt tuning once trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.methods.injection import Plan, base_of
from minipeft.methods.prompt import Prompt
from minipeft.methods.virtual_tokens import VirtualTokensConfig, check_room, place_of
from minipeft.settings import POSITIVE_INTEGER, PROBABILITY, setting


@dataclass
class PromptEncoderConfig(VirtualTokensConfig):
    """peft's PromptEncoderConfig.

    Raises:
        ConfigError: a value of the wrong type or out of range, when injected.
    """

    method: ClassVar[str] = "ptuning"
    peft_type: ClassVar[str] = "P_TUNING"

    num_virtual_tokens: int = setting(20, "V, tokens before the text", POSITIVE_INTEGER)
    encoder_reparameterization_type: str = setting("MLP", "network that makes the prompt", choices=("MLP", "LSTM"))
    encoder_hidden_size: int | None = setting(None, "h, its width; default n_embd", POSITIVE_INTEGER)
    encoder_num_layers: int = setting(2, "layers of the LSTM", POSITIVE_INTEGER)
    encoder_dropout: float = setting(0.0, "dropout between the LSTM's layers", PROBABILITY)


class PromptEncoder(nn.Module):
    """V trained embeddings and the network that turns them into the prompt."""

    def __init__(self, width: int, hidden: int, config: PromptEncoderConfig, device: torch.device) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_virtual_tokens, width, device=device)
        self.lstm = None
        if config.encoder_reparameterization_type == "LSTM":
            self.lstm = nn.LSTM(width, hidden, config.encoder_num_layers, dropout=config.encoder_dropout,
                                bidirectional=True, batch_first=True, device=device)
            sizes = [2 * hidden, 2 * hidden, width]
        else:
            sizes = [width, hidden, hidden, width]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b, device=device), nn.ReLU())]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def forward(self) -> Tensor:
        x = self.embedding.weight                                             # (V, C)
        if self.lstm is not None:
            x = self.lstm(x[None])[0][0]                                      # (V, 2h)
        return self.mlp_head(x)                                               # (V, C)


def plan(model: nn.Module, config: PromptEncoderConfig) -> Plan:
    """Put V vectors, made by a trained network, before every text.

    Raises:
        ConfigError: more virtual tokens than positions.
    """
    check_room(model, config.num_virtual_tokens)
    wte = base_of(model).wte.weight                                           # (vocab, C)
    hidden = config.encoder_hidden_size or wte.shape[1]
    encoder = PromptEncoder(wte.shape[1], hidden, config, wte.device)
    return Plan({place_of(model, "prompt_tuning"): Prompt(encoder, config.num_virtual_tokens)})
