"""tables.py: files of a user's own, read as they are or refused in one line that names the option."""

from __future__ import annotations

import codecs
import gzip
import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from helpers import write_csv, write_parquet

from minipeft.data import characters, tables
from minipeft.data.tables import Reading, file_type, read_rows, read_table, write_table
from minipeft.errors import ConfigError, DataError

CONTENT = [("un café, s'il vous plaît", "bon"), ("ein \"guter\" Film\nin zwei Zeilen", "gut"), ("x", "01")]
TEXT = "text,label\n" + "".join('"{}",{}\n'.format(text.replace('"', '""'), label) for text, label in CONTENT)


def cells(path, **reading):
    """The (text, label) pairs of a file."""
    rows = read_rows(path, ("text", "label"), Reading(**reading), "other tasks")
    return list(zip(rows.texts, rows.labels))


def written(path, text, encoding="utf-8", mark=b"", packed=False):
    """A file with this text in it; returns its path."""
    content = mark + text.encode(encoding)
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


# --- kinds of files ---------------------------------------------------------------------------------------------------

@pytest.mark.kind("7: CSV with semicolons, tabs or bars between columns")
@pytest.mark.parametrize(("delimiter", "shown"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_the_header_shows_what_stands_between_columns(tmp_path, delimiter, shown):
    lines = [("text", "label"), *((text.replace('"', '""'), label) for text, label in CONTENT)]
    path = written(tmp_path / "x.csv", "".join(f'"{text}"{delimiter}"{label}"\n' for text, label in lines))
    assert cells(path) == cells(path, delimiter=delimiter) == CONTENT
    assert read_rows(path, ("text", "label"), Reading(), "").found_out == f"{path}: {shown} between columns"


def test_a_comma_in_the_header_is_taken_as_usual_and_the_error_names_the_option(tmp_path):
    path = written(tmp_path / "x.csv", "text;label, by hand\na;1\n")
    with pytest.raises(DataError, match=r"no column 'text'; --text-column can be one of .* --delimiter says"):
        cells(path)
    assert cells(path, delimiter=";", label_column="label, by hand") == [("a", "1")]


def test_a_header_with_two_possible_characters_is_refused_naming_the_option(tmp_path):
    path = written(tmp_path / "x.csv", "text;label|other\na;1|2\n")
    with pytest.raises(DataError, match=r"has semicolons and bars in its header.*--delimiter"):
        cells(path)


def test_a_tsv_file_may_have_commas_and_tab_can_be_written_as_a_word(tmp_path):
    assert cells(written(tmp_path / "x.tsv", TEXT)) == CONTENT
    assert cells(written(tmp_path / "y.tsv", "text\tlabel\na, b\t1\n"), delimiter="tab") == [("a, b", "1")]


@pytest.mark.kind("7: files with a mark of their encoding, as Windows writes them")
@pytest.mark.parametrize(("encoding", "mark"), [
    ("utf-8", codecs.BOM_UTF8), ("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE),
    ("utf-32-le", codecs.BOM_UTF32_LE)])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_mark_at_the_beginning_names_the_encoding(tmp_path, encoding, mark, suffix):
    text = TEXT if suffix == ".csv" else "".join(json.dumps({"text": t, "label": value}, ensure_ascii=False) + "\n"
                                                 for t, value in CONTENT)
    assert cells(written(tmp_path / f"x{suffix}", text, encoding, mark)) == CONTENT


@pytest.mark.kind("7: files in another encoding than UTF-8")
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_an_encoding_without_a_mark_is_asked_for_and_read_when_named(tmp_path, encoding):
    path = written(tmp_path / "x.csv", TEXT, encoding)
    with pytest.raises(DataError, match="is not encoded in UTF-8, as its line 2 shows; name its encoding, such as "
                                        "--encoding cp1252"):
        cells(path)
    assert cells(path, encoding=encoding) == CONTENT


def test_utf_16_without_a_mark_is_recognized_and_read_when_named(tmp_path):
    path = written(tmp_path / "x.csv", "text,label\na,1\n", "utf-16-le")
    with pytest.raises(DataError, match="--encoding utf-16-le"):
        cells(path)
    assert cells(path, encoding="utf-16-le") == [("a", "1")]


@pytest.mark.kind("7: compressed files")
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_a_compressed_file_is_read(tmp_path, suffix):
    text = {".csv": "text,label\na,1\nb,0\n", ".tsv": "text\tlabel\na\t1\nb\t0\n"}.get(
        suffix, '{"text": "a", "label": "1"}\n{"text": "b", "label": "0"}\n')
    assert cells(written(tmp_path / f"x{suffix}.gz", text, packed=True)) == [("a", "1"), ("b", "0")]


def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path):
    path = written(tmp_path / "x.csv.gz", TEXT * 50, packed=True)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"not a readable .csv file"):
        cells(path)


def test_a_compressed_file_that_unpacks_to_more_than_any_memory_holds_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path / "x.csv.gz", "text,label\n" + "a,1\n" * 100, packed=True)
    monkeypatch.setattr(characters, "PART", 64)
    monkeypatch.setattr(characters, "MOST_BYTES", 411)
    assert len(cells(path)) == 100
    monkeypatch.setattr(characters, "MOST_BYTES", 410)
    with pytest.raises(DataError, match=r"x\.csv\.gz has more than 410 bytes when it is unpacked: split it"):
        cells(path)


