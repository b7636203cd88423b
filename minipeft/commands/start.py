"""How every command begins and ends: `minipeft COMMAND`, and scripts/COMMAND.py, which is the same."""

from __future__ import annotations

import gc
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from minipeft.commands import stand_ins
from minipeft.errors import ConfigError, MinipeftError
from minipeft.training.stopping import StopAtOnce, handling

# Each is a module beside this one: main(arguments, program) takes what follows the command's name, and the name of the
# program as it was started, and returns an exit code or None.
COMMANDS = {
    "train": "fine-tune a GPT-2 with a method, and test it",
    "predict": "what a trained model says of texts",
    "evaluate": "test a trained model on a dataset",
    "compare": "methods under equal terms: tuned, trained, tested, their costs",
    "tune": "compare settings of a method on the validation split",
    "anatomy": "what a method does to a model: its modules, a picture, memory, traffic",
    "report": "tables from results files",
    "convert": "an adapter that peft pickled, as safetensors",
}

# How often a thread looks for work before it sleeps; GNU's OpenMP looks 300,000 times, and starves the others where
# other programs compute, too. So often it costs an idle machine a few percent; sleeping at once, up to a third.
SPINS = "20000"


def main() -> None:
    """The `minipeft` command: the first argument says which command the others are for."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        start(name, arguments, f"minipeft {name}")
    else:
        run(_list_commands, name)


def _list_commands(name: str) -> None:
    if name not in ("-h", "--help"):
        raise ConfigError(f"unknown command {name!r}: use {', '.join(COMMANDS)}")
    print("usage: minipeft COMMAND [OPTIONS]\n\nParameter-efficient fine-tuning of GPT-2.\n")
    print("\n".join(f"  {command:10} {summary}" for command, summary in COMMANDS.items()))
    print("\n`minipeft COMMAND --help` lists the options of a command.")


def script(name: str) -> None:
    """What scripts/NAME.py does: the same command, with that file's name in its help."""
    start(name, sys.argv[1:], f"{name}.py")


def start(name: str, arguments: list[str], program: str) -> None:
    """Run one command to its end, which is the end of the program.

    Args:
        arguments: what follows the command's name.
        program: how it was started: "minipeft train" or "train.py".
    """
    run(_import_and_call, name, arguments, program)


def _import_and_call(name: str, arguments: list[str], program: str) -> int | None:
    helps = any(word in ("-h", "--help") for word in takewhile(lambda word: word != "--", arguments))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported
    with handling(_end_at_once), _importing():
        if helps:
            stand_ins.use()
        command = importlib.import_module(f"minipeft.commands.{name}")
    return (command.parse if helps else command.main)(arguments, program)


@contextmanager
def _importing() -> Iterator[None]:
    """While modules are imported, and of them later, Python does not search for garbage: a sixth of the time."""
    is_new = gc.isenabled() and "torch" not in sys.modules
    if is_new:
        gc.disable()
    yield
    if is_new:
        gc.freeze()
        gc.enable()


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """A signal's handler while modules are imported: an exception there would get lost in, or break, someone's code."""
    os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(128 + number)


def run(main: Callable[..., int | None], *arguments: Any) -> None:
    """Call a program's main with the arguments given. A MinipeftError becomes one line on stderr and exit code 2, and
    what the system says of a file does, too.

    Ctrl-C, a closed terminal (SIGHUP) and a cluster's notice (SIGTERM) become exit code 128 + the signal's number.
    """
    _prepare_streams()
    try:
        with handling(StopAtOnce()):
            try:
                code = main(*arguments)
            except SystemExit as ended:  # of --help
                code = ended.code
            sys.stdout.flush()  # here, where an error can still be told
    except MinipeftError as error:
        code = _refused(str(error))
    except RuntimeError as error:
        from minipeft.training.hardware import ran_out_of_memory
        if not ran_out_of_memory(error):
            raise
        # In training and in prediction the error is another, and says more: here the model itself did not fit.
        code = _refused(f"out of memory: use a smaller --model, or another device ({str(error).splitlines()[0]})")
    except KeyboardInterrupt as stopped:
        print("interrupted", file=sys.stderr)
        code = 128 + getattr(stopped, "number", signal.SIGINT)
    except BrokenPipeError:  # the reader (head, less) has gone
        code = 1
    except OSError as error:
        code = _refused(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error))
    _end(code)


def _prepare_streams() -> None:
    """See to it that the three standard streams are there, and take every character."""
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers: each file gets the lowest free one
        if getattr(sys, name) is None:  # closed before the program started: 2>&-
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console or a pipe need not know all characters: \u2192
            stream.reconfigure(errors="backslashreplace")


def _refused(why: str) -> int:
    """Say in one line what is wrong; returns the exit code for it."""
    print(f"error: {' '.join(why.split())}", file=sys.stderr)
    return 2


def _end(code: int | str | None) -> NoReturn:
    """End the program. What is left to print goes nowhere if it cannot be printed: else Python would tell that on its
    way out, and give another exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
