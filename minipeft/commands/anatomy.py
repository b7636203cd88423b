"""Show what a method does to a model: module trees before and after, a picture of one block, counts, memory.

    minipeft anatomy --method lora --model gpt2
    minipeft anatomy --method prefix --picture prefix.png
    minipeft anatomy --all
    minipeft anatomy --memory --method lora --model gpt2-xl --batch-size 8 --length 512
    minipeft anatomy --traffic --model gpt2-xl

Shapes are enough for all of it: no weights are read, except a folder's config.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from minipeft.commands.options import add_method_options, given, new_parser
from minipeft.explain.anatomy import config_of, injected, render, shapes_only, tree
from minipeft.explain.memory import memory_table, traffic_table
from minipeft.explain.pictures import draw, gallery
from minipeft.methods import METHODS
from minipeft.methods.injection import trainable_parameters
from minipeft.tasks.task import MAX_LENGTH


def parse(words: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    parser.add_argument("--method", default="lora", help=f"{', '.join(METHODS)}; default lora")
    parser.add_argument("--model", default="mini", help="mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder; "
                                                        "default mini")
    parser.add_argument("--picture", type=Path, help="draw one block with the method's parts into a .png or .svg file")
    parser.add_argument("--all", action="store_true", help="the gallery of all methods and their table of counts")
    parser.add_argument("--output", type=Path, default=Path("results/anatomy"), help="folder for --all; default "
                                                                                     "results/anatomy")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--memory", action="store_true", help="predict the bytes that one training step takes")
    memory.add_argument("--batch-size", type=int, default=16, help="texts; default 16")
    memory.add_argument("--length", type=int, help=f"tokens of each; default {MAX_LENGTH}")
    memory.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="whose kernels; default cpu")
    parser.add_argument("--traffic", action="store_true",
                        help="what each of 8, 64 and 512 GPUs sends in a step of every method")
    add_method_options(parser, words)
    return parser.parse_args(words)


def main(words: Sequence[str], program: str) -> None:
    arguments = parse(words, program)
    if arguments.all:
        for path in gallery(arguments.output, arguments.model):
            print(f"wrote {path}")
        return
    config, method = config_of(arguments.model), arguments.method
    values = given(arguments, METHODS[method].config_class)
    if arguments.traffic:
        print(traffic_table(config))
    elif arguments.memory:
        print(memory_table(config, arguments.model, method, values, arguments.batch_size, arguments.length,
                           arguments.device))
    elif arguments.picture:
        draw(injected(config, method, **values), method, arguments.picture)
        print(f"wrote {arguments.picture}")
    else:
        model, color = injected(config, method, **values), sys.stdout.isatty()
        before = render(tree(shapes_only(config).requires_grad_(False)), color)
        print(f"{arguments.model} before:\n{before}\n")
        print(f"{arguments.model} with {method}, what is trained marked *:\n{render(tree(model), color)}\n")
        print(trainable_parameters(model))
