"""The official safetensors files, to and from our modules: read, check, fill, save.

The official layout has two spellings. OpenAI's upload names tensors `wte.weight`, `h.0.attn.c_attn.weight`, and carries
causal-mask buffers `h.0.attn.bias`; transformers' save_pretrained prefixes them with `transformer.` and drops the
buffers. Both load here. Matrices are stored (in, out) and become (out, in), the layout of `nn.Linear`.

This file knows the layout and no model class. A model's state dict says which tensors it needs, and three attributes
say the rest: `prefix`, how its names for the base's tensors start; `head`, the name of its head or None; `tied`, which
of its tensors are another one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minipeft.errors import WeightsError, first_few
from minipeft.files import read_json_file, replacing_folder, write_json

CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE = "config.json", "model.safetensors", "vocab.tiktoken"

_PREFIX = "transformer."
_COMPILED = "_orig_mod."  # what torch.compile puts before the names of a module that it wraps
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Matched as whole endings: ".attn.c_attn.bias" is a parameter, ".attn.bias" is a mask buffer.
_BUFFERS = (".attn.bias", ".attn.masked_bias")
_FLOATING_POINT = ("F64", "F32", "F16", "BF16")


class StoredTensor(NamedTuple):
    """What a file says of a tensor before the tensor is read: its name there, its shape and its type."""

    name: str
    shape: tuple[int, ...]
    kind: str


# --- read -------------------------------------------------------------------------------------------------------------

def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json.

    Raises:
        WeightsError: not a JSON object.
    """
    return read_json_file(folder / CONFIG_FILE, WeightsError)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, turning every way in which it can be damaged into a WeightsError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is truncated or not a safetensors file: {error}") from error


