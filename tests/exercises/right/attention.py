"""A right answer to exercises/attention.py."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor


def split_heads(x: Tensor, n_head: int) -> Tensor:
    B, T, C = x.shape
    return x.view(B, T, n_head, C // n_head).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    B, H, T, D = x.shape
    return x.transpose(1, 2).reshape(B, T, H * D)


def visible(T: int, S: int, attention_mask: Tensor | None = None) -> Tensor:
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if attention_mask is None:
        return mask
    itself = torch.eye(S, dtype=torch.bool)[S - T:]
    return (mask & attention_mask[:, None, None, :].bool()) | itself


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = query @ key.transpose(2, 3) / query.shape[-1]**0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ value


class Attention(nn.Module):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None,
                past: tuple[Tensor, Tensor] | None = None) -> Tensor:
        query, key, value = (split_heads(part, self.n_head) for part in self.c_attn(x).chunk(3, dim=2))
        if past is not None:
            key = torch.cat((past[0], key), dim=2)
            value = torch.cat((past[1], value), dim=2)
        mask = visible(query.shape[2], key.shape[2], attention_mask)
        return self.c_proj(merge_heads(attend(query, key, value, mask)))
