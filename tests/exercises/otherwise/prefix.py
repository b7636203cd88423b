"""A right answer to exercises/prefix.py in other words: columns cut out, einsum, one softmax by its parts."""

import torch
from torch import einsum, nn


class Prefix(nn.Module):
    def __init__(self, virtual, blocks, heads, channels):
        super().__init__()
        self.table = nn.Parameter(torch.empty(virtual, blocks * 2 * channels).normal_())
        self.heads, self.channels = heads, channels

    def positions(self, length):
        return len(self.table) + torch.arange(length)

    def keys_and_values(self, block, texts):
        start = 2 * block * self.channels
        columns = self.table[:, start:start + 2 * self.channels].split(self.channels, dim=1)
        return tuple(torch.stack(part.chunk(self.heads, 1)).repeat(texts, 1, 1, 1) for part in columns)

    def attend(self, block, q, k, v, padding=None):
        texts, size = len(q), q.shape[-1]
        key, value = self.keys_and_values(block, texts)
        to_prefix = einsum("bhtd,bhvd->bhtv", q, key).div(size ** 0.5).exp()
        to_text = einsum("bhtd,bhsd->bhts", q, k).div(size ** 0.5).exp().tril()
        if padding is not None:
            to_text = to_text * padding[:, None, None, :]
        weighted = einsum("bhtv,bhvd->bhtd", to_prefix, value) + einsum("bhts,bhsd->bhtd", to_text, v)
        return weighted / (to_prefix.sum(-1) + to_text.sum(-1)).unsqueeze(-1)
