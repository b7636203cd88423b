"""Make tables from results/*.json, or write all that Markdown files ask for:

    minipeft report --dataset multi30k
    minipeft report --write results/README.md docs/methods/*.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minipeft.commands.options import new_parser
from minipeft.explain.chapters import refreshed
from minipeft.runs.results import results_table, rewrite


def parse(words: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="folder of results files")
    parser.add_argument("--dataset", default="imdb", help="results on this dataset; default imdb")
    parser.add_argument("--write", type=Path, nargs="+", metavar="FILE",
                        help="replace the tables in these Markdown files instead of printing one; in the methods' "
                             "chapters the equations and the lines of code, too")
    return parser.parse_args(words)


def main(words: Sequence[str], program: str) -> None:
    arguments = parse(words, program)
    if arguments.write:
        for page in arguments.write:
            rewrite(page, partial(refreshed, place=page.parent, folder=arguments.results_dir,
                                  required=len(arguments.write) == 1))
    else:
        print(results_table(arguments.results_dir, arguments.dataset))
