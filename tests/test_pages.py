"""The pages to learn from: their code runs and prints what they show, their experiments break what they say, and what
any page, notebook or docstring names is there."""

from __future__ import annotations

import ast
import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from documents import NOTEBOOKS, PAGES, ROOT, code_blocks, commands, markdown_cells, shell_lines
from helpers import ScriptRunner

from minipeft import GPT2ForSequenceClassification, LoraConfig, inject, trainable_parameters
from minipeft.check.__main__ import EXERCISES
from minipeft.commands.start import COMMANDS
from minipeft.model.gpt2 import Attention

INDEX, TROUBLE = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("README.md", "troubleshooting.md"))


def assert_shows(printed, shown):
    """What was printed is what a page shows, where ... stands for anything."""
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.OutputChecker().check_output(shown, printed, options), f"printed:\n{printed}\nshown:\n{shown}"


def shown_commands(page):
    """Each (command, what the page shows of its output)."""
    return [block[2:].split("\n", 1) for block in code_blocks(page, "text") if block.startswith("$ ")]


# --- troubleshooting.md -----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_code_on_symptoms_prints_what_stands_below_it(tmp_path, monkeypatch, capsys):
    """From top to bottom, in one namespace, as the page says."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```\n(?:\n\1```text\n(.*?)^\1```$)?", TROUBLE,
                        re.MULTILINE | re.DOTALL)
    assert len(blocks) > 12
    names = {}
    for number, (indent, code, shown) in enumerate(blocks):
        code, shown = (re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for text in (code, shown))
        exec(compile(code, f"block {number} of troubleshooting.md", "exec"), names)
        printed = capsys.readouterr().out
        assert shown.strip() or not printed, code
        assert_shows(printed, shown)


@pytest.mark.slow
def test_the_commands_on_symptoms_print_what_stands_below_them(monkeypatch, capsys):
    found = shown_commands(TROUBLE)
    assert found
    for command, shown in found:
        script, *options = shlex.split(command.removeprefix("python scripts/"))
        outcome = ScriptRunner(monkeypatch, capsys)(script, *options)
        assert outcome.code == 0
        assert_shows(outcome.out, shown)


# --- the way to learn -------------------------------------------------------------------------------------------------

PATH, BREAK_IT = re.findall(r"^## (?:Learn|Break) it\n(.*?)(?=^## )", INDEX, re.MULTILINE | re.DOTALL)
STEPS = re.findall(r"^\d\. \*\*(.+)\*\* \((.+)\)\n((?:   .*\n)+)", PATH, re.MULTILINE)


def test_each_step_says_what_to_read_to_run_to_do_and_to_know_and_how_long_it_takes():
    assert [name for name, *_ in STEPS] == ["GPT-2", "LoRA", "Run it", "Break it", "Write your own"]
    for name, long, text in STEPS:
        assert re.search(r"\b(hour|day)s?$", long)
        verbs = re.findall(r"^   - (\w+)", text, re.MULTILINE)
        assert verbs == (["Read", "You"] if name == "Break it" else ["Read", "Run", "Do", "You"]), name
        assert "You know it when" in text
    assert len(INDEX.splitlines()) <= 100


def test_the_answers_to_the_questions_of_the_steps():
    """A learner can look here; and the questions have answers."""
    model = GPT2ForSequenceClassification.from_pretrained("mini")
    first = model.transformer.h[0].attn
    assert type(first) is Attention
    query, key, _ = first.c_attn(torch.zeros(2, 5, model.config.n_embd)).split(model.config.n_embd, dim=2)
    heads = [part.view(2, 5, first.n_head, -1).transpose(1, 2) for part in (query, key)]
    scores = heads[0] @ heads[1].transpose(2, 3)
    assert scores.shape == (2, 4, 5, 5), "q k^T: texts, heads, queries, keys"
    assert trainable_parameters(inject(model, LoraConfig())).trainable == 6 * 8 * (256 + 768) + 2 * 256
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    layer = model.transformer.h[0].attn.c_attn
    assert not layer.lora_A.weight.grad.any() and layer.lora_B.weight.grad.any(), "A's gradient is multiplied by B = 0"


# --- break it ---------------------------------------------------------------------------------------------------------

EXPERIMENTS = re.findall(
    r"^\d\. \*\*(.+?)\*\* `(minipeft/\S+)`:\s+`([^`]+)`\s+becomes\s+`([^`]+)`.*?^   ```text\n   \$ (.+?)\n(.*?)^   ```",
    BREAK_IT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone has, as far as the experiments need it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("minipeft", "scripts", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/mini").symlink_to(ROOT / "checkpoints/mini")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_there_are_four_experiments():
    assert len(EXPERIMENTS) == len(re.findall(r"^\d\. ", BREAK_IT, re.MULTILINE)) == 4


@contextmanager
def broken(clone, file, line, other):
    """A block in which this line of a file is another one."""
    path = clone / file
    source = path.read_text(encoding="utf-8")
    assert source.count(line) == 1
    path.write_text(source.replace(line, other), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(source, encoding="utf-8")


def run(clone, command):
    """What a command prints there, for a person: pytest prints longer messages where CI or BUILD_NUMBER is set."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "BUILD_NUMBER")}
    return subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=clone, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**environment, "PYTHONPATH": str(clone)}).stdout


