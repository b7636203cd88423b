"""A method's equation with live numbers: each term beside its tensor while the model reads one text.

The equation is that of the method file's docstring, as it stands there; the file's `symbols` says which tensor each
letter is. What the equation comes to must be what the model computes, or there is an error. Then the same for merging.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minipeft.errors import ConfigError, InjectionError
from minipeft.explain.equation import Line, Term, compute, equation_of, symbols_in, text_under
from minipeft.methods import METHODS, inject
from minipeft.methods.full import FullConfig
from minipeft.methods.injection import Injection, active_injections, base_of
from minipeft.methods.switch import disable_adapter, merge, unmerge
from minipeft.methods.symbols import Seen, Step, Symbols
from minipeft.model.gpt2 import GPT2ForSequenceClassification
from minipeft.model.hub import find
from minipeft.model.tokenizer import Tokenizer, get_tokenizer
from minipeft.runs.defaults import table
from minipeft.runs.trained import load_finetuned
from minipeft.training.loop import TrainingConfig
from minipeft.training.optimizer import adamw

TEXT = "A moving film with a wonderful cast."
ALLOWED = 1e-5          # between what is put together by hand and what the model computes
MOVED_BY = 0.05         # the deviation of what moves a fresh adapter off the identity


@dataclass
class Computed:
    """An equation of one line, computed by hand.

    Attributes:
        line: its two sides, and the remark.
        terms: each part of the right side, in the order in which it is computed; the last is the whole.
        model: what the model computed for the left side.
        difference: the largest between the two, as a share of the model's largest number.
    """

    line: Line
    terms: list[Term]
    model: Any
    difference: float


@dataclass
class Place:
    """A layer or module, and what the equation says of it.

    Attributes:
        forward: the lines of the equation that hold there.
        merged: how its weight and its output come out of `merge`; nothing where the method does not merge.
    """

    name: str
    forward: list[Computed]
    merged: list[Computed]


@dataclass
class Trace:
    """One text's way through one block.

    Attributes:
        model: the base model's name.
        tokens: the text, cut into tokens; token is the number of the one that is looked at.
        virtual: how many virtual tokens stand before them.
        start: where the adapter is from, in words.
        not_here: lines of the equation that no place of this model computes.
        why_not_merged: nothing for a method that merges.
        trained, frozen: addresses of the tensors that a gradient reaches, and of the model's others.
    """

    method: str
    model: str
    block: int
    tokens: list[str]
    token: int
    virtual: int
    start: str
    places: list[Place]
    not_here: list[Line]
    why_not_merged: str
    trained: set[int]
    frozen: set[int]

    def role(self, term: Term) -> str:
        """What a term is: "trained", "frozen", "number", "computed", or "seen" if it is of the text."""
        if not isinstance(term.value, Tensor):
            return "number"
        address = term.value.untyped_storage().data_ptr()
        known = {"trained": address in self.trained, "frozen": address in self.frozen}
        return next((role for role, holds in known.items() if holds and term.symbol), "seen" if term.symbol
                    else "computed")

    def of_token(self, value: Tensor) -> Tensor:
        """The token's part of what has a sequence, (1, ..., seq, n), a row in each head; all of anything else."""
        value, text = value.detach(), len(self.tokens)
        if value.ndim < 3 or value.shape[-2] not in (text, self.virtual + text):  # such as a prefix's keys
            return value
        return value[..., self.token - text, :]  # virtual tokens come first

    def row(self, value: Tensor) -> Tensor:
        """The token's row, in the first head; of a matrix the first row; a vector itself."""
        value = torch.atleast_1d(self.of_token(value))
        return value.reshape(-1, value.shape[-1])[0]

    def norm(self, value: Tensor) -> float | None:
        """The length of the token's part; nothing for whole numbers, which are ids or positions."""
        return float(self.of_token(value).norm()) if value.is_floating_point() else None


# --- models -----------------------------------------------------------------------------------------------------------

def fresh(model_name: str, method: str, values: dict[str, Any]) -> tuple[nn.Module, Tokenizer, str]:
    """A classifier that carries a new adapter, moved by seeded small values where it would change nothing.

    Args:
        values: of the method's configuration; the others are the table of defaults'.

    Returns:
        (model, tokenizer, in words where the adapter is from).

    Raises:
        MinipeftError: an unknown model, or a configuration that cannot be.
    """
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification.from_pretrained(model_name)
    tokenizer = get_tokenizer(find(model_name))
    inject(model, METHODS[method].config(**{**table(method)["method"], **values}))
    return model, tokenizer, moved(model, torch.tensor([tokenizer.encode(TEXT)]))


