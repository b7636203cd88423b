"""Make tables from results/*.json, or write all that a Markdown file asks for:

    python scripts/report.py --dataset multi30k
    python scripts/report.py --write results/README.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minipeft.runs.command_line import run
from minipeft.runs.results import replace_tables, results_table, rewrite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="folder of results files")
    parser.add_argument("--dataset", default="imdb", help="results on this dataset; default imdb")
    parser.add_argument("--write", type=Path, help="replace the tables in this Markdown file instead of printing one")
    arguments = parser.parse_args()
    if arguments.write:
        rewrite(arguments.write, lambda text: replace_tables(text, arguments.results_dir))
    else:
        print(results_table(arguments.results_dir, arguments.dataset))


if __name__ == "__main__":
    run(main)
