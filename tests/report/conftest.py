"""A comparison of eleven methods on two datasets, made from cells' files that are written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cell_files import TERMS, baseline_content, costs_content, final_content, trial_content

from minipeft.files import read_json_file, write_json_file
from minipeft.methods import METHODS
from minipeft.runs.budget import SIZES, Cell
from minipeft.runs.comparison import write_comparison

SHARES = {"full": 0.95, "lora": 0.94, "dora": 0.935, "vera": 0.9, "adapter": 0.93, "ia3": 0.9, "bitfit": 0.89,
          "head": 0.7, "prompt": 0.72, "ptuning": 0.75, "prefix": 0.8}
SIZES_TRIED = (16, 64)


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A results folder with comparison.json and comparison_tuning.json."""
    folder = tmp_path_factory.mktemp("results")

    def write(cell, content):
        write_json_file(folder / "cells" / cell.dataset / f"{cell.name}.json", content)

    for dataset in ("films", "imdb"):
        terms = {**TERMS, "dataset": {**TERMS["dataset"], "name": dataset}}
        cell = Cell(dataset, "baseline", 0, "final")
        write(cell, baseline_content(cell, terms))
        for number, (method, share) in enumerate(SHARES.items()):
            for seed in range(3):
                cell = Cell(dataset, method, seed, "final", (("learning_rate", 1e-3),))
                content = final_content(cell, terms, share - 0.005 * seed, forgotten=0.5 / (1 + number))
                content["parameters"] = {"trainable": 7_000_000 // (1 + number) ** 3, "total": 7_000_000}
                write(cell, content)
                cell = replace(cell, kind="costs")
                write(cell, costs_content(cell, terms, 30.0 - number, (20 - number) * 2**20,
                                          "no" if method in ("adapter", "prefix") else "yes"))
    for method, score in (("lora", 0.8), ("ia3", 0.7), ("adapter", 0.75)):
        for step, rate in enumerate((3.16e-4, 1e-3, 3.16e-3)):
            cell = Cell("imdb", method, 0, "tuning", (("learning_rate", rate),))
            write(cell, trial_content(cell, terms, score - 0.1 * abs(step - 1)))
    for method, score in (("lora", 0.79), ("adapter", 0.7)):
        cell = Cell("imdb", method, 0, "tuning", (("learning_rate", 1e-3), *SIZES[method][0].items()))
        write(cell, trial_content(cell, terms, score))
    cell = Cell("imdb", "lora", 0, "best", (("epochs", 9),))
    write(cell, final_content(cell, terms, 0.98))
    for method, share in (("lora", 0.6), ("head", 0.65)):
        for size in SIZES_TRIED:
            cell = Cell("imdb", method, 0, "size", (), size)
            write(cell, final_content(cell, terms, share + size / 1000))
    assert SHARES.keys() == METHODS.keys()
    write_comparison(folder)
    return folder


@pytest.fixture(scope="session")
def comparison(results):
    return read_json_file(results / "comparison.json")


@pytest.fixture(scope="session")
def tuning(results):
    return read_json_file(results / "comparison_tuning.json")
