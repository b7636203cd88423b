"""What a trained model predicts for texts from the command line or, one per line, from standard input:

    minipeft predict "A funny, touching film. I loved it." "A boring story and terrible acting."
    cat reviews.txt | minipeft predict --adapter checkpoints/lora_finetuned
    minipeft predict --adapter checkpoints/translation "Two dogs play in the snow."
    minipeft predict --input reviews.csv --output predictions.csv

A label and its probability, words with their tags, or a summary or translation, written as it is generated. The output
file has the input's columns, the prediction, and of a classifier a column for each label, with its probability.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minipeft.commands.options import add_machine_options, new_parser, options_of
from minipeft.data.examples import check_texts
from minipeft.data.tables import FILE_TYPES, Table, file_type, read_table, table_content, write_table
from minipeft.errors import ConfigError, DataError, OutputError
from minipeft.files import check_writable
from minipeft.runs.inference import chosen_adapter, columns_noted, load, predict, predict_table
from minipeft.tasks.generation import source_text
from minipeft.tasks.tagging import Tagging
from minipeft.training.hardware import matmul_precision

DECODING = ("max_new_tokens", "num_beams", "length_penalty", "temperature", "top_k", "top_p", "seed")


def parse(words: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    what = parser.add_argument_group("what to predict")
    what.add_argument("texts", nargs="*", metavar="TEXT", help="texts to read; without any, lines of standard input")
    what.add_argument("--adapter", help="folder that training wrote; default: the newest in checkpoints")
    what.add_argument("--model", help="base model; default: the one the adapter was trained on")
    what.add_argument("--task", help="a task's name or, of a task of your own, its .py file; default: what the "
                                       "adapter was trained for")
    table = parser.add_argument_group("files")
    kinds = f"{', '.join(FILE_TYPES)} (.gz behind it or not)"
    table.add_argument("--input", type=Path, help=f"a file of texts: {kinds}")
    table.add_argument("--output", type=Path, help=f"write a table, of these kinds too: {kinds}")
    table.add_argument("--text-column", help="of --input; default: training's where it has that, else the task's")
    table.add_argument("--delimiter", help="between the columns of --input; default: what its header shows")
    table.add_argument("--encoding", help="of --input; default utf-8, or what a mark at its beginning shows")
    table.add_argument("--overwrite", action="store_true", help="replace an --output that is there")
    how = parser.add_argument_group("how to write a summary or translation; greedily by default")
    how.add_argument("--max-new-tokens", type=int, help="default as in training")
    how.add_argument("--num-beams", type=int, help="beam search: continuations followed at once; not streamed")
    how.add_argument("--length-penalty", type=float, help="beam search: above 1 favors longer texts; default 1")
    how.add_argument("--temperature", type=float, help="sample from softmax(logits / temperature)")
    how.add_argument("--top-k", type=int, help="sample among the k likeliest tokens")
    how.add_argument("--top-p", type=float, help="sample among the likeliest tokens of this probability together")
    how.add_argument("--seed", type=int, help="of sampling; default 0")
    add_machine_options(parser)
    return parser.parse_args(words)


def main(words: Sequence[str], program: str) -> None:
    arguments = parse(words, program)
    with matmul_precision(arguments.matmul_precision):
        answer(arguments)


def answer(arguments: argparse.Namespace) -> None:
    """Print what the model says of the texts, or write it into a table."""
    check_files(arguments)
    options = options_of(arguments)
    table = read_table(arguments.input, options.delimiter, options.encoding) if arguments.input else None
    texts = read_texts(arguments) if table is None else []
    trained = load(chosen_adapter(arguments.adapter, partial(print, file=sys.stderr)), options)
    if table is not None:
        column = arguments.text_column or columns_noted(trained, table.names).get("text_column")
        texts = texts_of(table, arguments.input, column or trained.task.columns[0], type(trained.task) is Tagging)
    decoding = {name: getattr(arguments, name) for name in DECODING if getattr(arguments, name) is not None}
    if arguments.output is None:
        for part in predict(trained, texts, **decoding):
            print(part, end="", flush=True)
        return
    own = {name: table.column(name) for name in table.names} if table else {trained.task.columns[0]: texts}
    table_content(arguments.output, own)  # what the file cannot hold is told before the work
    found = predict_table(trained, texts, progress="predicting", **decoding)
    if taken := [name for name in found if name in own]:
        raise DataError(f"{arguments.input or 'the texts'} has a column {taken[0]!r} already, which a prediction would "
                        "be called too: rename it")
    write_table(arguments.output, {**own, **found})
    print(f"wrote {len(texts):,} predictions to {arguments.output}")


def check_files(arguments: argparse.Namespace) -> None:
    """Refuse files that contradict each other, or cannot be written, before anything is loaded."""
    if arguments.input and arguments.texts:
        raise ConfigError("give either --input or texts, not both")
    if not arguments.input and (arguments.text_column or arguments.delimiter or arguments.encoding):
        raise ConfigError("--text-column, --delimiter and --encoding are for --input: name a file with it")
    if arguments.output is None:
        return
    if file_type(arguments.output) is None:
        raise ConfigError(f"--output {arguments.output} should end in one of {', '.join(FILE_TYPES)} (.gz behind it or "
                          "not)")
    if arguments.output.exists():
        if arguments.input and arguments.input.exists() and arguments.output.samefile(arguments.input):
            raise OutputError(f"{arguments.output} is the input itself: choose another --output")
        if not arguments.overwrite:
            raise OutputError(f"{arguments.output} is there already: choose another --output, or replace it with "
                              "--overwrite")
    check_writable(arguments.output.parent)


def texts_of(table: Table, path: Path, column: str, keeps_words: bool) -> list[Any]:
    """The texts of a file, where a list of words or sentences is one text.

    Args:
        keeps_words: a list of words stays one, so that each has its tag, also one with a blank in it.

    Raises:
        DataError: no such column, or a row that cannot be used.
    """
    if len(set(table.names)) < len(table.names):
        raise DataError(f"{path} has two columns of one name: {', '.join(table.names)}")
    if column not in table.names:
        raise DataError(f"{path} has no column {column!r}; --text-column can be one of {', '.join(table.names)}")
    for row, why in sorted(table.unreadable.items()):
        raise DataError(f"{path}, row {row}: {why}")
    cells = table.column(column)
    texts = [source_text(cell) for cell in cells]
    check_texts(texts, str(path))
    return cells if keeps_words else texts


def read_texts(arguments: argparse.Namespace) -> list[str]:
    """The texts of the command line or else, one per line, of standard input."""
    if not arguments.texts and sys.stdin.isatty():
        raise DataError("no text: give texts as arguments, or lines on standard input")
    try:
        texts = arguments.texts or [line for line in sys.stdin.read().split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8: {error}") from error
    check_texts(texts, "argument" if arguments.texts else "standard input")
    return texts
