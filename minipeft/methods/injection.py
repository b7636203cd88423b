"""Module surgery, shared by all methods: choose targets, put layers in, freeze, count.

A method puts layers of its own into the model: in place of a submodule, which is kept as `base_layer`, or beside the
others as one more child. Each layer declares which of its parameters are trained; a record of every injection is kept
on the model. Freezing, counting, saving and undoing (`operations.py`) read these two, and never look for "lora_" or
"bias" inside a name.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.errors import ConfigError, InjectionError
from minipeft.methods.config import compiled

HEADS = ("score", "classifier", "lm_head")


class AdapterLayer(nn.Module):
    """What a method puts into a model at one place: its own parameters, and how it gets in and out.

    Attributes:
        trained: names, below this layer, of the parameters the method trains.
        raised_rate: those among them that LoRA+ trains at a higher rate.
    """

    trained: tuple[str, ...] = ()
    raised_rate: ClassVar[tuple[str, ...]] = ()

    def attach(self, model: nn.Module, name: str) -> None:
        """Put this layer into the model, at `name`."""
        raise NotImplementedError

    def detach(self, model: nn.Module, name: str) -> None:
        """Take it out again; the model then computes what it did before."""
        raise NotImplementedError

    def merged(self) -> dict[str, Tensor]:
        """The tensors of the replaced layer with the method folded in, by name.

        Raises:
            InjectionError: the method is not a change of weights.
        """
        raise InjectionError(f"{type(self).__name__} cannot be merged: it is not a change of weights")

    def stored(self, name: str) -> dict[str, Tensor]:
        """The tensors an adapter file holds of this layer, under their names there."""
        parameters = dict(self.named_parameters())
        return {f"base_model.model.{name}.{key}": parameters[key] for key in self.trained}

    @torch.no_grad()
    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Take over the tensors of an adapter file, which have the names and shapes of `stored`."""
        for key, parameter in self.stored(name).items():
            parameter.copy_(tensors[key])


class ReplacementLayer(AdapterLayer):
    """An adapter layer that stands in the place of one of the model's own, which it keeps as `base_layer`."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def attach(self, model: nn.Module, name: str) -> None:
        self.train(self.base_layer.training)
        swap(model, name, self)

    def detach(self, model: nn.Module, name: str) -> None:
        self.base_layer.train(self.training)
        swap(model, name, self.base_layer)


class AddedLayer(AdapterLayer):
    """An adapter layer that becomes one more child of a module of the model and sees what goes into and out of it.

    No module is moved, so no name changes. `before` and `after` are PyTorch's forward hooks on the module.
    """

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments the module is to be called with."""
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The output the module is to give."""
        return output

    def attach(self, model: nn.Module, name: str) -> None:
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        self.train(module.training)
        module.add_module(child, self)
        self.hooks = [module.register_forward_pre_hook(self.before, with_kwargs=True),
                      module.register_forward_hook(self.after, with_kwargs=True)]

    def detach(self, model: nn.Module, name: str) -> None:
        parent, _, child = name.rpartition(".")
        for hook in self.hooks:
            hook.remove()
        delattr(model.get_submodule(parent), child)


def to_dtype_of(parameter: Tensor, x: Tensor) -> Tensor:
    """`x` in the dtype of the parameter it meets: adapters stay float32 on a half-precision base.

    Under autocast the matrix product chooses the dtype itself, and a cast here would only be undone.
    """
    return x if torch.is_autocast_enabled(x.device.type) else x.to(parameter.dtype)


@dataclass(eq=False)
class Injection:
    """What one injection did to a model.

    Tensors of the base model go by the names they have in the bare model, whatever has been put around them since.

    Attributes:
        method: its name in METHODS.
        config: a copy of the user's configuration.
        name: of the adapter this is (a part of); see `set_adapter`.
        fingerprint: of the base model (see `fingerprint`).
        required_grad: parameter of the bare model -> whether it required a gradient.
        layers: module name -> the layer put there.
        trained_base: the base model's own tensors that the method trains (biases, the head).
        base_values: the base's value of each of its tensors that the method changes; None where no copy is kept.
        own_values: the method's values of these, while it is detached.
        attached: whether the method is in force.
        merged: module name -> the plain tensors that `merge` replaced.
    """

    method: str
    config: Any
    name: str
    fingerprint: str
    required_grad: dict[str, bool]
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    trained_base: list[str] = field(default_factory=list)
    base_values: dict[str, Tensor | None] = field(default_factory=dict)
    own_values: dict[str, Tensor] = field(default_factory=dict)
    attached: bool = True
    merged: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def all_injections(model: nn.Module) -> list[Injection]:
    """Every injection a model knows of, in force or not, oldest first."""
    return model.__dict__.setdefault("_injections", [])


def injections(model: nn.Module) -> list[Injection]:
    """The injections in force, oldest first."""
    return [injection for injection in all_injections(model) if injection.attached]


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters, the base's own under the names they have in the bare model."""
    return {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}


