"""Find a dataset and split it.

A dataset is one of those named below (a folder of parquet files, else the Hugging Face hub), "sample" (reviews written
for this project, bundled), or files of the user's own: one, one for each split, or a folder of them. A task reads two
columns as examples, in three splits: train, validation, test. A split that is lacking is carved from train.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from minipeft.data.examples import Examples, repeated
from minipeft.data.labels import by_name, check_classes, contradictory, unified, untested
from minipeft.data.tables import FILE_TYPES, Reading, cells_of, file_type, read_parquet, read_rows, read_table, stem
from minipeft.errors import DataError
from minipeft.model.hub import hub_is_reachable

SAMPLE_FOLDER = Path(__file__).parent / "sample"
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}  # of files
VALIDATION_FRACTION = 0.1
CONVERTED = "refs/convert/parquet"  # the branch with the hub's own conversion of a dataset to parquet files


class Reader(Protocol):
    """All that a dataset knows of its task.

    Attributes:
        name: what --task calls it.
        columns: of texts and of labels, in a user's own file, unless others are named.
        one_label_each: whether a label is one of a few, for a whole text.
    """

    name: str
    columns: tuple[str, str]
    one_label_each: bool

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
NAMED = (*KNOWN, "sample")  # all others are files of the user's own


@dataclass
class Dataset:
    """A dataset ready to use: its task, three splits, the labels' names by number, and where it came from.

    Attributes:
        how_read: what its user should know of how it was read, by a word for each.
    """

    name: str
    source: str
    task: Reader
    label_names: list[str]
    train: Examples
    validation: Examples
    test: Examples
    how_read: dict[str, str] = field(default_factory=dict)

    @property
    def remarks(self) -> dict[str, str]:
        """`how_read`, and what its user should know of the examples that are in it now."""
        splits = {split: getattr(self, split) for split in SPLITS}
        found = {"repeated": repeated(splits)}
        if self.task.one_label_each:
            found |= {"conflicts": contradictory(splits),
                      "rare": untested(splits, self.label_names) if self.train.labels else ""}
        return self.how_read | {key: remark for key, remark in found.items() if remark}

    def fingerprints(self) -> dict[str, str]:
        """Each split's fingerprint: a dataset is known by what it holds, whatever it is called."""
        return {split: getattr(self, split).fingerprint() for split in SPLITS}


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


def load_dataset(name: str, task: Reader, data_dir: str | Path | None = None, seed: int = 0,
                 label_names: list[str] | None = None, reading: Reading | None = None) -> Dataset:
    """Read a dataset.

    Args:
        name: one of KNOWN, "sample", or the path of a file of one of FILE_TYPES (.gz behind it or not), or of a folder
            with such files, one for each split: train, validation (or valid, val, dev), test.
        task: the task class that reads its columns: see `minipeft.tasks.task_for`.
        data_dir: folder that holds `imdb/` and the others; default the MINIPEFT_DATA environment variable.
        seed: of the splits that are carved from train because they have no file: 10 % each, every label in its share.
        label_names: of files of the user's own, where they are known: those that a model was trained on.
        reading: how files of the user's own are read; default as the task has it, and as they show.

    Raises:
        DataError: an unknown name, a missing file or column, or unusable content.
    """
    reading = reading or Reading()
    if name in NAMED:
        if given := [f"--{field.name.replace('_', '-')}" for field in fields(Reading)
                     if getattr(reading, field.name) != field.default]:
            raise DataError(f"{' and '.join(given)}: for files of your own; how they are read is yours to say, "
                            f"{name}'s are known")
        return _known(name, KNOWN[name], task, data_dir, seed) if name in KNOWN else _sample(task)
    return _own_files(name, _files_of(name, reading), task, reading, seed, label_names)


def read_parquet_split(folder: Path, split: str) -> pa.Table:
    """One split of a dataset stored as parquet files named `<split>-*.parquet`.

    Raises:
        DataError: no such file, or not readable.
    """
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no {split}-*.parquet")
    return pa.concat_tables([read_parquet(file) for file in files])


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
        texts, labels = (cells_of(table[column], f"{name} {split}") for column in (text_column, known.label_column))
        found[split], label_names = task.read(texts, by_name(labels, names or ()), f"{name} {split}", names)
    if "validation" not in found:
        kept, held_out = stratified_split(found["train"].classes(), VALIDATION_FRACTION, seed)
        found["train"], found["validation"] = found["train"].take(kept), found["train"].take(held_out)
    return Dataset(name, source, task, label_names, **found)


def name_of(dataset: str) -> str:
    """What results call a dataset that a user asks for: its name or, of a file, the file's without its ending.

    Raises:
        DataError: nothing is left of it then.
    """
    if dataset in NAMED:
        return dataset
    path = Path(dataset) if Path(dataset).name not in ("", "..") else Path(dataset).resolve()
    if stem(path) in ("", ".", ".."):  # folders of these names would be others' than its own
        raise DataError(f"{dataset} has no name by which results could call it: rename it")
    taken = stem(path) in NAMED  # results on another "imdb" are not IMDb's
    return (path.name if file_type(path) else f"{path.name}_folder") if taken else stem(path)


