"""Make tables from results/*.json, or write all that a Markdown file asks for:

    python scripts/report.py --dataset multi30k
    python scripts/report.py --write README.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minipeft.errors import OutputError
from minipeft.files import write_text_file
from minipeft.runs.command_line import run
from minipeft.runs.results import replace_tables, results_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="folder of results files")
    parser.add_argument("--dataset", default="imdb", help="results on this dataset; default imdb")
    parser.add_argument("--write", type=Path, help="replace the tables in this Markdown file instead of printing one")
    options = parser.parse_args()
    if options.write:
        if not options.write.is_file():
            raise OutputError(f"there is no file {options.write} to write into")
        write_text_file(options.write, replace_tables(options.write.read_text(encoding="utf-8"), options.results_dir))
    else:
        print(results_table(options.results_dir, options.dataset))


if __name__ == "__main__":
    run(main)
