"""A right answer to exercises/ia3.py in other words: two vectors, of which one is always ones; diagonal matrices."""

import re

import torch
from torch import nn


class IA3Linear(nn.Module):
    def __init__(self, frozen, before):
        super().__init__()
        out_features, in_features = frozen.weight.size()
        self.ia3_l = nn.Parameter(torch.full((in_features if before else out_features,), 1.0))
        self.before = before
        frozen.weight.requires_grad = False
        frozen.bias.requires_grad = False
        self.base_layer = frozen

    def merged(self):
        W, b, D = self.base_layer.weight, self.base_layer.bias, torch.diag(self.ia3_l)
        return (W @ D, b.clone()) if self.before else (D @ W, D @ b)

    def forward(self, inputs):
        weight, bias = self.merged()
        return torch.einsum("bti,oi->bto", inputs, weight) + bias


def places(layers):
    found = {}
    for name in layers:
        if match := re.search(r"\.(attn\.c_attn|mlp\.c_proj)$", name):
            found[name] = match[1].startswith("mlp")
    return found
