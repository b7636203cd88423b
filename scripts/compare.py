"""Train and test several methods on one dataset, one after the other, and print the table of their results:

    python scripts/compare.py --dataset wnut_17
    python scripts/compare.py --dataset multi30k --methods baseline,full,lora --epochs 1

Options that are not its own go to scripts/train.py, for every method. A method whose results file is there already is
not run again, and a run that was cut off goes on where it stopped: the same command after an interruption finishes it.
Another base model or other sizes make another comparison, with a --results-dir of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from minipeft.data.datasets import name_of
from minipeft.errors import ConfigError
from minipeft.files import read_json_file
from minipeft.methods import METHODS
from minipeft.runs.command_line import run
from minipeft.runs.finetune import results_path
from minipeft.runs.results import results_table

HERE = Path(__file__).resolve().parent
COMPARED = ("baseline", "full", "lora", "prefix", "prompt", "adapter", "ia3", "bitfit")


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


def train(arguments: list[str]) -> int:
    """Run scripts/train.py in a process of its own, for its memory to be its own; its exit code."""
    with subprocess.Popen([sys.executable, str(HERE / "train.py"), *arguments]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # which train.py gets, too: it saves its state first
            return process.wait()


def check_same_model(path: Path, model: str | None) -> str:
    """What a results file is about, in words.

    Raises:
        ConfigError: another base model than the one that is asked for.
    """
    results = read_json_file(path)
    base, examples = results["base_model"]["name"], results["dataset"]["sizes"]["train"]
    if model not in (None, base):
        raise ConfigError(f"{path} is about {base}, not about {model}: give this comparison its own --results-dir")
    return f"{base}, {examples:,} training examples"


def main() -> int:
    options, others = parse()
    if any(other.split("=")[0] == "--method" for other in others):
        raise ConfigError("--method trains one method, by scripts/train.py; here it is --methods")
    methods = options.methods.split(",")
    if unknown := set(methods) - {"baseline", *METHODS}:
        raise ConfigError(f"unknown method {', '.join(sorted(unknown))}: use baseline, {', '.join(METHODS)}")
    name = name_of(options.dataset)
    for method in methods:
        path = results_path(options.results_dir, "baseline" if method == "baseline" else f"fine_tuned_{method}", name)
        if path.is_file():
            print(f"{method}: {path} is there ({check_same_model(path, options.model)})")
            continue
        print(f"\n--- {method}", flush=True)
        code = train(["--method", method, "--dataset", options.dataset, "--results-dir", str(options.results_dir),
                      "--output", str(options.output / f"{name}_{method}"), "--resume",
                      *(["--model", options.model] if options.model else []), *others])
        if code:
            return code
    print(f"\n{results_table(options.results_dir, name)}")
    return 0


if __name__ == "__main__":
    run(main)
