"""Module surgery, shared by all methods: choose targets, swap a submodule in place, freeze, count, undo.

A method replaces some submodules of the model by its own layers, which hold the replaced one as `base_layer`. Each
layer declares which of its parameters are trained; a record of every injection is kept on the model. Freezing,
counting, saving and undoing read these two, and never look for "lora_" or "bias" inside a name.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.errors import ConfigError, InjectionError
from minipeft.methods.fields import compiled

HEADS = ("score", "classifier", "lm_head")


class AdapterLayer(nn.Module):
    """A layer that a method puts in place of one of the base model's.

    Attributes:
        trained: names, below this layer, of the parameters the method trains.
        base_layer: the layer it replaced.
        enabled: False makes the layer pass its input to `base_layer` alone.
    """

    trained: ClassVar[tuple[str, ...]] = ()
    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True

    def merged_weight(self) -> Tensor:
        """The base layer's weight with the method folded in.

        Raises:
            InjectionError: the method is not a change of weights.
        """
        raise InjectionError(f"{type(self).__name__} cannot be merged: it is not a change of weights")


def to_dtype_of(parameter: Tensor, x: Tensor) -> Tensor:
    """`x` in the dtype of the parameter it meets: adapters stay float32 on a half-precision base.

    Under autocast the matrix product chooses the dtype itself, and a cast here would only be undone.
    """
    return x if torch.is_autocast_enabled(x.device.type) else x.to(parameter.dtype)


@dataclass
class Injection:
    """What one injection did to a model.

    Attributes:
        method: its name in METHODS.
        config: a copy of the user's configuration.
        fingerprint: of the base model (see `fingerprint`).
        required_grad: parameter name -> whether it required a gradient before.
        layers: module name -> the layer put there.
        base_values: name -> value before training, of each of the base model's own tensors that the method trains
            (biases, the head); None where no copy is kept.
        merged: module name -> the plain weight that `merge` replaced.
    """

    method: str
    config: Any
    fingerprint: str
    required_grad: dict[str, bool]
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    base_values: dict[str, Tensor | None] = field(default_factory=dict)
    merged: dict[str, Tensor] = field(default_factory=dict)

    def trained_names(self) -> list[str]:
        """Names, from the model's root, of every tensor this injection trains."""
        own = [f"{name}.{parameter}" for name, layer in self.layers.items() for parameter in layer.trained]
        return own + list(self.base_values)


def injections(model: nn.Module) -> list[Injection]:
    """The injections a model carries, oldest first."""
    return model.__dict__.setdefault("_injections", [])


# --- choose -----------------------------------------------------------------------------------------------------------

class Targeting(Protocol):
    """The configuration fields that choose modules, as in peft."""

    target_modules: str | Sequence[str] | None
    exclude_modules: str | Sequence[str] | None
    layers_to_transform: int | Sequence[int] | None
    layers_pattern: str | None


def find_targets(model: nn.Module, config: Targeting, default: Sequence[str]) -> list[str]:
    """Names of the linear layers a configuration targets, by peft's rules.

    A list names modules by their full name or by its end at a dot ("c_proj" matches attention's and the MLP's,
    "attn.c_proj" attention's only). A string is a regular expression for the full name, or "all-linear".
    `layers_to_transform` keeps only blocks of these numbers. The head is never a target.

    Raises:
        ConfigError: contradictory fields, or a regular expression that does not compile.
        InjectionError: nothing matched, or a match is not a linear layer.
    """
    targets = default if config.target_modules is None else config.target_modules
    layers = config.layers_to_transform
    layers = [layers] if isinstance(layers, int) else list(layers or [])
    if layers and isinstance(targets, str):
        raise ConfigError("layers_to_transform needs target_modules as a list of names, not as an expression")
    if config.layers_pattern and not layers:
        raise ConfigError("layers_pattern needs layers_to_transform")
    linear = [name for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and name and name not in HEADS]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        found = linear
    else:
        found = [name for name, _ in model.named_modules()
                 if name and name not in HEADS and _matches(name, targets, layers, config.layers_pattern)]
    if config.exclude_modules:
        found = [name for name in found if not _matches(name, config.exclude_modules, [], None)]
    if not found:
        wanted = targets if isinstance(targets, str) else ", ".join(targets)
        where = f" in layers {layers}" if layers else ""
        raise InjectionError(f"target_modules {wanted!r} match nothing{where}; nearest names: "
                             f"{', '.join(_nearest(wanted, linear))}")
    for name in found:
        module = model.get_submodule(name)
        if isinstance(module, AdapterLayer):
            raise InjectionError(f"{name} already carries a {type(module).__name__}: remove or merge it first")
        if not isinstance(module, nn.Linear):
            raise InjectionError(f"target {name} is a {type(module).__name__}; only linear layers can be targeted: "
                                 f"{', '.join(sorted({n.split('.', 3)[-1] for n in linear}))}")
    return found