def test_a_file_of_several_parts_that_gzip_packed_one_by_one_is_read_whole(tmp_path):
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\na,1\n") + gzip.compress(b"b,0\n"))
    assert cells(path) == [("a", "1"), ("b", "0")]


def test_rows_that_name_more_columns_than_a_table_can_have_are_refused(tmp_path, monkeypatch):
    path = written(tmp_path / "x.jsonl", "".join(f'{{"text": "a", "label": 1, "c{i}": 0}}\n' for i in range(9)))
    monkeypatch.setattr(tables, "MOST_COLUMNS", 11)
    assert len(cells(path)) == 9
    monkeypatch.setattr(tables, "MOST_COLUMNS", 10)
    with pytest.raises(DataError, match="its rows name 11 different columns, of which there can be 10"):
        cells(path)


@pytest.mark.kind("7: JSON arrays")
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_of_objects_is_read_whatever_the_ending(tmp_path, suffix, indent):
    path = written(tmp_path / f"x{suffix}", json.dumps([{"text": t, "label": value} for t, value in CONTENT],
                                                       indent=indent))
    assert cells(path) == CONTENT


@pytest.mark.parametrize(("text", "message"), [
    ('{"data": [{"text": "a", "label": 1}]}', r"no column 'text'; --text-column can be one of data"),
    ('{"text": ["a", "b"], "label": [0, 1]}', "it is one object; it should be an array of objects"),
    ('{"text": {"0": "a", "1": "b"}, "label": {"0": 0, "1": 1}}', "it is one object; it should be an array"),
    ('{\n"text": "a"\n}\n', "not a readable .json file: row 1: no JSON object"), ("[1, 2]", "row 1: no JSON object"),
    ("[]", "nothing in it"), ("[" * 100_000, "not a readable .json file")])
def test_other_json_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        cells(written(tmp_path / "x.json", text))


@pytest.mark.parametrize(("name", "kind"), [
    ("x.csv", ".csv"), ("X.CSV", ".csv"), ("x.jsonl.gz", ".jsonl"), ("x.json", ".json"), ("x.txt", None),
    ("csv", None), ("x.gz", None)])
def test_a_files_kind_is_what_its_name_says(name, kind):
    assert file_type(name) == kind


@pytest.mark.parametrize(("field", "value"), [
    ("delimiter", ""), ("delimiter", ";;"), ("delimiter", '"'), ("encoding", "klingon"), ("encoding", "utf9"),
    ("encoding", "rot13"), ("encoding", "hex"), ("encoding", "a\0b"), ("similar_labels", "maybe"),
    ("skip_bad_rows", "yes")])
def test_an_impossible_way_of_reading_is_refused_by_its_name(field, value):
    with pytest.raises(ConfigError, match=field):
        Reading(**{field: value})


# --- cells ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line", ['"never closed,good', 'never closed,"good', '"never closed",good,"'])
@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_a_quotation_mark_that_swallows_the_rest_of_a_file_is_refused_whatever_may_be_skipped(
        tmp_path, line, skip_bad_rows):
    path = written(tmp_path / "x.csv", f"text,label\n5\" wide,bad\n5\" high,good\nfine,good\n{line}\nx,bad\ny,good\n")
    with pytest.raises(DataError, match=r"not a readable .csv file: a quotation mark in it is never closed"):
        cells(path, skip_bad_rows=skip_bad_rows)


@pytest.mark.kind("7: rows that a quotation mark makes one cell of")
def test_rows_that_a_quotation_mark_swallows_are_told(tmp_path):
    lines = ["text\tlabel", "plain\tgood", '"Great, said nobody\tbad', "lost\tgood", 'quoted "twice\tgood', "x\tbad"]
    path = written(tmp_path / "x.tsv", "\n".join(lines) + "\n")
    with pytest.raises(DataError, match="row 2: the text holds whole rows of the file; a quotation mark"):
        cells(path)
    assert cells(path, skip_bad_rows=True) == [("plain", "good"), ("x", "bad")]
    several = [("one line\nanother\tline, good\nand\ta\tthird", "good"), ("a, good\nfilm", "bad")]
    write_csv(tmp_path / "y.csv", several)
    assert cells(tmp_path / "y.csv") == several


