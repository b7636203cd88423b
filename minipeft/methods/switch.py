"""Switching: turn the methods that a model carries off and on, choose between them, merge them, remove them.

All of it changes the model itself; no forward pass asks whether a method is on. What is inactive is not in the module
tree, nor in `parameters()` or `state_dict()`: in its place stand the base's own modules and Parameters. Training moved
none of these, unless a user unfroze some, so switching off and removing leave the base's values, bit for bit. (`full`
trains the base's own: it cannot be taken out.)

    set_adapter        every other adapter out, this one in; `load_adapter` does the same with a new one
    disable_adapter    all out, for the length of a block
    merge, unmerge     layers out, folded into the weights they adapt; the layers and the kept weights back, bit for bit
    remove             out for good; no other adapter becomes active. After the last one, requires_grad too is what it
                       was before the first injection

Optimizers  Layers and Parameters that come back are the objects that left, with their requires_grad and grad. So an
            optimizer goes on where it was; while its Parameters are out, no backward pass reaches them. Where the model
            was moved to the meta device meanwhile, Parameters come back as new objects, without values.
Heads       Each adapter has a new head of its own, and biases of its own where it trains them. When all adapters are
            out, the base's own are back, untrained.
Merged      Each weight becomes what its layer's `merged()` gives, with LoRA W + s B A: lora, dora, vera and ia3 have
            one. The model computes the same up to rounding. What an adapter trains of the model's own (head, biases)
            stays in and can go on training; its layers are out. `unmerge` undoes any change of a folded weight. Until
            then merging, switching to another, disabling, injecting and `save_adapter` are refused; `remove` unmerges.
Rounding    Where the model was given another dtype meanwhile, what comes back takes it too: a Parameter that was out,
            a kept weight. Layers keep their own, and so does a Parameter that is float32 beside half precision.
Threads     One at a time may change a model, a `disable_adapter` block counting as a change; for others it is an
            InjectionError meanwhile. Forward passes are not held up: a lock around those is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn

from minipeft.errors import InjectionError
from minipeft.methods.injection import (
    HALF,
    Injection,
    active_injections,
    all_injections,
    base_dtype,
    base_parameters,
    put_parameter,
)
from minipeft.methods.turn import surgery, this_threads_turn
from minipeft.methods.wrappers import check_not_data_parallel, seeing_through, unwrapped


@seeing_through
def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters a model carries, active or not."""
    return list(dict.fromkeys(injection.name for injection in all_injections(model)))


@surgery
def set_adapter(model: nn.Module, name: str) -> nn.Module:
    """Make the adapter `name` the active one, and every other one inactive, without touching the base model.

    Raises:
        InjectionError: no adapter of this name, or one that was out when the model left the meta device; another one is
            active that is merged, has no copy of the base's values, or was injected on the meta device, before the base
            had values; or the model is wrapped for several processes.
    """
    check_not_data_parallel(model)
    itself = unwrapped(model)
    _check_name(itself, name)
    returning = [injection for injection in all_injections(itself) if injection.name == name and not injection.active]
    _check_own_values(itself, returning)
    deactivate(itself, [injection for injection in active_injections(itself) if injection.name != name])
    activate(itself, returning)
    return model


@seeing_through
@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is the base model: no adapter, and the base's own biases and head, untrained.

    Within the block all is frozen, except what a user has unfrozen of the base: requires_grad belongs to a Parameter,
    and comes and goes with it.

    After the block, even one that raises, the adapters that were active before are active again. One that was removed
    within it stays removed. An adapter that was made active and merged within it has to be unmerged there: else the
    block ends in an InjectionError. So does a block in which the model left the meta device: the adapters that were out
    have no values.

    Raises:
        InjectionError: the base's weights are not at hand: the adapter is merged, all of them were trained, or the
            adapter was injected on the meta device, before the base had values.
    """
    with this_threads_turn(model):
        active = deactivate(model, active_injections(model))
        try:
            yield model
        finally:
            returning = [injection for injection in active if injection in all_injections(model)]
            if returning:
                deactivate(model, active_injections(model))
            activate(model, returning)


@seeing_through
@surgery
def remove(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take the adapter `name`, or all of them, out for good: the base's own modules and values again.

    With the last adapter requires_grad, too, becomes what it was before the first. Without the active one none is
    active: the others wait for `set_adapter`.

    Raises:
        InjectionError: no adapter of this name; full fine-tuning, which keeps no copy of the base; or an adapter that
            was injected on the meta device, before the base had values.
    """
    if name is not None:
        _check_name(model, name)
    leaving = [injection for injection in all_injections(model) if name in (None, injection.name)]
    active = [injection for injection in leaving if injection.active]
    _check_base_values(model, active)
    if any(injection.merged for injection in active):
        unmerge(model)
    deactivate(model, active)
    all_injections(model)[:] = [injection for injection in all_injections(model) if injection not in leaving]
    if leaving and not all_injections(model):
        for parameter_name, parameter in base_parameters(model).items():
            parameter.requires_grad_(leaving[0].required_grad[parameter_name])
    return model


