"""An adapter folder's files: which belong together, and which of them an earlier save wrote.

    adapter_config.json, adapter_model.safetensors      what peft reads and writes too
    adapter_model.bin                                   what peft wrote in place of the latter until 2023: only read
    minipeft.json                                       what peft ignores: the account of this save

The account names the files of the save with their digests, or the sub-folders that hold one method each. By it a loader
notices files of two different saves, and a later save deletes what an earlier one wrote, and nothing else.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from minipeft.errors import AdapterError, MinipeftError, OutputError
from minipeft.files import digest, parse_json, read_json_file, replacing_folder
from minipeft.methods.pickled import read_tensors
from minipeft.methods.wrappers import without_wrappers

CONFIG_FILE, TENSORS_FILE, DETAILS_FILE = "adapter_config.json", "adapter_model.safetensors", "minipeft.json"
PICKLED_FILE = "adapter_model.bin"
# How often, and after how many seconds, a folder is read again whose files are not of one save: a writer renames them
# within milliseconds.
_READS, _PAUSE = 20, 0.05


class Contents(NamedTuple):
    """What the three files of one adapter hold; `details` is empty for an adapter that peft wrote."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    details: dict[str, Any]


def read_details(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's minipeft.json; empty for an adapter that peft wrote.

    Raises:
        AdapterError: it is damaged.
    """
    path = Path(folder) / DETAILS_FILE
    return read_json_file(path, AdapterError) if path.is_file() else {}


def parts_of(folder: Path) -> list[Path]:
    """The folders that hold one method each: those that the account names, or the folder itself.

    Raises:
        AdapterError: a damaged account.
    """
    named = read_details(folder).get("parts")
    if named is None:
        return [folder]
    if not isinstance(named, list) or not named or not all(_is_plain(name) for name in named):
        raise AdapterError(f"{folder / DETAILS_FILE}: parts must be a list of sub-folders' names, got {named!r}")
    return [folder / name for name in named]


def read_contents(folder: Path) -> Contents:
    """The files of an adapter, all of one save.

    Raises:
        AdapterError: one is missing or damaged, or they are of different saves.
    """
    for name in (CONFIG_FILE, tensors_file(folder)):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} holds no {name}: it is not an adapter folder")
    path = folder / tensors_file(folder)
    details, files, others = read_together(folder, (CONFIG_FILE, path.name))
    config = parse_json(files[CONFIG_FILE], folder / CONFIG_FILE, AdapterError)
    if path.name == PICKLED_FILE:
        tensors = read_tensors(files[path.name], path)
    else:
        try:
            tensors = load(files[path.name])
        except (SafetensorError, ValueError) as error:
            raise AdapterError(f"{path} is truncated or not a safetensors file: {error}") from error
        except KeyError as error:  # it looks types up in a table
            raise AdapterError(f"{path} holds a tensor of type {error}, which is not read here") from error
    check_one_save(folder, others)
    bare = {}
    for name, tensor in tensors.items():
        if without_wrappers(name) in bare:
            raise AdapterError(f"{path} holds {without_wrappers(name)} twice, once as {name}")
        bare[without_wrappers(name)] = tensor
    return Contents(config, bare, details)


def tensors_file(folder: Path) -> str:
    """The name of the file that holds an adapter's tensors: peft's older one where only that is there.

    Raises:
        AdapterError: a damaged account.
    """
    if (folder / TENSORS_FILE).is_file() or not (folder / PICKLED_FILE).is_file():
        return TENSORS_FILE
    account = read_details(folder).get("files")
    # What this library saved is never pickled: then the file that its account names is missing.
    return TENSORS_FILE if isinstance(account, dict) and TENSORS_FILE in account else PICKLED_FILE


def convert(folder: str | Path, output: str | Path) -> list[Path]:
    """Write the tensors of an adapter_model.bin as adapter_model.safetensors, and copy the configuration as it stands.

    Args:
        output: created if absent; may be `folder` itself. Nothing there is replaced or deleted.

    Returns:
        The files that were written.

    Raises:
        AdapterError: no such adapter, or a .bin that is damaged or holds anything but tensors.
        OutputError: one of the files is there already, or cannot be written.
    """
    folder, output = Path(folder), Path(output)
    if tensors_file(folder) != PICKLED_FILE:
        holds = f"holds {TENSORS_FILE}" if (folder / TENSORS_FILE).is_file() else f"holds no {PICKLED_FILE}"
        raise AdapterError(f"{folder} {holds}: there is nothing to convert")
    tensors = read_contents(folder).tensors
    copied = [] if output.resolve() == folder.resolve() else [
        name for name in (CONFIG_FILE, DETAILS_FILE) if (folder / name).is_file()]
    if present := [name for name in (TENSORS_FILE, *copied) if (output / name).exists()]:
        raise OutputError(f"{output} holds {', '.join(present)} already: choose another folder")
    with replacing_folder(output) as temporary:
        # Safetensors stores whole tensors of their own: no views, and no values that two names share.
        save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
                  temporary / TENSORS_FILE, metadata={"format": "pt"})
        for name in copied:
            shutil.copyfile(folder / name, temporary / name)
    return [output / name for name in (TENSORS_FILE, *copied)]


def read_together(folder: Path, names: tuple[str, ...], read: Callable[[Path], Any] = Path.read_bytes,
                  digest_of: Callable[[Any], str] = digest) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The account and the named files: of one save if there is one, also after a moment.

    Args:
        read: what to read of a file; default its content.
        digest_of: the digest of what was read.

    Returns:
        (account, what was read by name, names of the files that are not those of the account).

    Raises:
        AdapterError: a file cannot be read, or the account is damaged.
    """
    for _ in range(_READS):
        details = read_details(folder)
        known = details.get("files", {})
        if not isinstance(known, dict):
            raise AdapterError(f"{folder / DETAILS_FILE}: files must be an object, got {known!r}")
        try:
            files = {name: read(folder / name) for name in names}
        except OSError as error:
            raise AdapterError(f"{folder} cannot be read: {error}") from error
        others = [name for name, found in files.items() if known.get(name) not in (None, digest_of(found))]
        if not others:
            break
        time.sleep(_PAUSE)
    return details, files, others


def check_one_save(folder: Path, others: list[str]) -> None:
    """Refuse a folder with files of another save than its account's.

    Raises:
        AdapterError: naming them.
    """
    if others:
        raise AdapterError(f"{folder} holds files of different saves: {', '.join(others)} is not what {DETAILS_FILE} "
                           "names. A save was stopped, or the file was changed by hand: save again, or delete "
                           f"the entry \"files\" in {DETAILS_FILE}")


def written_before(folder: Path) -> set[Path]:
    """The files of the adapter or model that an earlier save wrote into `folder`, by its own account."""
    if folder.is_symlink() or not (folder / DETAILS_FILE).is_file():
        return set()
    found, names = {folder / DETAILS_FILE}, [CONFIG_FILE, TENSORS_FILE]
    with suppress(MinipeftError):
        details = read_details(folder)
        if isinstance(details.get("files"), dict):
            names = [name for name in details["files"] if _is_plain(name)]
        if details.get("parts") is not None:
            names = []
            for part in parts_of(folder):
                found |= written_before(part)
    return found | {folder / name for name in names}


def clear(earlier: set[Path], folder: Path, written: set[Path]) -> None:
    """Delete the files of an earlier save that the new one has not replaced, and sub-folders that are empty then."""
    for path in earlier - written:
        path.unlink(missing_ok=True)
        if path.parent != folder:
            with suppress(OSError):  # it holds something else
                path.parent.rmdir()


def _is_plain(name: Any) -> bool:
    """Whether it is the name of something directly in a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name
