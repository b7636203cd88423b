"""Train and test several methods on one dataset, one after the other, and print the table of their results:

    python scripts/compare.py --dataset wnut_17
    python scripts/compare.py --dataset multi30k --methods baseline,full,lora --epochs 1

Options that are not its own go to scripts/train.py, for every method. A method whose results file is there already is
not run again, and a run that was cut off goes on where it stopped: the same command after an interruption finishes it.
Another base model or other sizes make another comparison, with a --results-dir of its own.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from minipeft.errors import ConfigError
from minipeft.methods import METHODS
from minipeft.runs.command_line import run
from minipeft.runs.sweep import COMPARED, compare

TRAIN = Path(__file__).resolve().parent / "train.py"


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--dataset", required=True, help="as scripts/train.py's")
    parser.add_argument("--methods", default=",".join(COMPARED), help=f"baseline, {', '.join(METHODS)}; default "
                                                                      f"{','.join(COMPARED)}")
    parser.add_argument("--model", help="as scripts/train.py's")
    parser.add_argument("--output", type=Path, default=Path("checkpoints"),
                        help="where adapters go, each to DATASET_METHOD in it; default checkpoints")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="default results")
    return parser.parse_known_args()


def main() -> int:
    arguments, others = parse()
    if any(other.split("=")[0] == "--method" for other in others):
        raise ConfigError("--method trains one method, by scripts/train.py; here it is --methods")
    return compare(arguments.methods.split(","), arguments.dataset, [sys.executable, str(TRAIN), *others],
                   arguments.model, arguments.output, arguments.results_dir, say=partial(print, flush=True))


if __name__ == "__main__":
    run(main)
