"""record.py: how a run's results file is called."""

from __future__ import annotations

import pytest
from helpers import write_csv

from minipeft.runs.finetune import finetune
from minipeft.runs.record import results_path


@pytest.mark.parametrize(("dataset", "file"), [
    ("imdb", "fine_tuned_lora_results.json"), ("sample", "fine_tuned_lora_sample_results.json"),
    ("films", "fine_tuned_lora_films_results.json")])
def test_a_results_file_is_named_after_its_dataset_unless_that_is_imdb(tmp_path, dataset, file):
    assert results_path(tmp_path, "fine_tuned_lora", dataset) == tmp_path / file


@pytest.mark.parametrize("name", ["imdb", "sample"])
def test_results_on_a_file_of_ones_own_never_take_the_place_of_those_on_a_known_dataset(options, tmp_path, name):
    write_csv(tmp_path / f"{name}.csv")
    finetune(options(dataset=str(tmp_path / f"{name}.csv")))
    assert not results_path(tmp_path / "results", "fine_tuned_lora", name).exists()
