"""What stands in a model: the layers that methods put there, in place of one of its own or beside them.

Each layer declares in `trained` what an adapter file holds of it; nothing looks for "lora_" or "bias" inside a name.
What is trained follows from `requires_grad`: a layer comes into a model that is frozen already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minipeft.errors import InjectionError
from minipeft.methods.wrappers import unwrapped
from minipeft.model.linear import autocast_dtype


class AdapterLayer(nn.Module):
    """What a method puts into a model at one place: its own parameters, and how it gets in and out.

    Attributes:
        trained: names, below this layer, of the parameters that the method trains, all of which a file holds.
        raised_rate: those among them that LoRA+ trains at a higher learning rate.
        num_virtual_tokens: positions that the layer takes from every text.
    """

    trained: tuple[str, ...] = ()
    raised_rate: ClassVar[tuple[str, ...]] = ()
    num_virtual_tokens: int = 0

    def attach(self, model: nn.Module, name: str) -> None:
        """Put this layer into the model, at `name`, in the mode (training or eval) of what is there."""
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

    @property
    def out_features(self) -> int:
        """How wide its output is, where the layer in whose place it stands says so."""
        return self.base_layer.out_features

    def attach(self, model: nn.Module, name: str) -> None:
        self.train(self.base_layer.training)
        model.set_submodule(name, self)

    def detach(self, model: nn.Module, name: str) -> None:
        self.base_layer.train(self.training)
        model.set_submodule(name, self.base_layer)


class AddedLayer(AdapterLayer):
    """An adapter layer that becomes one more child of a module of the model and sees what goes into and out of it.

    No module is moved, so no name changes. The module's `forward` is called by `around`, which stands in its place on
    the module itself: a compiled model notices that, and a forward hook it would not.
    """

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments the module is called with."""
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The output the module gives."""
        return output

    def around(self, module: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """One call of the module, whose own forward is `forward`."""
        args, kwargs = self.before(module, args, kwargs)
        return self.after(module, args, kwargs, forward(*args, **kwargs))

    def attach(self, model: nn.Module, name: str) -> None:
        parent, _, child = name.rpartition(".")
        module = unwrapped(model.get_submodule(parent))
        self.train(module.training)
        module.add_module(child, self)
        module.forward = partial(self.around, module, module.forward)

    def detach(self, model: nn.Module, name: str) -> None:
        parent, _, child = name.rpartition(".")
        module = unwrapped(model.get_submodule(parent))
        _, forward = module.forward.args
        delattr(module, child)
        del module.forward
        if module.forward != forward:  # another layer was there first
            module.forward = forward


def forward_beside_half(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer of a half-precision model computes with tensors of its own in float32, since they are trained.

    Args:
        module: a linear layer with a float32 bias, a linear head in float32, or a LayerNorm.
        x: (..., in), in half precision.

    Returns:
        (..., out), like x; a head's is float32. Under autocast as autocast has it.
    """
    forward = partial(type(module).forward, module)
    if all(tensor.dtype == x.dtype for tensor in module.parameters()):  # the whole model was cast since
        return forward(x)
    if isinstance(module, nn.LayerNorm):  # also under autocast, which on a CPU takes no two formats
        return F.layer_norm(x.float(), module.normalized_shape, module.weight.float(), module.bias.float(),
                            module.eps).to(x.dtype)
    if autocast_dtype(x):
        return forward(x)
    if module.weight.dtype == torch.float32:
        return forward(x.float())
    return (F.linear(x, module.weight) + module.bias).to(x.dtype)


def to_dtype_of(parameter: Tensor, x: Tensor) -> Tensor:
    """`x` in the dtype of the parameter it meets: adapters stay float32 on a half-precision base.

    Under autocast the matrix product chooses the dtype itself, and a cast here would only be undone.
    """
    return x if autocast_dtype(x) else x.to(parameter.dtype)
