"""Measure this library against transformers + peft, and against the machine; writes results/benchmark.json.

    python scripts/benchmark/benchmark.py                    # everything: most of an hour on two cores, idle otherwise
    python scripts/benchmark/benchmark.py --parts training,limit
    python scripts/benchmark/benchmark.py --before --parts profile    # with PYTHONPATH naming an earlier state
    python scripts/benchmark/benchmark.py --quick            # a small model and few rounds: does it work?
    python scripts/benchmark/benchmark.py --write FILE.md    # measure nothing: put the tables into a Markdown file

Every side runs in a process of its own (scripts/benchmark/sides.py) and the sides take turns, A B A B, so that what
else the machine does meets all of them. The first turn warms up and is not counted. Parts measured earlier are kept.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from equal_terms import language_model, mini, profile, same_micro_batches
from page import benchmark_tables
from parts import PARTS, Benchmark
from picture import draw_benchmark
from tables import benchmark_headline, write_speed

import minipeft
from minipeft.commands.start import run
from minipeft.errors import ConfigError
from minipeft.files import check_writable, read_json_file, write_json_file, write_text_file
from minipeft.runs.results import rewrite
from minipeft.training.hardware import commit, machine, versions

REFERENCES = ("transformers", "peft", "accelerate")  # what it is measured against
# Parts that are kept twice, "before" the work on speed and "after" it.
EQUAL_TERMS: dict[str, Callable[[Benchmark], dict[str, Any]]] = {
    part.__name__: part for part in (same_micro_batches, mini, language_model, profile)}
ALL_PARTS = (*PARTS, *EQUAL_TERMS)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(ALL_PARTS), help=f"which of {', '.join(ALL_PARTS)}; default all")
    parser.add_argument("--only", default="", help="measure only rows that begin so (limit, growth and start_up "
                                                   "whole): matched, default, best, fp32, bf16, auto, mini, gpt2")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side that count; default 5")
    parser.add_argument("--before", action="store_true",
                        help="keep the rows as those of before the work on speed, beside the others")
    parser.add_argument("--quick", action="store_true", help="a small model and two rounds; writes nothing to keep")
    parser.add_argument("--dataset", default="imdb", help="imdb, or sample where IMDb cannot be had")
    parser.add_argument("--data-dir", help="folder that holds imdb/*.parquet; default: the MINIPEFT_DATA variable")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="where benchmark.json goes")
    parser.add_argument("--write", type=Path, metavar="FILE",
                        help="measure nothing; replace the results on speed in this Markdown file")
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(ALL_PARTS):
        raise ConfigError(f"unknown part {', '.join(sorted(unknown))}: use {', '.join(ALL_PARTS)}")
    if options.before and (other := set(options.parts) - set(EQUAL_TERMS)):
        raise ConfigError(f"--before is not kept of {', '.join(sorted(other))}: use {', '.join(EQUAL_TERMS)}")
    if options.rounds < 1:
        raise ConfigError(f"rounds must be at least 1, got {options.rounds}")
    return options


def measure(options: argparse.Namespace) -> Path:
    """Measure the parts that are asked for, one after the other, and write each; returns the results file."""
    check_writable(options.results_dir)
    path = options.results_dir / ("benchmark_quick.json" if options.quick else "benchmark.json")
    results = read_json_file(path) if path.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(options, Path(folder))
        column = results.setdefault(benchmark.device.type, {})
        if not options.before:
            column |= {"machine": machine(), "versions": versions() | {name: version(name) for name in REFERENCES},
                       **benchmark.description()}
        for part in options.parts:
            print(f"--- {part}", flush=True)
            equal = EQUAL_TERMS.get(part)
            place, name = (column, part) if equal is None else (_kept_twice(column, part, options.before), "rows")
            found = equal(benchmark) if equal else getattr(benchmark, part)()
            place[name] = {**place.get(name, {}), **found} if options.only else found
            results |= benchmark_headline(results)
            write_json_file(path, results)
            if not options.quick:
                written = read_json_file(path)  # whose rows are sorted: the page has their order
                draw_benchmark(written, options.results_dir / "benchmark.png")
                write_text_file(options.results_dir / "benchmark.md", benchmark_tables(written))
    return path


def _kept_twice(column: dict[str, Any], part: str, before: bool) -> dict[str, Any]:
    """Where the rows of such a part belong, with the commit and the machine they are measured with."""
    place = column.setdefault(part, {}).setdefault("before" if before else "after", {})
    place |= {"commit": commit(Path(minipeft.__file__).parent), "machine": machine()}
    return place


def main() -> None:
    options = parse()
    if options.write:
        results = read_json_file(options.results_dir / "benchmark.json")
        rewrite(options.write, lambda text: write_speed(text, results))
    else:
        print(f"wrote {measure(options)}")


if __name__ == "__main__":
    run(main)
