"""Results files become tables."""

import json

import pytest

from minipeft.errors import OutputError
from minipeft.report import TABLE_END, TABLE_START, replace_table, results_table


def write(folder, name, method, dataset, metrics, trainable, seconds):
    (folder / f"{name}_results.json").write_text(json.dumps({
        "method": method, "base_model": {"name": "mini"}, "dataset": {"name": dataset, "sizes": {"train": 22500}},
        "metrics": metrics, "parameters": {"trainable": trainable, "total": 2000}, "seconds": seconds,
        "training_config": {"epochs": 3}}))


def found(accuracy):
    return {"accuracy": accuracy, "accuracy_95_interval": [accuracy - 0.01, accuracy + 0.01], "f1": accuracy}


def test_a_table_has_baselines_first_and_then_methods_by_accuracy(tmp_path):
    write(tmp_path, "fine_tuned_lora", "lora", "imdb", {"test": found(0.9)}, 500, {"train": 90, "train_on_cores": 150})
    write(tmp_path, "fine_tuned_full", "full", "imdb", {"test": found(0.8)}, 2000, {"train": 600})
    write(tmp_path, "baseline", "baseline", "imdb",
          {"untrained_head": found(0.5), "zero_shot": found(0.6)}, 0, {"zero_shot": 3})
    write(tmp_path, "fine_tuned_lora_sample", "lora", "sample", {"test": found(0.99)}, 500, {"train": 9})
    assert results_table(tmp_path).splitlines()[2:] == [
        "| baseline: untrained head | mini | 0 | 0 | - | 50.00 % | 49.00 to 51.00 % | 50.00 % | - |",
        "| baseline: zero-shot by prompt | mini | 0 | 0 | - | 60.00 % | 59.00 to 61.00 % | 60.00 % | - |",
        "| full | mini | 2,000 (100.00 %) | 22,500 | 3 | 80.00 % | 79.00 to 81.00 % | 80.00 % | 10.0 min |",
        "| lora | mini | 500 (25.00 %) | 22,500 | 3 | 90.00 % | 89.00 to 91.00 % | 90.00 % | 2.5 core minutes |"]


def test_a_table_replaces_what_is_between_the_markers_and_nothing_else():
    text = f"before\n{TABLE_START}\nold\n{TABLE_END}\nafter\n"
    assert replace_table(text, "new") == f"before\n{TABLE_START}\nnew\n{TABLE_END}\nafter\n"
    with pytest.raises(OutputError, match="there is no"):
        replace_table("no markers", "new")
