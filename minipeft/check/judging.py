"""How one property is judged: an answer's value beside the one that the equation gives.

A wrong value is also held against the values of known wrong formulas. So a misconception is found, and not guessed: the
answer computes exactly what the mistake would.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

MOST_SHOWN = 8                 # numbers of a tensor that are printed whole; of larger ones the first difference is


class Refused(Exception):
    """A property does not hold.

    Args:
        what: the expression that was looked at, such as "layer(x)".
        got, expected: texts; if nothing is expected, `got` is an error in the answer's code.
        given: the input.
        because: the misconception, where it is known.
    """

    def __init__(self, what: str, got: str, expected: str, given: str = "", because: str = "") -> None:
        super().__init__(what)
        self.what, self.got, self.expected, self.given, self.because = what, got, expected, given, because


class WrongDtype(Refused):
    """What came out has another dtype: of that no formula is the cause."""


# --- texts ------------------------------------------------------------------------------------------------------------

def show(value: Any) -> str:
    """A value in one line: [[1, 2.5], [0, -1]]."""
    if isinstance(value, Tensor):
        value = value.detach().tolist()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(show, value)) + "]"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def given(**values: Any) -> str:
    """The input of a property in one line: "x [[1, 2]], r 2"."""
    return ", ".join(f"{name} {show(value)}" for name, value in values.items())


def _numbers(got: Tensor, expected: Tensor) -> tuple[str, str]:
    """Two tensors of one shape, whole if they are small, or else at the first place where they differ."""
    if got.numel() <= MOST_SHOWN:
        return show(got), show(expected)
    differs = ~torch.isclose(got.double(), expected.double(), rtol=1e-5, atol=1e-5)
    place = tuple(differs.nonzero()[0].tolist())
    where = f" at {list(place)}, the first of {int(differs.sum())} numbers that differ"
    return show(got[place]) + where, show(expected[place])


# --- values -----------------------------------------------------------------------------------------------------------

def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors have one shape and, up to rounding, the same numbers; NaN is the same as NaN."""
    return a.shape == b.shape and torch.allclose(a.detach().double(), b.detach().double(), tolerance, tolerance, True)


def expect(what: str, got: Any, expected: Tensor, given: str = "", wrong: dict[str, Tensor] | None = None,
           tolerance: float = 1e-5) -> None:
    """Hold an answer's tensor against the expected one.

    Args:
        wrong: misconception -> the tensor that it leads to.

    Raises:
        Refused: another type, shape, dtype or other numbers.
    """
    wrong = wrong if isinstance(got, Tensor) else {}
    because = next((name for name, value in (wrong or {}).items()
                    if close(got, value, tolerance) and not close(value, expected, tolerance)), "")
    expect_shape(what, got, tuple(expected.shape), expected.dtype, given, {got.shape: because} if because else {})
    if not close(got, expected, tolerance):
        raise Refused(what, *_numbers(got, expected), given, because)


def expect_shape(what: str, got: Any, shape: tuple[int, ...], dtype: torch.dtype, given: str = "",
                 wrong: dict[Any, str] | None = None, cast: str = "") -> None:
    """Hold the shape and the dtype of an answer's tensor against the expected ones; raises as `expect`.

    Args:
        wrong: another shape or dtype -> the misconception that leads to it.
        cast: why the dtype is another, where `wrong` does not say it.
    """
    if not isinstance(got, Tensor):
        because = "nothing is returned: is a return missing?" if got is None else ""
        raise Refused(what, type(got).__name__, f"a tensor of shape {shape}", given, because)
    if got.shape != shape:
        because = (wrong or {}).get(tuple(got.shape), "")
        raise Refused(what, f"shape {tuple(got.shape)}", f"shape {tuple(shape)}", given, because)
    if got.dtype != dtype:
        raise WrongDtype(what, str(got.dtype), str(dtype), given, (wrong or {}).get(got.dtype, cast))


def expect_same(what: str, got: Any, expected: Any, given: str = "", wrong: dict[str, Any] | None = None) -> None:
    """Hold anything but a tensor against what is expected: a number, a list of names.

    Raises:
        Refused: they are not equal.
    """
    if got != expected:
        because = next((name for name, value in (wrong or {}).items() if value == got), "")
        raise Refused(what, show(got), show(expected), given, because)


