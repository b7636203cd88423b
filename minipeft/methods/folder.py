"""An adapter folder's files: which belong together, and which of them an earlier save wrote.

    adapter_config.json, adapter_model.safetensors      what peft reads and writes too
    minipeft.json                                       what peft ignores: the account of this save

The account names the files of the save with their digests, or the sub-folders that hold one method each. By it a loader
notices files of two different saves, and a later save deletes what an earlier one wrote, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from minipeft.errors import AdapterError, MinipeftError
from minipeft.files import digest, parse_json, read_json_file
from minipeft.methods.wrappers import without_wrappers

CONFIG_FILE, TENSORS_FILE, DETAILS_FILE = "adapter_config.json", "adapter_model.safetensors", "minipeft.json"
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
    """The three files of an adapter, all of one save.

    Raises:
        AdapterError: one is missing or damaged, or they are of different saves.
    """
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} holds no {name}: it is not an adapter folder")
    details, files, others = read_together(folder, (CONFIG_FILE, TENSORS_FILE))
    try:
        contents = Contents(parse_json(files[CONFIG_FILE], folder / CONFIG_FILE, AdapterError),
                            {without_wrappers(name): tensor for name, tensor in load(files[TENSORS_FILE]).items()},
                            details)
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{folder / TENSORS_FILE} is truncated or not a safetensors file: {error}") from error
    check_one_save(folder, others)
    return contents


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
                           f"{DETAILS_FILE}")


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
