"""What the commands share: a parser, and option groups made from dataclasses."""

from __future__ import annotations

import argparse
import difflib
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from minipeft.data.datasets import KNOWN
from minipeft.data.tables import FILE_TYPES
from minipeft.errors import ConfigError
from minipeft.methods import METHODS
from minipeft.runs.defaults import table
from minipeft.runs.plan import Options, check_method
from minipeft.settings import Settings, in_words, option_fields, parsed
from minipeft.tasks import TASKS
from minipeft.tasks.generation import MAX_SUMMARY_LENGTH
from minipeft.tasks.task import MAX_LENGTH
from minipeft.training.hardware import MATMUL_PRECISIONS
from minipeft.training.loop import TrainingConfig

DROPOUT_HELP = "in the base model; default 0, whatever its config.json says"
LENGTH_HELP = f"tokens kept of a text; default {MAX_LENGTH}, of one to summarize {MAX_SUMMARY_LENGTH}"

# What others call an option by, where its name is not alike.
CALLED = {"--lr": "--learning-rate", "--rank": "--r", "--use-dora": "--method dora"}


class Parser(argparse.ArgumentParser):
    """A parser that takes no option cut short, and whose errors are one line that says what may have been meant.

    Attributes:
        method: whose options it has; None where they have no part in the command.
    """

    method: str | None = None

    def __init__(self, **more: Any) -> None:
        super().__init__(allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse_args(self, words: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        arguments, unknown = self.parse_known_args(words, namespace)
        if unknown and unknown[0].startswith("-"):
            self.error(self._unknown_option(unknown[0].partition("=")[0]))
        if unknown:
            self.error(self._one_too_many(unknown[0], words))
        return arguments

    def _unknown_option(self, name: str) -> str:
        """What to say of an option that there is not: whose it is, or which one may have been meant."""
        asked = name.lstrip("-").replace("-", "_")
        owners = [method for method in METHODS
                  if any(field.name == asked for field in option_fields(METHODS[method].config_class))]
        if self.method and owners and self.method not in owners:
            return f"{name} is an option of {', '.join(owners)}, not of {self.method}"
        options, meant = [known for known in self._option_string_actions if known != "-h"], CALLED.get(name, "")
        if meant.split(" ")[0] not in options:
            bare = [known.lstrip("-") for known in options]
            meant = "".join(f"--{close}" for close in difflib.get_close_matches(name.lstrip("-"), bare, 1, cutoff=0.65))
        return f"unknown option {name}: " + (f"did you mean {meant}?" if meant else "--help lists the options")

    def _one_too_many(self, word: str, words: Sequence[str]) -> str:
        """What to say of a word that no option takes: that the one before it takes names with commas, if it does."""
        before = [known for known in words[:words.index(word)] if known.startswith("--")]
        action = self._option_string_actions.get(before[-1]) if before else None
        if action is not None and "list[" in getattr(action.type, "__name__", ""):
            return f"unexpected {word!r} after {before[-1]}: separate by commas, without blanks, as in c_attn,c_proj"
        return f"unexpected {word!r}: --help lists what the command takes"


def new_parser(program: str, description: str, **more: Any) -> Parser:
    """A parser whose examples begin as the user began: with `minipeft train`, or with `python scripts/train.py`."""
    if program.endswith(".py"):
        description = re.sub(r"\bminipeft (\w+)", r"python scripts/\1.py", description)
    return Parser(prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **more)


def add_method_options(parser: Parser, arguments: Sequence[str], also: Sequence[str] = ()) -> str:
    """Add the options of the method that the command line names, which is looked up ahead of all other options.

    Args:
        arguments: the command line.
        also: what --method may name besides; it has no options of its own.

    Returns:
        The method's name.

    Raises:
        ConfigError: an unknown method.
    """
    ahead = Parser(add_help=False)
    ahead.add_argument("--method", default="lora")
    parser.method = method = ahead.parse_known_args(arguments)[0].method
    check_method(method, also)
    if method in METHODS and option_fields(METHODS[method].config_class):
        add_dataclass_options(parser.add_argument_group(f"method {method}"), METHODS[method].config_class,
                              table(method)["method"])
    return method


def add_dataclass_options(group: argparse._ArgumentGroup, config_class: type[Settings],
                          shown: Mapping[str, Any]) -> None:
    """One option for each field of a configuration class that is to have one; None where it is not given.

    Args:
        shown: defaults to print where they differ from the class's.
    """
    kinds = typing.get_type_hints(config_class)
    for field in option_fields(config_class):
        words, _, described = field.metadata["help"].partition("; default ")
        default = shown.get(field.name, described or ("none" if field.default is MISSING else field.default))
        choices = field.metadata["choices"]
        listed = f" ({','.join(map(str, choices))})" if choices else ""
        group.add_argument(
            f"--{field.name.replace('_', '-')}", dest=f"{config_class.__name__}.{field.name}", metavar="VALUE",
            type=_reader(kinds[field.name]), default=None,
            **({"nargs": "?", "const": True} if kinds[field.name] is bool else {}),
            help=f"{words}{listed}; default {default}".replace("%", "%%"))


def _reader(kind: Any) -> Callable[[str], Any]:
    """How to read a field of this type."""
    def read(text: str) -> Any:
        try:
            return parsed(text, kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    read.__name__ = in_words(kind)
    return read


def given(arguments: argparse.Namespace, config_class: type[Settings]) -> dict[str, Any]:
    """The fields of `config_class` that the command line set."""
    prefix = f"{config_class.__name__}."
    return {key.removeprefix(prefix): value for key, value in vars(arguments).items()
            if key.startswith(prefix) and value is not None}


def options_of(arguments: argparse.Namespace) -> Options:
    """What the command line asks a run for; the rest is as `Options` has it.

    Raises:
        ConfigError: a value out of range.
    """
    known = {field.name for field in fields(Options)}
    method = METHODS.get(getattr(arguments, "method", None))
    return Options(**{key: value for key, value in vars(arguments).items() if key in known},
                   training_values=given(arguments, TrainingConfig),
                   method_values=given(arguments, method.config_class) if method else {})


def add_data_options(parser: Parser, one: bool = True) -> None:
    """Options that choose a dataset.

    Args:
        one: whether it is one, by --dataset, of a size that depends on the machine; else only how files are read.
    """
    data = parser.add_argument_group("data")
    if one:
        data.add_argument("--dataset", help=f"{', '.join(KNOWN)}, sample, or a {', '.join(FILE_TYPES)} file of your "
                                            "own (.gz behind it or not), or a folder with train, validation and test "
                                            "files; default: imdb where it can be had, else sample")
        data.add_argument("--full", action="store_true", help="all examples, also on a CPU")
    data.add_argument("--task", help=f"what your own file is for: {', '.join(TASKS)}, or a .py file that defines a "
                                     "task; default classification, or what the adapter was trained for")
    data.add_argument("--data-dir", help="folder that holds imdb/*.parquet and others; default: the MINIPEFT_DATA "
                                         "variable")
    columns = "; ".join(f"{task.name}: {task.columns[0]}, {task.columns[1]}" for task in TASKS.values())
    data.add_argument("--text-column", help=f"of your own file; this and the next are by default, for {columns}")
    data.add_argument("--label-column", help="of your own file: labels (words or numbers), tags, or target texts")
    for split in ("validation", "test"):
        data.add_argument(f"--{split}-file", help=f"a file of your own for the {split} split; default: a tenth of "
                                                  "--dataset's rows")
    data.add_argument("--delimiter", help="between the columns of your own .csv or .tsv file, such as ';' or tab; "
                                          "default: what the header shows")
    data.add_argument("--encoding", help="of your own files' characters, such as cp1252; default utf-8, or what a mark "
                                         "at the beginning shows")
    data.add_argument("--skip-bad-rows", action="store_true",
                      help="leave out rows of your own files that cannot be read or have an empty cell")
    data.add_argument("--similar-labels", help="labels that differ in blanks, case, leading zeros or .0 alone: merge "
                                               "makes them one, keep keeps them apart; default: they are refused")


def add_machine_options(parser: Parser) -> argparse._ArgumentGroup:
    """Options that choose where and in which number format to run."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    group.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16; default auto")
    group.add_argument("--matmul-precision", choices=MATMUL_PRECISIONS,
                       help="of what is computed in float32: torch's float32_matmul_precision; default highest")
    return group
