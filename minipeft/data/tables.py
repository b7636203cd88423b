"""Read and write files of the user's own: rows with named columns, as CSV, JSON or parquet, plain or packed by gzip.

What can be seen is not asked for: a mark at a file's beginning names its encoding, the header shows what stands between
columns, the first bytes show gzip. Cells of a CSV file are texts as they stand there: "01" is not 1. What cannot be
read or is empty is counted; it is refused, or left out with --skip-bad-rows.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from minipeft.data.characters import decoded, unpacked
from minipeft.data.examples import complaint
from minipeft.errors import ConfigError, DataError
from minipeft.files import without_nan, write_bytes_file
from minipeft.settings import Settings, setting

FILE_TYPES = (".csv", ".tsv", ".jsonl", ".parquet", ".json")
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
MOST_COLUMNS = 1000  # of a JSON file, whose every row may name others
BLOCK = 1 << 30  # bytes of a CSV file that are parsed at once: pyarrow takes no 2 GiB
MISSING = ("nan", "null", "<na>", "#n/a")  # how programs write a cell that is empty
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


@dataclass
class Reading(Settings):
    """How files of the user's own are read; None means: as the task has it, or as the files show.

    Attributes:
        text_column, label_column: default the task's `columns`.
        validation_file, test_file: splits that have a file of their own.
        delimiter: between the columns of a .csv or .tsv file: a character, or "tab".
        encoding: of a file's characters, by a name that Python knows.
        skip_bad_rows: leave out rows that cannot be read or have an empty cell, where they are refused otherwise.
        similar_labels: whether labels that differ in blanks, case, leading zeros or .0 alone are one ("merge") or
            several ("keep"); where there are any, it must be said.

    Raises:
        ConfigError: a value of the wrong type, or none of a field's choices.
    """

    text_column: str | None = None
    label_column: str | None = None
    validation_file: str | Path | None = None
    test_file: str | Path | None = None
    delimiter: str | None = None
    encoding: str | None = None
    skip_bad_rows: bool = False
    similar_labels: str | None = setting(None, choices=(None, "merge", "keep"))

    def check(self) -> None:
        super().check()
        if self.delimiter in ("tab", "\\t"):
            self.delimiter = "\t"
        if self.delimiter is not None and (len(self.delimiter) != 1 or not self.delimiter.isascii()
                                           or self.delimiter in '"\r\n'):
            raise ConfigError(f"delimiter must be one character, such as ; or tab, got {self.delimiter!r}")
        try:
            "a".encode(self.encoding or "utf-8")
        except (LookupError, ValueError) as error:
            raise ConfigError(f"encoding must be one that Python knows, such as cp1252 or utf-16, got "
                              f"{self.encoding!r}") from error


class Table(NamedTuple):
    """A file's columns, by name.

    Attributes:
        unreadable: what is wrong with the rows that are in no column, by their numbers, which count from 1.
        found_out: in words, what the file itself showed of how to read it.
        delimiter: what stands between columns of a CSV file.
    """

    names: list[str]
    column: Callable[[str], list[Any]]
    unreadable: dict[int, str]
    found_out: str = ""
    delimiter: str | None = None

    def swallowed(self, text: Any, label_column: str, labels: Container[Any]) -> bool:
        """Whether a cell holds rows of the file: an opening quotation mark in a text makes one cell of all up to the
        next such mark."""
        if self.delimiter is None or "\n" not in str(text):
            return False
        rows = [line.split(self.delimiter) for line in str(text).split("\n")]
        return any(len(row) == len(self.names) and row[self.names.index(label_column)] in labels for row in rows)


def file_type(path: str | Path) -> str | None:
    """The one of FILE_TYPES that a file's name ends with, before .gz where it has that; None where there is none."""
    name = Path(path).name.lower().removesuffix(".gz")
    return next((ending for ending in FILE_TYPES if name.endswith(ending)), None)


def stem(path: Path) -> str:
    """A file's name without the ending that says what kind of file it is, compressed or not; a folder's whole name."""
    kind = file_type(path)
    return path.name if kind is None else path.name[:path.name.lower().rindex(kind)]