def base_of(model: nn.Module) -> nn.Module:
    """The GPT2Model in a model with a head, or the model itself."""
    return getattr(model, "transformer", model)


# --- choose -----------------------------------------------------------------------------------------------------------

class Targeting(Protocol):
    """The configuration field that chooses modules, as in peft.

    `exclude_modules`, `layers_to_transform` and `layers_pattern` count too, where a method's configuration has them.
    """

    target_modules: str | Sequence[str] | None


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
    layers, layers_pattern = getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None)
    layers = [layers] if isinstance(layers, int) else list(layers or [])
    if layers and isinstance(targets, str):
        raise ConfigError("layers_to_transform needs target_modules as a list of names, not as an expression")
    if layers_pattern and not layers:
        raise ConfigError("layers_pattern needs layers_to_transform")
    modules = base_modules(model)
    linear = [name for name, module in modules.items() if isinstance(module, (nn.Linear, ReplacementLayer))]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        found = linear
    else:
        found = [name for name in modules if _matches(name, targets, layers, layers_pattern)]
    if excluded := getattr(config, "exclude_modules", None):
        found = [name for name in found if not _matches(name, excluded, [], None)]
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


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by name, without the head and without what is inside adapter layers."""
    inside = {id(part) for injection in injections(model) for layer in injection.layers.values()
              for part in layer.modules() if part is not layer or isinstance(layer, AddedLayer)}
    return {name: module for name, module in model.named_modules()
            if name and name not in HEADS and id(module) not in inside}


def _matches(name: str, targets: str | Sequence[str], layers: list[int],
             layers_pattern: str | Sequence[str] | None) -> bool:
    if isinstance(targets, str):
        return compiled(targets, "target").fullmatch(name) is not None
    if name in targets:
        return True  # a full name is meant as it stands, whatever layers are chosen
    if not any(name.endswith(f".{target}") for target in targets):
        return False
    if not layers:
        return True
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    before = "|".join(patterns) if patterns else "[^.]*"
    number = compiled(rf".*?\.(?:{before})\.(\d+)\.", "layers_pattern").match(f".{name}")
    return number is not None and int(number.group(1)) in layers


def saved_targets(target_modules: str | Sequence[str] | None, layers: dict[str, AdapterLayer]) -> str | list[str]:
    """target_modules as an adapter file should say it: "all-linear" and None do not mean the same everywhere."""
    if target_modules is None:
        return sorted({name.split(".")[-1] for name in layers})
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        return list(layers)
    return target_modules if isinstance(target_modules, str) else list(target_modules)


def block_numbers(model: nn.Module, layers_to_transform: int | Sequence[int] | None) -> list[int]:
    """The chosen blocks of a model, or all.

    Raises:
        ConfigError: a number the model does not have.
    """
    n_layer = model.config.n_layer
    if layers_to_transform is None or layers_to_transform == []:
        return list(range(n_layer))
    chosen = [layers_to_transform] if isinstance(layers_to_transform, int) else list(dict.fromkeys(layers_to_transform))
    if not all(0 <= number < n_layer for number in chosen):
        raise ConfigError(f"layers_to_transform={chosen}: this model has the blocks 0 to {n_layer - 1}")
    return chosen


def bias_names(model: nn.Module, among: Sequence[str] | None = None) -> list[str]:
    """Names of the base model's bias vectors, the head's left out; `among` keeps only those of certain modules."""
    names = []
    for name, module in base_modules(model).items():
        module = module.base_layer if isinstance(module, ReplacementLayer) else module
        if isinstance(getattr(module, "bias", None), nn.Parameter) and (among is None or name in among):
            names.append(f"{name}.bias")
    return names


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

def begin(model: nn.Module, method: str, config: Any, name: str = "default") -> Injection:
    """Note how the model is before it is touched; `record` ends what this begins."""
    earlier = all_injections(model)
    required_grad = earlier[0].required_grad if earlier else {
        parameter_name: parameter.requires_grad for parameter_name, parameter in model.named_parameters()}
    return Injection(method, copy.deepcopy(config), name, base_fingerprint(model), required_grad)


def swap(model: nn.Module, name: str, replacement: nn.Module) -> None:
    """Put `replacement` where the submodule `name` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, replacement)


