"""Find a dataset, split it, and batch what is of equal length.

A dataset is named "imdb" (a folder of parquet files, else the Hugging Face hub), "sample" (reviews written for this
project, bundled), or is a path to a file of the user's own. Whatever it is, the result is texts and label numbers in
three splits: train, validation, test. The validation split is always carved from train, never from test.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import torch
from torch import Tensor

from minipeft.errors import DataError
from minipeft.weights import hub_is_reachable

HUB_NAMES = {"imdb": "stanfordnlp/imdb"}
SAMPLE_FOLDER = Path(__file__).parent / "sample"
FILE_TYPES = (".csv", ".tsv", ".jsonl", ".parquet")
VALIDATION_FRACTION = 0.1
# A text this long is a book or a mistake: a model that reads a few hundred tokens of it would judge something else.
MAX_CHARACTERS = 100_000
_LINE_BREAK = re.compile(r"<br\s*/?>")


@dataclass
class Examples:
    """Texts and their label numbers, in one order."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at `indices`, in that order."""
        return Examples([self.texts[i] for i in indices], [self.labels[i] for i in indices])

    def subset(self, size: int | None, seed: int) -> Examples:
        """`size` examples, each label in its own share; all of them where there are no more."""
        if size is None or size >= len(self):
            return self
        labels, rng = np.asarray(self.labels), np.random.default_rng(seed)
        place = np.empty(len(labels))  # each label's examples evenly spaced in [0, 1), in random order
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
        return self.take(rng.permutation(np.argsort(place, kind="stable")[:size]).tolist())


@dataclass
class ClassificationData:
    """A dataset ready to use: three splits, the labels' names by number, and where it came from."""

    name: str
    source: str
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
    if _in_hub_cache(HUB_NAMES["imdb"]):
        return "imdb", "found in the Hugging Face cache"
    if hub_is_reachable():
        return "imdb", "to be downloaded from the Hugging Face hub"
    return "sample", "IMDb is not on this machine (--data-dir, MINIPEFT_DATA) and the hub cannot be reached"


def load_dataset(name: str, data_dir: str | Path | None = None, text_column: str = "text", label_column: str = "label",
                 seed: int = 0) -> ClassificationData:
    """Read a text-classification dataset.

    Args:
        name: "imdb", "sample", or the path of a .csv, .tsv, .jsonl or .parquet file.
        data_dir: folder that holds `imdb/`; default the MINIPEFT_DATA environment variable.
        text_column, label_column: columns of a file of one's own; its labels may be words.
        seed: of the validation split and, for a single file, of the test split (10 % each, every label in its share).

    Raises:
        DataError: an unknown name, a missing file or column, or unusable content.
    """
    if name == "imdb":
        data = _imdb(data_dir, seed)
    elif name == "sample":
        splits = [_read_table(SAMPLE_FOLDER / f"{split}.jsonl") for split in ("train", "validation", "test")]
        data = ClassificationData(
            "sample", "640 reviews written for minipeft (minipeft/sample)", ["negative", "positive"],
            *(Examples(table["text"].to_pylist(), table["label"].to_pylist()) for table in splits))
    elif name.endswith(FILE_TYPES):
        data = _own_file(Path(name), text_column, label_column, seed)
    else:
        raise DataError(f"unknown dataset {name!r}: use imdb, sample, or the path of a {', '.join(FILE_TYPES)} file")
    for split in ("train", "validation", "test"):
        check_texts(getattr(data, split).texts, f"{data.name} {split}")
    return data


def check_texts(texts: Sequence[str], where: str) -> None:
    """Refuse what cannot be classified: nothing at all, an empty text, or one of over MAX_CHARACTERS characters.

    Raises:
        DataError: naming the first such text's row, counted from 1.
    """
    if not texts:
        raise DataError(f"{where}: there is no text at all")
    for row, text in enumerate(texts, start=1):
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}, row {row}: {str(text)[:40]!r} is {type(text).__name__}, not text"
                            + ("; is the file encoded in UTF-8?" if isinstance(text, bytes) else ""))
        if text is None or not text.strip():
            raise DataError(f"{where}, row {row}: the text is empty")
        if len(text) > MAX_CHARACTERS:
            raise DataError(f"{where}, row {row}: the text has {len(text):,} characters, the limit is "
                            f"{MAX_CHARACTERS:,}; cut it into parts")


