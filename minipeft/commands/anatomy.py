"""Show what a method does to a model: module trees before and after, a picture of one block, counts, memory; and its
equation, term by term, with the numbers that are there while the model reads a text.

    minipeft anatomy --method lora --model gpt2
    minipeft anatomy --method prefix --picture prefix.png
    minipeft anatomy --all
    minipeft anatomy --memory --method lora --model gpt2-xl --batch-size 8 --length 512
    minipeft anatomy --traffic --model gpt2-xl
    minipeft anatomy --method lora --trace --trace-page lora.html
    minipeft anatomy --trace --adapter checkpoints/lora_finetuned --text "Dull, and far too long."
    minipeft anatomy --spectrum checkpoints/lora_finetuned --picture spectrum.png

Shapes are enough for most of it: only a trace and a spectrum read weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipeft.commands.options import add_method_options, given, new_parser
from minipeft.errors import ConfigError
from minipeft.explain import spectrum
from minipeft.explain.anatomy import config_of, injected, render, shapes_only, tree
from minipeft.explain.memory import memory_table, traffic_table
from minipeft.explain.pictures import draw, gallery
from minipeft.explain.trace import TEXT, fresh, trace, trained
from minipeft.explain.trace_page import write_page
from minipeft.explain.trace_text import as_text
from minipeft.methods import METHODS
from minipeft.methods.injection import trainable_parameters
from minipeft.tasks.task import MAX_LENGTH

DEFAULTS = {"batch_size": 16, "device": "cpu", "text": TEXT, "block": 0, "output": Path("results/anatomy")}
NOTHING_ELSE = "nothing else to show"
OPTIONS_OF = {("--batch-size", "--length", "--device"): ("--memory",),
              ("--adapter", "--text", "--block", "--token"): ("--trace", "--trace-page"),
              ("--output",): ("--all",), ("--picture",): ("--spectrum", NOTHING_ELSE)}  # each with what it belongs to


def parse(words: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    parser.add_argument("--method", default="lora", help=f"{', '.join(METHODS)}; default lora")
    parser.add_argument("--model", help="mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder; default mini, or "
                                        "the base that --adapter was trained on")
    parser.add_argument("--picture", type=Path, help="draw one block with the method's parts into a .png or .svg file")
    parser.add_argument("--all", action="store_true", help="the gallery of all methods and their table of counts")
    parser.add_argument("--output", type=Path, help=f"folder for --all; default {DEFAULTS['output']}")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--memory", action="store_true", help="predict the bytes that one training step takes")
    memory.add_argument("--batch-size", type=int, help=f"texts; default {DEFAULTS['batch_size']}")
    memory.add_argument("--length", type=int, help=f"tokens of each; default {MAX_LENGTH}")
    memory.add_argument("--device", choices=("cpu", "cuda"), help=f"whose kernels; default {DEFAULTS['device']}")
    parser.add_argument("--traffic", action="store_true",
                        help="what each of 8, 64 and 512 GPUs sends in a step of every method")
    add_trace_options(parser.add_argument_group("trace"))
    parser.add_argument("--spectrum", type=Path, metavar="FOLDER",
                        help="of a trained model: singular values and effective rank of each matrix's update, and the "
                             "accuracy when all updates are cut to rank 0, 1, 2, 4 (of a larger rank than 8 also 8), "
                             "and not cut; with --picture also drawn")
    add_method_options(parser, words)
    return parser.parse_args(words)


def add_trace_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trace", action="store_true", help="print every term of the method's equation and its numbers")
    group.add_argument("--trace-page", type=Path, metavar="FILE", help="write a trace as an .html page to step through")
    group.add_argument("--adapter", type=Path, metavar="FOLDER",
                       help="trace this trained adapter; default: a fresh one of --method, moved off its start")
    group.add_argument("--text", help=f"what the model reads; default {TEXT!r}")
    group.add_argument("--block", type=int, help=f"number of the block to look at; default {DEFAULTS['block']}")
    group.add_argument("--token", type=int, help="number of the token to look at; default the last one")


def main(words: Sequence[str], program: str) -> None:
    arguments = parse(words, program)
    check_view(arguments)
    for name, default in DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    if arguments.all:
        for path in gallery(arguments.output, arguments.model or "mini"):
            print(f"wrote {path}")
        return
    values = given(arguments, METHODS[arguments.method].config_class)
    if arguments.spectrum:
        show_spectrum(arguments)
        return
    if arguments.trace or arguments.trace_page:
        show_trace(arguments, values)
        return
    name, method = arguments.model or "mini", arguments.method
    config = config_of(name)
    if arguments.traffic:
        print(traffic_table(config))
    elif arguments.memory:
        print(memory_table(config, name, method, values, arguments.batch_size, arguments.length,
                           arguments.device))
    elif arguments.picture:
        draw(injected(config, method, **values), method, arguments.picture)
        print(f"wrote {arguments.picture}")
    else:
        model, color = injected(config, method, **values), sys.stdout.isatty()
        before = render(tree(shapes_only(config).requires_grad_(False)), color)
        print(f"{name} before:\n{before}\n")
        print(f"{name} with {method}, what is trained marked *:\n{render(tree(model), color)}\n")
        print(trainable_parameters(model))


def check_view(arguments: argparse.Namespace) -> None:
    """Refuse two things to show at once, and options of what is not asked for.

    Raises:
        ConfigError: naming them.
    """
    shown = {"--all": arguments.all, "--memory": arguments.memory, "--traffic": arguments.traffic,
             "--trace": arguments.trace or arguments.trace_page, "--spectrum": arguments.spectrum}
    asked = [name for name, wanted in shown.items() if wanted]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} show different things: choose one")
    for options, views in OPTIONS_OF.items():
        unused = [name for name in options if getattr(arguments, name[2:].replace("-", "_")) is not None]
        if unused and not {*(asked or [NOTHING_ELSE])} & {*views}:
            raise ConfigError(f"{', '.join(unused)}: only with {' or '.join(views)}")


def show_trace(arguments: argparse.Namespace, values: dict[str, Any]) -> None:
    """Trace a trained adapter, or a fresh one with these values of its configuration; print it, write its page."""
    if arguments.trace_page and arguments.trace_page.suffix != ".html":
        raise ConfigError(f"--trace-page writes an .html file, not {arguments.trace_page.name!r}")
    model, tokenizer, start = (trained(arguments.adapter, arguments.model) if arguments.adapter else
                               fresh(arguments.model or "mini", arguments.method, values))
    found = trace(model, tokenizer, arguments.text, arguments.block, arguments.token, start)
    if arguments.trace:
        print(as_text(found, sys.stdout.isatty()))
    if arguments.trace_page:
        write_page(found, arguments.trace_page)
        print(f"wrote {arguments.trace_page}")


def show_spectrum(arguments: argparse.Namespace) -> None:
    """Print what the updates of a trained model are made of, and draw it."""
    found = spectrum.spectrum_of(arguments.spectrum, arguments.model)
    print(spectrum.as_text(found))
    if arguments.picture:
        spectrum.draw(found, arguments.picture)
        print(f"wrote {arguments.picture}")
