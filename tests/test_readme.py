"""README says what is true: its example runs, its table is the results', its files exist."""

import json
import re
from pathlib import Path

import pytest

from minipeft.config import GPT2Config
from minipeft.ledger import traffic_table
from minipeft.report import TABLE_END, TABLE_START, results_table
from minipeft.weights import MINI_FOLDER

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_as_printed_and_has_ten_lines_at_most(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    exec(compile(example, "README.md", "exec"), {})
    assert "trainable params: " in capsys.readouterr().out


def test_the_table_is_what_the_results_files_say():
    table = README.partition(TABLE_START)[2].partition(TABLE_END)[0].strip()
    assert table == results_table(ROOT / "results")


def test_the_gain_from_cached_features_is_what_was_measured():
    once, each_epoch = (json.loads((ROOT / f"results/head_features/{run}/fine_tuned_head_results.json").read_text())
                        ["seconds"]["train_on_cores"] for run in ("once", "each_epoch"))
    for figure in (once, each_epoch, each_epoch / once):
        assert f"{figure:.1f}" in README


def test_the_traffic_is_what_the_ledger_says():
    lines = traffic_table(GPT2Config.official("gpt2")).splitlines()
    for line in lines[:2] + [line for line in lines if line.startswith(("| full |", "| lora |", "| ia3 |"))]:
        assert line in README.splitlines()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_a_linked_file_exists(path):
    assert (ROOT / path).exists()


def test_the_bundled_model_is_small_and_complete():
    names = {path.name for path in MINI_FOLDER.iterdir()}
    assert names == {"config.json", "model.safetensors", "vocab.tiktoken", "README.md"}
    assert sum(path.stat().st_size for path in MINI_FOLDER.iterdir()) <= 24_000_000
