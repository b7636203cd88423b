"""What a trained model predicts for texts from the command line or, one per line, from standard input:

    minipeft predict "A film I will not forget." "Two hours I want back."
    cat reviews.txt | minipeft predict --adapter checkpoints/lora_finetuned
    minipeft predict --adapter checkpoints/translation "Two dogs play in the snow."

A label and its probability, words with their tags, or a summary or translation, written as it is generated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from minipeft.commands.options import add_machine_options, new_parser, options_of
from minipeft.data.examples import check_texts
from minipeft.errors import DataError
from minipeft.runs.inference import chosen_adapter, load, predict

DECODING = ("max_new_tokens", "num_beams", "length_penalty", "temperature", "top_k", "top_p", "seed")


def parse(words: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    what = parser.add_argument_group("what to predict")
    what.add_argument("texts", nargs="*", metavar="TEXT", help="texts to read; without any, lines of standard input")
    what.add_argument("--adapter", help="folder that training wrote; default: the newest in checkpoints")
    what.add_argument("--model", help="base model; default: the one the adapter was trained on")
    what.add_argument("--task", help="a task's name or, of a task of your own, its .py file; default: what the "
                                       "adapter was trained for")
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
    texts = read_texts(arguments)
    trained = load(chosen_adapter(arguments.adapter, partial(print, file=sys.stderr)), options_of(arguments))
    decoding = {name: getattr(arguments, name) for name in DECODING if getattr(arguments, name) is not None}
    for part in predict(trained, texts, **decoding):
        print(part, end="", flush=True)


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
