"""`python -m minipeft.check`: what it prints, how it ends, and files that cannot be graded at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from documents import ROOT, code_blocks

from exercises import answers
from minipeft.check.__main__ import EXERCISES, main
from minipeft.check.grading import PROPERTIES, exercise
from minipeft.check.references import FILE

RIGHT = (answers.HERE / "right" / "lora.py").read_text(encoding="utf-8")


@pytest.fixture
def check(tmp_path, capsys):
    """check(source): the exit code and the lines printed for an answer to the exercise on LoRA."""

    def check(source):
        path = tmp_path / "mine.py"
        path.write_bytes(source if isinstance(source, bytes) else source.encode())
        code = main(["lora", str(path)])
        captured = capsys.readouterr()
        assert not captured.err and "Traceback" not in captured.out
        return code, captured.out.splitlines()

    return check


def run(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "minipeft.check", *map(str, arguments)], capture_output=True,
                          text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def test_a_right_answer_gets_one_line_for_each_property(check):
    code, lines = check(RIGHT)
    assert code == 0 and lines[-1] == "all 8 properties hold"
    assert lines[1:-1] == [f"  holds   {title}" for key, title in PROPERTIES.items() if hasattr(exercise("lora"), key)]


def test_a_mistake_is_shown_with_input_got_expected_and_why(check):
    code, lines = check(RIGHT.replace("lora_alpha / r", "lora_alpha"))
    assert code == 1
    text = " ".join(line.strip() for line in lines[lines.index("  FAILS   the formula on small whole numbers") + 1:])
    assert " ".join(text.split()) == (
        "of layer(x) "
        "with x [[1, 2]], W [[1, 2], [3, 4]], bias [1, -1], A [[1, 0], [2, 1]], B [[1, 3], [0, 2]], r 2, lora_alpha 6 "
        "got [[84, 58]] expected [[45, 34]] because scaled by lora_alpha, not by lora_alpha / r "
        "then gradients in float64; what is trained and what is frozen; the number of trained parameters; merged gives "
        "what unmerged gives; the stored reference outputs")


def test_a_mistake_that_is_not_known_is_said_to_be_none_of_them(check):
    code, lines = check(RIGHT.replace("return y + self.scaling", "return y + 0.1234 * self.scaling"))
    assert code == 1 and any("of none of the mistakes known here" in line for line in lines)


@pytest.mark.parametrize(("source", "says"), [
    ("class LoRALinear(:\n", "line 1: SyntaxError: invalid syntax"),
    ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    ("x = 1\n\n1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
    ("raise SystemExit(0)\n", "line 1: the file ends the program"),
    ("", "LoRALinear is missing: keep the names of the template"),
    (RIGHT.replace("def merged_weight", "def merge"), "LoRALinear.merged_weight is missing: keep the names"),
    (RIGHT.replace("def forward(self, x: Tensor)", "def forward(self)"),
     "LoRALinear.forward(self) has to take 1 arguments beside self: keep the template's signatures"),
    (b"\xff\xfe", "cannot be read: it is no UTF-8 text"),
    (b"x = '\0'\n", "source code string cannot contain null bytes"),
    ("\tx = 1\n  y = 2\n", "IndentationError"),
], ids=["syntax", "import", "error", "exit", "empty", "name", "signature", "bytes", "null", "indentation"])
def test_a_file_that_cannot_be_graded_is_one_line(check, source, says):
    code, lines = check(source)
    assert code == 1 and len(lines) == 2
    assert lines[1].startswith("  FAILS   ") and says in lines[1]


@pytest.mark.parametrize(("line", "says"), [
    ("raise ValueError('two\\nlines')", "line 20, forward: ValueError: two"),
    ("return self.forward(x)", "RecursionError: maximum recursion depth exceeded"),
    ("return exit()", "line 20, forward: the file ends the program"),
    ("return None", "NoneType"),
    ("return [1.0]", "list"),
    ("raise NotImplementedError", "line 20, forward: not written yet"),
])
def test_an_error_in_the_middle_is_a_property_that_fails(check, line, says):
    code, lines = check(RIGHT.replace("y = self.base_layer(x)", line))
    assert code == 1 and lines[1] == "  FAILS   shapes and dtypes"
    assert any(says in each for each in lines), lines


@pytest.mark.parametrize(("line", "says"), [
    ("raise GeneratorExit", "line 20, forward: GeneratorExit"),
    ("raise KeyboardInterrupt", "line 20, forward: KeyboardInterrupt"),
    ("raise type('Silent', (Exception,), {'__str__': lambda self: 1 / 0})",
     "line 20, forward: Silent: its message cannot be shown (ZeroDivisionError)"),
    ("__import__('os')._exit(0)", "line 20, forward: the file ends the program"),
])
def test_what_ends_a_program_is_an_error_of_the_file(check, line, says):
    code, lines = check(RIGHT.replace("y = self.base_layer(x)", line))
    assert code == 1 and any(says in each for each in lines), lines


@pytest.mark.parametrize("line", [
    "import sys; sys.stdout.close()", "import sys; sys.stdout = None", "import io, sys; sys.stdout = io.StringIO()",
    "torch.set_grad_enabled(False)", "torch.set_default_dtype(torch.float64)"])
def test_a_file_takes_neither_the_output_nor_the_settings_of_torch_away(check, line):
    code, lines = check(RIGHT + f"\n\n{line}\n")
    assert code == 0 and lines[-1] == "all 8 properties hold"


def test_a_byte_order_mark_at_the_beginning_is_no_part_of_the_file(check):
    assert check(b"\xef\xbb\xbf" + RIGHT.encode())[0] == 0


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["lora", str(tmp_path / "none.py")]) == 1
    assert "none.py cannot be read: No such file or directory" in capsys.readouterr().out
    assert main(["lora", str(tmp_path)]) == 1
    assert "cannot be read: Is a directory" in capsys.readouterr().out


@pytest.mark.parametrize(("old", "new", "line"), [
    ("y = self.base_layer(x)", "while True: pass", 20), ("class LoRALinear", "while True: pass\nclass LoRALinear", 9)],
    ids=["in forward", "at import"])
def test_an_endless_loop_is_ended_and_its_line_named(tmp_path, old, new, line):
    path = tmp_path / "mine.py"
    path.write_text(RIGHT.replace(old, new), encoding="utf-8")
    ended = run("lora", path, "--seconds", 1)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout.splitlines()[-1] == \
        f"  FAILS   it has not ended after 1 s in line {line}: is there an endless loop?"


def test_the_list_and_a_wrong_word_need_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch is imported')\n")
    listed = run("--list", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert listed.returncode == 0 and [line.split()[0] for line in listed.stdout.splitlines()] == list(EXERCISES)
    wrong = run("lroa", "mine.py", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert wrong.returncode == 2 and "invalid choice: 'lroa'" in wrong.stderr
    assert run("lora", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}").returncode == 2


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_limit_that_is_none_is_refused(seconds, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["lora", "mine.py", "--seconds", seconds])
    assert ended.value.code == 2 and "--seconds" in capsys.readouterr().err


def test_a_reader_that_has_gone_leaves_no_traceback():
    command = f"{sys.executable} -m minipeft.check --list | true"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert ended.stderr == ""


def test_the_command_grades_an_answer():
    ended = run("lora", answers.HERE / "otherwise" / "lora.py")
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.endswith("all 8 properties hold\n")


# --- references and table ---------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_stored_references_are_what_peft_and_transformers_compute(tmp_path):
    pytest.importorskip("peft"), pytest.importorskip("transformers")
    from exercises import references

    def flat(value):
        return [number for each in value for number in flat(each)] if isinstance(value, list) else [value]

    references.write(tmp_path / "made.json")
    made, stored = (json.loads(path.read_text(encoding="utf-8"))["cases"] for path in (tmp_path / "made.json", FILE))
    assert made.keys() == stored.keys()
    for name, case in stored.items():
        assert made[name].keys() == case.keys(), name
        for key, value in case.items():
            assert flat(made[name][key]) == pytest.approx(flat(value), abs=1e-5) if not isinstance(value, str) and \
                key != "names" else made[name][key] == value, (name, key)
    assert {name for name, case in stored.items() if case["by"] == "minipeft"} == {"adapter", "bitfit"}


def test_the_table_has_a_row_for_each_mistake(capsys):
    answers.print_table(["ia3"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == [mistake.title for mistake in answers.mistakes("ia3")]
    assert all(mistake.says in row[2] for row, mistake in zip(rows, answers.mistakes("ia3")))


def test_the_page_shows_what_is_printed(check):
    """docs/exercises.md: the grader's answer to the mistake it speaks of, and a line on each exercise."""
    page = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    _, lines = check(RIGHT.replace("lora_alpha / r", "lora_alpha"))
    shown = [block for block in code_blocks(page, "text") if "FAILS" in block]
    assert shown[0].splitlines() == ["lora: my_lora.py", *lines[1:]]
    for name in EXERCISES:
        assert f"| [{name}](../exercises/{name}.py) |" in page
