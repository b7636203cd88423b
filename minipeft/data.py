"""Find a dataset, split it, turn text into token ids, and batch what is of equal length.

A dataset is named "imdb" (a folder of parquet files, else the Hugging Face hub), "sample" (reviews written for this
project, bundled), or is a path to a file of the user's own. Whatever it is, the result is three lists of texts and
labels: train, validation, test.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from minipeft.errors import DataError

HUB_NAMES = {"imdb": "stanfordnlp/imdb"}
_LINE_BREAK = re.compile(r"<br\s*/?>")


def data_folder(data_dir: str | Path | None = None) -> Path | None:
    """The folder of datasets named by `--data-dir` or, without it, by the MINIPEFT_DATA environment variable."""
    named = data_dir or os.environ.get("MINIPEFT_DATA")
    return Path(named) if named else None


def clean(text: str) -> str:
    """IMDb's reviews mark line breaks as HTML; a language model should see a line break."""
    return _LINE_BREAK.sub("\n", text)


def read_parquet_split(folder: Path, split: str) -> datasets.Dataset:
    """One split of a dataset stored as parquet files named `<split>-*.parquet`.

    Raises:
        DataError: no such file, or not readable.
    """
    files = sorted(str(file) for file in folder.glob(f"{split}-*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no {split}-*.parquet")
    try:
        return datasets.Dataset.from_parquet(files, keep_in_memory=True)
    except Exception as error:
        raise DataError(f"{files[0]} is not a readable parquet file: {error}") from error


def stratified_split(labels: Sequence[int], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint sets of indices, the second holding `fraction` of each label; both shuffled.

    Returns:
        (kept, held_out), int64 arrays that together hold every index once.
    """
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    held_out = np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:round(fraction * np.sum(labels == label))]
                               for label in np.unique(labels)])
    kept = np.setdiff1d(np.arange(len(labels)), held_out)
    return rng.permutation(kept), rng.permutation(held_out)
