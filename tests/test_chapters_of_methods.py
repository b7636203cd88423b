"""The chapters of docs/methods: one for each method, true to its file, and every command in them runs."""

import importlib
import re
import shlex
import textwrap

import pytest
from documents import ROOT, code_blocks, links, own_text, results_changed, tables
from helpers import ScriptRunner, write_tiny_model

from minipeft.explain.chapters import refreshed
from minipeft.explain.equation import equation_of
from minipeft.explain.pictures import TITLES
from minipeft.methods import METHODS

FOLDER = ROOT / "docs/methods"
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
INDEX = TEXTS.pop("README")
HEADINGS = ["The equation and the code", "What came out", "When to use it, and when not", "Your turn"]
QUICK = ("--epochs", 1, "--train-size", 32, "--validation-size", 16, "--test-size", 16, "--max-length", 24)

each_chapter = pytest.mark.parametrize("method", METHODS)


# --- form -------------------------------------------------------------------------------------------------------------

def test_each_method_has_a_chapter_and_the_index_has_them_in_their_order():
    (rows,) = tables(INDEX)
    assert TEXTS.keys() == METHODS.keys()
    assert [(row[0], row[2]) for row in rows] == [(f"`{name}`", f"[{TITLES[name]}]({name}.md)") for name in METHODS]


@each_chapter
def test_a_chapter_is_short_and_has_its_picture_and_its_parts_in_order(method):
    text = TEXTS[method]
    assert text.startswith(f"# {TITLES[method]}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS
    assert text.index(f'src="../../results/anatomy/{method}.png"') < text.index("## ")
    assert len([line for line in text.splitlines() if line and not line.startswith("<!--")]) <= 70
    assert len([line for line in own_text(text).splitlines() if line]) <= 45


@each_chapter
def test_a_chapter_leads_to_the_next(method):
    order = [*METHODS, None]
    after = order[order.index(method) + 1]
    last = TEXTS[method].rstrip().rpartition("\n\n")[2]
    assert f"{after}.md" in links(last) if after else "../structure.md" in links(last)


@each_chapter
def test_a_chapter_names_its_exercise_or_says_that_it_has_none(method):
    text = " ".join(TEXTS[method].split())
    if (ROOT / f"exercises/{method}.py").exists():
        assert f"../../exercises/{method}.py" in links(text) and f"`python -m minipeft.check {method} FILE`" in text
    else:
        assert "It has no exercise of its own." in text or method == "full"
    for exercise in re.findall(r"minipeft\.check (\w+)", text):
        assert (ROOT / f"exercises/{exercise}.py").exists()


# --- what is copied ---------------------------------------------------------------------------------------------------

@each_chapter
def test_the_equation_is_that_of_the_file(method):
    equation, *_ = code_blocks(TEXTS[method], "text")
    docstring = importlib.import_module(f"minipeft.methods.{method}").__doc__
    assert equation_of(textwrap.indent(equation.rstrip("\n"), "    ")) == equation_of(docstring)


@each_chapter
def test_the_quoted_lines_are_those_of_the_file_at_the_linked_place(method):
    quoted = re.findall(r"^\[`\S+`, lines \d+ to \d+\]\((\S+\.py)#L(\d+)-L(\d+)\):\n\n```python\n(.*?)\n```$",
                        TEXTS[method], re.MULTILINE | re.DOTALL)
    assert len(quoted) == len(code_blocks(TEXTS[method], "python")) >= 1
    assert f"../../minipeft/methods/{method}.py" in {file for file, *_ in quoted}
    for file, first, last, code in quoted:
        lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()[int(first) - 1:int(last)]
        assert code == textwrap.dedent("\n".join(lines))


@each_chapter
def test_all_that_is_copied_is_what_the_command_writes(method):
    if results_changed():
        pytest.skip("measured anew here; scripts/report.py --write docs/methods/*.md writes it into the chapters")
    assert refreshed(TEXTS[method], FOLDER, ROOT / "results") == TEXTS[method]


@each_chapter
def test_figures_are_in_the_table_alone(method):
    """Whatever is measured is written by the command: in the chapter's own words are no shares and no decimals."""
    prose = re.sub(r"\]\(\S+\)|\b\d{4}\.\d{5}\b|```.*?```", "", own_text(TEXTS[method]), flags=re.DOTALL)
    assert not re.findall(r"\d+(?:\.\d+)? ?%|\d+\.\d+|\d,\d{3}|per ?cent", prose)


# --- what to try ------------------------------------------------------------------------------------------------------

@each_chapter
def test_the_commands_to_try_run(method, tmp_path, monkeypatch, capsys):
    """Each as it is printed, one after the other; only what trains takes a tiny base and few examples."""
    monkeypatch.chdir(tmp_path)
    script, more = ScriptRunner(monkeypatch, capsys), ("--model", write_tiny_model(tmp_path / "tiny"), *QUICK)
    (block,) = code_blocks(TEXTS[method], "bash")
    for line in block.replace("\\\n", "").splitlines():
        python, name, *options = shlex.split(line)
        assert python == "python" and name in ("scripts/train.py", "scripts/anatomy.py")
        outcome = script(name.removeprefix("scripts/"), *options, *(more if "train" in name else ()))
        assert outcome.code == 0, outcome.err
    assert outcome.out