def clean(text: str) -> str:
    """IMDb's reviews mark line breaks as HTML; a language model should see a line break."""
    return _LINE_BREAK.sub("\n", text)


def read_parquet_split(folder: Path, split: str) -> pa.Table:
    """One split of a dataset stored as parquet files named `<split>-*.parquet`.

    Raises:
        DataError: no such file, or not readable.
    """
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise DataError(f"{folder} holds no {split}-*.parquet")
    return pa.concat_tables([_read_table(file) for file in files])


def _imdb(data_dir: str | Path | None, seed: int) -> ClassificationData:
    folder = data_folder(data_dir)
    if folder is not None:
        if not (folder / "imdb").is_dir():
            raise DataError(f"{folder} has no folder imdb: it should hold imdb/train-*.parquet and imdb/test-*.parquet")
        tables = {split: read_parquet_split(folder / "imdb", split) for split in ("train", "test")}
        source = "the data folder's imdb/*.parquet"
    else:
        tables = {split: _from_hub(HUB_NAMES["imdb"], split) for split in ("train", "test")}
        source = f"{HUB_NAMES['imdb']} on the Hugging Face hub"
    for split, table in tables.items():
        for column in ("text", "label"):
            if table.column_names.count(column) != 1:
                raise DataError(f"IMDb's {split} file has no column {column!r}; it has {', '.join(table.column_names)}")
        check_texts(table["text"].to_pylist(), f"imdb {split}")
    labelled = {split: Examples([clean(text) for text in table["text"].to_pylist()], table["label"].to_pylist())
                for split, table in tables.items()}
    kept, held_out = stratified_split(labelled["train"].labels, VALIDATION_FRACTION, seed)
    train = labelled["train"]
    return ClassificationData("imdb", source, ["negative", "positive"], train.take(kept), train.take(held_out),
                              labelled["test"])


def _in_hub_cache(repository: str) -> bool:
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___")).is_dir()


def _from_hub(repository: str, split: str) -> pa.Table:
    """One split through `datasets`: from its cache, else downloaded."""
    import datasets

    if not _in_hub_cache(repository) and not hub_is_reachable():
        raise DataError(f"{repository} is not on this machine and the Hugging Face hub cannot be reached: put its "
                        "parquet files into FOLDER/imdb as train-00000-of-00001.parquet and "
                        "test-00000-of-00001.parquet and pass --data-dir FOLDER, or use --dataset sample")
    try:
        return datasets.load_dataset(repository, split=split).data.table
    except Exception as error:  # the hub client raises its HTTP library's errors, which differ between versions
        raise DataError(f"loading {repository} from the hub failed: {type(error).__name__}: {error}") from error


