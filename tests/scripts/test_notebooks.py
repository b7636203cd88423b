"""The notebooks run from top to bottom, are stored with what they print and draw, and say nothing that can change."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cell_files import TERMS, costs_content, final_content
from documents import NOTEBOOKS, ROOT, dead_links, markdown_cells

from minipeft import GPT2ForSequenceClassification, load_adapter
from minipeft.files import write_json_file
from minipeft.report.tables import costs as costs_table
from minipeft.runs.budget import Cell
from minipeft.runs.comparison import write_comparison

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def text_of(cell):
    return "".join(cell["source"])


def kinds_of(outputs):
    """What a cell showed: streams, which may come in several parts, and the richest form of each thing displayed."""
    kinds = [output.get("name") or sorted(output.get("data", {"error": 0}))[0] for output in outputs]
    return [kind for kind, _ in itertools.groupby(kinds)]


def test_these_are_the_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["baseline_results", "comparing_results", "finetuning_lora"]


@each_notebook
def test_a_notebook_is_stored_with_its_outputs_which_are_small_and_of_no_one_machine(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run anew, from top to bottom"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 250_000
    assert not re.search(r"/(root|home|tmp|work)/", path.read_text(encoding="utf-8"))


@each_notebook
def test_texts_and_cells_are_short_and_links_lead_somewhere(path):
    for cell in cells(path, "code"):
        assert text_of(cell).count("\n") < 40
    for text in markdown_cells(path):
        assert len(text) < 1200
        assert not dead_links(text, path)


def test_the_comparison_s_text_names_no_result():
    (path,) = [path for path in NOTEBOOKS if path.stem == "comparing_results"]
    numbers = {number for cell in cells(path, "markdown") for number in re.findall(r"\d[\d.,]*\d|\d", text_of(cell))}
    assert numbers <= {"95", "100", "4"}  # of intervals, of all parameters, of bytes


def test_the_comparison_takes_a_comparison_s_file_where_there_is_one(tmp_path):
    for method, share in (("lora", 0.94), ("full", 0.93), ("head", 0.7)):
        for seed in range(3):
            cell = Cell("films", method, seed, "final", (("learning_rate", 1e-3),))
            files = {cell: final_content(cell, TERMS, share),
                     replace(cell, kind="costs"): costs_content(replace(cell, kind="costs"), TERMS, 30.0)}
            for each, content in files.items():
                write_json_file(tmp_path / "cells" / "films" / f"{each.name}.json", content)
    write_comparison(tmp_path)
    (path,) = [path for path in NOTEBOOKS if path.stem == "comparing_results"]
    here, names = 'Path(minipeft.__file__).parents[1] / "results"', {}
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    code = "\n".join(text_of(cell) for cell in cells(path, "code"))
    assert here in code
    exec(code.replace(here, f"Path({str(tmp_path)!r})"), names)
    assert names["order"] == ["head", "full", "lora"] and names["beside"] == ["full"] and names["below"] == ["head"]
    assert "| full | 31.0 ± 1.0 |" in costs_table(names["name"], names["compared"]) and names["supported"]


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_from_top_to_bottom_and_shows_what_is_stored(path, tmp_path):
    run = runpy.run_path(str(ROOT / "scripts/notebooks.py"))["run"]
    again = [cell for cell in run(path, tmp_path).cells if cell.cell_type == "code"]
    for cell, stored in zip(again, cells(path, "code")):
        assert kinds_of(cell.outputs) == kinds_of(stored["outputs"]), cell.source
    if path.stem == "finetuning_lora":
        model = load_adapter(GPT2ForSequenceClassification.from_pretrained("mini"),
                             tmp_path / "checkpoints/notebook_lora")
        assert model(torch.tensor([[1, 2, 3]])).shape == (1, 2)
    assert "validation accuracy" in path.read_text(encoding="utf-8") or path.stem != "finetuning_lora"


def test_the_script_leaves_a_notebook_that_fails_as_it_was(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    path = tmp_path / "bad.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    monkeypatch.setattr(sys, "argv", ["notebooks.py", str(path)])
    with pytest.raises(Exception, match="ZeroDivisionError"):
        runpy.run_path(str(ROOT / "scripts/notebooks.py"), run_name="__main__")
    assert path.read_bytes() == before and [file.name for file in Path(tmp_path).iterdir()] == ["bad.ipynb"]
