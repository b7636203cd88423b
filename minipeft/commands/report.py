"""Make tables from results/*.json, or write all that a Markdown file asks for:

    minipeft report --dataset multi30k
    minipeft report --write results/README.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from minipeft.commands.options import new_parser
from minipeft.runs.results import replace_tables, results_table, rewrite


def parse(words: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="folder of results files")
    parser.add_argument("--dataset", default="imdb", help="results on this dataset; default imdb")
    parser.add_argument("--write", type=Path, help="replace the tables in this Markdown file instead of printing one")
    return parser.parse_args(words)


def main(words: Sequence[str], program: str) -> None:
    arguments = parse(words, program)
    if arguments.write:
        rewrite(arguments.write, lambda text: replace_tables(text, arguments.results_dir))
    else:
        print(results_table(arguments.results_dir, arguments.dataset))
