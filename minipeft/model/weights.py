"""The official safetensors files, to and from our modules: find, download, check, load, save.

The official layout has two spellings. OpenAI's upload names tensors `wte.weight`, `h.0.attn.c_attn.weight`, and carries
causal-mask buffers `h.0.attn.bias`; transformers' save_pretrained prefixes them with `transformer.` and drops the
buffers. Both load here. Matrices are stored (in, out) and become (out, in), the layout of `nn.Linear`.

This file knows tensors and files and no model class: it reads the names it must fill from the module it is given.
"""

from __future__ import annotations

import http.client
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minipeft.errors import WeightsError
from minipeft.files import read_json_file, replacing_folder, write_json
from minipeft.training import distributed as parallel

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
MINI_FOLDER = Path(__file__).resolve().parents[2] / "checkpoints" / "mini"
HUB_NAMES = {"gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
             "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl"}

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Matched as whole endings: ".attn.c_attn.bias" is a parameter, ".attn.bias" is a mask buffer.
_BUFFERS = (".attn.bias", ".attn.masked_bias")
_HEADS = ("lm_head.", "score.", "classifier.")


# --- find -------------------------------------------------------------------------------------------------------------

def find(name_or_folder: str | Path) -> Path:
    """The folder that holds a model's config.json and model.safetensors, downloading an official one if needed.

    Raises:
        WeightsError: an unknown name, a folder without the two files, or no network.
    """
    name = str(name_or_folder)
    folder = MINI_FOLDER if name == "mini" else Path(name)
    if name in HUB_NAMES and not folder.is_dir():
        return _download(name)
    if not name or not folder.is_dir():
        raise WeightsError(f"model {name!r} is neither a folder nor one of mini, {', '.join(HUB_NAMES)}")
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
    if missing:
        raise WeightsError(f"{folder} holds no {' and no '.join(missing)}: a model folder needs both "
                           f"{CONFIG_FILE} and {WEIGHTS_FILE}")
    return folder


def hub_is_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face hub (or the mirror named by HF_ENDPOINT) answers a request, within `timeout` s."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    reached = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout):
                reached.set()
        except urllib.error.HTTPError:  # whatever it answers, it answers
            reached.set()
        except (OSError, ValueError, http.client.HTTPException):
            pass

    # In a thread of its own, since the look-up of a name has no timeout.
    attempt = threading.Thread(target=ask, daemon=True)
    attempt.start()
    attempt.join(timeout)
    return reached.is_set()


