"""Fine-tune a GPT-2 by one command, to classify texts, find names, summarize or translate:

    minipeft train --method lora
    minipeft train --method prefix --dataset multi30k

Without more it uses what there is: gpt2 on a GPU and the bundled mini model on a CPU; IMDb where it can be had, else
the bundled sample reviews. `--method NAME --help` adds the method's own options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from minipeft.commands.options import (
    DROPOUT_HELP,
    LENGTH_HELP,
    add_data_options,
    add_dataclass_options,
    add_machine_options,
    add_method_options,
    new_parser,
    options_of,
)
from minipeft.methods import METHODS
from minipeft.runs import defaults
from minipeft.runs.baseline import baseline
from minipeft.runs.finetune import finetune
from minipeft.tasks.classification import TRUNCATION, TRUNCATIONS
from minipeft.training import distributed as parallel
from minipeft.training.loop import TrainingConfig


def parse(words: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    what = parser.add_argument_group("what to train")
    summaries = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    what.add_argument("--method", default="lora",
                      help=f"baseline: no training, only test; {summaries}; default lora")
    what.add_argument("--model", help="mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder; default: gpt2 on "
                                      "CUDA, mini on a CPU")
    what.add_argument("--dropout", type=float, default=0.0, help=DROPOUT_HELP)
    method = add_method_options(parser, words, also=("baseline",))
    add_data_options(parser)
    add_length_options(parser.add_argument_group("length and size"))
    training = parser.add_argument_group("training", "learning rates are classification's; the other tasks' are in "
                                                     "minipeft/runs/defaults.py")
    add_dataclass_options(training, TrainingConfig, defaults.DEFAULTS.get(method, {}).get("training", {}))
    machine = add_machine_options(parser)
    machine.add_argument("--compile", action="store_true", help="run through torch.compile; pays on long runs")
    machine.add_argument("--gradient-checkpointing", action="store_true",
                         help="less memory, about half more time; with --method full a third more")
    if method == "head":
        machine.add_argument("--recompute-features", action="store_true",
                             help="run the frozen base in every epoch instead of once")
    if method == "full":
        machine.add_argument("--shard", action="store_true",
                             help="under torchrun: spread weights, gradients and optimizer state over the processes")
    output = parser.add_argument_group("output")
    output.add_argument("--output", help="folder of the trained adapter; default "
                                          "checkpoints/METHOD_DATASET_finetuned, on IMDb checkpoints/METHOD_finetuned")
    output.add_argument("--results-dir", help="folder of the results file; default results, in a clone "
                                              "results/mine")
    output.add_argument("--overwrite", action="store_true", help="replace the adapter and the results of another "
                                                                 "request; those of the same one are replaced anyway")
    output.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    output.add_argument("--save-minutes", type=float, default=10.0,
                        help="save the state to resume from at least this often; default 10")
    return parser.parse_args(words)


def add_length_options(group: argparse._ArgumentGroup) -> None:
    """How much is read, of a text and of each split."""
    group.add_argument("--max-length", type=int, help=LENGTH_HELP)
    group.add_argument("--truncation", choices=TRUNCATIONS,
                       help=f"what to keep of a longer text; default {TRUNCATION}")
    group.add_argument("--max-new-tokens", type=int, help="tokens of a translation, default a third of max-length, or "
                                                          "of a summary, default a sixth")
    for split in ("train", "validation", "test"):
        group.add_argument(f"--{split}-size", type=int, help=f"use only so many {split} examples")


def main(words: Sequence[str], program: str) -> int | None:
    options = options_of(parse(words, program))
    with parallel.processes(options.device):
        if options.method == "baseline":
            baseline(options, print)
            return None
        finetune(options, print)
