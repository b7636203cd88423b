"""Compare methods under equal terms: settings tuned, then trained and tested with several seeds, costs measured.

    minipeft compare
    minipeft compare --methods all --datasets imdb sst2 wnut_17 scitldr multi30k --seeds 3

The first compares seven methods and the baseline on the bundled sample, in minutes. Every method gets the same
examples, steps and lengths (minipeft/runs/budget.py), and as many learning rates to choose from. Each run is a process
of its own and leaves a file; what is there is not run again, and the same command after an interruption goes on where
it stopped. At the end comparison.json is made from these files, and tables are printed: means and deviations over
seeds, intervals, and ranks where they are significant.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minipeft.commands.options import (
    DROPOUT_HELP,
    LENGTH_HELP,
    add_data_options,
    add_machine_options,
    new_parser,
    options_of,
)
from minipeft.errors import ConfigError, InUseError
from minipeft.methods import METHODS
from minipeft.runs.budget import COMPARED, FEW_EXAMPLES
from minipeft.runs.cells import Job, run_cell
from minipeft.runs.compare import Request, compare
from minipeft.runs.places import CHECKPOINTS
from minipeft.runs.workers import AGAIN, IN_USE

# What replaces every budget's own, by its option.
CHANGES = {"epochs": "passes over the training examples", "tuning_epochs": "the same, of a trial",
           "tuning_size": "training examples of a trial", "batch_size": "texts per batch",
           "validation_size": "use only so many validation examples", "test_size": "use only so many test examples"}


def parse(words: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    what = parser.add_argument_group("what to compare")
    what.add_argument("--datasets", nargs="+", default=["sample"], metavar="DATASET",
                      help="names, or files of your own; default sample")
    what.add_argument("--methods", nargs="+", default=list(COMPARED), metavar="METHOD",
                      help=f"all, or some of baseline, {', '.join(METHODS)}; default {' '.join(COMPARED)}")
    what.add_argument("--seeds", type=int, default=1, help="runs of each method; default 1")
    what.add_argument("--every-seed", action="store_true", help="also where the budget has fewer, for all methods")
    what.add_argument("--no-tuning", action="store_true", help="train the default settings, without trials before")
    what.add_argument("--best", action="store_true", help="also the best that lora and full reach without the budget")
    what.add_argument("--few-examples", action="store_true",
                      help=f"also train {', '.join(FEW_EXAMPLES.methods)} on {FEW_EXAMPLES.sizes[0]} to "
                           f"{FEW_EXAMPLES.sizes[-1]} examples")
    what.add_argument("--model", help="as train's")
    what.add_argument("--dropout", type=float, default=0.0, help=DROPOUT_HELP)
    budget = parser.add_argument_group("budget", "the same for every method; defaults are each dataset's own, in "
                                                 "minipeft/runs/budget.py")
    budget.add_argument("--train-size", nargs="+", default=[], metavar="[DATASET=]N",
                        help="use only so many training examples, of all datasets or of this one: imdb=10000")
    for name, text in CHANGES.items():
        budget.add_argument(f"--{name.replace('_', '-')}", dest=f"change_{name}", type=int, metavar="N", help=text)
    budget.add_argument("--max-length", type=int, help=LENGTH_HELP)
    add_data_options(parser, one=False)
    add_machine_options(parser).add_argument(
        "--workers", type=int, help="runs at a time; default: one for each core, and one on a GPU")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=CHECKPOINTS,
                        help=f"folder of trained models, in cells/; default {CHECKPOINTS}")
    output.add_argument("--results-dir", type=Path, help="folder of comparison.json and cells/; default results, in a "
                                                         "clone results/mine")
    output.add_argument("--retry", action="store_true", help="run again what has failed")
    output.add_argument("--overwrite", action="store_true", help="delete results of another comparison")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # one job, in a process that a comparison started
    return parser.parse_args(words)


def main(words: Sequence[str], program: str) -> int:
    arguments = parse(words, program)
    if arguments.cell:
        return run_job(Job.from_json(arguments.cell))
    changes = {name: value for name in CHANGES if (value := getattr(arguments, f"change_{name}")) is not None}
    shared = options_of(argparse.Namespace(**{key: getattr(arguments, key) for key in vars(arguments) if key not in (
        "train_size", "output", "results_dir", "overwrite", "full")}))
    request = Request(
        _words(arguments.datasets), _words(arguments.methods), arguments.seeds, shared, changes,
        sizes_of(arguments.train_size, _words(arguments.datasets)), not arguments.no_tuning, arguments.best,
        arguments.few_examples, arguments.every_seed, arguments.retry, arguments.overwrite, arguments.workers,
        arguments.results_dir, arguments.output)
    return 1 if compare(request, command, partial(print, flush=True)) else 0


def command(job: Job) -> list[str]:
    """What runs a job in a process of its own, which imports from where this one does and from nowhere else. By itself
    Python would look in the current folder first: a user's file there with a library's name would be imported."""
    program = (f"import sys; sys.path = {sys.path!r}; del sys.argv[0]; "
               "from minipeft.commands.start import main; main()")
    return [sys.executable, "-c", program, "minipeft", "compare", "--cell", job.as_json()]


def run_job(job: Job) -> int:
    """Run one job, in a process that ends with the one that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run_cell(job, partial(print, flush=True))
    except InUseError as error:
        print(error, flush=True)
        return IN_USE
    return 0


def _end_with_parent() -> None:
    """Wait until nobody holds the other end of standard input, then be asked to stop, as by a cluster."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(AGAIN)


def _words(given: Sequence[str]) -> list[str]:
    """Words with blanks between, or with commas."""
    return [word for part in given for word in part.split(",") if word]


def sizes_of(words: Sequence[str], datasets: Sequence[str]) -> dict[str, int]:
    """`--train-size`'s words as a size for each dataset.

    Raises:
        ConfigError: a word that is neither N nor DATASET=N.
    """
    found: dict[str, int] = {}
    for word in words:
        dataset, _, size = word.rpartition("=")
        if not size.isdigit():
            raise ConfigError(f"--train-size {word!r} is neither a number nor DATASET=NUMBER")
        found |= {dataset: int(size)} if dataset else dict.fromkeys(datasets, int(size))
    return found