@pytest.mark.slow
@pytest.mark.parametrize(("title", "file", "line", "other", "command", "shown"), EXPERIMENTS,
                         ids=[experiment[0].rstrip(".") for experiment in EXPERIMENTS])
def test_an_experiment_breaks_what_the_page_says(clone, title, file, line, other, command, shown):
    with broken(clone, file, line, other):
        assert_shows(run(clone, command), "...\n" + re.sub(r"^ {3}", "", shown, flags=re.MULTILINE))


@pytest.mark.slow
def test_the_trace_does_not_see_a_wrong_scale_that_it_takes_from_the_layer(clone):
    title, file, line, other, *_ = EXPERIMENTS[1]
    assert "The trace says \"equal\"" in " ".join(INDEX.split(title)[1].split())
    with broken(clone, file, line, other):
        printed = run(clone, "python scripts/anatomy.py --method lora --trace")
    assert len(re.findall(r"^    equal", printed, re.MULTILINE)) == 3, "y, and W and y when it is merged"


# --- what pages name --------------------------------------------------------------------------------------------------

TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES} | {
    str(path.relative_to(ROOT)): "\n\n".join(markdown_cells(path)) for path in NOTEBOOKS}
each_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


def commands_of(text, *start):
    """The words that follow these in each command of a text."""
    for line in shell_lines(text):
        if line.startswith(" ".join(start)):
            words = shlex.split(line, comments=True)
            if words[:len(start)] == list(start) and len(words) > len(start):
                yield words[len(start):]


@each_text
def test_the_tests_that_a_text_calls_are_there(text):
    for words in commands_of(text, "python", "-m", "pytest"):
        named = [word for word in words if word.startswith("tests")]
        assert named or "-m" in words, words
        for word in named:
            file, _, test = word.partition("::")
            assert (ROOT / file).exists(), word
            assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), word
            if "-k" in words:
                assert words[words.index("-k") + 1] in (ROOT / file).read_text(encoding="utf-8"), words


@each_text
def test_the_exercises_commands_and_files_that_a_text_calls_are_there(text):
    for first, *_ in commands_of(text, "python", "-m", "minipeft.check"):
        assert first == "--list" or first in EXERCISES
    for first, *_ in commands_of(text, "minipeft"):
        assert first in COMMANDS
    for first, *_ in commands_of(text, "make"):
        assert re.search(rf"^{first}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), first
    for first, *_ in commands_of(text, "python"):
        assert first == "-m" or (ROOT / first).is_file(), first


HELPS = {name: re.sub(r"\bminipeft (\w+)", r"python scripts/\1.py", ast.get_docstring(ast.parse(
    (ROOT / f"minipeft/commands/{name}.py").read_text(encoding="utf-8")))) for name in COMMANDS}


@pytest.mark.parametrize("text", [*HELPS.values(), *(TEXTS[name] for name in TEXTS if name.endswith(".ipynb"))],
                         ids=[*HELPS, *(name for name in TEXTS if name.endswith(".ipynb"))])
def test_the_commands_in_a_help_or_a_notebook_have_options_that_there_are(text, tmp_path, monkeypatch, capsys):
    """Those of pages are held by test_docs.py."""
    monkeypatch.chdir(tmp_path)
    for name, options in [(name, options) for name, options in commands(text) if options]:
        outcome = ScriptRunner(monkeypatch, capsys)(name, *options, "--help")
        assert outcome.code == 0, outcome.err
        for option in options:
            assert not option.startswith("--") or re.search(rf"{option}\b", outcome.out), f"{name} has no {option}"


def test_commands_are_found_in_lines_and_in_blocks():
    page = "Run `make test`.\n```\npython a.py \\\n  --b  # c\n```\n```text\n$ minipeft train\nmake it\n```\nmake no\n"
    assert [list(commands_of(page, name)) for name in ("make", "python", "minipeft")] == [
        [["test"]], [["a.py", "--b"]], [["train"]]]


FOLDERS = ("minipeft", "scripts", "tests", "docs", "exercises", "results", "notebooks", "checkpoints/mini")
FILES = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*")
         if path.suffix in (".py", ".md", ".ipynb", ".cpp")} | {"README.md"}
SOURCES = [path for folder in ("minipeft", "scripts", "exercises", "tests") for path in (ROOT / folder).rglob("*.py")]


def files_named_in(source):
    """The files that the docstrings of a file of Python name; those in capitals, and a reader's own, are examples."""
    tree = ast.parse(source)
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, holders)]
    found = re.findall(r"(?<![\w./])((?:\w+/)*\w+\.(?:py|md|ipynb|cpp))\b", "\n".join(texts))
    return {name for name in found if not re.search(r"[A-Z]{4,}\.|\bmy_", name.replace("README.md", ""))}


def test_the_files_that_docstrings_name_are_there():
    """Exercises and their templates too. A name may be the end of a path: `runs/defaults.py`."""
    ends = {"/".join(file.split("/")[-parts:]) for file in FILES for parts in range(1, 6)}
    missing = {str(path.relative_to(ROOT)): names for path in SOURCES
               if (names := files_named_in(path.read_text(encoding="utf-8")) - ends)}
    assert not missing


def test_the_search_for_named_files_finds_them():
    assert files_named_in('"""See lora.py, `runs/defaults.py` (README.md) and exercises/METHOD.py."""') == {
        "lora.py", "runs/defaults.py", "README.md"}
