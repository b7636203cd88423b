"""Prefix tuning: learned keys and values before the text, in every block.

Attention finds, before the text's own keys and values, V more that no token produced: a learned key-value cache. They
are all that is trained. Unlike a prompt's vectors they act on every block directly and pass through none.

    attention(q, [P_k; k], [P_v; v])        P_k, P_v (V, C) of each block trained; every query sees all V

With `prefix_projection` the table is made by a trained network, P = tanh(E W_1^T + b_1) W_2^T + b_2, of which only the
result is stored.

Paper: Li, Liang (2021), "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190.
Trained: the prefix (or the network that makes it) and the classification head.
Costs: 2 V L C parameters: GPT-2 at V = 20, 368,640; with the network V C + C h + h + 2 L C h + 2 L C to train. Not the
base model at step 0: even zero keys take their share of the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.methods.config import check_fields
from minipeft.methods.injection import base_of, begin, insert, record
from minipeft.methods.virtual_tokens import SavedAsPrompt, Table, VirtualTokens, check_room, compute_dtype, place_of
from minipeft.model.gpt2 import KVCache


@dataclass
class PrefixTuningConfig(SavedAsPrompt):
    """peft's PrefixTuningConfig.

    Raises:
        ConfigError: a value of the wrong type or out of range, when injected.
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    num_virtual_tokens: int = field(default=20, metadata={"help": "V, keys and values before the text"})
    prefix_projection: bool = field(default=False, metadata={"help": "train a network that makes the prefix"})
    encoder_hidden_size: int | None = field(default=None, metadata={"help": "h, its width; default n_embd"})
    init_weights: str | None = field(
        default=None, metadata={"help": "how the table starts: none: normal; zero", "choices": (None, "zero")})


class PrefixProjection(nn.Module):
    """V trained embeddings and the two layers that widen them to keys and values."""

    def __init__(self, num_virtual_tokens: int, width: int, hidden: int, out: int, device: torch.device) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_virtual_tokens, width, device=device)
        self.transform = nn.Sequential(nn.Linear(width, hidden, device=device), nn.Tanh(),
                                       nn.Linear(hidden, out, device=device))

    def forward(self) -> Tensor:
        return self.transform(self.embedding.weight)                          # (V, C) -> (V, h) -> (V, 2 L C)


class Prefix(VirtualTokens):
    """Keys and values that every block's attention finds in its cache before the first token."""

    def __init__(self, encoder: nn.Module, num_virtual_tokens: int, n_layer: int, n_head: int) -> None:
        super().__init__(encoder, num_virtual_tokens)
        self.n_layer, self.n_head = n_layer, n_head

    def keys_and_values(self, batch: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """For each block a key and a value, (B, H, V, D)."""
        table = self.encoder().to(dtype)                                                      # (V, 2 L C)
        table = table.view(self.num_virtual_tokens, 2 * self.n_layer, self.n_head, -1)        # (V, 2L, H, D)
        table = table.permute(1, 2, 0, 3).unsqueeze(1).expand(-1, batch, -1, -1, -1)          # (2L, B, H, V, D)
        return [(table[2 * layer], table[2 * layer + 1]) for layer in range(self.n_layer)]

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        _, call = super().before(module, args, kwargs)
        if call.get("position_ids") is not None:
            call["position_ids"] = call["position_ids"] + self.num_virtual_tokens
        if call.get("cache") is None:
            call["cache"] = KVCache()
        if call["cache"].length == 0:
            tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]
            call["cache"].layers = self.keys_and_values(len(tokens), compute_dtype(module.wte.weight))
        return (), call


def inject(model: nn.Module, config: PrefixTuningConfig, name: str = "default") -> nn.Module:
    """Put V learned keys and values before every text, in every block.

    Raises:
        ConfigError: a bad value, or more virtual tokens than positions.
    """
    check_fields(config)
    check_room(model, config.num_virtual_tokens)
    wte, base = base_of(model).wte.weight, base_of(model).config
    hidden = base.n_embd if config.encoder_hidden_size is None else config.encoder_hidden_size
    if hidden < 1:
        raise ConfigError(f"encoder_hidden_size must be a positive integer, got {hidden}")
    shape = (config.num_virtual_tokens, 2 * base.n_layer * base.n_embd)
    if config.prefix_projection:
        encoder = PrefixProjection(config.num_virtual_tokens, base.n_embd, hidden, shape[1], wte.device)
    else:
        start = torch.zeros if config.init_weights == "zero" else torch.randn
        encoder = Table(start(shape, device=wte.device))
    injection = begin(model, "prefix", config, name)
    insert(model, injection, place_of(model, "prefix_tuning"),
           Prefix(encoder, config.num_virtual_tokens, base.n_layer, base.n_head))
    return record(model, injection)
