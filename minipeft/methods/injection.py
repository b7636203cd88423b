"""Module surgery: a method's plan is carried out, recorded, and counted.

A method only plans: which layers stand where, and which of the model's own tensors are trained. Here the plan is
recorded on the model, which is frozen but for those tensors, and its layers are attached. `carry_out` is the one
function that puts a new method into a model; `switch.py` alone takes methods out and puts them back, by the record.
Both act through a layer's own `attach` and `detach` and through `put_parameter`.

"The bare model" is the model as it was made: names are those it has without torch.compile's or FSDP's additions.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.methods.config import MethodConfig
from minipeft.methods.layers import AdapterLayer, ReplacementLayer, forward_beside_half
from minipeft.methods.wrappers import bare_name, seeing_through, unwrapped

HALF = (torch.float16, torch.bfloat16)  # what is trained beside a base in one of these is float32


@dataclass
class Plan:
    """What a method is going to do to a model. Making a plan touches nothing, and all that can fail fails there.

    Attributes:
        layers: module name -> the layer to put there.
        trained: names of the model's own tensors to train; a new head is trained besides.
        replaced: names of the model's own tensors -> the values they get, frozen.
        keeps_base: whether a copy of the base's values is kept of what is trained; taking the method out needs it.
    """

    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    keeps_base: bool = True


@dataclass(eq=False)
class Injection:
    """The record of one injection, kept on the model.

    Tensors of the base model go by the names they have in the bare model, whatever has been put around them since.

    Attributes:
        method: its name in METHODS.
        config: a copy of the user's configuration.
        name: of the adapter. Injections of one name are one adapter, and are switched together.
        fingerprint: of the base model (see `fingerprint`), whose number format was base_dtype then.
        required_grad: parameter of the bare model -> whether it required a gradient.
        layers: module name -> the layer put there.
        trained_base: the base model's own tensors that the method trains (biases, the head).
        base_values: the base's Parameter for each of its tensors that the method changes, kept aside while the method's
            own stands in its place; None where the base's are trained as they stand.
        own_values: the method's own Parameters for these, kept aside while it is inactive.
        finer: names of those that are float32 beside a half-precision base.
        active: whether the method is in the model now.
        merged: module name -> the plain tensors that `merge` replaced.
    """

    method: str
    config: MethodConfig
    name: str
    fingerprint: str
    base_dtype: torch.dtype
    required_grad: dict[str, bool]
    layers: dict[str, AdapterLayer]
    trained_base: list[str]
    base_values: dict[str, nn.Parameter | None] = field(default_factory=dict)
    own_values: dict[str, nn.Parameter] = field(default_factory=dict)
    finer: set[str] = field(default_factory=set)
    active: bool = True
    merged: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def carry_out(plan: Plan, model: nn.Module, config: MethodConfig, name: str) -> nn.Module:
    """Do to the model, in place, what the plan says; freeze everything else; keep the record.

    A new head is trained by every method, since it starts random. Only the first injection freezes: what somebody has
    unfrozen since is their choice.
    """
    earlier, flags = all_injections(model), {key: p.requires_grad for key, p in base_parameters(model).items()}
    required_grad, dtype = (earlier[0].required_grad, earlier[0].base_dtype) if earlier else (flags, base_dtype(model))
    injection = Injection(config.method, copy.deepcopy(config), name, fingerprint(model), dtype, required_grad,
                          plan.layers, trained_base=list(dict.fromkeys([*plan.trained, *new_head_tensors(model)])))
    if not earlier:
        model.requires_grad_(False)
    give_own_parameters(model, injection, plan)
    for place, layer in plan.layers.items():
        layer.attach(model, place)
    earlier.append(injection)
    return model


def give_own_parameters(model: nn.Module, injection: Injection, plan: Plan) -> None:
    """Put Parameters of the adapter's own in the places of the base's tensors that it changes.

    So no other adapter, and no optimizer of another one, ever holds what this adapter trains. Where several methods of
    one adapter train the same tensor, such as the head, the first one makes the Parameter, and they share it.
    """
    parameters, taken = base_parameters(model), set().union(*(other.base_values for other in active_injections(model)))
    for key in [key for key in (*injection.trained_base, *plan.replaced) if key not in taken]:
        injection.base_values[key] = parameters[key] if plan.keeps_base else None
        if plan.keeps_base:
            value = plan.replaced.get(key, in_trained_dtype(parameters[key].detach()).clone())
            put_parameter(model, key, nn.Parameter(value, requires_grad=key in injection.trained_base))
        else:
            parameters[key].data = in_trained_dtype(parameters[key].data)
            parameters[key].requires_grad_(True)


def in_trained_dtype(tensor: Tensor) -> Tensor:
    """Half precision as float32: most small steps change no bfloat16 number, and GradScaler refuses float16."""
    return tensor.float() if tensor.dtype in HALF else tensor


def base_dtype(model: nn.Module) -> torch.dtype:
    """The number format of the base model, which its first parameter, the embeddings, is in."""
    return next(model.parameters()).dtype


def put_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make `parameter` the one that goes by this name in the bare model, whatever has been put around its module."""
    module_name, _, key = name.rpartition(".")
    module = unwrapped(model.get_submodule(module_name))
    module = unwrapped(module.base_layer) if isinstance(module, ReplacementLayer) else module
    setattr(module, key, parameter)
    vars(module).pop("forward", None)
    if base_dtype(model) in HALF and torch.float32 in (tensor.dtype for tensor in module.parameters()):
        module.forward = partial(forward_beside_half, module)


