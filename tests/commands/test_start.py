"""commands/start.py: the `minipeft` command, and how every command begins and ends."""

from __future__ import annotations

import os
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
    (KeyboardInterrupt(), 130, "interrupted\n"), (SystemExit(3), 3, ""),
    (PermissionError(13, "Permission denied", "theirs/x.json"), 2, "error: theirs/x.json: Permission denied\n"),
    (OSError(36, "File name too long", "xxx"), 2, "error: xxx: File name too long\n"),
    (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
    (OSError("no\nnumber"), 2, "error: no number\n"), (BrokenPipeError(32, "Broken pipe"), 1, ""),
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


@pytest.mark.parametrize("words", [("predict", "--adapter"), ("train", "--model"), ("train", "--dataset"),
                                   ("train", "--dataset", "films.csv", "--output")], ids=" ".join)
def test_a_name_that_is_too_long_for_a_file_is_one_line(minipeft, words):
    code, _, err = minipeft(*words, "x" * 300, *["a film"] * (words[0] == "predict"))
    assert code == 2 and err.startswith("error: ") and err.endswith(": File name too long\n") and err.count("\n") == 1


# --- standard streams -------------------------------------------------------------------------------------------------

def in_a_shell(line, code="from minipeft.commands.start import main; main()"):
    """How a shell's line ends in which $PYTHON and $CODE are a program: its exit code, what it printed, and errors."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True,
                          env=environment | {"PYTHON": sys.executable, "CODE": code})
    return done.returncode, done.stdout, done.stderr


def test_a_reader_that_has_gone_is_no_error_to_print():
    assert in_a_shell('"$PYTHON" -c "$CODE" --help | true') == (1, "", "")


def test_what_cannot_be_printed_on_a_full_disk_is_one_line():
    assert in_a_shell('"$PYTHON" -c "$CODE" --help > /dev/full') == (2, "", "error: No space left on device\n")


def test_an_error_is_told_though_what_was_printed_before_it_cannot_be_written():
    code = ("from minipeft.commands.start import run; from minipeft.errors import DataError\n"
            "def main():\n    print('half')\n    raise DataError('that')\nrun(main)")
    assert in_a_shell('"$PYTHON" -c "$CODE" > /dev/full', code) == (2, "", "error: that\n")


@pytest.mark.parametrize(("closed", "printed", "told"), [
    ("<&-", "''\n", "told\n"), (">&-", "", "told\n"), ("2>&-", "''\n", ""), ("<&- >&- 2>&-", "", "")])
def test_standard_streams_that_are_closed_are_empty_or_swallow_what_is_written(closed, printed, told):
    code = ("import os, sys; from minipeft.commands.start import run\n"
            "def main():\n    print(repr(sys.stdin.read()))\n    sys.stderr.write('told\\n')\n"
            "    for number in range(3):\n        os.fstat(number)\nrun(main)")
    assert in_a_shell(f'"$PYTHON" -c "$CODE" < /dev/null {closed}', code) == (0, printed, told)