def call(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the answer makes of copies of these arguments, each of which it leaves as it is.

    Raises:
        Refused: a tensor among the arguments has other values afterwards.
    """
    lent = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
    got = function(*lent)
    for before, after in zip(arguments, lent):
        if isinstance(before, Tensor) and not torch.equal(before, after):
            raise Refused(f"the input of {what} after the call", show_some(after), show_some(before),
                          because=f"{what} changes its input in place: whoever calls it still needs it as it was")
    return got


def show_some(tensor: Tensor) -> str:
    """All of a small tensor; of a larger one its shape."""
    return show(tensor) if tensor.numel() <= MOST_SHOWN else f"other values in shape {tuple(tensor.shape)}"


def pair(what: str, value: Any) -> tuple[Any, Any]:
    """The two parts of what an answer returned.

    Raises:
        Refused: it is not two.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise Refused(what, "nothing" if value is None else type(value).__name__, "a tuple of two")
    return value[0], value[1]


# --- layers -----------------------------------------------------------------------------------------------------------

def whole(*rows: Any) -> Tensor:
    """Small whole numbers as a float tensor."""
    return torch.tensor(rows, dtype=torch.float32)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with these values: weight (out, in), bias (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """A module of this library with every parameter random, so that nothing in it is zero or one."""
    randomize(module.parameters(), seed)
    return module


@torch.no_grad()
def randomize(tensors: Iterable[Tensor], seed: int = 0) -> None:
    """Make these random. Of an answer's module that is what the template names: it may keep numbers of its own."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))


def check_random(name: str, matrix: Tensor) -> None:
    """A matrix that starts random has no two rows that are the same.

    Raises:
        Refused: it has.
    """
    if len(matrix.detach().unique(dim=0)) < len(matrix):
        raise Refused(f"self.{name} at the start", "rows that are the same", "random", because=
                      f"{name} is not random, its rows are the same: they get the same gradients, and stay the same")


def check_kept(module: nn.Module, name: str, given: nn.Module) -> None:
    """The answer keeps the given module itself under this name.

    Raises:
        Refused: it keeps another object.
    """
    kept = getattr(module, name, None)
    if kept is not given:
        raise Refused(f"self.{name}", "nothing" if kept is None else "another object", "the given one itself",
                      because=f"self.{name} is not the given object itself, but a copy or a part of it: the given one "
                              "stays as it was")


def parameter(module: nn.Module, name: str, *shape: int,
              wrong: dict[tuple[int, ...], str] | None = None) -> nn.Parameter:
    """The parameter that an answer keeps under this name; an nn.Linear's weight counts, too.

    Args:
        wrong: another shape -> the misconception that leads to it.

    Raises:
        Refused: it is missing, no nn.Parameter, or of another shape.
    """
    value = getattr(module, name, None)
    value = value.weight if isinstance(value, nn.Linear) else value
    if not isinstance(value, Tensor):
        raise Refused(f"self.{name}", "nothing" if value is None else type(value).__name__, "an nn.Parameter")
    if value.shape != shape:
        because = {shape[::-1]: f"{name} is stored transposed", **(wrong or {})}.get(tuple(value.shape), "")
        raise Refused(f"self.{name}", f"shape {tuple(value.shape)}", f"shape {shape}", because=because)
    if not isinstance(value, nn.Parameter):
        raise Refused(f"self.{name}", "a plain tensor", "an nn.Parameter",
                      because=f"{name} is a plain tensor: no optimizer finds it and no file holds it")
    return value


def with_bias(module: nn.Module, name: str, out: int, into: int) -> dict[str, nn.Parameter]:
    """The weight (out, into) and the bias (out,) of the linear layer that an answer keeps under this name.

    Raises:
        Refused: it is no such layer.
    """
    parameter(module, name, out, into)
    layer = getattr(module, name)
    if getattr(layer, "bias", None) is None:
        raise Refused(f"self.{name}.bias", "nothing", "a bias", because=f"self.{name} has no bias")
    return {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}


@torch.no_grad()
def put(target: Tensor, values: Tensor) -> None:
    """Give a parameter these values."""
    target.copy_(values)


@contextmanager
def unchanged(layer: nn.Module, x: Tensor, call: str, given: str = "") -> Iterator[None]:
    """What is called inside leaves the layer as it was.

    Raises:
        Refused: the layer has another output afterwards, or another state.
    """
    before, values = layer(x.clone()), {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}
    modes = _modes(layer)
    yield
    if not torch.equal(layer(x.clone()), before):
        raise Refused(f"layer(x) after {call}", "another output", "the same as before", given,
                      f"{call} changes the layer: from then on the method acts twice in forward")
    for name, tensor in layer.named_parameters():
        if name not in values or not torch.equal(tensor, values[name]):
            raise Refused(f"{name} after {call}", "other values", "those of before", given,
                          f"{call} changes {name}, though not what comes out: what is saved then is another method")
    if _modes(layer) != modes:
        raise Refused(f"the layer after {call}", "frozen, trained, in training or eval mode otherwise", "as before",
                      given, f"{call} leaves the layer in another mode, or other tensors frozen")


def _modes(layer: nn.Module) -> tuple[list[bool], list[bool]]:
    """Of each module whether it is in training mode, and of each parameter whether it requires a gradient."""
    return [module.training for module in layer.modules()], [tensor.requires_grad for tensor in layer.parameters()]


# --- gradients --------------------------------------------------------------------------------------------------------

def check_gradients(what: str, function: Callable[[], Tensor], inputs: dict[str, Tensor]) -> None:
    """torch.autograd.gradcheck: each input's gradient is the slope of the function's own values.

    Args:
        function: computes from the inputs, which it finds where they are.
        inputs: name -> a leaf in float64 that requires a gradient.

    Raises:
        Refused: no gradient, or another one than the slope.
    """
    for name, tensor in inputs.items():
        if not tensor.requires_grad:
            raise Refused(f"{name}.requires_grad", "False", "True", because=f"{name} is frozen: it has to learn")
    output = function()
    if output.requires_grad:
        gradients = torch.autograd.grad(output.sum(), list(inputs.values()), allow_unused=True)
    else:
        gradients = [None] * len(inputs)
    for name, gradient in zip(inputs, gradients):
        if gradient is None:
            raise Refused(f"the gradient of {name}", "none", f"one, from {what}",
                          because=f"no gradient reaches {name}: .data, .detach() or no_grad cuts it off")
    try:
        gradcheck(lambda *_: function(), tuple(inputs.values()))
    except GradcheckError as error:
        number = re.search(r"with respect to input (\d+)", str(error))
        name = list(inputs)[int(number[1])] if number else "an input"
        raise Refused(f"the gradient of {name}", "another number", f"the slope of {what}",
                      because=f"a part of the way from {name} to {what} is cut off from the gradient") from None


def check_trained(module: nn.Module, trained: dict[str, Tensor], frozen: dict[str, Tensor], given: str = "") -> None:
    """Exactly these tensors of the module are trained, and these frozen.

    Raises:
        Refused: naming the first one that is not as it should be.
    """
    own = {id(tensor): name for name, tensor in module.named_parameters()}
    if loose := [name for name, tensor in frozen.items() if tensor.requires_grad]:
        more = f" and {len(loose) - 1} more are trained: freeze them" if len(loose) > 1 else " is trained: freeze it"
        raise Refused(f"{loose[0]}.requires_grad", "True", "False", given, loose[0] + more)
    for name, tensor in trained.items():
        if not tensor.requires_grad:
            raise Refused(f"{name}.requires_grad", "False", "True", given, because=f"{name} is frozen: it has to learn")
        if id(tensor) not in own:
            raise Refused(name, "not among parameters()", "one of them", given)
    wanted = {id(tensor) for tensor in trained.values()}
    for name, tensor in module.named_parameters():
        if tensor.requires_grad and id(tensor) not in wanted:
            raise Refused(f"{name}.requires_grad", "True", "no such tensor", given,
                          because=f"{name} is trained besides, which the method does not do")


def trained_count(parameters: Iterable[Tensor]) -> int:
    """How many numbers require a gradient; a tensor that comes twice counts once."""
    return sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in parameters}.values()
               if tensor.requires_grad)