# --- look up ----------------------------------------------------------------------------------------------------------

def all_injections(model: nn.Module) -> list[Injection]:
    """Every injection a model knows of, active or not, oldest first."""
    return model.__dict__.setdefault("_injections", [])


def active_injections(model: nn.Module) -> list[Injection]:
    """The active injections, oldest first."""
    return [injection for injection in all_injections(model) if injection.active]


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters, the base's own under the names they have in the bare model."""
    return {bare_name(name).replace(".base_layer.", "."): tensor for name, tensor in model.named_parameters()}


def base_of(model: nn.Module) -> nn.Module:
    """The GPT2Model in a model with a head, or the model itself."""
    return getattr(model, "transformer", model)


def new_head_tensors(model: nn.Module) -> list[str]:
    """Names of the tensors of a head that pretraining did not make; none where there is no such head."""
    return [f"{model.head}.{name}" for name, _ in model.get_submodule(model.head).named_parameters()
            ] if getattr(model, "has_new_head", False) else []


# --- count ------------------------------------------------------------------------------------------------------------

class ParameterCount(NamedTuple):
    """Numbers of parameters; printing it gives peft's familiar line."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return (f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
                f"trainable%: {100 * self.trainable / self.total:.4f}")


@seeing_through
def trainable_parameters(model: nn.Module) -> ParameterCount:
    """How many parameters are trained, and how many there are; tied ones count once."""
    parameters = list(model.parameters())
    return ParameterCount(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


@seeing_through
def positions_left(model: nn.Module) -> int:
    """How many tokens of text fit the model's positions beside the virtual tokens of the active methods."""
    taken = sum(layer.num_virtual_tokens for injection in active_injections(model)
                for layer in injection.layers.values())
    return model.config.n_positions - taken


# --- recognize --------------------------------------------------------------------------------------------------------

def fingerprint(model: nn.Module) -> str:
    """A short name for the base model's values, to notice an adapter that is loaded on another base.

    Hashes every tensor's name and shape and some thousands of its values, evenly spaced, the head left out; -0.0 counts
    as 0.0, which it equals. What the model carries does not matter: the first injection has noted the fingerprint.

    Returns:
        16 hexadecimal digits, or nothing for a model on the meta device, which has no values.
    """
    base, digest = base_of(model), hashlib.sha256()
    if all_injections(model):
        return all_injections(model)[0].fingerprint
    if any(parameter.is_meta for parameter in base.parameters()):
        return ""
    for name, tensor in sorted((bare_name(name), tensor) for name, tensor in base.state_dict().items()):
        flat = tensor.detach().flatten()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        # -0.0 + 0.0 is 0.0.
        digest.update((flat[::max(1, flat.numel() // 4096)].float() + 0.0).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