def read_table(path: Path, delimiter: str | None = None, encoding: str | None = None) -> Table:
    """The content of a file of one of FILE_TYPES, or of one whose name goes on with .gz.

    Raises:
        DataError: there is no such file, or it is empty, damaged, or in another encoding.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    kind = file_type(path)
    try:
        if kind == ".parquet":
            table = read_parquet(path)
            return Table(table.column_names, lambda name: cells_of(table[name], f"{path}, column {name!r}"), {})
        content = path.read_bytes()
        if content.startswith(b"PK\x03\x04"):
            raise DataError(f"{path} is a zip archive or a spreadsheet: unpack it, or save it as .csv")
        text, found_out = decoded(unpacked(content, path), path, encoding)
        table = _read_json(text) if kind in (".json", ".jsonl") else _read_csv(
            text, path, delimiter, usual="\t" if kind == ".tsv" else ",")
    except (pa.ArrowException, OSError, EOFError, zlib.error, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} is empty or not a readable {kind} file: {_reason(error)}") from error
    return table._replace(found_out=", ".join(filter(None, (table.found_out, found_out))))


def read_parquet(path: Path) -> pa.Table:
    """The content of a parquet file.

    Raises:
        DataError: it is empty or damaged.
    """
    try:
        return pyarrow.parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is empty or not a readable .parquet file: {_reason(error)}") from error


def cells_of(column: pa.ChunkedArray, where: str) -> list[Any]:
    """A column of a parquet file as Python's values.

    Raises:
        DataError: one of them is none, such as a text that is not UTF-8.
    """
    try:
        return column.to_pylist()
    except (ValueError, OverflowError) as error:
        raise DataError(f"{where} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an error says in its first line or, where it says nothing, its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_csv(text: str, path: Path, delimiter: str | None, usual: str) -> Table:
    """Every cell as text. A row with more or fewer columns than the header is unreadable."""
    chosen = delimiter or _delimiter_of(text, path, usual)
    unreadable: dict[int, str] = {}
    content, last_cells = text.encode(), []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        last_cells.append(_header(row.text, chosen)[-1])
        unreadable[row.number - 1] = f"{row.actual_columns} columns, where the header has {row.expected_columns}"
        return "skip"

    # One block, if it can be: a row may be as long as a book. One thread: rows are numbered.
    block = min(BLOCK, max(1 << 20, len(content)))
    table = pyarrow.csv.read_csv(
        pa.BufferReader(content), pyarrow.csv.ReadOptions(use_threads=False, block_size=block),
        pyarrow.csv.ParseOptions(delimiter=chosen, newlines_in_values=True, invalid_row_handler=note),
        pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(_header(text, chosen), pa.string())))
    names = [name.strip() for name in table.column_names]
    last_cells += table.column(table.num_columns - 1).slice(max(0, table.num_rows - 1)).to_pylist()
    if any("\n" in cell.strip() for cell in last_cells[-2:]) and not text.rstrip().endswith('"'):
        raise ValueError("a quotation mark in it is never closed, and all lines behind it are one cell")
    return Table(names, lambda name: table.column(names.index(name)).to_pylist(), unreadable,
                 "" if chosen in (delimiter, usual) else f"{DELIMITERS[chosen]} between columns", chosen)


def _header(text: str, delimiter: str) -> list[str]:
    """The first row of a CSV file: the names of its columns."""
    return next((row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row), [])


def _delimiter_of(text: str, path: Path, usual: str) -> str:
    """What the header's columns stand between: the usual character where it is there, else the only other one."""
    columns = {character: len(_header(text, character)) for character in DELIMITERS}
    found = [character for character, number in columns.items() if number > 1]
    if columns[usual] > 1 or not found:
        return usual
    if len(found) > 1:
        raise DataError(f"{path} has {' and '.join(DELIMITERS[character] for character in found)} in its header: say "
                        "what stands between columns, such as --delimiter ';' or --delimiter tab")
    return found[0]


def _read_json(text: str) -> Table:
    """An array of objects, or an object on each line. What is no object is unreadable."""
    if text.lstrip()[:1] == "[":
        items = json.loads(text)
    else:
        items = [_parsed(line) for line in text.split("\n") if line.strip()]
        if len(items) == 1 and isinstance(items[0], dict) and any(
                isinstance(value, (list, dict)) and len(value) > 1 for value in items[0].values()):
            raise ValueError("it is one object; it should be an array of objects, or have an object on each line")
    rows = [item for item in items if isinstance(item, dict)]
    unreadable = {number: f"no JSON object{f' ({item})' if isinstance(item, Exception) else ''}"
                  for number, item in enumerate(items, start=1) if not isinstance(item, dict)}
    if not rows:
        raise ValueError(f"row 1: {unreadable[1]}" if unreadable else "there is nothing in it")
    names = dict.fromkeys(name for row in rows for name in row)
    if len(names) > MOST_COLUMNS:
        raise ValueError(f"its rows name {len(names):,} different columns, of which there can be {MOST_COLUMNS:,}")
    return Table(list(names), lambda name: [row.get(name) for row in rows], unreadable)


