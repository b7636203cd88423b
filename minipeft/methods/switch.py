"""Switching: turn the methods that a model carries off and on, choose between them, merge them, remove them.

    inject(model, LoraConfig())                        # an adapter, "default", which is active
    load_adapter(model, "checkpoints/letters", "b")    # now "b" is active, and "default" waits
    set_adapter(model, "default")                      # "default" is active, and "b" waits
    with disable_adapter(model):
        base_logits = model(ids)                       # both wait: the base model
    merge(model)                                       # plain layers that compute what "default" computes
    unmerge(model)                                     # its own layers again
    remove(model)                                      # the base model, which carries nothing

All of it changes the model itself; no forward pass asks whether a method is on. What is inactive is not in the module
tree, nor in `parameters()` or `state_dict()`: in its place stand the base's own modules and Parameters. Training moved
none of these, unless a user unfroze some. So where the model kept its dtype, switching off and removing leave the
base's values, bit for bit. (`full` trains the base's own: it cannot be taken out.)

    set_adapter        every other adapter out, this one in; `load_adapter` does the same with a new one
    disable_adapter    all out, for the length of a block
    merge, unmerge     layers out, folded into the weights they adapt; the layers and the kept weights back
    remove             out for good; no other adapter becomes active, and while others wait, the base is frozen. After
                       the last one, requires_grad is what it was before the first injection

Adapters    `inject` puts one method into a model: one injection. All injections of one name are one adapter, and are
            switched, merged and removed together, as LoRA and BitFit under the name "default", which is what `inject`
            takes where none is given. One adapter at most is active: methods under several names never add up. Where
            one is active, `inject` under another name is an InjectionError, and so is `inject` under the name of one
            that waits. `load_adapter` adds one beside others; so does `inject` within a `disable_adapter` block.
Record      An Injection (injection.py) for each, in a list that lies on the model: name, method, config, `active`; the
            layers by their places; `base_values`, the base's Parameters for which the method has its own, and
            `own_values`, the method's, while they are out; `merged`, the weights that `merge` replaced. A deepcopy of
            the model has its own.
Optimizers  Layers and Parameters that come back are the objects that left, with their requires_grad and grad. So an
            optimizer goes on where it was; while its Parameters are out, no backward pass reaches them. If the model
            was moved or given another dtype meanwhile, the values follow, but not every grad, nor what an optimizer
            keeps: make a new optimizer, as after torch's own `model.to`. If it was moved to the meta device, Parameters
            come back as new objects. If it was moved off that device, what was out has no values, and stays out.
Positions   Nothing of a method stays in the forward pass while it is out: without prompt, ptuning or prefix a text
            begins at position 0 and has the V virtual tokens' room for itself, and the mask has its own width. What a
            KVCache holds was computed by the adapter that was in place: begin a new one after a switch.
Files       `save_adapter` writes the active adapter alone, under the method's own names; its file has no switch in it.
            So each adapter has a folder, and `load_adapter` brings several together.
Heads       Each adapter has a new head of its own, and biases of its own where it trains them. When all adapters are
            out, the base's own are back, untrained.
Mode        What comes back takes the model's present mode, training or eval.
Merged      Each weight W (out, in) that a layer adapts becomes what the layer's `merged()` gives; A is (r, in), B
            (out, r), s = lora_alpha / r, with rsLoRA lora_alpha / sqrt(r):
                lora   W + s B A
                dora   m (W + s B A) / ||W + s B A||, each row divided by its length and times its m (out,)
                vera   W + diag(b) B diag(d) A, b (out,), d (r,)
                ia3    l W, each row times its l (out, 1), and the bias too; in feed-forward targets each column times
                       its l (1, in), and the bias stays
            By hand: W = 1, s = 2, B = 3, A = 0.5 give 4, and the layer gives 4 x, as x + 2 * 3 * 0.5 x did.
            The others do not merge. adapter has a nonlinear function inside; prompt, ptuning and prefix take positions;
            full, head and bitfit train the model's own tensors, which need no merging. What an adapter trains of these
            (head, biases) stays in and can go on training. A change of a folded weight is lost in `unmerge`. Until then
            merging, switching to another, disabling, injecting and `save_adapter` are refused; removing it unmerges.
            `state_dict` has the base's names, and `save_pretrained` writes a plain model.
Rounding    What is merged is computed in the finer type of W and the method's float32, even under autocast, and rounded
            once to W's. In eval mode the model computes the same up to rounding: where an adapter moved mini's logits
            by 1 to 2, merging moved them by up to 3e-6 in float32, 0.08 in bfloat16. A merged layer has no dropout.
Dtype       Where the model was given another dtype meanwhile, what comes back takes it too: a Parameter that was out,
            a kept weight. Layers keep their own, and so does a Parameter that is float32 beside half precision.
Threads     One at a time may change a model, a `disable_adapter` block counting as a change; for others it is an
            InjectionError meanwhile. Forward passes are not held up: a lock around those is the caller's.
Cost        Switching copies nothing: it takes up to 0.04 s for GPT-2 124M on a CPU. What waits stays in memory: its
            layers, and of the head and biases both the base's and its own; `remove` frees it. A `disable_adapter` block
            is two switches. `merge` takes one product (out, r) (r, in) per LoRA layer, 0.9 s for all 48 matrices, and
            `unmerge` 0.1 s. The replaced weights lie where they were until `unmerge`: for those 48 matrices
            12 * 12 * 768^2 = 84,934,656 numbers, 340 MB. A merged model's forward pass costs what the base's costs.

Unlike peft: there the layers of every adapter stay in the model, inside a PeftModel, and each forward pass asks whether
they are disabled or merged. Several adapters may be active at once, and add up. `merge_adapter` adds s B A to the
weight in place, and `unmerge_adapter` subtracts it, so that rounding is left over. A second merge and an unmerge of
nothing warn; `set_adapter` and a forward pass that is disabled unmerge. `set_adapter` sets requires_grad to True.
`delete_adapter` makes another adapter active.

Paper: merging is LoRA's, Hu et al. 2021, arXiv 2106.09685, section 4.1. The rest has none.
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
from minipeft.methods.turn import check_turn, surgery
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
            had values; the model is wrapped for several processes; or another thread is changing it.
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
    and comes and goes with it. Without an adapter nothing happens.

    After the block, even one that raises, the adapter that was active before is active again, and one that was made
    active within the block waits. That one has to be unmerged by then, and must not be `full`: else the block ends in
    an InjectionError. So does a block in which the model left the meta device: the adapters that were out have no
    values. If none was active before, or if it was removed within the block, the model stays as the block leaves it.

    Raises:
        InjectionError: the base's weights are not at hand: the adapter is merged, all of them were trained, or the
            adapter was injected on the meta device, before the base had values. Or another thread is changing the
            model.
    """
    with check_turn(model):
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
    active: the others wait for `set_adapter`, and the base's own head and biases are frozen. Without a name and without
    an adapter nothing happens.

    Raises:
        InjectionError: no adapter of this name; full fine-tuning, which keeps no copy of the base; an adapter that was
            injected on the meta device, before the base had values; or another thread is changing the model.
    """
    if name is not None:
        _check_name(model, name)
    leaving = [injection for injection in all_injections(model) if name in (None, injection.name)]
    active = [injection for injection in leaving if injection.active]
    check_can_leave(model, active)
    if any(injection.merged for injection in active):
        unmerge(model)
    deactivate(model, active)
    all_injections(model)[:] = [injection for injection in all_injections(model) if injection not in leaving]
    if leaving and not all_injections(model):
        for parameter_name, parameter in base_parameters(model).items():
            parameter.requires_grad_(leaving[0].required_grad.get(parameter_name, parameter.requires_grad))
    return model


@seeing_through
@surgery
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Fold every active layer into the weights it adapts: no adapter module stays, and inference costs nothing extra.

    By hand, LoRA with r = 1: W = [[1, 2], [3, 4]], B = [[1], [0]], A = [[0.5, 0]] and s = 2 give s B A =
    [[1, 0], [0, 0]], so W becomes [[2, 2], [3, 4]]. For x = [1, 1] it was W x + s B A x = [3, 7] + [1, 0] = [4, 7], and
    the new W times x is [4, 7], too. After `unmerge` W is [[1, 2], [3, 4]] again.

    The Parameters stay the same objects, frozen as they were; their values are new. The replaced values are kept on the
    model, so that `unmerge` restores them bit for bit.

    Raises:
        InjectionError: nothing to merge, already merged, or there is one among the methods whose layers do not merge:
            adapter, prompt, ptuning or prefix. Nothing has changed then: all weights are computed before the first is
            replaced. Or another thread is changing the model.
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
        InjectionError: nothing is merged, or another thread is changing the model.
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
    check_can_leave(model, leaving)
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


def check_can_leave(model: nn.Module, leaving: list[Injection]) -> None:
    """Refuse to take out what has left nothing of the base to put back.

    Raises:
        InjectionError: one keeps no copy of the base, or was injected on the meta device, before the base had values.
    """
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