def load(model: nn.Module, folder: Path, dtype: torch.dtype, heads: Collection[str],
         initialize: Callable[[nn.Module], None]) -> None:
    """Fill a model built on the meta device from a folder in the official layout, one tensor at a time.

    Names, shapes and types are all checked before the first tensor is read. Each tensor is read, transposed and
    converted alone, so the peak is the model plus one tensor.

    Args:
        model: a module on the meta device, with the attributes `prefix`, `head` and `tied`.
        dtype: type of the parameters.
        heads: the names of all heads that a file may hold. Another model's head is left in the file: a classifier's
            file is a fine source for a language model.
        initialize: called on a head that the file does not hold.

    Raises:
        WeightsError: a damaged file, or tensors that are missing, left over, of another shape or not floating point.
    """
    path, head, tied = folder / WEIGHTS_FILE, f"{model.head}.", model.tied
    source, problems = _by_our_names(stored_tensors(path), model.prefix, heads)
    new_head = model.head is not None and not any(name.startswith(head) for name in (*source, *tied))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
              if name not in tied and not (new_head and name.startswith(head))}
    others = tuple(f"{other}." for other in heads if other != model.head)
    left_over = [name for name in source if name not in wanted and name not in tied and not name.startswith(others)]
    problems += [f"unexpected {source[name].name} {source[name].shape}" for name in left_over]
    problems += _misfits(wanted, source)
    if problems:
        raise _does_not_fit(path, source, problems)
    _fill(model, path, {name: source[name].name for name in wanted}, dtype)
    for copy, original in tied.items():
        if copy in source:
            _check_tied(path, source[copy].name, original, model)
        _set_parameter(model, copy, model.get_parameter(original))
    if new_head:
        new = model.get_submodule(model.head)
        for name, parameter in new.named_parameters():
            _set_parameter(new, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        initialize(new)


def stored_tensors(path: Path) -> list[StoredTensor]:
    """What a file holds, without its mask buffers; only its header is read.

    Raises:
        WeightsError: it is damaged.
    """
    with open_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys() if not name.endswith(_BUFFERS)}
        return [StoredTensor(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]


def _by_our_names(stored: list[StoredTensor], prefix: str,
                  heads: Collection[str]) -> tuple[dict[str, StoredTensor], list[str]]:
    """Stored tensors by their names in a model whose base starts with `prefix`, and what is wrong with these names."""
    source, problems = {}, []
    for tensor in stored:
        name = tensor.name.replace(_COMPILED, "").removeprefix("module.")  # what torch.compile and DDP put before
        in_head = name.startswith(tuple(f"{head}." for head in heads))
        ours = name if in_head else prefix + name.removeprefix(_PREFIX)
        if ours in source:
            problems.append(f"{tensor.name} and {source[ours].name} are the same tensor")
        source[ours] = tensor
    return source, problems


# --- check ------------------------------------------------------------------------------------------------------------

def _misfits(wanted: dict[str, tuple[int, ...]], source: dict[str, StoredTensor]) -> list[str]:
    """What is wrong with the tensors that a model needs: missing, of another shape, or not floating point."""
    problems = []
    for name, shape in wanted.items():
        expected = shape[::-1] if name.endswith(_TRANSPOSED) else shape
        if name not in source:
            problems.append(f"missing {name} {shape}")
        elif source[name].shape != expected:
            problems.append(f"{source[name].name} is {source[name].shape}, expected {expected}")
        elif source[name].kind not in _FLOATING_POINT:
            problems.append(f"{source[name].name} is stored as {source[name].kind}, expected floating point")
    return problems


def _does_not_fit(path: Path, source: dict[str, StoredTensor], problems: list[str]) -> WeightsError:
    """The error that names the first few problems or, of a file of another kind, what it holds."""
    if not any(name.endswith("wte.weight") for name in source):
        return WeightsError(f"{path} is not a GPT-2: it holds {first_few(sorted(t.name for t in source.values()))}")
    return WeightsError(f"{path} does not fit its config.json: {first_few(sorted(problems))}")


def _check_tied(path: Path, stored_name: str, original: str, model: nn.Module) -> None:
    """A stored copy of a tied tensor must equal the original.

    Raises:
        WeightsError: it does not.
    """
    expected = model.get_parameter(original)
    with open_tensors(path) as file:
        stored = file.get_tensor(stored_name)
    if stored.shape != expected.shape or not torch.equal(stored.to(expected.dtype), expected):
        raise WeightsError(f"{path} holds an {stored_name} that differs from {original.removeprefix(model.prefix)}, "
                           "although config.json ties them: set tie_word_embeddings to false to load it untied")


# --- fill -------------------------------------------------------------------------------------------------------------

def _fill(model: nn.Module, path: Path, stored_names: dict[str, str], dtype: torch.dtype) -> None:
    """Read each tensor from a checked file into the model.

    Raises:
        WeightsError: a value that is no finite number.
    """
    for name, stored_name in stored_names.items():
        # Opened anew for each tensor, so that the pages mapped for the last one are given back.
        with open_tensors(path) as file:
            tensor = file.get_tensor(stored_name)
            if name.endswith(_TRANSPOSED):
                tensor = tensor.t()                                               # (in, out) -> (out, in)
            tensor = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):  # a NaN is both; needs no memory
            raise WeightsError(f"{path} holds NaN or infinity in {stored_name}: the file is damaged, or its training "
                               f"went wrong{'' if dtype == torch.float32 else f', or its values do not fit {dtype}'}")
        _set_parameter(model, name, nn.Parameter(tensor))


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module_name, _, parameter_name = name.rpartition(".")
    setattr(model.get_submodule(module_name), parameter_name, parameter)


# --- save -------------------------------------------------------------------------------------------------------------

def bare_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, by the names they have in a model of which nothing is compiled."""
    return {name.replace(_COMPILED, ""): tensor for name, tensor in tensors.items()}


def save(model: nn.Module, config: dict[str, Any], folder: str | Path, dtype: torch.dtype | None,
         state_dict: dict[str, Tensor], loaded_from: Path | None) -> None:
    """Write a model in the official layout, as transformers' save_pretrained spells it.

    Args:
        model: a module with the attributes `prefix` and `tied`.
        config: the content of config.json.
        folder: created if absent.
        dtype: stored type; None keeps each tensor's own.
        state_dict: the model's tensors, by their names in the bare model.
        loaded_from: the folder whose vocabulary is the model's, if it holds one; None where there is no such folder.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    tensors = {}
    for name, tensor in state_dict.items():
        if name in model.tied:  # safetensors stores no tensor twice
            continue
        tensor = tensor.t() if name.endswith(_TRANSPOSED) else tensor             # (out, in) -> (in, out)
        name = name if model.prefix else _PREFIX + name
        tensors[name] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    with replacing_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(temporary / CONFIG_FILE, config)
        if loaded_from is not None and (loaded_from / VOCABULARY_FILE).is_file():
            shutil.copyfile(loaded_from / VOCABULARY_FILE, temporary / VOCABULARY_FILE)
