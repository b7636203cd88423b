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

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.methods.injection import Plan, base_of
from minipeft.methods.virtual_tokens import (
    Table,
    VirtualTokens,
    VirtualTokensConfig,
    check_room,
    compute_dtype,
    place_of,
)
from minipeft.model.kv_cache import KVCache
from minipeft.settings import POSITIVE_INTEGER, setting


@dataclass
class PrefixTuningConfig(VirtualTokensConfig):
    """peft's PrefixTuningConfig.

    Raises:
        ConfigError: a value of the wrong type or out of range, when injected.
    """

    method: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"

    num_virtual_tokens: int = setting(20, "V, keys and values before the text", POSITIVE_INTEGER)
    prefix_projection: bool = setting(False, "train a network that makes the prefix")
    encoder_hidden_size: int | None = setting(None, "h, its width; default n_embd", POSITIVE_INTEGER)
    init_weights: str | None = setting(None, "how the table starts: none: normal; zero", choices=(None, "zero"))


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
        """For each block a key and a value, (batch, H, V, D)."""
        # A row of the table holds, for one virtual token, block after block, its key and then its value.
        table = self.encoder().to(dtype)                                                 # (V, L * 2 * C)
        table = table.view(self.num_virtual_tokens, self.n_layer, 2, self.n_head, -1)    # (V, L, 2, H, D)
        table = table.permute(1, 2, 3, 0, 4)                                             # (L, 2, H, V, D)
        table = table.unsqueeze(2).expand(-1, -1, batch, -1, -1, -1)                     # (L, 2, batch, H, V, D)
        return [(key, value) for key, value in table]

    def put_into(self, call: dict[str, Any], module: nn.Module) -> None:
        if call["position_ids"] is not None:
            call["position_ids"] = call["position_ids"] + self.num_virtual_tokens
        if call["cache"] is None:
            call["cache"] = KVCache()
        if call["cache"].length == 0:
            tokens = call["input_ids"] if call["inputs_embeds"] is None else call["inputs_embeds"]
            call["cache"].layers = self.keys_and_values(len(tokens), compute_dtype(module.wte.weight))


def plan(model: nn.Module, config: PrefixTuningConfig) -> Plan:
    """Put V learned keys and values before every text, in every block.

    Raises:
        ConfigError: more virtual tokens than positions.
    """
    check_room(model, config.num_virtual_tokens)
    base, device = base_of(model).config, base_of(model).wte.weight.device
    shape = (config.num_virtual_tokens, 2 * base.n_layer * base.n_embd)
    if config.prefix_projection:
        hidden = config.encoder_hidden_size or base.n_embd
        encoder = PrefixProjection(config.num_virtual_tokens, base.n_embd, hidden, shape[1], device)
    else:
        start = torch.zeros if config.init_weights == "zero" else torch.randn
        encoder = Table(start(shape, device=device))
    layer = Prefix(encoder, config.num_virtual_tokens, base.n_layer, base.n_head)
    return Plan({place_of(model, "prefix_tuning"): layer})
