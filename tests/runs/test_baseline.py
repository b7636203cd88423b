"""baseline.py: what is tested without training, and that a zero-shot test needs labels that are sentiments."""

from __future__ import annotations

import pytest
from helpers import files_below, read_json, rows, write_csv

from minipeft.errors import OutputError
from minipeft.runs.baseline import baseline


def test_the_baselines_results_file_has_both_baselines_and_no_training(options, tmp_path):
    returned = baseline(options("baseline"))
    results = read_json(tmp_path / "results" / "baseline_films_results.json")
    assert results["method"] == returned["method"] == "baseline"
    assert results["metrics"].keys() == {"most_frequent_label", "untrained_head", "zero_shot"}
    for found in results["metrics"].values():
        assert {"accuracy", "accuracy_95_interval", "f1", "confusion_matrix"} <= found.keys()
        assert found["examples"] == 4
    assert results["parameters"]["trainable"] == 0 < results["parameters"]["total"]
    assert results["zero_shot"]["prompt"] and results["zero_shot"]["words"]["positive"]
    assert {"base_model", "dataset", "choices", "precision", "machine", "versions", "seed", "seconds",
            "peak_memory_bytes", "samples_per_second"} <= results.keys()
    assert files_below(tmp_path / "output") == []


def test_the_zero_shot_baseline_needs_labels_that_are_sentiments(options, tmp_path):
    write_csv(tmp_path / "films.csv", rows(labels=(0, 1)))
    assert baseline(options("baseline"))["metrics"].keys() == {"most_frequent_label", "untrained_head"}


def test_a_results_folder_that_cannot_be_written_is_known_before_a_baseline_is_tested(options, tmp_path, no_work):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="cannot write to"):
        baseline(options("baseline", results_dir=str(tmp_path / "file" / "below")))


def test_a_baseline_has_no_method_whatever_the_options_say(options):
    results = baseline(options("none", method_values={"rank": 8}))
    assert results["method"] == "baseline" and "method_config" not in results
    assert "epochs" not in results["choices"]
