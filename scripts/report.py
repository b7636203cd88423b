"""Make tables from results/*.json, or write all that a Markdown file asks for:

    python scripts/report.py --dataset multi30k
    python scripts/report.py --write README.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import run

from minipeft.report import replace_tables, results_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="folder of results files")
    parser.add_argument("--dataset", default="imdb", help="results on this dataset; default imdb")
    parser.add_argument("--write", type=Path, help="replace the tables in this Markdown file instead of printing one")
    options = parser.parse_args()
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        options.write.write_text(replace_tables(text, options.results_dir), encoding="utf-8")
    else:
        print(results_table(options.results_dir, options.dataset))


if __name__ == "__main__":
    run(main)