def _matches(name: str, targets: str | Sequence[str], layers: list[int], layers_pattern: str | None) -> bool:
    if isinstance(targets, str):
        return compiled(targets, "target").fullmatch(name) is not None
    if name in targets:
        return True  # a full name is meant as it stands, whatever layers are chosen
    if not any(name.endswith(f".{target}") for target in targets):
        return False
    if not layers:
        return True
    number = compiled(rf".*?\.{layers_pattern or '[^.]*'}\.(\d+)\.", "layers_pattern").match(f".{name}")
    return number is not None and int(number.group(1)) in layers


def _nearest(wanted: str, names: list[str]) -> list[str]:
    endings = sorted({".".join(name.split(".")[-k:]) for name in names for k in (1, 2)})
    words = [word for word in re.split(r"[^\w]+", wanted) if word]
    close = [match for word in words for match in difflib.get_close_matches(word, endings, n=3, cutoff=0.4)]
    return list(dict.fromkeys(close)) or endings


def pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as peft reads rank_pattern."""
    for pattern, value in patterns.items():
        if compiled(rf"(.*\.)?({pattern})$", "pattern").match(name):
            return value
    return default


# --- cut --------------------------------------------------------------------------------------------------------------

def begin(model: nn.Module, method: str, config: Any) -> Injection:
    """Note how the model is before it is touched; `record` ends what this begins."""
    return Injection(method, copy.deepcopy(config), fingerprint(model),
                     {name: parameter.requires_grad for name, parameter in model.named_parameters()})


def swap(model: nn.Module, name: str, replacement: nn.Module) -> None:
    """Put `replacement` where the submodule `name` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, replacement)


def insert(model: nn.Module, injection: Injection, name: str, layer: AdapterLayer) -> None:
    """Put a method's layer where the submodule `name` is, in the mode (training or eval) that one was in."""
    layer.train(layer.base_layer.training)
    swap(model, name, layer)
    injection.layers[name] = layer


def record(model: nn.Module, injection: Injection, trained_base: Sequence[str] = (),
           keep_values: bool = True) -> nn.Module:
    """Finish an injection: note it on the model, freeze everything, and unfreeze what is declared as trained.

    The classification head is trained by every method, since a new one is random.

    Args:
        trained_base: names of the base model's own tensors that the method trains.
        keep_values: copy their values, which `disable_adapter` and `remove` need.
    """
    head = getattr(model, "head", None)
    if head in ("score", "classifier"):
        trained_base = [*trained_base, *(f"{head}.{name}" for name, _ in getattr(model, head).named_parameters())]
    taken = {name for earlier in injections(model) for name in earlier.base_values}
    parameters = dict(model.named_parameters())
    injection.base_values = {name: parameters[name].detach().clone() if keep_values else None
                             for name in dict.fromkeys(trained_base) if name not in taken}
    injections(model).append(injection)
    freeze(model)
    return model