def _download(name: str) -> Path:
    """Fetch an official model into huggingface_hub's cache (with its progress bar, and resuming a broken one)."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository = HUB_NAMES[name]
    try:
        cached = [hf_hub_download(repository, file, local_files_only=True) for file in (CONFIG_FILE, WEIGHTS_FILE)]
        return Path(cached[0]).parent
    except LocalEntryNotFoundError:
        pass
    advice = (f"put {CONFIG_FILE} and {WEIGHTS_FILE} of {repository} into a folder and pass the folder's path instead "
              "of the name")
    if not hub_is_reachable():
        raise WeightsError(f"model {name!r} is not on this machine and the Hugging Face hub cannot be reached: "
                           f"{advice}")
    try:
        hf_hub_download(repository, CONFIG_FILE)
        return Path(hf_hub_download(repository, WEIGHTS_FILE)).parent
    except Exception as error:  # the hub client raises its HTTP library's errors, which differ between versions
        raise WeightsError(f"downloading {repository} failed ({type(error).__name__}): {advice}") from error


# --- load -------------------------------------------------------------------------------------------------------------

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


def load(model: nn.Module, folder: Path, dtype: torch.dtype, initialise: Callable[[nn.Module], None]) -> None:
    """Fill a model built on the meta device from a folder in the official layout, one tensor at a time.

    Names, shapes and dtypes are all checked before the first tensor is read. Each tensor is read, transposed and
    converted alone, so the peak is the model plus one tensor.

    Args:
        model: a module on the meta device whose class says how its own names start (`prefix`) and, where it has one,
            what its head is called (`head`).
        dtype: type of the parameters.
        initialise: called on a head that the file does not hold.

    Raises:
        WeightsError: a damaged file, or tensors that are missing, left over, of another shape or not floating point.
    """
    path = folder / WEIGHTS_FILE
    wanted = model.state_dict()
    head = getattr(model, "head", None)
    with open_tensors(path) as file:
        stored = {name: file.get_slice(name) for name in file.keys()}
        parameters = [name for name in stored if not name.endswith(_BUFFERS)]
        source = {_our_name(name, model.prefix): name for name in parameters}
        shapes = {ours: tuple(stored[name].get_shape()) for ours, name in source.items()}
        kinds = {ours: stored[name].get_dtype() for ours, name in source.items()}
    new_head = head is not None and not any(name.startswith(head + ".") for name in source)
    tied = head == "lm_head" and model.config.tie_word_embeddings
    if new_head or tied:
        wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith(f"{head}.")}
    # Another class's head is not ours to load: a classifier's file is a fine source for a language model.
    others = tuple(name for name in _HEADS if name != f"{head}.")
    left_over = [name for name in source if name not in wanted and not name.startswith(others)
                 and not (tied and name == "lm_head.weight")]
    problems = [f"missing {name} {tuple(wanted[name].shape)}" for name in wanted if name not in source]
    problems += [f"{name} and {source[_our_name(name, model.prefix)]} are the same tensor" for name in parameters
                 if source[_our_name(name, model.prefix)] != name]
    problems += [f"unexpected {source[name]} {shapes[name]}" for name in left_over]
    for name in wanted.keys() & source.keys():
        expected = _stored_shape(name, tuple(wanted[name].shape))
        if shapes[name] != expected:
            problems.append(f"{source[name]} is {shapes[name]}, expected {expected}")
        elif kinds[name] not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{source[name]} is stored as {kinds[name]}, expected floating point")
    if problems:
        if not any(name.endswith("wte.weight") for name in source):
            raise WeightsError(f"{path} is not a GPT-2: it holds {_listed(sorted(stored))}")
        raise WeightsError(f"{path} does not fit its config.json: {_listed(sorted(problems))}")

    for name in wanted:
        # Opened anew for each tensor, so that the pages mapped for the last one are given back.
        with open_tensors(path) as file:
            tensor = file.get_tensor(source[name])
            if name.endswith(_TRANSPOSED):
                tensor = tensor.t()                                               # (in, out) -> (out, in)
            tensor = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        _set_parameter(model, name, tensor)
    if tied:
        with open_tensors(path) as file:
            _check_tied(file, path, source, model)
        model.tie_weights()
    elif new_head:
        module = model.get_submodule(head).to_empty(device="cpu").to(dtype)
        initialise(module)


def _our_name(name: str, prefix: str) -> str:
    """A stored tensor's name in a model whose base starts with `prefix`, from either spelling of the layout."""
    if name.startswith(_HEADS):
        return name
    return prefix + name.removeprefix("transformer.")


def _stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if name.endswith(_TRANSPOSED) else shape


def _set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, parameter_name = name.rpartition(".")
    setattr(model.get_submodule(module_name), parameter_name, nn.Parameter(tensor))


def _check_tied(file: Any, path: Path, source: dict[str, str], model: nn.Module) -> None:
    """A stored lm_head must equal the embedding it is tied to."""
    if "lm_head.weight" in source:
        stored = file.get_tensor("lm_head.weight")
        embedding = model.transformer.wte.weight
        if stored.shape != embedding.shape or not torch.equal(stored.to(embedding.dtype), embedding):
            raise WeightsError(f"{path} holds an lm_head.weight that differs from wte.weight, although config.json "
                               "ties them: set tie_word_embeddings to false to load it untied")


def _listed(items: list[str], at_most: int = 8) -> str:
    more = f" and {len(items) - at_most} more" if len(items) > at_most else ""
    return "; ".join(items[:at_most]) + more


# --- save -------------------------------------------------------------------------------------------------------------

def save(model: nn.Module, config: dict[str, Any], folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a model in the official layout, as transformers' save_pretrained spells it.

    Of several processes that hold a sharded model all must call, and the first one writes.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        tensor = parallel.whole(tensor)
        tensor = tensor.t() if name.endswith(_TRANSPOSED) else tensor             # (out, in) -> (in, out)
        name = name if model.prefix or name.startswith("transformer.") else "transformer." + name
        tensors[name] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    if parallel.rank() > 0:
        return
    with replacing_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(temporary / CONFIG_FILE, config)
