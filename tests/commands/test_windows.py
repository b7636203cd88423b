"""Commands on Windows, as far as Linux can pretend: without what only Unix has, and with what is different there."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from minipeft.commands.start import run as run_program

# Run before a command. Of the modules and functions that Windows lacks, the library finds none; other packages do, as
# they have what they need there.
PRETENDED = """
import builtins, errno, fcntl, os, signal, sys, torch, warnings

LACKING = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "posix"}
found, opened, forced, asked = builtins.__import__, os.open, os.fsync, os.kill

def imported(name, values=None, *more):
    if name in LACKING and str((values or {}).get("__name__")).startswith("minipeft"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return found(name, values, *more)

def open_file(path, flags, *more, **others):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return opened(path, flags, *more, **others)

def force(descriptor):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    forced(descriptor)

def kill(process, number):
    assert number not in (0, 1), "on Windows this ends the process, or every process of the console"
    asked(process, number)

builtins.__import__, os.open, os.fsync, os.kill = imported, open_file, force, kill
warnings.filterwarnings("error", category=EncodingWarning, module="minipeft")  # a file's encoding is never the system's
del os.sysconf, os.sched_getaffinity, os.getuid, signal.SIGHUP
from minipeft.commands.start import main
main()
"""


def pretended(*arguments):
    return subprocess.run([sys.executable, "-X", "warn_default_encoding", "-c", PRETENDED, *map(str, arguments)],
                          capture_output=True, encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_training_writes_its_files_and_prediction_reads_them(tmp_path, tiny_model):
    """A killed run's leftover stays where it is: whether that process lives cannot be asked."""
    leftover = tmp_path / "out" / f".writing-{os.uname().nodename}@999999-model"
    leftover.mkdir(parents=True)
    done = pretended("train", "--model", tiny_model, "--method", "lora", "--dataset", "sample", "--train-size", 32,
                     "--validation-size", 16, "--test-size", 16, "--epochs", 1, "--max-length", 32, "--device", "cpu",
                     "--output", tmp_path / "out", "--results-dir", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").glob("*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["peak_memory_bytes"] is None and results["machine"]["memory_gib"] is None
    assert leftover.is_dir()
    done = pretended("predict", "--adapter", tmp_path / "out", "A moving film.")
    assert done.returncode == 0 and "A moving film." in done.stdout, done.stderr


def test_a_text_that_the_console_has_no_letters_for_is_printed_nevertheless(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        run_program(lambda: print("film → 😀"))
    assert stream.buffer.getvalue().decode("cp1252") == "film \\u2192 \\U0001f600\n"
