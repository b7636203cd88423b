"""Where a run writes if nothing else is said, and where what it wrote is found again.

    results/fine_tuned_lora_results.json            checkpoints/lora_finetuned              on IMDb
    results/fine_tuned_lora_sample_results.json     checkpoints/lora_sample_finetuned       on the sample, and so on

A clone brings a LoRA adapter for IMDb, so that it can predict before anything is trained. Its account says "bundled".
"""

from __future__ import annotations

from pathlib import Path

from minipeft.errors import AdapterError
from minipeft.methods.folder import DETAILS_FILE, read_details

CHECKPOINTS, RESULTS = Path("checkpoints"), Path("results")
BUNDLED = "bundled"  # in minipeft.json: true where the folder came with the library


def results_path(folder: str | Path, method: str, dataset: str) -> Path:
    """The results file of a method, or of "baseline"; the dataset's name is in it unless that is IMDb."""
    name = method if method == "baseline" else f"fine_tuned_{method}"
    return Path(folder) / f"{name}{_with(dataset)}_results.json"


def default_folder(method: str, dataset: str) -> Path:
    """The folder of a trained model where none is named; the dataset's name is in it as in `results_path`."""
    return CHECKPOINTS / f"{method}{_with(dataset)}_finetuned"


def own_results() -> Path:
    """The folder of a user's own results: in a clone of this project, whose `results` are published, one below it."""
    return RESULTS / "mine" if (RESULTS / "README.md").is_file() else RESULTS


def _with(dataset: str) -> str:
    return "" if dataset == "imdb" else f"_{dataset}"


def newest_trained() -> Path:
    """The folder below `checkpoints` that a training wrote last, or else the bundled one.

    A folder whose account says no dataset is of no training.

    Raises:
        AdapterError: there is none.
    """
    accounts = sorted(CHECKPOINTS.glob(f"*/{DETAILS_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    trained = [folder for folder in (path.parent for path in accounts) if "dataset" in read_details(folder)]
    if not trained:
        raise AdapterError(f"{CHECKPOINTS} holds no trained model: train first, or name a folder with --adapter")
    return min(trained, key=is_bundled)


def is_bundled(folder: Path) -> bool:
    """Whether what is there came with the library: then no user loses anything if a training takes its place.

    Raises:
        AdapterError: a damaged account.
    """
    return read_details(folder).get(BUNDLED) is True
