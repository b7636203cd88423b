"""places.py: how a run's results file and folder are called, and which folder is taken where none is named."""

from __future__ import annotations

import os

import pytest
from helpers import write_csv

from minipeft import GPT2ForSequenceClassification, LoraConfig, inject, save_adapter
from minipeft.errors import AdapterError
from minipeft.runs.finetune import finetune
from minipeft.runs.places import default_folder, newest_trained, results_path


@pytest.mark.kind("7: default folder names carry the dataset")
@pytest.mark.parametrize(("dataset", "file", "folder"), [
    ("imdb", "fine_tuned_lora_results.json", "lora_finetuned"),
    ("sample", "fine_tuned_lora_sample_results.json", "lora_sample_finetuned"),
    ("films", "fine_tuned_lora_films_results.json", "lora_films_finetuned")])
def test_a_results_file_and_a_folder_are_named_after_their_dataset_unless_that_is_imdb(tmp_path, dataset, file, folder):
    assert results_path(tmp_path, "lora", dataset) == tmp_path / file
    assert default_folder("lora", dataset).parts == ("checkpoints", folder)
    assert results_path(tmp_path, "baseline", dataset).name == file.replace("fine_tuned_lora", "baseline")


@pytest.mark.parametrize("name", ["imdb", "sample"])
def test_results_on_a_file_of_ones_own_never_take_the_place_of_those_on_a_known_dataset(options, tmp_path, name):
    write_csv(tmp_path / f"{name}.csv")
    finetune(options(dataset=str(tmp_path / f"{name}.csv")))
    assert not results_path(tmp_path / "results", "lora", name).exists()


def test_the_newest_folder_is_the_one_that_a_training_wrote_last(options, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match="checkpoints holds no trained model: train first, or name a folder"):
        newest_trained()
    for number, method in enumerate(("ia3", "lora")):
        finetune(options(method, output=None, training_values={"epochs": 1}))
        os.utime(default_folder(method, "films") / "minipeft.json", (number, number))
    model = GPT2ForSequenceClassification.from_pretrained(tiny_model)
    save_adapter(inject(model, LoraConfig()), "checkpoints/by_hand")  # newer, and of no training
    assert newest_trained() == default_folder("lora", "films")
