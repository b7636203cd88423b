"""What training did to each matrix: the singular values of its update, and how many of them the model needs.

    dW = U S V^T        dW is what merging adds to W, such as s B A; it is (out, in)

S holds the singular values, from the largest on. With LoRA at most r of them are not zero. The effective rank says how
many of them count: exp of the entropy of S / sum(S), which is 1 if one value has all, and r if r values are alike (Roy
and Vetterli 2007, "The effective rank: a measure of effective dimensionality"). Cutting an update to rank k keeps its k
largest singular values. The head, and trained biases, stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.data.datasets import load_dataset
from minipeft.errors import ConfigError, InjectionError
from minipeft.files import replacing_folder
from minipeft.methods.injection import active_injections, base_of
from minipeft.methods.layers import ReplacementLayer
from minipeft.methods.switch import merge, unmerge
from minipeft.runs.results import blank_figure, markdown_table
from minipeft.runs.trained import details_of, load_finetuned
from minipeft.tasks.classification import Classification
from minipeft.tasks.task import Task

RANKS = (0, 1, 2, 4, 8)
SHOWN = 8                       # singular values in a row of the table
KINDS = {"attn.c_attn": "#2a6fb0", "attn.c_proj": "#d1700a", "mlp.c_fc": "#2f8a4c", "mlp.c_proj": "#8a3fa0"}


@dataclass
class Update:
    """What training added to one matrix.

    Attributes:
        weight: W as it was, (out, in); U, S, V of the update, in float64: (out, k), (k,), (k, in).
    """

    name: str
    weight: Tensor
    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def values(self) -> Tensor:
        """The singular values that are not zero up to rounding."""
        return self.S[self.S / self.S.max().clamp(min=1e-30) > 1e-9]

    @property
    def effective_rank(self) -> float:
        """How many singular values count; 0 for an update of zeros."""
        share = self.values / self.values.sum()
        return float((-share * share.log()).sum().exp()) if len(share) else 0.0

    def cut(self, rank: int | None) -> Tensor:
        """W with the update's `rank` largest singular values, (out, in); None keeps all."""
        U, S, Vh = self.U[:, :rank], self.S[:rank], self.Vh[:rank]
        return (self.weight.double() + (U * S) @ Vh).to(self.weight.dtype)


@dataclass
class Spectrum:
    """The updates of a trained model, and the accuracy that is left when all of them are cut.

    Attributes:
        accuracy: rank -> (accuracy, its 95 % interval), None for all of the update; empty for a model of another task.
        on: on what it was measured, in words.
    """

    folder: Path
    updates: list[Update]
    accuracy: dict[int | None, tuple[float, list[float]]]
    on: str


def spectrum_of(folder: Path, model_name: str | None = None) -> Spectrum:
    """Take a trained model from its folder, and measure it.

    Raises:
        AdapterError: no trained model.
        InjectionError: a method that changes no matrix.
    """
    model, task = load_finetuned(folder, model_name)
    updates = updates_of(model, details_of(folder).get("base_model"))
    data = load_dataset("sample", Classification)
    if not isinstance(task, Classification) or task.label_names != data.label_names:
        return Spectrum(folder, updates, {}, "not measured: the sample's reviews have other labels")
    encoded = task.encode(data.validation)
    return Spectrum(folder, updates, dict(accuracies(model, updates, task, encoded)),
                    f"on the sample's {len(data.validation)} validation reviews")


@torch.no_grad()
def updates_of(model: nn.Module, base_model: str | None = None) -> list[Update]:
    """The update of each matrix that a method changes, or of each matrix of the blocks after full fine-tuning.

    Args:
        base_model: of a model that carries no adapter: what it was fine-tuned from.

    Raises:
        InjectionError: a method that changes no matrix.
    """
    injections = active_injections(model)
    layers = {name: layer for injection in injections for name, layer in injection.layers.items()}
    if injections and not (layers and all(isinstance(layer, ReplacementLayer) for layer in layers.values())):
        raise InjectionError(f"{injections[0].method} changes no matrix: its update has no singular values")
    if layers:
        exact = {name: copy.deepcopy(layer).double() for name, layer in layers.items()}
        pairs = {name: (layers[name].base_layer.weight, layer.merged()["weight"] - layer.base_layer.weight)
                 for name, layer in exact.items()}
    else:
        if base_model is None:
            raise InjectionError("this model carries no method, and does not say what it was fine-tuned from")
        base = type(model).from_pretrained(base_model, num_labels=model.config.num_labels)
        pairs = {name: (base.get_submodule(name).weight, module.weight.double() - base.get_submodule(name).weight)
                 for name, module in base_of(model).named_modules(prefix="transformer")
                 if isinstance(module, nn.Linear)}
    return [Update(name, weight.detach().clone(), *torch.linalg.svd(change, full_matrices=False))
            for name, (weight, change) in pairs.items()]


