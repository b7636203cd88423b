"""scripts/bundle.py: from a cell's results file to the adapter that a clone brings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import read_json, write_tiny_model

from minipeft import GPT2ForSequenceClassification, LoraConfig, inject, load_adapter, save_adapter
from minipeft.files import write_json_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results_file(tmp_path):
    """Of a cell, whose adapter is there."""
    base = write_tiny_model(tmp_path / "base")
    torch.manual_seed(0)
    model = inject(GPT2ForSequenceClassification.from_pretrained(base), LoraConfig(init_lora_weights=False))
    save_adapter(model, tmp_path / "cell", {"dataset": "imdb"})
    write_json_file(tmp_path / "best.json", {"adapter_folder": "cell"})
    return Path("best.json")


def bundle(folder, *words):
    return subprocess.run([sys.executable, str(ROOT / "scripts" / "bundle.py"), *map(str, words)], cwd=folder,
                          capture_output=True, text=True, timeout=100)


def test_the_adapter_is_copied_and_its_account_says_where_it_is_from(results_file, tmp_path):
    done = bundle(tmp_path, results_file)
    assert done.stdout == "wrote checkpoints/lora_finetuned\n", done.stderr
    ours = tmp_path / "checkpoints" / "lora_finetuned"
    assert {file.name for file in ours.iterdir()} == {"adapter_config.json", "adapter_model.safetensors",
                                                      "minipeft.json"}
    account = read_json(ours / "minipeft.json")
    assert account["bundled"] is True and account["results"] == "best.json" and account["dataset"] == "imdb"
    for folder in (ours, tmp_path / "cell"):
        load_adapter(GPT2ForSequenceClassification.from_pretrained(tmp_path / "base"), folder)
    assert bundle(tmp_path, results_file).returncode == 0, "a bundled one may be replaced"


def test_a_users_own_model_is_not_replaced(results_file, tmp_path):
    (tmp_path / "checkpoints" / "lora_finetuned").mkdir(parents=True)
    done = bundle(tmp_path, results_file)
    assert done.returncode == 2
    assert done.stderr == "error: checkpoints/lora_finetuned holds something that was not bundled: move it away\n"


def test_an_adapter_that_is_gone_is_named(results_file, tmp_path):
    (tmp_path / "cell").rename(tmp_path / "elsewhere")
    done = bundle(tmp_path, results_file)
    assert done.returncode == 2 and "names cell, where there is no adapter" in done.stderr
    assert not (tmp_path / "checkpoints").exists()
