"""Writing files so that nothing is ever half-written, lost or mixed; and reading JSON.

A file is written under a temporary name, forced to the disk, then renamed. Files that belong together carry each
other's digests (`digests`), so that a reader beside a writer sees whether they are of one save. A folder in use is
locked. What a killed process left behind is cleared by the next one that writes there.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import logging
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minipeft.errors import InUseError, MinipeftError, OutputError

try:
    import fcntl
except ImportError:  # Windows: it has no such lock
    fcntl = None

logger = logging.getLogger(__name__)
LOCK_FILE = ".lock"
_WRITING = ".writing"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as people and diffs like it: indented, keys sorted, newline at the end."""
    path.write_text(_as_json(content), encoding="utf-8", newline="\n")


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(without_nan(content), indent=2, sort_keys=True, allow_nan=False) + "\n"


def without_nan(content: Any) -> Any:
    """A JSON value in which None stands for what is no number, or infinite: a file that every reader takes."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


# --- write ------------------------------------------------------------------------------------------------------------

@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` once all of them are written; on an error nothing moves.

    Other files in `folder` stay. The files that move get the access rights that the user's umask gives a new file.

    Raises:
        OutputError: the folder cannot be created or written, or the disk is full.
    """
    folder = Path(folder)
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        temporary = Path(tempfile.mkdtemp(prefix=f"{_WRITING}-{_owner()}-", dir=folder))
        yield temporary
        mode = _new_file_mode(temporary)
        for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.chmod(mode)
            _force_to_disk(file)
            file.replace(target)
            _force_to_disk(target.parent)
    except (OSError, SafetensorError) as error:
        raise OutputError(_cannot_write(folder, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_json_file(path: str | Path, content: dict[str, Any]) -> None:
    """Write one JSON file under a temporary name, then rename it.

    Raises:
        OutputError: it cannot be written.
    """
    write_text_file(path, _as_json(content))


def write_text_file(path: str | Path, text: str) -> None:
    """Write one text file under a temporary name, then rename it.

    Raises:
        OutputError: it cannot be written.
    """
    _write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_bytes_file(path: str | Path, content: bytes) -> None:
    """Write one file under a temporary name, then rename it.

    Raises:
        OutputError: it cannot be written.
    """
    _write_file(path, lambda temporary: temporary.write_bytes(content))


def _write_file(path: str | Path, write: Callable[[Path], Any]) -> None:
    path = Path(path)
    temporary = path.with_name(f"{_WRITING}-{_owner()}-{path.name}.part")  # no one takes it for a .json file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent)
        write(temporary)
        _force_to_disk(temporary)
        temporary.replace(path)
        _force_to_disk(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OutputError(_cannot_write(path, error)) from error


def check_writable(folder: str | Path) -> None:
    """Find out now whether files can be written into `folder`, and leave nothing there.

    Raises:
        OutputError: they cannot.
    """
    with _no_empty_folder_left(Path(folder)), replacing_folder(folder):
        pass


@contextmanager
def _no_empty_folder_left(folder: Path) -> Iterator[None]:
    """Folders that come to be within the block, on the way to `folder`, go again if they are empty at its end."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def clear_leftovers(folder: Path) -> None:
    """Delete what processes of this machine that live no more were writing into `folder` when they ended."""
    for path in folder.glob(f"{_WRITING}-*"):
        host, _, rest = path.name.removeprefix(f"{_WRITING}-").partition("@")
        number = rest.partition("-")[0]
        if host == _host() and number.isdecimal() and not _lives(int(number)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):  # another user's, in a folder where each may delete only what is theirs
                    path.unlink()


def _owner() -> str:
    """This process in a temporary name, so that another one can tell whether it still lives."""
    return f"{_host()}@{os.getpid()}"


def _host() -> str:
    return socket.gethostname().replace("/", "_").replace("@", "_")


def _lives(process: int) -> bool:
    if fcntl is None:  # on Windows the question would end the process: what it left stays
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it belongs to somebody else, or no process has such a number
        return True
    return True


def _new_file_mode(folder: Path) -> int:
    """The access rights of a new file; safetensors would give its files the owner's alone."""
    probe = folder / "mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def _force_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, would outlive a power cut."""
    with suppress(PermissionError):  # Windows opens no folders, and forces only what is open for writing
        descriptor = os.open(path, os.O_RDWR if fcntl is None else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cannot_write(path: Path, error: Exception) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
    return f"cannot write to {path}: {reason}; choose another folder or free some space"


# --- belong together --------------------------------------------------------------------------------------------------

def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file directly in a folder, by name."""
    return {file.name: file_digest(file) for file in sorted(folder.iterdir()) if file.is_file()}


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, read in parts: a whole model need not fit into memory a second time."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def digest(content: bytes) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other processes that lock `folder` out of it for the length of the block. A lock ends with its process.

    On Windows and on a file system that has no locks it keeps nobody out.

    Raises:
        InUseError: another process has it.
        OutputError: the lock file cannot be written.
    """
    if fcntl is None:
        yield
        return
    path = Path(folder) / LOCK_FILE
    with _no_empty_folder_left(path.parent), _lock(path) as file:
        try:
            _note_owner(path, file)
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def is_locked(folder: str | Path) -> bool:
    """Whether another process holds the lock of `folder`, just now."""
    if fcntl is None:
        return False
    try:
        with _open_lock(Path(folder) / LOCK_FILE, "r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except (OSError, OutputError):  # no such file, or none that a lock could have
        return False
    return False


def _lock(path: Path) -> io.FileIO:
    """The lock file, open and locked: the operating system takes the lock away when the process ends, however it does.

    Raises:
        InUseError: another process has it.
        OutputError: the file cannot be written.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _open_lock(path, "a+")
        except OSError as error:
            raise OutputError(_cannot_write(path.parent, error)) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            with file:
                file.seek(0)
                owner = file.read().decode(errors="replace").strip() or "just started"
            raise InUseError(f"{path.parent} is in use by another run ({owner}): wait for it to end, or choose another "
                             "folder") from error
        except OSError as error:
            _warn_of_no_lock(error.strerror)
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()  # the run before this one deleted it a moment ago


def _open_lock(path: Path, mode: str) -> io.FileIO:
    """A lock file. A link is not followed: a folder from elsewhere could have one to any of the user's files.

    Raises:
        OutputError: a link, or no plain file.
        OSError: it cannot be opened.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OutputError(f"{path} is no plain file, as a lock should be: delete it")
    return io.FileIO(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def _note_owner(path: Path, file: io.FileIO) -> None:
    """Write into a lock file whose it is.

    Raises:
        OutputError: the disk is full.
    """
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {_host()}\n".encode())
    except OSError as error:
        raise OutputError(_cannot_write(path.parent, error)) from error


@functools.cache
def _warn_of_no_lock(reason: str) -> None:
    """Said once: two runs in one folder would not notice each other."""
    logger.warning("this file system has no locks (%s): see to it that no two runs write into one folder", reason)


# --- read -------------------------------------------------------------------------------------------------------------

def read_json_file(path: Path, error_class: type[MinipeftError] = OutputError) -> dict[str, Any]:
    """The content of a JSON file that holds one object.

    Raises:
        error_class: it cannot be read, or holds something else.
    """
    try:
        return parse_json(path.read_bytes(), path, error_class)
    except OSError as error:
        raise error_class(f"{path} is not readable JSON: {error}") from error


def parse_json(content: bytes, path: Path, error_class: type[MinipeftError]) -> dict[str, Any]:
    """The object that a JSON file's content means.

    Raises:
        error_class: it means none.
    """
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise error_class(f"{path} is not readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise error_class(f"{path} is not a JSON object")
    return found
