"""A right answer to exercises/adapter.py in other words: einsum, a loop over the places."""

import torch
from torch import nn


class BottleneckAdapter(nn.Module):
    def __init__(self, channels, inner, factor=1.0):
        super().__init__()
        self.factor = factor
        self.up, self.down = nn.Linear(inner, channels), nn.Linear(channels, inner)
        for tensor in self.up.parameters():
            tensor.data.fill_(0)

    def forward(self, states):
        narrow = torch.einsum("btc,mc->btm", states, self.down.weight) + self.down.bias
        narrow = narrow.clamp(min=0)
        return torch.add(states, self.up(narrow), alpha=self.factor)


class AdaptedBlock(nn.Module):
    def __init__(self, frozen, channels, inner, factor=1.0):
        super().__init__()
        self.second = BottleneckAdapter(channels, inner, factor)
        self.first = BottleneckAdapter(channels, inner, factor)
        self.block = frozen
        for tensor in frozen.parameters():
            tensor.requires_grad = False

    def forward(self, stream):
        block = self.block
        for norm, layer, adapter in ((block.ln_1, block.attn, self.first), (block.ln_2, block.mlp, self.second)):
            stream = adapter(layer(norm(stream))) + stream
        return stream