def _parsed(line: str) -> Any:
    """A line's value, or why it has none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error


# --- rows -------------------------------------------------------------------------------------------------------------

class Rows(NamedTuple):
    """The usable rows of a file: cells of two columns, and in words how the file was read and what was left out."""

    texts: list[Any]
    labels: list[Any]
    found_out: str
    skipped: str


def read_rows(path: Path, columns: tuple[str, str], reading: Reading, tasks: str) -> Rows:
    """Two columns of a file, named by `reading` or else by `columns`.

    Args:
        columns: the task's, which are also what an error calls their cells.
        tasks: in words, what --task can be besides, for an error.

    Raises:
        DataError: no such column, or rows that cannot be used, unless they are to be skipped: the first one and their
            number.
    """
    table = read_table(path, reading.delimiter, reading.encoding)
    names = [reading.text_column or columns[0], reading.label_column or columns[1]]
    for name, option in zip(names, ("--text-column", "--label-column")):
        if name not in table.names:
            hint = "; --delimiter says what stands between columns" * bool(re.search(r"[;,|\t]", "".join(table.names)))
            raise DataError(f"{path} has no column {name!r}; {option} can be one of {', '.join(table.names)}, and "
                            f"{tasks}{hint}")
        if table.names.count(name) > 1:
            raise DataError(f"{path} has {table.names.count(name)} columns named {name!r}")
    texts, labels = map(table.column, names)
    known = {label for label in labels if isinstance(label, str)}
    if texts and all(isinstance(text, str) and NUMBER.fullmatch(text.strip()) for text in texts):
        raise DataError(f"{path}: the column {names[0]!r} holds nothing but numbers, no texts; --text-column can be "
                        f"one of {', '.join(table.names)}")
    kept, bad = _usable(texts, labels, columns, table.unreadable)
    for row in [row for row, (text, _) in kept.items() if table.swallowed(text, names[1], known)]:
        bad[row] = f"the {columns[0]} holds whole rows of the file; a quotation mark in it should be doubled, or quoted"
        del kept[row]
    counted = f"{len(bad):,} of {len(kept) + len(bad):,} rows"
    first = next((f"row {row}: {why}" for row, why in sorted(bad.items())), "")
    if bad and not reading.skip_bad_rows:
        where = f"{path} is not a readable {file_type(path)} file: " if min(bad) in table.unreadable else f"{path}, "
        raise DataError(f"{where}{first} ({counted} cannot be used: mend them, or leave them out with --skip-bad-rows)")
    return Rows([text for text, _ in kept.values()], [label for _, label in kept.values()],
                f"{path}: {table.found_out}" if table.found_out else "",
                f"{counted} of {path} (the first is {first})" if bad else "")


def _usable(texts: list[Any], labels: list[Any], columns: tuple[str, str],
            unreadable: dict[int, str]) -> tuple[dict[int, tuple[Any, Any]], dict[int, str]]:
    """By number the rows without an empty cell or an impossible text, and what is wrong with all others."""
    kept, bad = {}, dict(unreadable)
    numbers = (number for number in range(1, 1 + len(texts) + len(unreadable)) if number not in unreadable)
    for number, cells in zip(numbers, zip(texts, labels)):
        wrong = [f"the {what} {why}" for cell, what in zip(cells, columns) if (why := _complaint(cell))]
        if wrong:
            bad[number] = wrong[0]
        else:
            kept[number] = cells
    return kept, bad


def _complaint(cell: Any) -> str | None:
    """Why no task can use a cell, if none can; what else a task asks of it, the task checks."""
    if cell is None or cell != cell:  # nothing but NaN differs from itself
        return "is empty"
    if isinstance(cell, str):
        return f"is empty ({cell!r})" if cell.strip().lower() in MISSING else complaint(cell)
    return None


# --- write ------------------------------------------------------------------------------------------------------------

def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """Write columns of equal length as a file of one of FILE_TYPES, packed where its name goes on with .gz.

    In a .csv or .tsv file a list of texts becomes one text with blanks between, any other list or object JSON.

    Raises:
        DataError: another kind of file, or one that cannot hold these columns.
        OutputError: it cannot be written.
    """
    content = table_content(path, columns)
    write_bytes_file(path, gzip.compress(content) if path.name.lower().endswith(".gz") else content)


def table_content(path: Path, columns: dict[str, list[Any]]) -> bytes:
    """What `write_table` writes, before it is packed.

    Raises:
        DataError: another kind of file, or one that cannot hold these columns.
    """
    kind = file_type(path)
    if kind is None:
        raise DataError(f"{path} should end in one of {', '.join(FILE_TYPES)} (.gz behind it or not)")
    try:
        if kind == ".parquet":
            sink = pa.BufferOutputStream()
            pyarrow.parquet.write_table(pa.table(columns), sink)
            return sink.getvalue().to_pybytes()
        rows = list(zip(*columns.values()))
        if kind in (".csv", ".tsv"):
            return _csv_text(list(columns), rows, "\t" if kind == ".tsv" else ",").encode()
        text = _json_text([dict(zip(columns, row)) for row in rows], a_line_each=kind == ".jsonl")
        return text.encode(errors="backslashreplace")  # half a character is written as JSON does: \ud800
    except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} cannot hold these columns: {_reason(error)}; write a .jsonl file") from error


def _csv_text(names: list[str], rows: list[tuple[Any, ...]], delimiter: str) -> str:
    """Each row ends in \\n. The writer ends it in \\r\\n, so that it quotes a cell with either."""
    lines: list[str] = []
    writer = csv.writer(SimpleNamespace(write=lines.append), delimiter=delimiter, lineterminator="\r\n")
    writer.writerows([names, *([_cell(value) for value in row] for row in rows)])
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


def _cell(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    return json.dumps(without_nan(value), default=str) if isinstance(value, (list, dict)) else value


def _json_text(rows: list[dict[str, Any]], a_line_each: bool) -> str:
    lines = [json.dumps(without_nan(row), ensure_ascii=False, default=str) for row in rows]
    return "\n".join(lines) + "\n" if a_line_each else "[\n" + ",\n".join(lines) + "\n]\n"
