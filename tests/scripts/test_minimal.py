"""scripts/minimal.py: short, plain, and it shows what it says."""

import ast
import re
import sys
from pathlib import Path

import pytest
from helpers import SCRIPTS

MINIMAL = SCRIPTS / "minimal.py"
TEXT = MINIMAL.read_text(encoding="utf-8")


def run(monkeypatch, capsys, *arguments):
    """The lines that the script prints."""
    monkeypatch.setattr(sys, "argv", [str(MINIMAL), *arguments])
    exec(compile(TEXT, str(MINIMAL), "exec"), {})
    return capsys.readouterr().out.splitlines()


def accuracy(lines):
    return next(float(found[1]) for line in lines if (found := re.match(r"test accuracy (\d\.\d+)$", line)))


def test_it_is_one_screen_without_functions_of_its_own():
    assert len(TEXT.splitlines()) <= 50
    assert not [node for node in ast.walk(ast.parse(TEXT)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    (loop,) = [node for node in ast.parse(TEXT).body if isinstance(node, ast.For)]
    assert loop.end_lineno - loop.lineno < 12


@pytest.mark.slow
def test_it_learns_trains_what_is_declared_and_comes_back_from_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = run(monkeypatch, capsys)
    assert lines[0].startswith("trainable params: 197,120 ||")
    assert len([line for line in lines if line.startswith("step ")]) == 6
    assert accuracy(lines) > 0.6
    assert lines[-2:] == ["frozen tensors unchanged: True", "same logits after loading: True"]
    assert {path.name for path in Path("checkpoints/minimal").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "minipeft.json"}


@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("many", 1), ("-1", 1), ("", 1)])
def test_what_is_no_number_of_steps_is_answered_by_how_to_run_it(monkeypatch, capsys, word, code):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, capsys, word)
    shown, other = capsys.readouterr()[::-1] if code else capsys.readouterr()
    assert ended.value.code == code and "python scripts/minimal.py [STEPS]" in shown and not other