@torch.no_grad()
def moved(model: nn.Module, ids: Tensor) -> str:
    """Move a fresh adapter off the identity by seeded small values, where it is the identity; returns so in words."""
    (injection,) = active_injections(model)
    head = set(model.get_submodule(model.head).parameters())
    own = [p for p in model.parameters() if p.requires_grad and p not in head]
    if not injection.config.saves_adapter:
        return "fresh: the model is the base; the step of AdamW is the third of three on this text"
    if not own:
        return "fresh: the model is the base, under a new head"
    with disable_adapter(model):
        base = base_of(model)(ids)
    if not torch.allclose(base_of(model)(ids), base, atol=ALLOWED):
        return "fresh, seed 0: it does not start as the base model, and is left where it starts"
    generator = torch.Generator().manual_seed(0)
    for parameter in own:
        parameter.add_(MOVED_BY * torch.randn(parameter.shape, generator=generator))
    return (f"fresh, and moved: at its start it changes nothing, so normal numbers of deviation {MOVED_BY} (seed 0) "
            "were added to all it trains but the head")


def trained(folder: Path, model_name: str | None = None) -> tuple[nn.Module, Tokenizer, str]:
    """A trained model from its folder; see `fresh`.

    Raises:
        MinipeftError: as `load_finetuned`.
    """
    model, task = load_finetuned(folder, model_name)
    if not active_injections(model):
        inject(model, FullConfig())
    return model, task.tokenizer, f"trained, from {folder}"


# --- tracing ----------------------------------------------------------------------------------------------------------

def trace(model: nn.Module, tokenizer: Tokenizer, text: str = TEXT, block: int = 0, token: int | None = None,
          start: str = "") -> Trace:
    """Let a model read a text, and compute its method's equation by hand beside it.

    Args:
        block: its number, from 0.
        token: which to show, from 0; default the last one, which has seen all others.
        start: where the adapter is from, in words.

    Raises:
        ConfigError: a text without a token, or a block or token that there is not.
        InjectionError: the block carries nothing of the method.
        AssertionError: the equation does not come to what the model computes.
    """
    injection = active_injections(model)[0]
    ids = torch.tensor([tokenizer.encode(text)])                               # (1, seq)
    if not ids.numel():
        raise ConfigError("there is no token to look at: the text is empty")
    token = ids.shape[1] - 1 if token is None else token
    for name, number, end in (("block", block, len(base_of(model).h)), ("token", token, ids.shape[1])):
        if not 0 <= number < end:
            raise ConfigError(f"there is no {name} {number}: this {'model' if name == 'block' else 'text'} has those "
                              f"from 0 to {end - 1}")
    docstring = inspect.getmodule(METHODS[injection.method].plan).__doc__
    with torch.no_grad():
        places, missing = _places(model.eval(), injection, block, ids, equation_of(docstring))
        why_not = _merge(model, injection, ids, places, docstring)
    parameters = [(p.untyped_storage().data_ptr(), p.requires_grad) for p in [*model.parameters(), *model.buffers()]]
    return Trace(injection.method, getattr(model, "name_or_path", "a model"), block,
                 [tokenizer.decode([number]) for number in ids[0].tolist()], token,
                 sum(layer.num_virtual_tokens for layer in injection.layers.values()), start,
                 [place for place, _ in places], missing, why_not, {address for address, flag in parameters if flag},
                 {address for address, flag in parameters if not flag})


def _places(model: nn.Module, injection: Injection, block: int, ids: Tensor,
            equation: list[Line]) -> tuple[list[tuple[Place, Symbols]], list[Line]]:
    """The first place at which each line of the equation holds, and the lines that hold nowhere."""
    name = f"transformer.h.{block}" if base_of(model) is not model else f"h.{block}"
    inputs, outputs = record(model, ids)
    found, left = [], list(equation)
    for place in _candidates(model, injection, name):
        symbols = METHODS[injection.method].symbols(
            Seen(model, place, name, ids, inputs, outputs, partial(adamw_step, model, ids)))
        lines = [line for line in left if symbols_in(line.right) <= symbols.values.keys()
                 and line.remark.startswith(symbols.remark)]
        if lines:
            found.append((Place(place, [computed(line, symbols.values) for line in lines], []), symbols))
            left = [line for line in left if line not in lines]
    found.sort(key=lambda pair: equation.index(pair[0].forward[0].line))
    return found, left


