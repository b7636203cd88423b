"""Make tables, pictures and a page from what was measured, or write all that Markdown files ask for:

    minipeft report
    minipeft report --dataset multi30k --results-dir results/mine
    minipeft report --write results/README.md docs/methods/*.md
    minipeft report --comparison                        # from comparison.json: pictures in comparison/, report.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minipeft.commands.options import new_parser
from minipeft.errors import NothingToWriteError
from minipeft.explain.chapters import refreshed
from minipeft.report.page import write_page
from minipeft.report.pictures import draw_comparison
from minipeft.report.tables import PICTURES, read_comparison
from minipeft.runs.results import datasets_in, results_table, rewrite

PAGE = "report.html"


def parse(words: Sequence[str], program: str) -> argparse.Namespace:
    parser = new_parser(program, __doc__)
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="folder of results files")
    parser.add_argument("--dataset", help="results on this dataset; default: on each that there is")
    parser.add_argument("--write", type=Path, nargs="+", metavar="FILE",
                        help="replace the tables in these Markdown files instead of printing one; in the methods' "
                             "chapters the equations and the lines of code, too")
    parser.add_argument("--comparison", action="store_true",
                        help=f"draw comparison.json into {PICTURES}/ and write {PAGE}, beside it")
    return parser.parse_args(words)


def main(words: Sequence[str], program: str) -> None:
    arguments = parse(words, program)
    folder = arguments.results_dir
    if arguments.comparison:
        found = read_comparison(folder)
        write_page(*found, folder / PAGE)  # which needs no matplotlib
        names = draw_comparison(*found, folder / PICTURES)
        print(f"wrote {folder / PAGE} and, in {folder / PICTURES}, {', '.join(names)}")
    for page in arguments.write or ():
        try:
            rewrite(page, partial(refreshed, place=page.parent, folder=folder))
        except NothingToWriteError as error:
            if len(arguments.write) == 1:
                raise
            print(f"{page}: {error}")
    if not (arguments.comparison or arguments.write):
        if arguments.dataset is not None:
            print(results_table(folder, arguments.dataset))
            return
        for number, dataset in enumerate(datasets_in(folder)):
            print("\n" * (number > 0) + f"{dataset}\n\n{results_table(folder, dataset)}")
