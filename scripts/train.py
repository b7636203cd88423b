"""Fine-tune a GPT-2 by one command, to classify texts, find names, summarise or translate:

    python scripts/train.py --method lora
    python scripts/train.py --method prefix --dataset multi30k

Without more it uses what there is: gpt2 on a GPU and the bundled mini model on a CPU; IMDb where it can be had, else
the bundled sample reviews. `--method NAME --help` adds the method's own options.
"""

from __future__ import annotations

import argparse

from minipeft.errors import ConfigError
from minipeft.methods import METHODS
from minipeft.runs import defaults
from minipeft.runs.command_line import (
    LENGTH_HELP,
    add_data_options,
    add_dataclass_options,
    add_machine_options,
    given,
    run,
)
from minipeft.runs.finetune import Options, baseline, finetune
from minipeft.tasks.classification import TRUNCATIONS
from minipeft.training import distributed as parallel
from minipeft.training.loop import TrainingConfig


def parse() -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--method", default="lora")
    chosen = first.parse_known_args()[0].method
    if chosen not in METHODS and chosen != "baseline":
        raise ConfigError(f"unknown method {chosen!r}: use baseline, {', '.join(METHODS)}")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main_group = parser.add_argument_group("what to train")
    summaries = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    main_group.add_argument("--method", default="lora", help=f"baseline: no training, only test; {summaries}; default "
                                                             "lora")
    main_group.add_argument("--model", help="mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder; default: gpt2 "
                                            "on CUDA, mini on a CPU")
    main_group.add_argument("--dropout", type=float, help="in the base model; default: what its config.json says")
    if chosen in METHODS and METHODS[chosen].config_class.__dataclass_fields__:
        add_dataclass_options(parser.add_argument_group(f"method {chosen}"), METHODS[chosen].config_class,
                              defaults.DEFAULTS[chosen]["method"], leave_out=METHODS[chosen].fixed)
    add_data_options(parser)
    length = parser.add_argument_group("length and size")
    length.add_argument("--max-length", type=int, help=LENGTH_HELP)
    length.add_argument("--truncation", choices=TRUNCATIONS,
                        help=f"what to keep of a longer text; default {defaults.TRUNCATION}")
    length.add_argument("--max-new-tokens", type=int, help="tokens of a translation, default a third of "
                                                           "max-length, or of a summary, default a sixth")
    for split in ("train", "validation", "test"):
        length.add_argument(f"--{split}-size", type=int, help=f"use only so many {split} examples")
    training = parser.add_argument_group("training", "learning rates are classification's; the other tasks' are in "
                                                     "minipeft/defaults.py")
    add_dataclass_options(training, TrainingConfig, defaults.DEFAULTS.get(chosen, {}).get("training", {}))
    machine = add_machine_options(parser)
    machine.add_argument("--compile", action="store_true", help="run through torch.compile; pays on long runs")
    machine.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    if chosen == "head":
        machine.add_argument("--recompute-features", action="store_true",
                             help="run the frozen base in every epoch instead of once")
    if chosen == "full":
        machine.add_argument("--shard", action="store_true",
                             help="under torchrun: spread weights, gradients and optimiser state over the processes")
    output = parser.add_argument_group("output")
    output.add_argument("--output", help="folder of the trained adapter; default checkpoints/METHOD_finetuned")
    output.add_argument("--results-dir", default="results", help="folder of the results file; default results")
    output.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    return parser.parse_args()


def main() -> int | None:
    arguments = parse()
    fields = Options.__dataclass_fields__
    options = Options(**{key: value for key, value in vars(arguments).items() if key in fields})
    options.training_values = given(arguments, TrainingConfig)
    if arguments.method != "baseline":
        options.method_values = given(arguments, METHODS[arguments.method].config_class)
        default_targets = defaults.DEFAULTS[arguments.method]["method"].get("target_modules")
        if "layers_to_transform" in options.method_values and default_targets == "all-linear":
            # Blocks are chosen for modules that are named, in peft too; "all-linear" is no name.
            options.method_values.setdefault("target_modules", ["c_attn", "c_proj", "c_fc"])
    with parallel.processes(options.device):
        if arguments.method == "baseline":
            baseline(options, print)
            return None
        return None if finetune(options, print) else 130


if __name__ == "__main__":
    run(main)
