"""Make the table of results from results/*.json, and write it into README.md:

    python scripts/report.py --write README.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import run

from minipeft.report import replace_table, results_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="folder of results files")
    parser.add_argument("--dataset", default="imdb", help="results on this dataset; default imdb")
    parser.add_argument("--write", type=Path, help="replace the table in this Markdown file")
    options = parser.parse_args()
    table = results_table(options.results_dir, options.dataset)
    print(table)
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        options.write.write_text(replace_table(text, table), encoding="utf-8")


if __name__ == "__main__":
    run(main)
