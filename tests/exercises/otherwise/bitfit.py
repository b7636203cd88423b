"""A right answer to exercises/bitfit.py in other words: by modules, by einsum, by state dictionaries."""

import copy

import torch


def trained_names(network, new):
    names = []
    for place, module in network.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            if key == "bias" or place == new or place.startswith(f"{new}."):
                names.append(f"{place}.{key}".lstrip("."))
    return names


def bitfit(network, new):
    chosen = set(trained_names(network, new))
    for name, tensor in network.named_parameters():
        tensor.requires_grad = name in chosen


def bias_gradient(slope):
    return torch.einsum("bto->o", slope)


def to_save(network, new):
    state, chosen = network.state_dict(), trained_names(network, new)
    return copy.deepcopy({name: state[name] for name in chosen})


def load(network, tensors):
    left = network.load_state_dict(tensors, strict=False)
    assert not left.unexpected_keys
