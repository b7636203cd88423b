"""A right answer to exercises/prompt.py in other words: index_select, gather, one-hot products."""

import torch
from torch import nn


class Prompt(nn.Module):
    def __init__(self, length, words, start):
        super().__init__()
        chosen = torch.tensor([start[i % len(start)] for i in range(length)])
        self.prompt = nn.Parameter(words.weight.data.index_select(0, chosen))

    def strip(self, states):
        return states.narrow(1, len(self.prompt), states.size(1) - len(self.prompt))

    def extend_mask(self, real):
        return torch.cat([real.new_ones(real.size(0), len(self.prompt)), real], -1)

    def embed(self, tokens, words, places):
        length = len(self.prompt)
        count = length + tokens.size(1)
        text = words.weight[tokens] + places.weight[length:count]
        return torch.cat([(self.prompt + places.weight[:length]).repeat(len(tokens), 1, 1), text], 1)

    def pool(self, states, real):
        from_the_right = real.flip(1).argmax(1)
        is_last = nn.functional.one_hot(real.size(1) - 1 - from_the_right, real.size(1)).to(states.dtype)
        return torch.einsum("bt,btc->bc", is_last, self.strip(states))