def _candidates(model: nn.Module, injection: Injection, block: str) -> list[str]:
    """The method's layers in a block; of a method that adds none, the modules there whose own tensors it trains.

    Layers and modules that stand outside of all blocks, such as a prompt, count for each of them.

    Raises:
        InjectionError: there are some in other blocks only.
    """
    names = list(injection.layers) or list(dict.fromkeys(name.rpartition(".")[0] for name in injection.trained_base))
    outside = [name for name in names if not re.search(r"\bh\.\d+\.", name)]
    inside = [name for name in names if name.startswith(f"{block}.")]
    if len(outside) < len(names) and injection.layers and not inside:
        raise InjectionError(f"{block} carries nothing of {injection.method}; {names[0]} does")
    return inside or outside


def record(model: nn.Module, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each module is given and gives, by name, while the model reads a text."""
    inputs, outputs = {}, {}
    with _hooks(model, inputs, outputs):
        model(ids)
    return inputs, outputs


@contextmanager
def _hooks(model: nn.Module, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Iterator[None]:
    def keep(name: str, module: nn.Module, arguments: tuple, output: Any) -> None:
        inputs[name], outputs[name] = (arguments or (None,))[0], output

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def computed(line: Line, values: dict[str, Any]) -> Computed:
    """One line put together by hand, and held against what the model computed for its left side; see `held`."""
    return held(line, compute(line.right, values), values[line.left])


def held(line: Line, terms: list[Term], model: Any) -> Computed:
    """What came out by hand, the last of the terms, held against what the model computed.

    Raises:
        AssertionError: they differ by more than `ALLOWED`.
    """
    by_hand, by_model = torch.as_tensor(terms[-1].value), torch.as_tensor(model)
    if by_hand.shape != by_model.shape:
        raise AssertionError(f"{line.text}: by hand {tuple(by_hand.shape)}, in the model {tuple(by_model.shape)}")
    difference = float((by_hand - by_model).abs().max()) / (float(by_model.abs().max()) or 1.0)
    if not difference <= ALLOWED:
        raise AssertionError(f"{line.text}: by hand and in the model it differs by {difference:.2g}, more than "
                             f"{ALLOWED:g}")
    return Computed(line, terms, by_model, difference)


def _merge(model: nn.Module, injection: Injection, ids: Tensor, places: Sequence[tuple[Place, Symbols]],
           docstring: str) -> str:
    """Merge, hold each place's new weight and new output against the docstring's formula, and unmerge.

    Returns:
        Why the method does not merge; nothing if it does.
    """
    text = text_under(docstring, "Merging")
    formula = re.match(r"\w+ <- ([^,.;]+)", text)
    by_hand = [compute(formula[1], symbols.values | symbols.merging) if formula else None for _, symbols in places]
    try:
        merge(model)
    except InjectionError as error:
        return f"{text.split('. ')[0].rstrip('.')}. `merge` answers: {error}."
    inputs, _ = record(model, ids)
    for (place, symbols), terms in zip(places, by_hand):
        linear = model.get_submodule(place.name)
        W = linear.weight.detach()                                             # its data change back in unmerge
        bias = "merged_bias" if "bias" in injection.merged[place.name] else "bias"
        values = {"x": inputs[place.name], "merged_W": W, bias: linear.bias.detach(), "y": symbols.values["y"]}
        if terms:
            place.merged.append(held(Line("merged_W", formula[1], ""), terms, W))
        place.merged.append(computed(Line("y", f"x merged_W^T + {bias}", ""), values))
    unmerge(model)
    return ""


def adamw_step(model: nn.Module, ids: Tensor, parameter: nn.Parameter) -> Step:
    """The third of three steps of AdamW on one parameter alone, which is then as it was.

    The loss is the cross-entropy of what the model finds the least likely, so that there is something to learn.
    """
    kept, flag = parameter.detach().clone(), parameter.requires_grad
    rate, decay = table("full")["training"]["learning_rate"], TrainingConfig().weight_decay
    optimizer = adamw([parameter.requires_grad_(True)], model, rate, decay)
    for _ in range(3):
        with torch.enable_grad():
            logits = model(ids).flatten(0, -2)[-1:]                            # (1, K), a language model's (1, vocab)
            (parameter.grad,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmin(dim=1)), parameter)
        state = optimizer.state[parameter] or {"exp_avg": torch.zeros_like(kept), "exp_avg_sq": torch.zeros_like(kept)}
        before, means = parameter.detach().clone(), (state["exp_avg"].clone(), state["exp_avg_sq"].clone())
        optimizer.step()
    state = optimizer.state[parameter]
    step = Step(3, rate, decay, optimizer.defaults["eps"], parameter.grad, before, means,
                parameter.detach().clone(), (state["exp_avg"], state["exp_avg_sq"]))
    parameter.grad = None
    parameter.data.copy_(kept)
    parameter.requires_grad_(flag)
    return step
