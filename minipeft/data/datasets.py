"""Find a dataset and split it.

A dataset is one of those named below (a folder of parquet files, else the Hugging Face hub), "sample" (reviews written
for this project, bundled), or the path of a file of the user's own. A task reads two of its columns as examples, in
three splits: train, validation, test. A validation split that a dataset lacks is carved from train, never from test.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from minipeft.data.examples import Examples
from minipeft.errors import DataError
from minipeft.model.hub import hub_is_reachable

SAMPLE_FOLDER = Path(__file__).parent / "sample"
FILE_TYPES = (".csv", ".tsv", ".jsonl", ".parquet")
SPLITS = ("train", "validation", "test")
VALIDATION_FRACTION = 0.1
CONVERTED = "refs/convert/parquet"  # the branch with the hub's own conversion of a dataset to parquet files


class Reader(Protocol):
    """All that a dataset knows of its task.

    Attributes:
        name: what --task calls it.
        columns: of texts and of labels, in a user's own file, unless others are named.
    """

    name: str
    columns: tuple[str, str]

    def read(self, texts: list[Any], labels: list[Any], where: str,
             label_names: list[str] | None = None) -> tuple[Examples, list[str]]:
        """Two columns, checked, as examples and the labels' names: see Task.read."""


@dataclass(frozen=True)
class KnownDataset:
    """A dataset found by its name.

    Attributes:
        task: the name of the task it is for.
        hub: its repository on the Hugging Face hub; `folder` where that has several parts, `revision` where its
            default branch holds a program in place of data.
        text_columns: names that the column of texts goes by; the first one present is taken.
        label_names: of its labels by number; None where labels are texts.
        splits: those it has.
    """

    task: str
    hub: str
    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...] | None = None
    folder: str | None = None
    revision: str | None = None
    splits: tuple[str, ...] = SPLITS


KNOWN = {
    "imdb": KnownDataset("classification", "stanfordnlp/imdb", ("text",), "label", ("negative", "positive"),
                         splits=("train", "test")),
    "sst2": KnownDataset("classification", "SetFit/sst2", ("sentence", "text"), "label", ("negative", "positive")),
    "wnut_17": KnownDataset("tagging", "wnut_17", ("tokens",), "ner_tags", (
        "O", "B-corporation", "I-corporation", "B-creative-work", "I-creative-work", "B-group", "I-group", "B-location",
        "I-location", "B-person", "I-person", "B-product", "I-product"), folder="wnut_17", revision=CONVERTED),
    "scitldr": KnownDataset("summarization", "allenai/scitldr", ("source",), "target", folder="Abstract",
                            revision=CONVERTED),
    "multi30k": KnownDataset("translation", "bentrevett/multi30k", ("en",), "de"),
}


@dataclass
class Dataset:
    """A dataset ready to use: its task, three splits, the labels' names by number, and where it came from."""

    name: str
    source: str
    task: Reader
    label_names: list[str]
    train: Examples
    validation: Examples
    test: Examples


# --- find -------------------------------------------------------------------------------------------------------------

def data_folder(data_dir: str | Path | None = None) -> Path | None:
    """The folder of datasets named by `--data-dir` or, without it, by the MINIPEFT_DATA environment variable."""
    named = data_dir or os.environ.get("MINIPEFT_DATA")
    return Path(named) if named else None


def choose_dataset(data_dir: str | Path | None = None) -> tuple[str, str]:
    """The dataset to use when none is named, and why: IMDb where it can be had, else the bundled sample."""
    folder = data_folder(data_dir)
    if folder is not None and (folder / "imdb").is_dir():
        return "imdb", f"found in {folder}"
    if folder is not None:
        return "sample", f"{folder} has no folder imdb"
    if _in_hub_cache(KNOWN["imdb"].hub):
        return "imdb", "found in the Hugging Face cache"
    if hub_is_reachable():
        return "imdb", "to be downloaded from the Hugging Face hub"
    return "sample", "IMDb is not on this machine (--data-dir, MINIPEFT_DATA) and the hub cannot be reached"


def load_dataset(name: str, task: Reader, data_dir: str | Path | None = None, text_column: str | None = None,
                 label_column: str | None = None, seed: int = 0, label_names: list[str] | None = None) -> Dataset:
    """Read a dataset.

    Args:
        name: one of KNOWN, "sample", or the path of a .csv, .tsv, .jsonl or .parquet file.
        task: the task class that reads its columns: see `minipeft.tasks.task_for`.
        data_dir: folder that holds `imdb/` and the others; default the MINIPEFT_DATA environment variable.
        text_column, label_column: columns of a file of the user's own; default the task's `columns`.
        seed: of a validation split that is carved from train and, for a single file, of the test split (10 % each,
            every label in its share).
        label_names: of a file of the user's own, where they are known: those that a model was trained on.

    Raises:
        DataError: an unknown name, a missing file or column, or unusable content.
    """
    if name in KNOWN or name == "sample":
        if text_column or label_column:
            raise DataError(f"--text-column and --label-column name columns of a file of your own; {name}'s are known")
        return _known(name, KNOWN[name], task, data_dir, seed) if name in KNOWN else _sample(task)
    if name.endswith(FILE_TYPES):
        return _own_file(Path(name), task, text_column, label_column, seed, label_names)
    raise DataError(f"unknown dataset {name!r}: use {', '.join(KNOWN)}, sample, or the path of a "
                    f"{', '.join(FILE_TYPES)} file")


