"""What the scripts share: option groups made from dataclasses, and one line and exit code 2 for a user's mistake."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from minipeft.data.datasets import KNOWN
from minipeft.errors import MinipeftError
from minipeft.runs import defaults
from minipeft.tasks import TASKS

LENGTH_HELP = (f"tokens kept of a text; default {defaults.MAX_LENGTH}, of one to summarise "
               f"{defaults.MAX_SUMMARY_LENGTH}")


def run(main: Callable[[], int | None]) -> None:
    """Call a script's main; a MinipeftError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        sys.exit(main())
    except MinipeftError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader (head, less) has gone
        sys.stderr.close()


def add_dataclass_options(group: argparse._ArgumentGroup, config_class: type, shown: Mapping[str, Any],
                          leave_out: Collection[str] = ()) -> None:
    """One option for each field of a configuration class, its help from the field's metadata.

    Args:
        shown: defaults to print where they differ from the class's. The option itself defaults to None (not given).
        leave_out: fields that get no option.
    """
    for field in dataclasses.fields(config_class):
        if field.name in leave_out:
            continue
        default = shown.get(field.name, field.default if field.default is not dataclasses.MISSING else "none")
        choices = field.metadata.get("choices")
        group.add_argument(
            "--" + field.name.replace("_", "-"), dest=f"{config_class.__name__}.{field.name}", metavar="VALUE",
            type=_parser(str(field.type)), default=None,
            help=f"{field.metadata['help']}{f' ({chr(44).join(map(str, choices))})' if choices else ''}; "
                 f"default {default}".replace("%", "%%"))


def given(options: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """The fields of `config_class` that the command line set."""
    prefix = f"{config_class.__name__}."
    return {key.removeprefix(prefix): value for key, value in vars(options).items()
            if key.startswith(prefix) and value is not None}


def _parser(annotation: str) -> Callable[[str], Any]:
    """How to read a field of this type from the command line."""
    kinds = [kind.strip() for kind in annotation.split("|")]

    def number_or_word(text: str) -> Any:
        for kind, convert in (("int", int), ("float", float)):
            if kind in kinds:
                try:
                    return convert(text)
                except ValueError:
                    continue
        if "bool" in kinds and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if any(kind.startswith("dict") for kind in kinds):
            return _json_object(text)
        if "list[int]" in kinds:
            return [int(part) for part in text.split(",")]
        if "list[str]" in kinds and "," in text and text.replace(",", "").replace("_", "").replace(".", "").isalnum():
            return [part.strip() for part in text.split(",")]
        if "list[str]" in kinds and text.lower() != "all-linear" and text.replace("_", "").replace(".", "").isalnum():
            return [text]  # a plain name; anything with other characters is a regular expression
        if "str" in kinds:
            return text
        raise argparse.ArgumentTypeError(f"{text!r} is not a value of type {annotation}")

    number_or_word.__name__ = annotation
    return number_or_word


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options that choose a dataset."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help=f"{', '.join(KNOWN)}, sample, or a .csv, .tsv, .jsonl or .parquet file; "
                                        "default: imdb where it can be had, else sample")
    data.add_argument("--task", help=f"what your own file is for: {', '.join(TASKS)}, or a .py file that defines a "
                                     "task; default classification, or what the adapter was trained for")
    data.add_argument("--data-dir", help="folder that holds imdb/*.parquet and others; default: the MINIPEFT_DATA "
                                         "variable")
    columns = "; ".join(f"{task.name}: {task.columns[0]}, {task.columns[1]}" for task in TASKS.values())
    data.add_argument("--text-column", help=f"of your own file; this and the next are by default, for {columns}")
    data.add_argument("--label-column", help="of your own file: labels (words or numbers), tags, or target texts")
    data.add_argument("--full", action="store_true", help="all examples, also on a CPU")


def add_machine_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options that choose where and in which number format to run."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    group.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16; default auto")
    return group
