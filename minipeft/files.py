"""Writing files so that nothing is ever half-written: under a temporary name first, then renamed. And reading JSON."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minipeft.errors import MinipeftError, OutputError


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as people and diffs like it: indented, keys sorted, newline at the end."""
    path.write_text(_as_json(content), encoding="utf-8")


def _as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` once all of them are written; on an error nothing moves.

    Raises:
        OutputError: the folder cannot be created or written, or the disk is full.
    """
    folder = Path(folder)
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
        yield temporary
        for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
    except (OSError, SafetensorError) as error:
        raise OutputError(_cannot_write(folder, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_writable(folder: str | Path) -> None:
    """Find out now whether files can be written into `folder`, and leave nothing there.

    Raises:
        OutputError: they cannot.
    """
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with replacing_folder(folder):
            pass
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _cannot_write(path: Path, error: Exception) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
    return f"cannot write to {path}: {reason}; choose another folder or free some space"


def read_json_file(path: Path, error_class: type[MinipeftError] = OutputError) -> dict[str, Any]:
    """The content of a JSON file that holds one object.

    Raises:
        error_class: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise error_class(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise error_class(f"{path} is not a JSON object")
    return content


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
    path = Path(path)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OutputError(_cannot_write(path, error)) from error