def accuracies(model: nn.Module, updates: list[Update], task: Task,
               encoded: Any) -> Iterator[tuple[int | None, tuple[float, list[float]]]]:
    """The accuracy with all updates cut to each of `RANKS` that one of them exceeds, and with none of them cut."""
    most = max(len(update.values) for update in updates)
    with cut_off(model) as plain:
        for rank in [*(rank for rank in RANKS if rank < most), None]:
            for update in updates:
                plain.get_submodule(update.name).weight.data = update.cut(rank)
            found = task.evaluate(plain, encoded, torch.device("cpu"), torch.float32)
            yield rank, (found["accuracy"], found["accuracy_95_interval"])


@contextmanager
def cut_off(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its adapter merged, so that its weights can be set; afterwards it is as it was."""
    kept = {name: parameter.data for name, parameter in model.named_parameters()}
    adapted = bool(active_injections(model))
    if adapted:
        merge(model)
    try:
        yield model
    finally:
        if adapted:
            unmerge(model)
        for name, parameter in model.named_parameters():
            parameter.data = kept[name]


# --- shown ------------------------------------------------------------------------------------------------------------

def as_text(found: Spectrum) -> str:
    """Two tables: the singular values and the effective rank of each update; the accuracy at each rank."""
    rows = [[update.name.removeprefix("transformer."), f"{update.U.shape[0]} x {update.Vh.shape[1]}",
             f"{update.effective_rank:.1f}", f"{float(update.S.norm() / update.weight.double().norm()):.3f}",
             " ".join(f"{value:.3f}" for value in update.S[:SHOWN].tolist())] for update in found.updates]
    tables = [markdown_table(["matrix", "out x in", "effective rank", "size beside W",
                              f"singular values, the largest {SHOWN}"], rows)]
    most = max(len(update.values) for update in found.updates)
    if found.accuracy:
        tables.append(markdown_table(["updates cut to rank", "accuracy", "95 % interval"], [
            [f"not cut: {most}" if rank is None else str(rank), f"{100 * accuracy:.1f} %",
             " to ".join(f"{100 * end:.1f}" for end in interval) + " %"]
            for rank, (accuracy, interval) in found.accuracy.items()]))
    return f"{found.folder}\n\n" + "\n\n".join(tables) + f"\n\naccuracy: {found.on}"


def draw(found: Spectrum, path: Path) -> None:
    """The singular values of all updates, and beside them the accuracy at each rank.

    Args:
        path: .png or .svg.

    Raises:
        ConfigError: another kind of file, or no matplotlib.
        OutputError: the file cannot be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise ConfigError(f"a picture is a .png or a .svg file, not {path.name!r}")
    figure = blank_figure(9.2, 4.2, layout="constrained")
    left, right = figure.subplots(1, 2)
    for update in found.updates:
        kind = ".".join(update.name.split(".")[-2:])
        shown = update.values[:16]
        left.plot(range(1, len(shown) + 1), shown.tolist(), color=KINDS.get(kind, "#6b6b76"), marker="o", markersize=3,
                  linewidth=1, label=kind)
    by_kind = dict(zip(*reversed(left.get_legend_handles_labels())))
    left.legend(by_kind.values(), by_kind.keys(), frameon=False, fontsize=9)
    left.set(title="Singular values of each update", xlabel="number", yscale="log")
    ranks = ["all" if rank is None else str(rank) for rank in found.accuracy]
    low_high = [[abs(value - end) for value, (low, high) in found.accuracy.values() for end in [(low, high)[side]]]
                for side in (0, 1)]
    right.errorbar(ranks, [value for value, _ in found.accuracy.values()], yerr=low_high if ranks else None,
                   color="#d1700a", marker="o", capsize=3)
    right.set(title="Accuracy with all updates cut", xlabel="rank kept", ylabel=found.on)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with replacing_folder(path.parent) as temporary:
        figure.savefig(temporary / path.name, dpi=110, facecolor="white")
