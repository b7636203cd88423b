"""Train and test several methods on one dataset, one after the other, and print the table of their results:

    python scripts/compare.py --dataset wnut_17
    python scripts/compare.py --dataset multi30k --methods baseline,full,lora --epochs 1

Options that are not its own go to scripts/train.py, for every method. A method whose results file is there already is
not run again, and a run that was cut off goes on where it stopped: the same command after an interruption finishes it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from common import run

from minipeft.data import name_of
from minipeft.errors import ConfigError
from minipeft.finetune import results_path
from minipeft.methods import METHODS
from minipeft.report import results_table

HERE = Path(__file__).resolve().parent
COMPARED = ("baseline", "full", "lora", "prefix", "prompt", "adapter", "ia3", "bitfit")


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--dataset", required=True, help="as scripts/train.py's")
    parser.add_argument("--methods", default=",".join(COMPARED), help=f"baseline, {', '.join(METHODS)}; default "
                                                                      f"{','.join(COMPARED)}")
    parser.add_argument("--output", type=Path, default=Path("checkpoints"),
                        help="where adapters go, each to DATASET_METHOD in it; default checkpoints")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="default results")
    return parser.parse_known_args()


def main() -> int:
    options, others = parse()
    methods = options.methods.split(",")
    if unknown := set(methods) - {"baseline", *METHODS}:
        raise ConfigError(f"unknown method {', '.join(sorted(unknown))}: use baseline, {', '.join(METHODS)}")
    name = name_of(options.dataset)
    for method in methods:
        path = results_path(options.results_dir, "baseline" if method == "baseline" else f"fine_tuned_{method}", name)
        if path.is_file():
            print(f"{method}: {path} is there")
            continue
        print(f"\n--- {method}", flush=True)
        ran = subprocess.run([sys.executable, str(HERE / "train.py"), "--method", method, "--dataset", options.dataset,
                              "--results-dir", str(options.results_dir), "--resume",
                              "--output", str(options.output / f"{name}_{method}"), *others])
        if ran.returncode:
            return ran.returncode
    print(f"\n{results_table(options.results_dir, name)}")
    return 0


if __name__ == "__main__":
    run(main)