def _sample(task: Reader) -> Dataset:
    label_names, found = ["negative", "positive"], {}
    for split in SPLITS:
        table = read_table(SAMPLE_FOLDER / f"{split}.jsonl")
        found[split], _ = task.read(table.column("text"), by_name(table.column("label"), label_names),
                                    f"sample {split}", label_names)
    source = f"{sum(map(len, found.values())):,} reviews written for minipeft (minipeft/data/sample)"
    return Dataset("sample", source, task, label_names, **found)


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


# --- files of one's own -----------------------------------------------------------------------------------------------

def _files_of(name: str, reading: Reading) -> dict[str, Path]:
    """The file of each split that has one; train has.

    Raises:
        DataError: there is none, or several for one split.
    """
    given = {"validation": reading.validation_file, "test": reading.test_file}
    found = {"train": Path(name), **{split: Path(path) for split, path in given.items() if path is not None}}
    if name and Path(name).is_dir():
        for split, stems in SPLIT_NAMES.items():
            files = [path for path in sorted(Path(name).iterdir()) if file_type(path) and stem(path) in stems]
            if len(files) + (split in found and split != "train") > 1:
                raise DataError(f"{name} has {len(files)} files for the {split} split ({', '.join(map(str, files))})"
                                + (f", and --{split}-file names one" if found.get(split) else ""))
            if files:
                found[split] = files[0]
        if found["train"] == Path(name):
            raise DataError(f"{name} is a folder without a file train{', train'.join(FILE_TYPES)}")
    for split, path in found.items():
        if file_type(path) is None:
            unknown = name if split == "train" else str(path)
            raise DataError(f"unknown dataset {unknown!r}: use {', '.join(KNOWN)}, sample, or the path of a "
                            f"{', '.join(FILE_TYPES)} file (.gz behind it or not) or of a folder with train, "
                            "validation and test files")
    return found


def is_one_file(name: str, reading: Reading) -> bool:
    """Whether a dataset is a single file of the user's own, with rows for no split in particular."""
    return file_type(name) is not None and reading.test_file is None and not Path(name).is_dir()


def column_names(name: str, reading: Reading) -> list[str]:
    """The columns of a file of the user's own or, of several, of train's.

    Raises:
        DataError: it cannot be read.
    """
    return read_table(_files_of(name, reading)["train"], reading.delimiter, reading.encoding).names


def load_whole(name: str, task: Reader, label_names: list[str] | None, reading: Reading) -> Dataset:
    """A single file of the user's own, all of its rows in the test split.

    Raises:
        DataError: a missing file or column, or unusable content.
    """
    found, names, remarks = _read_own({"train": Path(name)}, task, reading, label_names)
    none = Examples([], [])
    return Dataset(name_of(name), name, task, names, none, none, found["train"], remarks)


def _own_files(name: str, files: dict[str, Path], task: Reader, reading: Reading, seed: int,
               label_names: list[str] | None) -> Dataset:
    found, names, remarks = _read_own(files, task, reading, label_names)
    total = len(found["train"])
    for number, split in enumerate(("test", "validation")):
        if split not in found:
            kept, held_out = stratified_split(found["train"].classes(), VALIDATION_FRACTION, seed + number)
            found["train"], found[split] = found["train"].take(kept), found["train"].take(held_out)
            if not held_out.size:
                raise DataError(f"{files['train']}: {total} rows are too few to hold out a {split} split; there should "
                                f"be at least ten{' of each label' * task.one_label_each}")
    return Dataset(name_of(name), ", ".join(map(str, files.values())), task, names, **found, how_read=remarks)


def _read_own(files: dict[str, Path], task: Reader, reading: Reading,
              label_names: list[str] | None) -> tuple[dict[str, Examples], list[str], dict[str, str]]:
    """Each file's examples, the labels' names, and remarks on how they were read."""
    tasks = dict.fromkeys(known.task for known in KNOWN.values())
    rows = {split: read_rows(path, task.columns, reading, f"--task, now {task.name}, one of {', '.join(tasks)}")
            for split, path in files.items()}
    remarks = {"reading": "; ".join(filter(None, (found.found_out for found in rows.values()))),
               "skipped": "; ".join(filter(None, (found.skipped for found in rows.values())))}
    labels = {split: found.labels for split, found in rows.items()}
    if task.one_label_each:
        labels, remarks["labels"] = _classes(labels, files, task, reading, label_names)
    elif reading.similar_labels is not None:
        raise DataError(f"--similar-labels is for labels of whole texts; {task.name} has none")
    found, names = {}, label_names
    for split, path in files.items():
        found[split], names = task.read(rows[split].texts, labels[split], str(path), names)
    return found, names, {key: remark for key, remark in remarks.items() if remark}


def _classes(labels: dict[str, list[Any]], files: dict[str, Path], task: Reader, reading: Reading,
             label_names: list[str] | None) -> tuple[dict[str, list[Any]], str]:
    """Each split's labels, of which no two mean the same, as names; and in words what was done to them."""
    columns = (reading.text_column or task.columns[0], reading.label_column or task.columns[1])
    if columns[0] == columns[1]:
        raise DataError(f"the column {columns[0]!r} cannot hold both texts and labels: see --text-column, "
                        "--label-column")
    if label_names is None and labels["train"]:
        check_classes(labels["train"], str(files["train"]))
    elif label_names is not None:
        labels = {split: by_name(column, label_names) for split, column in labels.items()}
    return unified(labels, label_names or (), reading.similar_labels, ", ".join(map(str, files.values())))


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
