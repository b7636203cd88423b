"""Train and test several methods on one dataset, one after the other, and print the table of their results:

    minipeft compare --dataset wnut_17
    minipeft compare --dataset multi30k --methods baseline,full,lora --epochs 1

Options that are not its own go to `minipeft train`, for every method. A method whose results file is there already, of
the same request, is not run again, and a run that was cut off goes on where it stopped: the same command after an
interruption finishes it. Results on other data, of another base model or with other settings are refused before the
first run: give the comparison a --results-dir of its own, or run what differs anew with --overwrite.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minipeft.commands import train
from minipeft.commands.options import new_parser, options_of
from minipeft.data.datasets import name_of
from minipeft.errors import ConfigError
from minipeft.methods import METHODS
from minipeft.runs.sweep import COMPARED, compare

TRAIN = (sys.executable, "-m", "minipeft", "train")  # each run has a process of its own


def parse(words: Sequence[str], program: str) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser(program, __doc__, allow_abbrev=False)
    parser.add_argument("--dataset", required=True, help="as train's")
    parser.add_argument("--methods", default=",".join(COMPARED), help=f"baseline, {', '.join(METHODS)}; default "
                                                                      f"{','.join(COMPARED)}")
    parser.add_argument("--model", help="as train's")
    parser.add_argument("--output", type=Path, default=Path("checkpoints"),
                        help="where adapters go, each to DATASET_METHOD in it; default checkpoints")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="default results")
    return parser.parse_known_args(words)


def main(words: Sequence[str], program: str) -> int:
    arguments, others = parse(words, program)
    if any(other.split("=")[0] == "--method" for other in others):
        raise ConfigError("--method trains one method, by `minipeft train`; here it is --methods")
    requests, commands = {}, {}
    for method in arguments.methods.split(","):
        wanted = words_of(method, arguments) + others
        requests[method] = options_of(train.parse(wanted, f"{program}, for {method}"))
        commands[method] = [*TRAIN, *wanted]
    return compare(requests, commands, say=partial(print, flush=True))


def words_of(method: str, arguments: argparse.Namespace) -> list[str]:
    """What `minipeft train` is called with for one method, besides the options that all of them share."""
    folder = arguments.output / f"{name_of(arguments.dataset)}_{method}"
    return ["--method", method, "--dataset", arguments.dataset, "--results-dir", str(arguments.results_dir), "--output",
            str(folder), "--resume", *(["--model", arguments.model] if arguments.model else [])]
