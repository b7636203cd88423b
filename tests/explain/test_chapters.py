"""What is copied into a method's chapter: found by name, wherever it stands, with a link to the lines."""

import pytest

from minipeft.errors import NothingToWriteError, OutputError
from minipeft.explain.chapters import EQUATION, LINES, refreshed
from minipeft.runs.results import WRITER

METHOD = '''r"""A method.

    y = x W^T    what it
    c = 2 * y    computes

Symbols
    x
"""


@decorated
def plan():
    return 1


class Layer:
    def forward(self, x):
        """What it computes."""
        return x

    def merged(self):
        return self
'''


@pytest.fixture
def page(tmp_path):
    """page(*blocks, move=0): a page in docs/ that asks for these, refreshed; the method's file has lines put before."""
    (tmp_path / "docs").mkdir()

    def refresh(*asked, move=0):
        docstring, end, code = METHOD.partition('"""\n\n\n')
        (tmp_path / "method.py").write_text(docstring + end + "# a line more\n" * move + code, encoding="utf-8")
        text = "".join(f"{start.format(subject, WRITER)}\nold\n{end}\nkept\n" for (start, end), subject in asked)
        written = refreshed(text, tmp_path / "docs", tmp_path)
        assert refreshed(written, tmp_path / "docs", tmp_path) == written
        for (start, end), subject in asked:
            written = written.replace(start.format(subject, WRITER), "<").replace(end, ">")
        return written

    return refresh


def test_an_equation_is_the_docstring_s_with_its_remarks(page):
    assert page((EQUATION, "../method.py")) == (
        "<\n```text\ny = x W^T    what it\nc = 2 * y    computes\n```\n>\nkept\n")


@pytest.mark.parametrize(("names", "first", "last", "code"), [
    ("plan", 11, 13, "@decorated\ndef plan():\n    return 1"),
    ("Layer.forward", 17, 19, 'def forward(self, x):\n    """What it computes."""\n    return x'),
    ("Layer.forward, Layer.merged", 17, 22,
     'def forward(self, x):\n    """What it computes."""\n    return x\n\ndef merged(self):\n    return self')])
@pytest.mark.parametrize("move", [0, 5])
def test_lines_are_found_by_name_wherever_they_stand(page, names, first, last, code, move):
    first, last = first + move, last + move
    link = f"[`method.py`, lines {first} to {last}](../method.py#L{first}-L{last})"
    assert page((LINES, f"../method.py, {names}"), move=move) == f"<\n{link}:\n\n```python\n{code}\n```\n>\nkept\n"


def test_a_page_may_ask_for_both(page):
    both = page((EQUATION, "../method.py"), (LINES, "../method.py, plan"))
    assert both == page((EQUATION, "../method.py")) + page((LINES, "../method.py, plan"))


@pytest.mark.parametrize(("asked", "message"), [
    ((LINES, "../method.py, Layer.backward"), "has no Layer.backward to copy"),
    ((LINES, "../method.py, no.thing"), "has no no.thing to copy"),
    ((EQUATION, "../methods.py"), "there is no file .*methods.py to copy from")])
def test_what_is_not_there_is_an_error_that_names_it(page, asked, message):
    with pytest.raises(OutputError, match=message):
        page(asked)


def test_a_page_that_asks_for_nothing_is_an_error(page):
    with pytest.raises(NothingToWriteError, match="there is no <!-- results on"):
        page()
