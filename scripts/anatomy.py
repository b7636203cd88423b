"""Show what a method does to a model: module trees before and after, a picture of one block, counts, memory.

    python scripts/anatomy.py --method lora --model gpt2
    python scripts/anatomy.py --method prefix --picture prefix.png
    python scripts/anatomy.py --all
    python scripts/anatomy.py --memory --method lora --model gpt2-xl --batch-size 8 --length 512
    python scripts/anatomy.py --traffic --model gpt2-xl

Shapes are enough for all of it: no weights are read, except a folder's config.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from minipeft.data.batches import number_of_passes
from minipeft.errors import ConfigError
from minipeft.explain.anatomy import counts_table, injected, render, shapes_only, tree
from minipeft.explain.memory import traffic_table, training_memory
from minipeft.explain.pictures import TITLES, draw
from minipeft.files import check_writable, replacing_folder
from minipeft.methods import METHODS
from minipeft.methods.injection import positions_left, trainable_parameters
from minipeft.model.config import GPT2Config
from minipeft.model.weights import HUB_NAMES, find, read_config
from minipeft.runs.command_line import add_dataclass_options, given, run
from minipeft.runs.defaults import DEFAULTS, MAX_LENGTH
from minipeft.training.hardware import PRECISIONS, tokens_per_pass


def parse() -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--method", default="lora")
    chosen = first.parse_known_args()[0].method
    if chosen not in METHODS:
        raise ConfigError(f"unknown method {chosen!r}: use {', '.join(METHODS)}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    if METHODS[chosen].config_class.__dataclass_fields__:
        add_dataclass_options(parser.add_argument_group(f"method {chosen}"), METHODS[chosen].config_class,
                              DEFAULTS[chosen]["method"], leave_out=METHODS[chosen].fixed)
    return parser.parse_args()


def config_of(name: str) -> GPT2Config:
    """A model's sizes, without its weights."""
    return GPT2Config.official(name) if name in HUB_NAMES else GPT2Config.from_dict(read_config(find(name)))


def gallery(folder: Path, model_name: str) -> None:
    """A picture of every method and a README that shows them beside the table of counts."""
    check_writable(folder)
    for method in METHODS:
        draw(injected(config_of(model_name), method), method, folder / f"{method}.png")
        print(f"wrote {folder / method}.png")
    table = counts_table({name: config_of(name) for name in ("mini", *HUB_NAMES)})
    pictures = "\n\n".join(f"## {TITLES[method]}\n\n![{TITLES[method]}]({method}.png)" for method in METHODS)
    text = f"""# Anatomy of the methods

Written by `python scripts/anatomy.py --all`. Trained parameters of each method in its default configuration (the
table in `minipeft/defaults.py`), the two-label head included, counted on models of the official shapes:

{table}

One block of `{model_name}` with each method's parts:

{pictures}
"""
    with replacing_folder(folder) as temporary:
        (temporary / "README.md").write_text(text, encoding="utf-8")
    print(f"wrote {folder / 'README.md'}")


def memory_table(options: argparse.Namespace, config: GPT2Config, values: dict[str, Any]) -> str:
    """The predicted memory of a training step in each precision, with and without checkpointing, beside `full`.

    Raises:
        ConfigError: sizes below 1, or a length beyond the model's positions.
    """
    left = positions_left(injected(config, options.method, **values))
    length = min(MAX_LENGTH, left) if options.length is None else options.length
    if options.batch_size < 1 or length < 1:
        raise ConfigError(f"batch_size and length must be at least 1, got {options.batch_size} and {length}")
    if length > left:
        raise ConfigError(f"length={length} is more than the {left} tokens that fit {options.model} with "
                          f"{options.method}")
    tokens = tokens_per_pass(torch.device(options.device), config.n_embd)
    passes = number_of_passes(options.batch_size, length, tokens)
    lines = [f"one training step of {options.model}, {options.batch_size} texts of {length} tokens"
             f"{f' in {passes} passes' if passes > 1 else ''}, {options.device}; GiB",
             f"{'':28}{'weights':>9}{'gradients':>11}{'optimiser':>11}{'activations':>13}{'peak':>9}"]
    for method in dict.fromkeys((options.method, "full")):
        for name, precision in PRECISIONS.items():
            if name == "fp16" and options.device == "cpu":
                continue
            for checkpointing in (False, True):
                memory = training_memory(config, method, options.batch_size, length, precision, checkpointing,
                                         options.device, tokens, **(values if method == options.method else {}))
                gib = {key: value / 2**30 for key, value in vars(memory).items()}
                what = f"{method}, {name}{', checkpointing' if checkpointing else ''}"
                lines.append(f"{what:28}{gib['weights']:9.3f}{gib['gradients']:11.4f}{gib['optimiser']:11.4f}"
                             f"{gib['activations']:13.3f}{gib['peak']:9.3f}")
    return "\n".join([*lines, "peak: the most alive at once; Python, PyTorch and drivers take their own on top"])


def main() -> None:
    options = parse()
    if options.all:
        gallery(options.output, options.model)
        return
    config = config_of(options.model)
    values = given(options, METHODS[options.method].config_class)
    if options.traffic:
        print(traffic_table(config))
        return
    if options.memory:
        print(memory_table(options, config, values))
        return
    model = injected(config, options.method, **values)
    if options.picture:
        draw(model, options.method, options.picture)
        print(f"wrote {options.picture}")
        return
    colour = sys.stdout.isatty()
    print(f"{options.model} before:\n{render(tree(shapes_only(config).requires_grad_(False)), colour)}\n")
    print(f"{options.model} with {options.method}, what is trained marked *:\n{render(tree(model), colour)}\n")
    print(trainable_parameters(model))


if __name__ == "__main__":
    run(main)