def _own_file(path: Path, text_column: str, label_column: str, seed: int) -> ClassificationData:
    table = _read_table(path)
    for column, option in ((text_column, "--text-column"), (label_column, "--label-column")):
        if column not in table.column_names:
            raise DataError(f"{path} has no column {column!r}; {option} can be one of {', '.join(table.column_names)}")
        if table.column_names.count(column) > 1:
            raise DataError(f"{path} has {table.column_names.count(column)} columns named {column!r}")
        if pa.types.is_nested(table.schema.field(column).type):
            raise DataError(f"{path}: column {column!r} holds {table.schema.field(column).type}, not single values")
    texts, raw_labels = table[text_column].to_pylist(), table[label_column].to_pylist()
    check_texts(texts, str(path))
    if any(label is None or label == "" for label in raw_labels):
        raise DataError(f"{path}, row {[not label and label != 0 for label in raw_labels].index(True) + 1}: "
                        f"column {label_column!r} is empty")
    values = sorted(set(raw_labels), key=lambda value: (isinstance(value, str), value))
    if len(values) < 2:
        raise DataError(f"{path}: column {label_column!r} holds one label only ({values[0]!r}); there is nothing to "
                        "learn")
    if len(values) > max(50, len(texts) // 10):
        raise DataError(f"{path}: column {label_column!r} holds {len(values):,} different values in {len(texts):,} "
                        "rows; that is not a set of classes")
    number = {value: i for i, value in enumerate(values)}
    examples = Examples([clean(text) for text in texts], [number[label] for label in raw_labels])
    rest, test = stratified_split(examples.labels, VALIDATION_FRACTION, seed)
    rest_examples = examples.take(rest)
    train, validation = stratified_split(rest_examples.labels, VALIDATION_FRACTION, seed + 1)
    name = path.name if path.stem in (*HUB_NAMES, "sample") else path.stem  # results on another "imdb" are not IMDb's
    data = ClassificationData(name, str(path), [str(value) for value in values], rest_examples.take(train),
                              rest_examples.take(validation), examples.take(test))
    if not len(data.validation) or not len(data.test):
        raise DataError(f"{path}: {len(texts)} rows are too few to hold out a validation and a test split; "
                        "each label needs at least ten")
    return data


def _read_table(path: Path) -> pa.Table:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        if path.suffix == ".jsonl":
            # One block, as a row may not span three; a row of a book's length should be refused as that.
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


# --- batch ------------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """Texts of similar length, padded on the right to the longest: ids and mask (B, T), labels (B,)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, copied to a GPU while it computes. The mask stays: the model looks at it first."""
        def there(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        return Batch(there(self.input_ids), self.attention_mask, there(self.labels))


def collate(ids: Sequence[np.ndarray], labels: Sequence[int], round_length_to: int = 1) -> Batch:
    """Pad on the right with id 0, which is a real token too: the mask alone tells them apart.

    Args:
        round_length_to: T is rounded up to a multiple of this, so that a compiled model meets few different shapes.
    """
    longest = -(-max(len(row) for row in ids) // round_length_to) * round_length_to
    input_ids = np.zeros((len(ids), longest), dtype=np.int64)                    # (B, T)
    mask = np.zeros((len(ids), longest), dtype=np.int64)                         # (B, T)
    for row, tokens in enumerate(ids):
        input_ids[row, :len(tokens)] = tokens
        mask[row, :len(tokens)] = 1
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(mask), torch.tensor(labels, dtype=torch.int64))


@dataclass
class BucketedBatches:
    """Batches of texts of similar length, in another random order each epoch.

    The examples are shuffled, cut into pools of `pool` batches, sorted by length within a pool, cut into batches, and
    the batches shuffled: little padding, and still a random walk through the data. `epoch(n)` depends on the seed and n
    alone, so that a resumed run sees what it would have seen. Lengths are rounded up to a multiple of
    `round_length_to`: a compiled model wants few different ones.
    """

    ids: Sequence[np.ndarray]
    labels: Sequence[int]
    batch_size: int
    seed: int = 0
    pool: int = 50
    round_length_to: int = 1

    def __len__(self) -> int:
        return -(-len(self.ids) // self.batch_size)

    def order(self, epoch: int) -> list[np.ndarray]:
        """The example numbers of each batch of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.ids))
        lengths = np.array([len(row) for row in self.ids])
        size = self.pool * self.batch_size
        pools = [order[start:start + size] for start in range(0, len(order), size)]
        order = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in pools])
        batches = [order[start:start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch number `first` on."""
        for rows in self.order(epoch)[first:]:
            yield collate([self.ids[i] for i in rows], [self.labels[i] for i in rows], self.round_length_to)


class FeatureBatches(BucketedBatches):
    """Batches of feature vectors, all of one length, in another random order each epoch: `ids` is (N, C)."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch number `first` on."""
        labels = torch.tensor(self.labels)
        for rows in map(torch.from_numpy, self.order(epoch)[first:]):
            yield Batch(self.ids[rows], torch.ones(len(rows), 1), labels[rows])


def in_order_of_length(ids: Sequence[np.ndarray], labels: Sequence[int],
                       batch_size: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """All examples once, longest first so that memory runs out at once or never, with their numbers: for evaluation."""
    order = np.argsort([-len(row) for row in ids], kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        yield rows, collate([ids[i] for i in rows], [labels[i] for i in rows])