def insert(model: nn.Module, injection: Injection, name: str, layer: AdapterLayer) -> None:
    """Attach a method's layer at `name`, in the mode (training or eval) of what is there."""
    layer.attach(model, name)
    injection.layers[name] = layer


def record(model: nn.Module, injection: Injection, trained_base: Sequence[str] = (),
           replaced_values: dict[str, Tensor] | None = None, keep_values: bool = True) -> nn.Module:
    """Finish an injection: note it on the model, freeze everything, and unfreeze what is declared as trained.

    The classification head is trained by every method, since a new one is random.

    Args:
        trained_base: names of the base model's own tensors that the method trains.
        replaced_values: earlier values of tensors that the method has changed without training them.
        keep_values: copy the trained ones' values, which taking the method out again needs.
    """
    head = getattr(model, "head", None)
    if head in ("score", "classifier"):
        trained_base = [*trained_base, *(f"{head}.{name}" for name, _ in getattr(model, head).named_parameters())]
    injection.trained_base = list(dict.fromkeys(trained_base))
    taken = {name for earlier in injections(model) for name in earlier.base_values}
    parameters = base_parameters(model)
    injection.base_values = {name: parameters[name].detach().clone() if keep_values else None
                             for name in injection.trained_base if name not in taken} | (replaced_values or {})
    all_injections(model).append(injection)
    freeze(model)
    return model


def freeze(model: nn.Module) -> None:
    """Let gradients flow to what the injections in force declare as trained, and to nothing else."""
    trained = {name for injection in injections(model) for name in injection.trained_base}
    trained |= {f"{name}.{parameter}" for injection in injections(model)
                for name, layer in injection.layers.items() for parameter in layer.trained}
    for name, parameter in base_parameters(model).items():
        parameter.requires_grad_(name in trained)


# --- count ------------------------------------------------------------------------------------------------------------

class ParameterCount(NamedTuple):
    """Numbers of parameters; printing it gives peft's familiar line."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return (f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
                f"trainable%: {100 * self.trainable / self.total:.4f}")


def positions_left(model: nn.Module) -> int:
    """How many tokens of text fit the model's positions beside the virtual tokens of the methods in force."""
    taken = sum(getattr(layer, "num_virtual_tokens", 0) for injection in injections(model)
                for layer in injection.layers.values())
    return model.config.n_positions - taken


def trainable_parameters(model: nn.Module) -> ParameterCount:
    """How many parameters are trained, and how many there are; tied ones count once."""
    parameters = list(model.parameters())
    return ParameterCount(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def base_fingerprint(model: nn.Module) -> str:
    """The fingerprint of a model's base, whatever the model carries."""
    earlier = all_injections(model)
    return earlier[0].fingerprint if earlier else fingerprint(model)


def fingerprint(model: nn.Module, samples: int = 4096) -> str:
    """A short name for the base model's values, to notice an adapter that is loaded on another base.

    Hashes every tensor's name and shape and up to `samples` evenly spaced values of it, the head left out. Must be
    called before anything is injected.

    Returns:
        16 hexadecimal digits, or nothing for a model on the meta device, which has no values.
    """
    base = base_of(model)
    if any(parameter.is_meta for parameter in base.parameters()):
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // samples)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
