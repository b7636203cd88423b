"""Compare settings of a method on the validation split, never on the test split; appends to tuning_METHOD.json.

    minipeft tune --method lora --train-size 4000 \\
        --try '{"learning_rate": 1e-3}' --try '{"learning_rate": 3e-3, "r": 16}'

`--method NAME --help` adds the method's own options, which all trials share.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from minipeft.commands.options import (
    LENGTH_HELP,
    add_data_options,
    add_machine_options,
    add_method_options,
    new_parser,
    options_of,
)
from minipeft.errors import ConfigError
from minipeft.methods import METHODS
from minipeft.runs.sweep import tune


def parse(words: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    parser.add_argument("--method", default="lora", help=f"{', '.join(METHODS)}; default lora")
    parser.add_argument("--model", help="mini, gpt2, ..., or a folder; default: gpt2 on CUDA, mini on a CPU")
    parser.add_argument("--try", dest="trials", action="append", required=True, metavar="JSON",
                        help="one trial: fields of the method's configuration or of the training, max_length, "
                             "truncation, dropout")
    add_data_options(parser)
    parser.add_argument("--train-size", type=int, help="use only so many training examples")
    parser.add_argument("--validation-size", type=int, help="use only so many validation examples")
    parser.add_argument("--max-length", type=int, help=LENGTH_HELP)
    parser.add_argument("--results-dir", help="folder of tuning_METHOD.json; default results, in a clone results/mine")
    add_machine_options(parser)
    add_method_options(parser, words)
    return parser.parse_args(words)


def read_trial(text: str) -> dict[str, Any]:
    """One trial from the command line."""
    try:
        trial = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--try {text!r} is not JSON: {error}") from error
    if not isinstance(trial, dict):
        raise ConfigError(f"--try {text!r} is not a JSON object")
    return trial


def main(words: Sequence[str], program: str) -> None:
    arguments = parse(words, program)
    tune(options_of(arguments), [read_trial(text) for text in arguments.trials], print)
