"""What a trained model has to say of texts; they come from the command line or, one a line, from standard input:

    python scripts/predict.py "A film I will not forget." "Two hours I want back."
    cat reviews.txt | python scripts/predict.py --adapter checkpoints/lora_finetuned
    python scripts/predict.py --adapter checkpoints/translation "Two dogs play in the snow."

A label and its probability, words with their tags, or a summary or translation, written as it is generated.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn

from minipeft.errors import ConfigError, DataError
from minipeft.runs.command_line import add_machine_options, run
from minipeft.runs.trained import load_finetuned
from minipeft.tasks.generation import Generation
from minipeft.tasks.task import Task, check_texts
from minipeft.training.hardware import cast_frozen, choose_device, choose_precision

WRITING = ("max_new_tokens", "num_beams", "length_penalty", "temperature", "top_k", "top_p", "seed")  # how to write


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to predict")
    what.add_argument("texts", nargs="*", metavar="TEXT", help="texts to read; without any, lines of standard input")
    what.add_argument("--adapter", default="checkpoints/lora_finetuned", help="folder that training wrote; default "
                                                                              "checkpoints/lora_finetuned")
    what.add_argument("--model", help="base model; default: the one the adapter was trained on")
    what.add_argument("--task", help="the .py file of a task of your own; default: what the adapter was trained for")
    how = parser.add_argument_group("how to write a summary or translation; greedily by default")
    how.add_argument("--max-new-tokens", type=int, help="default as in training")
    how.add_argument("--num-beams", type=int, help="beam search: continuations followed at once; not streamed")
    how.add_argument("--length-penalty", type=float, help="beam search: above 1 favours longer texts; default 1")
    how.add_argument("--temperature", type=float, help="sample from softmax(logits / temperature)")
    how.add_argument("--top-k", type=int, help="sample among the k likeliest tokens")
    how.add_argument("--top-p", type=float, help="sample among the likeliest tokens of this probability together")
    how.add_argument("--seed", type=int, help="of sampling; default 0")
    add_machine_options(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not options.texts and sys.stdin.isatty():
        raise DataError("no text: give texts as arguments, or lines on standard input")
    try:
        texts = options.texts or [line for line in sys.stdin.read().split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8: {error}") from error
    check_texts(texts, "argument" if options.texts else "standard input")
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    model, task = load_finetuned(options.adapter, options.model, device, options.task)
    cast_frozen(model.requires_grad_(False), precision)
    for piece in predicted(options, model, task, texts, device, precision):
        print(piece, end="", flush=True)


def predicted(options: argparse.Namespace, model: nn.Module, task: Task, texts: list[str], device: torch.device,
              precision: torch.dtype) -> Iterator[str]:
    """What the task has to say of the texts, piece by piece."""
    how: dict[str, Any] = {name: value for name in WRITING if (value := getattr(options, name)) is not None}
    if not isinstance(task, Generation):
        if how:
            raise ConfigError(f"{options.adapter} was trained for {task.name}, which writes no text: "
                              f"--{next(iter(how)).replace('_', '-')} means nothing to it")
        return task.answers(model, texts, device, precision)
    if "max_new_tokens" in how:
        task = dataclasses.replace(task, max_new_tokens=how.pop("max_new_tokens"))  # the source has the other tokens
    if "top_k" in how or "top_p" in how:
        how.setdefault("temperature", 1.0)
    seed, beams = how.pop("seed", None), how.get("num_beams", 1)
    if not 0 <= (seed or 0) < 2**63:
        raise ConfigError(f"seed must be a number from 0 to 2**63 - 1, got {seed}")
    if seed is not None and (beams != 1 or not how.get("temperature")):
        raise ConfigError("--seed is for sampling: add --temperature, --top-k or --top-p, and no --num-beams")
    if beams != 1:
        return (text + "\n" for text in task.write(model, texts, device, precision, **how))
    return task.answers(model, texts, device, precision,
                        generator=torch.Generator(device).manual_seed(seed or 0), **how)


if __name__ == "__main__":
    run(main)