@seeing_through
@surgery
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Fold every active layer into the weights it adapts: no adapter module stays, and inference costs nothing extra.

    The replaced weights are kept, so that `unmerge` restores them bit for bit.

    Raises:
        InjectionError: nothing to merge, already merged, or a method that is not a change of weights. Nothing has
            changed then: all weights are computed before the first is replaced.
    """
    active = active_injections(model)
    if any(injection.merged for injection in active):
        raise InjectionError("the adapter is already merged")
    if not any(injection.layers for injection in active):
        none = "no adapter is active" if all_injections(model) else "no method is injected"
        why = f"{active[0].method} trains the model's own tensors" if active else none
        raise InjectionError(f"there is nothing to merge: {why}")
    folded = [(injection, name, layer, layer.merged()) for injection in active
              for name, layer in injection.layers.items()]  # all of them first: one that cannot be merged raises
    for injection, name, layer, tensors in folded:
        base = base_parameters(layer.base_layer)
        injection.merged[name] = {key: base[key].data for key in tensors}
        for key, tensor in tensors.items():
            base[key].data = tensor
        layer.detach(model, name)
    return model


@seeing_through
@surgery
@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`: the original weights, and the adapter layers in their places.

    Raises:
        InjectionError: nothing is merged.
    """
    if not any(injection.merged for injection in active_injections(model)):
        raise InjectionError("nothing is merged into this model")
    for injection in active_injections(model):
        for name, tensors in injection.merged.items():
            layer, base = injection.layers[name], base_parameters(injection.layers[name].base_layer)
            for key, tensor in tensors.items():
                base[key].data = tensor.to(base[key])
            _follow(model, layer)
            layer.attach(model, name)
        injection.merged.clear()
    return model


@torch.inference_mode(False)
def deactivate(model: nn.Module, leaving: list[Injection]) -> list[Injection]:
    """Take injections out of the model, which keeps them for later.

    Raises:
        InjectionError: one is merged, keeps no copy of the base, or was injected on the meta device, before the
            base had values.
    """
    if any(injection.merged for injection in leaving):
        raise InjectionError("the adapter is merged into the weights: call unmerge first")
    _check_base_values(model, leaving)
    for injection in reversed(leaving):
        parameters = base_parameters(model)
        for name, base_value in injection.base_values.items():
            injection.own_values[name] = parameters[name]
            # Trained in float32 beside a half-precision base: neither is to take the other's dtype.
            finer = base_dtype(model) in HALF and parameters[name].dtype == torch.float32
            (injection.finer.add if finer else injection.finer.discard)(name)
            _put_back(model, name, base_value, parameters[name], keep_dtype=finer)
        for name, layer in reversed(injection.layers.items()):
            layer.detach(model, name)
        injection.active = False
    return leaving


@torch.inference_mode(False)
def activate(model: nn.Module, returning: list[Injection]) -> None:
    """Put inactive injections back into the model.

    Raises:
        InjectionError: one was out when the model left the meta device.
    """
    _check_own_values(model, returning)
    for injection in returning:
        for name, layer in injection.layers.items():
            _follow(model, layer)
            layer.attach(model, name)
        parameters = base_parameters(model)
        for name, own_value in injection.own_values.items():
            finer = name in injection.finer and parameters[name].dtype in HALF
            _put_back(model, name, own_value, parameters[name], keep_dtype=finer)
        injection.own_values.clear()
        injection.active = True


def _put_back(model: nn.Module, name: str, parameter: nn.Parameter, like: nn.Parameter, keep_dtype: bool) -> None:
    """Put a Parameter that was kept aside back into the model, moved to the device and dtype the model now has.

    Args:
        like: the Parameter in whose place it goes.
        keep_dtype: only to its device: one of the two is float32, the other in half precision, and this is to stay so.
    """
    dtype = parameter.dtype if keep_dtype else like.dtype
    if parameter.is_meta != like.is_meta:  # setting `data` cannot turn a tensor without values into one with values
        parameter = nn.Parameter(parameter.to(like.device, dtype), requires_grad=parameter.requires_grad)
    parameter.data = parameter.data.to(like.device, dtype)
    put_parameter(model, name, parameter)


def _check_name(model: nn.Module, name: str) -> None:
    if name not in adapter_names(model):
        raise InjectionError(f"there is no adapter {name!r}; there are {', '.join(adapter_names(model)) or 'none'}")


def _check_base_values(model: nn.Module, leaving: list[Injection]) -> None:
    parameters = base_parameters(model)
    for injection in leaving:
        if None in injection.base_values.values():
            raise InjectionError(f"{injection.method} keeps no copy of the base model's weights: load it anew")
        for name, value in injection.base_values.items():
            if value.is_meta and not parameters[name].is_meta:
                raise InjectionError(f"the base's own {name} has no values: the adapter was injected while the model "
                                     "was on the meta device; load the base first, and inject then")


def _check_own_values(model: nn.Module, returning: list[Injection]) -> None:
    if next(model.parameters()).is_meta:
        return
    for injection in returning:
        tensors = [*injection.own_values.values()]
        for layer in injection.layers.values():
            tensors += [*layer.parameters(), *layer.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            raise InjectionError(f"the adapter {injection.name!r} has no values: it was out of the model when this "
                                 "left the meta device; remove it, and inject or load it anew")


def _follow(model: nn.Module, layer: nn.Module) -> None:
    """Move a layer that was out of the tree to the device where the model is now; its dtype stays."""
    layer.to(device=next(model.parameters()).device)