def read_parquet_split(folder: Path, split: str) -> pa.Table:
    """One split of a dataset stored as parquet files named `<split>-*.parquet`.

    Raises:
        DataError: no such file, or not readable.
    """
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no {split}-*.parquet")
    return pa.concat_tables([_read_table(file) for file in files])


def _known(name: str, known: KnownDataset, task: Reader, data_dir: str | Path | None, seed: int) -> Dataset:
    folder = data_folder(data_dir)
    if folder is not None:
        if not (folder / name).is_dir():
            wanted = " and ".join(f"{name}/{split}-*.parquet" for split in known.splits)
            raise DataError(f"{folder} has no folder {name}: it should hold {wanted}")
        tables = {split: read_parquet_split(folder / name, split) for split in known.splits}
        source = f"the data folder's {name}/*.parquet"
    else:
        tables = {split: _from_hub(name, known, split) for split in known.splits}
        source = f"{known.hub} on the Hugging Face hub"
    names = list(known.label_names) if known.label_names else None
    found = {}
    for split, table in tables.items():
        for columns in (known.text_columns, (known.label_column,)):
            if sum(table.column_names.count(column) for column in columns) != 1:
                raise DataError(f"{name}'s {split} file has no column {columns[0]!r}; it has "
                                f"{', '.join(table.column_names)}")
        text_column = next(column for column in known.text_columns if column in table.column_names)
        found[split], label_names = task.read(table[text_column].to_pylist(), table[known.label_column].to_pylist(),
                                              f"{name} {split}", names)
    if "validation" not in found:
        kept, held_out = stratified_split(found["train"].classes(), VALIDATION_FRACTION, seed)
        found["train"], found["validation"] = found["train"].take(kept), found["train"].take(held_out)
    return Dataset(name, source, task, label_names, **found)


def name_of(dataset: str) -> str:
    """What results call a dataset that a user asks for: its name or, of a file, the file's without its ending."""
    path = Path(dataset)
    return path.name if path.stem in (*KNOWN, "sample") else path.stem  # results on another "imdb" are not IMDb's


def _sample(task: Reader) -> Dataset:
    label_names, found = ["negative", "positive"], {}
    for split in SPLITS:
        table = _read_table(SAMPLE_FOLDER / f"{split}.jsonl")
        found[split], _ = task.read(table["text"].to_pylist(), table["label"].to_pylist(), f"sample {split}",
                                    label_names)
    return Dataset("sample", "640 reviews written for minipeft (minipeft/data/sample)", task, label_names, **found)


def _in_hub_cache(repository: str) -> bool:
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___")).is_dir()


def _from_hub(name: str, known: KnownDataset, split: str) -> pa.Table:
    """One split through `datasets`: from its cache, else downloaded."""
    import datasets

    if not _in_hub_cache(known.hub) and not hub_is_reachable():
        files = " and ".join(f"{part}-00000-of-00001.parquet" for part in known.splits)
        raise DataError(f"{known.hub} is not on this machine and the Hugging Face hub cannot be reached: put its "
                        f"parquet files into FOLDER/{name} as {files} and pass --data-dir FOLDER, or use --dataset "
                        "sample")
    try:
        rows = datasets.load_dataset(known.hub, data_dir=known.folder, revision=known.revision, split=split)
        return rows.data.table
    except Exception as error:  # the hub client raises its HTTP library's errors, which differ between versions
        raise DataError(f"loading {known.hub} from the hub failed: {type(error).__name__}: {error}") from error


def _own_file(path: Path, task: Reader, text_column: str | None, label_column: str | None, seed: int,
              label_names: list[str] | None) -> Dataset:
    table, columns = _read_table(path), []
    for column, default, option in zip((text_column, label_column), task.columns, ("--text-column", "--label-column")):
        column = column or default
        if column not in table.column_names:
            tasks = dict.fromkeys(known.task for known in KNOWN.values())
            raise DataError(f"{path} has no column {column!r}; {option} can be one of {', '.join(table.column_names)}, "
                            f"and --task, now {task.name}, one of {', '.join(tasks)}")
        if table.column_names.count(column) > 1:
            raise DataError(f"{path} has {table.column_names.count(column)} columns named {column!r}")
        columns.append(table[column].to_pylist())
    examples, label_names = task.read(*columns, str(path), label_names)
    rest, test = stratified_split(examples.classes(), VALIDATION_FRACTION, seed)
    rest_examples = examples.take(rest)
    train, validation = stratified_split(rest_examples.classes(), VALIDATION_FRACTION, seed + 1)
    data = Dataset(name_of(str(path)), str(path), task, label_names, rest_examples.take(train),
                   rest_examples.take(validation), examples.take(test))
    if not len(data.validation) or not len(data.test):
        raise DataError(f"{path}: {len(examples)} rows are too few to hold out a validation and a test split; there "
                        "should be at least ten, of each label where a text has one")
    return data


def _read_table(path: Path) -> pa.Table:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        if path.suffix == ".jsonl":
            # One block: pyarrow fails at a row that spans three, and a row of a book's length has an error of its own.
            return pyarrow.json.read_json(path, pyarrow.json.ReadOptions(block_size=max(1 << 20, path.stat().st_size)))
        return pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(
            delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is empty or not a readable {path.suffix} file: {reason}") from error


def stratified_split(labels: Sequence[int], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint sets of indices, the second holding `fraction` of each label; both shuffled.

    Returns:
        (kept, held_out), int64 arrays that together hold every index once.
    """
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    per_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    held_out = np.concatenate([rng.permutation(rows)[:round(fraction * len(rows))] for rows in per_label])
    kept = np.setdiff1d(np.arange(len(labels)), held_out)
    return rng.permutation(kept), rng.permutation(held_out)
