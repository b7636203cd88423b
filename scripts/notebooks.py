"""Run the notebooks from top to bottom, and store in them what they print and draw. `make notebooks` does the same.

    python scripts/notebooks.py                                      # all of them
    python scripts/notebooks.py notebooks/finetuning_lora.ipynb      # this one

A notebook that fails is left as it was. Needs minipeft[dev].
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 3600  # seconds for one cell, and for a kernel to start: a machine may be busy with other things


def run(path: Path, folder: str | Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of a new run, from top to bottom, with the package of this clone.

    Args:
        folder: where it runs, and may leave files.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=PATIENCE, startup_timeout=PATIENCE, kernel_name="python3",
                            record_timing=False, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])})
    notebook.metadata.language_info = {"name": "python"}  # without the version of this machine's Python
    return notebook


def main(paths: list[Path]) -> None:
    for path in paths or sorted((ROOT / "notebooks").glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(path, folder)
        nbformat.write(notebook, path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
