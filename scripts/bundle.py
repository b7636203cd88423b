"""Make the adapter that a clone brings, `checkpoints/lora_finetuned`, of a model that a comparison trained:

    python scripts/compare.py --methods lora --datasets imdb --seeds 3 --best --precision bf16 --results-dir results
    python scripts/bundle.py results/cells/imdb/best_lora_seed0.json

The adapter's files are copied as they are. Its account, minipeft.json, says "bundled" and names the results file, which
says how the adapter was made and how it was tested.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from minipeft.commands.start import run
from minipeft.errors import OutputError
from minipeft.files import read_json_file, replacing_folder, write_json_file
from minipeft.methods.folder import CONFIG_FILE, DETAILS_FILE, TENSORS_FILE, read_details
from minipeft.runs.places import BUNDLED, default_folder, is_bundled


def bundle(results_file: Path, folder: Path) -> None:
    """Copy the adapter of a cell's results file into `folder`, and mark it.

    Raises:
        OutputError: a user's own model is there, or the adapter no longer is where the results file says.
    """
    source = Path(read_json_file(results_file)["adapter_folder"])
    if folder.exists() and not is_bundled(folder):
        raise OutputError(f"{folder} holds something that was not bundled: move it away")
    if not (source / DETAILS_FILE).is_file():
        raise OutputError(f"{results_file} names {source}, where there is no adapter: delete the file and train again")
    with replacing_folder(folder) as temporary:
        for name in (CONFIG_FILE, TENSORS_FILE):
            shutil.copyfile(source / name, temporary / name)
        write_json_file(temporary / DETAILS_FILE, read_details(source) | {BUNDLED: True, "results": str(results_file)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results_file", type=Path, help="of a cell, relative to the repository")
    parser.add_argument("--output", type=Path, default=default_folder("lora", "imdb"), help="default %(default)s")
    arguments = parser.parse_args()
    bundle(arguments.results_file, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run(main)
