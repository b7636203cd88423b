"""Test a saved adapter (or a fully fine-tuned model) on a dataset's test split, or on all rows of a file of your own:

    minipeft evaluate
    minipeft evaluate --adapter checkpoints/lora_finetuned
    minipeft evaluate --dataset more_reviews.csv

Without --dataset it is the one that the model was trained on. Of the very file that it was trained on, whatever it is
called, only the rows that training held out are tested.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipeft.commands.options import add_data_options, add_machine_options, new_parser, options_of
from minipeft.errors import OutputError
from minipeft.files import check_writable, write_json_file
from minipeft.runs.inference import chosen_adapter, evaluate, load
from minipeft.runs.record import headline


def parse(words: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    what = parser.add_argument_group("what to test")
    what.add_argument("--adapter", help="folder that training wrote; default: the newest in checkpoints")
    what.add_argument("--model", help="base model; default: the one the adapter was trained on")
    what.add_argument("--test-size", type=int, help="use only so many test examples")
    what.add_argument("--json", type=Path, help="also write the metrics to this file")
    add_data_options(parser)
    add_machine_options(parser)
    return parser.parse_args(words)


def main(words: Sequence[str], program: str) -> None:
    arguments = parse(words, program)
    options = options_of(arguments)
    if arguments.json:
        if arguments.json.is_dir():
            raise OutputError(f"--json {arguments.json} is a folder: name a file, such as "
                              f"{arguments.json / 'metrics.json'}")
        check_writable(arguments.json.parent)
    trained = load(chosen_adapter(arguments.adapter, print), options)
    found = evaluate(trained, options, print)
    more = " (--full takes all)" if found.examples < found.available and options.test_size is None else ""
    print(f"{found.dataset}, {found.examples:,} of {found.available:,} test examples{more}")
    print(headline(trained.task, found.metrics))
    print_metrics(found.metrics)
    for key in ("by_label", "by_type"):
        if key in found.metrics:
            print_rows(found.metrics[key])
    if "confusion_matrix" in found.metrics:
        print_confusion_matrix(found.metrics["confusion_matrix"], trained.task.label_names)
    if arguments.json:
        write_json_file(arguments.json, {"adapter": str(trained.folder), "dataset": found.dataset,
                                         "metrics": found.metrics})


def print_metrics(metrics: dict[str, Any]) -> None:
    """All that are one number, on a line; an F1 that is one label's names it."""
    print("   ".join(f"{key}{f' of {of}' if (of := metrics.get(f'{key}_label')) else ''} {value:.4f}"
                     for key, value in metrics.items() if isinstance(value, float)))


def print_confusion_matrix(matrix: list[list[int]], label_names: list[str]) -> None:
    """Rows are true labels, columns predicted ones."""
    width = max(len(label) for label in label_names) + 2
    print(f"{'true / predicted':>{width + 10}}" + "".join(f"{label:>{width}}" for label in label_names))
    for label, row in zip(label_names, matrix):
        print(f"{label:>{width + 10}}" + "".join(f"{count:>{width},}" for count in row))


def print_rows(rows: dict[str, dict[str, Any]]) -> None:
    """A line for each label or type of entity: its metrics, and how many of it there are."""
    width = max([20, *map(len, rows)])
    for kind, row in rows.items():
        metrics = "   ".join(f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float))
        print(f"{kind:>{width}}  {metrics}   of {next(value for value in row.values() if isinstance(value, int)):,}")