def test_quotation_marks_inside_of_a_text_are_characters_like_others(tmp_path):
    path = written(tmp_path / "x.csv", 'text,label\n5" wide,bad\n"two\nlines",good\n')
    assert cells(path) == [('5" wide', "bad"), ("two\nlines", "good")]


def test_a_spreadsheet_is_named(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(DataError, match=r"x.csv is a zip archive or a spreadsheet: unpack it, or save it as"):
        read_table(tmp_path / "x.csv")


def test_blanks_around_a_columns_name_are_no_part_of_it(tmp_path):
    assert cells(written(tmp_path / "x.csv", "text , label\na,1\n")) == [("a", "1")]


def test_cells_of_a_csv_file_are_texts_as_they_stand_there(tmp_path):
    path = written(tmp_path / "x.csv", "text,label\na,01\nb,1\nc,1.50\nd,true\ne,2020-01-31\n")
    assert [label for _, label in cells(path)] == ["01", "1", "1.50", "true", "2020-01-31"]


BAD = 'text,label\nfine,good\n"",bad\nbroken,bad,1,2\nno label,\nNaN,good\nNone,NaN\nx y,good\n'


@pytest.mark.kind("7: empty cells and NaN are told with their number, or skipped with it")
def test_bad_rows_are_refused_with_the_first_and_their_number_or_left_out(tmp_path):
    path = written(tmp_path / "x.csv", BAD)
    with pytest.raises(DataError, match=r"row 2: the text is empty \(5 of 7 rows cannot be used.*--skip-bad-rows"):
        cells(path)
    assert cells(path, skip_bad_rows=True) == [("fine", "good"), ("x y", "good")]
    assert read_rows(path, ("text", "label"), Reading(skip_bad_rows=True), "").skipped == (
        f"5 of 7 rows of {path} (the first is row 2: the text is empty)")


@pytest.mark.parametrize(("line", "message"), [
    ("a,", "row 2: the label is empty"), ("a,NaN", r"row 2: the label is empty \('NaN'\)"),
    ("a,nan", r"row 2: the label is empty \('nan'\)"), ("a,  ", "row 2: the label is empty"),
    ("a,null", r"row 2: the label is empty \('null'\)"), ("null,good", r"row 2: the text is empty \('null'\)"),
    ("a,b,c", "readable .csv file: row 2: 3 columns, where the header has 2")])
def test_a_bad_row_is_named(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        cells(written(tmp_path / "x.csv", f"text,label\nfine,good\n{line}\n"))


def test_none_is_a_label_like_others(tmp_path):
    assert cells(written(tmp_path / "x.csv", "text,label\na,None\nb,NA\n")) == [("a", "None"), ("b", "NA")]


def test_missing_values_of_json_and_parquet_are_bad_rows_too(tmp_path):
    lines = ['{"text": "a", "label": NaN}', '{"text": "b"}', "not JSON", '{"text": "\\ud800", "label": 1}',
             '{"text": "c", "label": 1}']
    assert cells(written(tmp_path / "x.jsonl", "\n".join(lines)), skip_bad_rows=True) == [("c", 1)]
    path = tmp_path / "x.parquet"
    write_parquet(path, text=["a", None, "c"], label=[float("nan"), 1.0, 2.0])
    assert cells(path, skip_bad_rows=True) == [("c", 2.0)]


def test_a_text_that_is_too_long_can_be_skipped(tmp_path):
    path = tmp_path / "x.csv"
    write_csv(path, [("x" * 200_000, "good"), ("fine", "bad")])
    assert cells(path, skip_bad_rows=True) == [("fine", "bad")]


def test_a_column_of_numbers_is_no_column_of_texts(tmp_path):
    path = written(tmp_path / "x.csv", "id,text,label\n1,good film,pos\n2,bad film,neg\n")
    with pytest.raises(DataError, match=r"the column 'id' holds nothing but numbers.*one of id, text, label"):
        cells(path, text_column="id")


def test_a_row_may_be_longer_than_a_block(tmp_path):
    path = tmp_path / "x.csv"
    write_csv(path, [(f"{'long ' * 15_000}{i}", "good") for i in range(60)])
    assert len(read_table(path).column("text")) == 60


def test_a_file_of_several_blocks_is_read_with_its_rows_numbered(tmp_path, monkeypatch):
    """pyarrow parses at most 2 GiB at once."""
    lines = [f'"film {i},\n{"x" * (i % 50)}",good' for i in range(200)]
    lines[150] = "broken,good,1"
    path = written(tmp_path / "x.csv", "text,label\n" + "\n".join(lines) + "\n")
    whole = cells(path, skip_bad_rows=True)
    monkeypatch.setattr(tables, "BLOCK", 500)
    assert cells(path, skip_bad_rows=True) == whole and len(whole) == 199
    with pytest.raises(DataError, match="row 151: 3 columns, where the header has 2"):
        cells(path)


def test_a_text_of_a_parquet_file_that_is_not_utf_8_is_refused_by_its_column(tmp_path):
    text = pa.array([b"fine", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    write_parquet(tmp_path / "x.parquet", text=text, label=["1", "0"])
    with pytest.raises(DataError, match=r"x\.parquet, column 'text' cannot be read: 'utf-8' codec"):
        cells(tmp_path / "x.parquet")
    assert read_table(tmp_path / "x.parquet").column("label") == ["1", "0"]


@pytest.mark.parametrize("name", ["x.parquet", "x.csv"])
def test_an_error_that_says_nothing_is_called_by_its_name(tmp_path, monkeypatch, name):
    def fail(*arguments, **more):
        raise OSError

    (tmp_path / name).write_text("text,label\na,1\n")
    monkeypatch.setattr(pyarrow.parquet, "read_table", fail)
    monkeypatch.setattr(pyarrow.csv, "read_csv", fail)
    with pytest.raises(DataError, match=rf"{name} is empty or not a readable \.\w+ file: OSError"):
        read_table(tmp_path / name)


# --- write ------------------------------------------------------------------------------------------------------------

COLUMNS = {"text": ["one, \"two\"", "line\nbreak\tand \u00e9"], "tags": [["O", "B-x"], ["O"]], "share": [0.25, 1.0],
           "id": ["007", None]}


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.parquet", "t.jsonl.gz"])
def test_a_table_is_read_as_it_was_written(tmp_path, name):
    write_table(tmp_path / name, COLUMNS)
    found = read_table(tmp_path / name)
    assert {column: found.column(column) for column in found.names} == COLUMNS
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
def test_a_table_of_texts_has_lists_as_texts_with_blanks_between(tmp_path, name):
    write_table(tmp_path / name, COLUMNS)
    found = read_table(tmp_path / name)
    assert {column: found.column(column) for column in found.names} == COLUMNS | {
        "tags": ["O B-x", "O"], "share": ["0.25", "1.0"], "id": ["007", ""]}


def test_a_table_of_no_kind_or_of_columns_that_a_kind_cannot_hold_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"t\.xlsx should end in one of \.csv"):
        write_table(tmp_path / "t.xlsx", COLUMNS)
    with pytest.raises(DataError, match=r"t\.parquet cannot hold these columns: .*; write a \.jsonl file"):
        write_table(tmp_path / "t.parquet", {"mixed": [1, "one"]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_a_cell_with_any_end_of_a_line_in_it_stays_one_cell(tmp_path, name):
    columns = {"text": ["one\rcell", "two\r\nlines", "\r", "last\n"], "id": ["a", "b\r", "\rc", "d"]}
    write_table(tmp_path / name, columns)
    found = read_table(tmp_path / name)
    assert {column: found.column(column) for column in found.names} == columns
    assert (tmp_path / name).read_bytes().endswith(b"d\n"), "and rows end as before"


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_half_a_character_is_written_as_json_does(tmp_path, name):
    columns = {"text": ["\u00e9"], "other": ["a \ud800 b"]}
    write_table(tmp_path / name, columns)
    assert "\\ud800" in (tmp_path / name).read_text(encoding="utf-8") and "\u00e9" in (tmp_path / name).read_text()
    found = read_table(tmp_path / name)
    assert {column: found.column(column) for column in found.names} == columns


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
def test_what_is_no_number_is_null_in_json(tmp_path, name):
    write_table(tmp_path / name, {"text": ["a"], "more": [{"x": float("nan"), "y": [float("inf")]}]})
    assert "NaN" not in (tmp_path / name).read_text() and "Infinity" not in (tmp_path / name).read_text()
    assert "null" in (tmp_path / name).read_text()


@pytest.mark.parametrize(("name", "cell"), [
    ("t.parquet", 10**30), ("t.parquet", "\ud800"), ("t.csv", "\ud800"), ("t.tsv.gz", "\ud800")], ids=repr)
def test_a_cell_that_a_kind_of_file_cannot_hold_is_one_line(tmp_path, name, cell):
    with pytest.raises(DataError, match=rf"{name} cannot hold these columns: .*; write a \.jsonl file") as caught:
        write_table(tmp_path / name, {"text": ["a"], "other": [cell]})
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
