"""Results files become tables."""

import json

import pytest

from minipeft.errors import OutputError
from minipeft.report.tables import replace_tables
from minipeft.runs.results import (
    BLOCK_END,
    BLOCK_START,
    datasets_in,
    overview_table,
    replace_blocks,
    results_table,
    rewrite,
)


def write(folder, name, method, dataset, metrics, trainable, seconds, task="classification"):
    (folder / f"{name}_results.json").write_text(json.dumps({
        "method": method, "task": task, "base_model": {"name": "mini"},
        "dataset": {"name": dataset, "sizes": {"train": 22500, "test": 25000}},
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


@pytest.mark.kind("7: a table of results on own data has macro F1, not the F1 of one label")
def test_a_table_on_a_users_own_data_has_macro_f1_beside_accuracy(tmp_path):
    metrics = {"test": {**found(0.9), "macro_f1": 0.5}}
    write(tmp_path, "fine_tuned_lora_fraud", "lora", "fraud", metrics, 500, {"train": 90})
    header, _, row = results_table(tmp_path, "fraud").splitlines()
    assert "| test accuracy | 95 % interval | macro F1 |" in header
    assert "| 90.00 % | 89.00 to 91.00 % | 50.00 % |" in row


def test_an_overview_has_a_column_for_each_dataset_and_its_first_figure(tmp_path):
    write(tmp_path, "fine_tuned_lora", "lora", "imdb", {"test": found(0.9)}, 500, {"train": 90})
    write(tmp_path, "fine_tuned_full", "full", "imdb", {"test": found(0.8)}, 2000, {"train": 90})
    write(tmp_path, "baseline", "baseline", "imdb", {"untrained_head": found(0.5)}, 0, {})
    bleu = {"bleu": 12.5, "bleu_95_interval": [11, 13], "chrf": 30.0}
    write(tmp_path, "fine_tuned_lora_multi30k", "lora", "multi30k", {"test": bleu}, 500, {"train": 90}, "translation")
    write(tmp_path, "baseline_multi30k", "baseline", "multi30k", {"copy_source": bleu}, 0, {}, "translation")
    write(tmp_path, "fine_tuned_lora_sample", "lora", "sample", {"test": found(0.99)}, 500, {"train": 9})
    assert overview_table(tmp_path, ["imdb", "multi30k"]).splitlines() == [
        "| method | imdb: test accuracy | multi30k: BLEU |", "| --- | ---: | ---: |",
        "| baseline: copy of the source | - | 12.50 |", "| baseline: untrained head | 50.00 % | - |",
        "| full | 80.00 % | - |", "| lora | 90.00 % | 12.50 |"]
    with pytest.raises(OutputError, match="holds no results on sst2"):
        overview_table(tmp_path, ["imdb", "sst2"])


@pytest.mark.parametrize(("task", "figures", "cells"), [
    ("tagging", {"f1": 0.5, "f1_95_interval": [0.4, 0.6], "precision": 0.25, "recall": 1.0},
     "50.00 % | 40.00 to 60.00 % | 25.00 % | 100.00 %"),
    ("summarization", {"rougeL": 20.0, "rougeL_95_interval": [19, 21], "rouge1": 30, "rouge2": 10},
     "20.00 | 19.00 to 21.00 | 30.00 | 10.00"),
    ("summarisation", {"rougeL": 20.0, "rougeL_95_interval": [19, 21], "rouge1": 30, "rouge2": 10},
     "20.00 | 19.00 to 21.00 | 30.00 | 10.00"),  # as files of earlier versions spell it
    ("translation", {"bleu": 5, "bleu_95_interval": [4, 6], "chrf": 30}, "5.00 | 4.00 to 6.00 | 30.00")])
def test_each_task_has_its_own_figures(tmp_path, task, figures, cells):
    write(tmp_path, "fine_tuned_lora_x", "lora", "x", {"test": figures}, 500, {"train": 60}, task)
    assert results_table(tmp_path, "x").splitlines()[2] == (
        f"| lora | mini | 500 (25.00 %) | 22,500 | 3 | {cells} | 1.0 min |")


def test_a_baseline_that_counts_words_shows_how_many_examples_it_counted(tmp_path):
    figures = {"bleu": 5, "bleu_95_interval": [4, 6], "chrf": 30}
    write(tmp_path, "baseline_x", "baseline", "x", {"copy_source": figures, "word_dictionary": {**figures, "bleu": 6}},
          0, {}, "translation")
    assert [line.split(" | ")[3] for line in results_table(tmp_path, "x").splitlines()[2:]] == ["0", "22,500"]


def test_without_results_there_is_no_table(tmp_path):
    with pytest.raises(OutputError, match="holds no results on imdb"):
        results_table(tmp_path)


@pytest.mark.parametrize("foreign", [{}, {"dataset": "imdb"}, {"dataset": {"name": "imdb"}, "accuracy": 1}])
def test_a_file_of_others_that_is_called_like_results_is_left_out(tmp_path, foreign):
    (tmp_path / "other_results.json").write_text(json.dumps(foreign))
    with pytest.raises(OutputError, match="holds no results on imdb"):
        results_table(tmp_path)
    with pytest.raises(OutputError, match="holds no results: train first"):
        datasets_in(tmp_path)
    write(tmp_path, "fine_tuned_lora", "lora", "imdb", {"test": found(0.9)}, 500, {"train": 90})
    assert len(results_table(tmp_path).splitlines()) == 3 and datasets_in(tmp_path) == ["imdb"]


@pytest.mark.kind("7: compare matches results by content")
def test_results_on_different_contents_of_one_name_are_in_no_table(tmp_path):
    for method, content in (("lora", "a"), ("ia3", "a"), ("full", "b")):
        write(tmp_path, f"fine_tuned_{method}_x", method, "x", {"test": found(0.9)}, 500, {"train": 90})
        path = tmp_path / f"fine_tuned_{method}_x_results.json"
        path.write_text(json.dumps({**json.loads(path.read_text()),
                                    "request": {"dataset": {"fingerprints": {"train": content}}}}))
        if content == "a":
            assert results_table(tmp_path, "x").splitlines()[2:]
    with pytest.raises(OutputError, match="holds results on different contents called x, which no table can compare"):
        results_table(tmp_path, "x")


def test_tables_replace_what_is_between_their_markers_and_nothing_else(tmp_path):
    write(tmp_path, "fine_tuned_lora", "lora", "imdb", {"test": found(0.9)}, 500, {"train": 90})
    write(tmp_path, "fine_tuned_lora_x", "lora", "x", {"test": found(0.8)}, 500, {"train": 90})
    one, both = (BLOCK_START.format(on, "scripts/report.py") for on in ("imdb", "x, imdb"))
    text = f"before\n{one}\nold\n{BLOCK_END}\nbetween\n{both}\n{BLOCK_END}\nafter\n"
    assert replace_tables(text, tmp_path) == (
        f"before\n{one}\n{results_table(tmp_path)}\n{BLOCK_END}\nbetween\n{both}\n"
        f"{overview_table(tmp_path, ['x', 'imdb'])}\n{BLOCK_END}\nafter\n")
    with pytest.raises(OutputError, match="there is no"):
        replace_tables("no markers", tmp_path)
    with pytest.raises(OutputError, match="is not followed by"):
        replace_tables(f"{one}\n", tmp_path)


def test_a_script_replaces_its_own_blocks_and_leaves_those_of_others():
    own, other = BLOCK_START.format("speed", "mine.py"), BLOCK_START.format("imdb", "scripts/report.py")
    text = f"{other}\nkept\n{BLOCK_END}\n{own}\nold\n{BLOCK_END}\n"
    assert replace_blocks(text, "mine.py", str.upper) == text.replace("old", "SPEED")
    for not_its_own in (other, own.replace(" -->", ""), "<!-- results on speed -->"):
        with pytest.raises(OutputError, match=r"there is no|is not followed by"):
            replace_blocks(f"{not_its_own}\n{BLOCK_END}\n", "mine.py", str.upper)


def test_a_file_is_rewritten_where_it_is_and_only_if_it_is_there(tmp_path):
    (tmp_path / "page.md").write_text("größer")
    rewrite(tmp_path / "page.md", str.upper)
    assert (tmp_path / "page.md").read_text() == "GRÖSSER"
    with pytest.raises(OutputError, match="there is no file"):
        rewrite(tmp_path / "other.md", str.upper)