def freeze(model: nn.Module) -> None:
    """Let gradients flow to the declared parameters only."""
    trained = {name for injection in injections(model) for name in injection.trained_names()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def remove(model: nn.Module) -> nn.Module:
    """Take every injection out again: the base model's own modules, values and requires_grad, bit for bit.

    Raises:
        InjectionError: full fine-tuning, which keeps no copy of the base.
    """
    _need_base_values(model)
    if any(injection.merged for injection in injections(model)):
        unmerge(model)
    parameters = dict(model.named_parameters())
    for injection in reversed(injections(model)):
        with torch.no_grad():
            for name, value in injection.base_values.items():
                parameters[name].copy_(value)
        for name, layer in injection.layers.items():
            swap(model, name, layer.base_layer)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(injection.required_grad[name])
    injections(model).clear()
    return model


def _need_base_values(model: nn.Module) -> None:
    for injection in injections(model):
        if None in injection.base_values.values():
            raise InjectionError(f"{injection.method} keeps no copy of the base model's weights: load it anew")


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes what the base model did: no adapter, untrained biases and head.

    Raises:
        InjectionError: the base's weights are not at hand: the adapter is merged, or all of them were trained.
    """
    if any(injection.merged for injection in injections(model)):
        raise InjectionError("the adapter is merged into the weights: call unmerge first")
    _need_base_values(model)
    parameters = dict(model.named_parameters())
    layers = [layer for injection in injections(model) for layer in injection.layers.values()]
    base_values = {name: value for injection in injections(model) for name, value in injection.base_values.items()}
    trained_values = {name: parameters[name].data for name in base_values}
    were_enabled = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        for name, value in base_values.items():
            parameters[name].data = value.to(parameters[name])
        yield model
    finally:
        for layer, was_enabled in zip(layers, were_enabled):
            layer.enabled = was_enabled
        for name, value in trained_values.items():
            parameters[name].data = value


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Fold every injected layer into the weight it adapts: no adapter module stays, and inference costs nothing extra.

    The replaced weights are kept, so that `unmerge` restores them bit for bit.

    Raises:
        InjectionError: nothing to merge, already merged, or a method that is not a change of weights.
    """
    if not any(injection.layers for injection in injections(model)):
        raise InjectionError("there is nothing to merge: no method is injected into this model")
    if any(injection.merged for injection in injections(model)):
        raise InjectionError("the adapter is already merged")
    weights = [(injection, name, layer, layer.merged_weight())
               for injection in injections(model) for name, layer in injection.layers.items()]
    for injection, name, layer, weight in weights:
        injection.merged[name] = layer.base_layer.weight.data
        layer.base_layer.weight.data = weight
        swap(model, name, layer.base_layer)
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`: the original weights, and the adapter layers in their places.

    Raises:
        InjectionError: nothing is merged.
    """
    if not any(injection.merged for injection in injections(model)):
        raise InjectionError("nothing is merged into this model")
    for injection in injections(model):
        for name, weight in injection.merged.items():
            layer, plain = injection.layers[name], model.get_submodule(name)
            # The kept weight and layer were not part of the model while it was merged: follow where it has gone since.
            layer.to(device=plain.weight.device)
            layer.base_layer.weight.data = weight.to(plain.weight)
            layer.train(plain.training)
            swap(model, name, layer)
        injection.merged.clear()
    return model


# --- count ------------------------------------------------------------------------------------------------------------

class ParameterCount(NamedTuple):
    """Numbers of parameters; printing it gives peft's familiar line."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return (f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
                f"trainable%: {100 * self.trainable / self.total:.4f}")


def trainable_parameters(model: nn.Module) -> ParameterCount:
    """How many parameters are trained, and how many there are; tied ones count once."""
    parameters = list(model.parameters())
    return ParameterCount(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def fingerprint(model: nn.Module, samples: int = 4096) -> str:
    """A short name for the base model's values, to notice an adapter that is loaded on another base.

    Hashes every tensor's name and shape and up to `samples` evenly spaced values of it, the head left out. Must be
    called before anything is injected.

    Returns:
        16 hexadecimal digits, or nothing for a model on the meta device, which has no values.
    """
    base = getattr(model, "transformer", model)
    if any(parameter.is_meta for parameter in base.parameters()):
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // samples)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
