"""A right answer to exercises/merging.py in other words: einsum, diagonal matrices, load_state_dict."""

import copy

import torch


def low_rank(W, down, up, factor):
    wide = torch.promote_types(W.dtype, torch.float32)
    return W.to(wide) + torch.einsum("ri,or->oi", down.to(wide), up.to(wide)).mul(factor)


def merged_lora(matrix, down, up, alpha, rank):
    return low_rank(matrix, down, up, alpha / rank).type_as(matrix)


def merged_dora(matrix, down, up, lengths, alpha, rank):
    rows = torch.nn.functional.normalize(low_rank(matrix, down, up, alpha / rank), dim=-1)
    return torch.einsum("o,oi->oi", lengths.to(rows), rows).type_as(matrix)


def merged_ia3(matrix, vector, scale, is_input):
    diagonal = torch.diag(scale.float())
    if is_input:
        return (matrix.float() @ diagonal).type_as(matrix), vector.clone()
    return (diagonal @ matrix.float()).type_as(matrix), (diagonal @ vector.float()).type_as(vector)


def merge(layer, weight, bias):
    old = copy.deepcopy(layer.state_dict())
    layer.load_state_dict({"weight": weight, "bias": bias})
    return old


def unmerge(layer, old):
    layer.load_state_dict(old)
