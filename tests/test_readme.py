"""README says what is true: its example runs, its table is the results', its files exist."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from helpers import ScriptRunner, write_tiny_model

from minipeft.explain.memory import traffic_table
from minipeft.model.config import GPT2Config
from minipeft.model.hub import MINI_FOLDER
from minipeft.runs.results import replace_tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_as_printed_and_has_ten_lines_at_most(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    exec(compile(example, "README.md", "exec"), {})
    assert "trainable params: " in capsys.readouterr().out


def test_the_example_of_a_new_task_trains_and_answers_as_printed(tmp_path, monkeypatch, capsys):
    content = re.search(r"```python\n(# truecase\.py\n.*?)```", README, re.DOTALL).group(1)
    assert len(content.splitlines()) < 100
    (tmp_path / "truecase.py").write_text(content)
    commands = re.findall(r"^python scripts/(\S+) (--task truecase\.py.*)$", README, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minipeft").symlink_to(ROOT / "minipeft")
    script = ScriptRunner(monkeypatch, capsys)
    quick = {"train.py": ("--epochs", 1, "--model", write_tiny_model(tmp_path / "tiny")), "predict.py": ()}
    for name, options in commands:
        outcome = script(name, *shlex.split(options), *quick[name])
        assert outcome.code == 0, outcome.err
    assert outcome.out.lower() == "the film was shot in paris. i loved it.\n"


@pytest.mark.parametrize("file", ["README.md", "results/README.md"])
def test_tables_are_what_the_results_files_say(file):
    changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", "results/*.json"], cwd=ROOT,
                             capture_output=True, text=True).stdout
    if changed:  # by whoever trains here; a clean clone, such as CI's, has the committed ones
        pytest.skip("results were measured anew here; scripts/report.py writes them into README.md")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert replace_tables(text, ROOT / "results") == text


def test_the_signatures_of_bleu_and_chrf_are_those_of_every_result():
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "results").glob("fine_tuned_*_multi30k_results.json"):
        found = json.loads(path.read_text(encoding="utf-8"))["metrics"]["test"]
        assert f"`{found['bleu_signature']}`" in text and f"`{found['chrf_signature']}`" in text


def test_the_gain_from_cached_features_is_what_was_measured():
    once, each_epoch = (json.loads((ROOT / f"results/head_features/{run}/fine_tuned_head_results.json").read_text())
                        ["seconds"]["train_on_cores"] for run in ("once", "each_epoch"))
    for figure in (once, each_epoch, each_epoch / once):
        assert f"{figure:.1f}" in README


def test_the_traffic_is_what_the_ledger_says():
    lines = traffic_table(GPT2Config.official("gpt2")).splitlines()
    for line in lines[:2] + [line for line in lines if line.startswith(("| full |", "| lora |", "| ia3 |"))]:
        assert line in README.splitlines()


def test_the_memory_is_what_the_ledger_says(monkeypatch, capsys):
    (block,) = re.findall(r"^\$ python scripts/(anatomy.py) (--memory .*)\n((?:.+\n)+?)\.\.\.$", README, re.MULTILINE)
    outcome = ScriptRunner(monkeypatch, capsys)(block[0], *shlex.split(block[1]))
    assert outcome.code == 0 and outcome.out.startswith(block[2])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_a_linked_file_exists(path):
    assert (ROOT / path).exists()


def test_the_bundled_model_is_small_and_complete():
    names = {path.name for path in MINI_FOLDER.iterdir()}
    assert names == {"config.json", "model.safetensors", "vocab.tiktoken", "README.md"}
    assert sum(path.stat().st_size for path in MINI_FOLDER.iterdir()) <= 24_000_000
