"""commands/start.py: the `minipeft` command, and how every command begins and ends."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import SCRIPTS

from minipeft.commands.start import COMMANDS, main, run
from minipeft.errors import OutputError


@pytest.fixture
def minipeft(monkeypatch, capsys):
    """minipeft(*arguments): (exit code, stdout, stderr) of the command, in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["minipeft", *arguments])
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        else:
            code = None
        captured = capsys.readouterr()
        return code or 0, captured.out, captured.err

    return call


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_alone_it_lists_the_commands(minipeft, arguments):
    code, out, err = minipeft(*arguments)
    assert (code, err) == (0, "") and out.startswith("usage: minipeft COMMAND [OPTIONS]\n")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == list(COMMANDS)
    assert {"train", "predict", "evaluate", "compare", "anatomy"} <= COMMANDS.keys()


@pytest.mark.parametrize("name", ["trian", "--method", ""])
def test_an_unknown_command_is_one_line_and_code_2(minipeft, name):
    code, out, err = minipeft(name)
    assert (code, out) == (2, "")
    assert err == f"error: unknown command {name!r}: use {', '.join(COMMANDS)}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_and_its_script_have_the_same_help_but_for_the_name(minipeft, script, name):
    code, by_command, _ = minipeft(name, "--help")
    by_script = script(f"{name}.py", "--help")
    assert code == by_script.code == 0
    assert by_command.startswith(f"usage: minipeft {name} [") and by_script.out.startswith(f"usage: {name}.py [")
    assert f"\n    minipeft {name} " in by_command and f"\n    python scripts/{name}.py " in by_script.out
    assert "scripts/" not in by_command.replace("minipeft/", "")

    def options(text):
        return [line for line in text.splitlines() if line.startswith("  -")]

    assert options(by_command) == options(by_script.out) != []


def test_a_command_trains_and_another_predicts(minipeft, tiny_model, folder):
    code, out, err = minipeft("train", "--model", str(tiny_model), "--dataset", "films.csv", "--epochs", "1")
    assert code == 0, err
    assert (folder / "checkpoints" / "lora_films_finetuned" / "adapter_model.safetensors").is_file()
    code, out, err = minipeft("predict", "a good film")
    assert code == 0 and out.endswith("\ta good film\n"), err


def test_each_script_holds_nothing_but_its_command():
    for name in COMMANDS:
        text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
        assert text.partition("\n\n")[2] == ("from minipeft.commands.start import script\n\n"
                                             f'if __name__ == "__main__":\n    script("{name}")\n')


def test_python_dash_m_is_the_same_command(folder):
    done = subprocess.run([sys.executable, "-m", "minipeft", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown command 'nothing': use train, ")


@pytest.mark.parametrize(("outcome", "code", "line"), [
    (None, None, ""), (130, 130, ""), (OutputError("two\nlines"), 2, "error: two lines\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    pytest.param(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"), 2,
                 "error: out of memory: use a smaller --model, or another device (CUDA out of memory. Tried to "
                 "allocate 9 GiB.)\n", marks=pytest.mark.kind("8: out of memory is one line"))])
def test_an_end_becomes_an_exit_code_and_one_line_at_most(capsys, outcome, code, line):
    def main():
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert (ended.value.code, capsys.readouterr().err) == (code, line)
