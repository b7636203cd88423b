"""places.py: how a run's results file and folder are called, and which folder is taken where none is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import read_json, write_csv

from minipeft import GPT2ForSequenceClassification, LoraConfig, inject, save_adapter
from minipeft.errors import AdapterError, OutputError
from minipeft.files import write_json_file
from minipeft.runs.finetune import finetune
from minipeft.runs.inference import chosen_adapter
from minipeft.runs.places import default_folder, is_bundled, newest_trained, results_path


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


def bundled(folder):
    """The folder, as one that came with the library."""
    account = folder / "minipeft.json"
    write_json_file(account, read_json(account) | {"bundled": True})
    return folder


def test_what_came_with_the_library_is_taken_until_something_is_trained_however_new_it_is(options, tmp_path,
                                                                                         monkeypatch):
    monkeypatch.chdir(tmp_path)
    finetune(options(output="checkpoints/lora_finetuned", training_values={"epochs": 1}))
    ours = bundled(Path("checkpoints/lora_finetuned"))
    said = []
    assert chosen_adapter(None, said.append) == ours
    assert said == ["adapter    checkpoints/lora_finetuned (bundled; nothing has been trained here yet)"]
    finetune(options("ia3", output=None, training_values={"epochs": 1}))
    os.utime(ours / "minipeft.json")  # a checkout writes it anew
    assert chosen_adapter(None, said.append) == default_folder("ia3", "films")
    assert said[-1] == "adapter    checkpoints/ia3_films_finetuned (the newest in checkpoints)"


def test_a_training_takes_the_place_of_what_came_with_the_library_and_says_so(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finetune(options(output="ours", training_values={"epochs": 1}))
    said = []
    finetune(options(output=str(bundled(Path("ours"))), training_values={"epochs": 2}, overwrite=False,
                     results_dir="others"), said.append)
    assert "output     ours (in place of the bundled adapter; git restore ours undoes that)" in said
    assert not is_bundled(Path("ours")) and read_json(Path("ours/minipeft.json"))["request"]["training_config"][
        "epochs"] == 2
    with pytest.raises(OutputError, match=r"^ours holds another run"):
        finetune(options(output="ours", training_values={"epochs": 1}, overwrite=False, results_dir="third"))
