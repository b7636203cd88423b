"""What scripts/report.py writes into a method's chapter, docs/methods/NAME.md: its equation, lines of code, results.

Each stands between two markers. A marker names what is copied, and never where in a file it stands, so that the command
finds lines again when they have moved. Paths are as seen from the page:

    <!-- equation of ../../minipeft/methods/lora.py: written by scripts/report.py -->
    <!-- lines of ../../minipeft/methods/lora.py, LoRALinear.forward: written by scripts/report.py -->
    <!-- lines of ../../minipeft/methods/prompt.py, Prompt.put_into, Prompt.after: written by scripts/report.py -->
    <!-- results on imdb by lora: written by scripts/report.py -->

Of two names, the lines go from the first one's beginning to the second one's end.
"""

from __future__ import annotations

import ast
import textwrap
from functools import partial
from pathlib import Path

from minipeft.errors import OutputError
from minipeft.explain.equation import equation_text
from minipeft.report.tables import replace_tables
from minipeft.runs.results import BLOCK_START, WRITER, replace_blocks

EQUATION = ("<!-- equation of {}: written by {} -->", "<!-- end of equation -->")
LINES = ("<!-- lines of {}: written by {} -->", "<!-- end of lines -->")


def refreshed(text: str, place: Path, folder: Path) -> str:
    """A page's text with all that scripts/report.py writes into it made anew.

    Args:
        place: the page's folder.
        folder: of results files.

    Raises:
        NothingToWriteError: the page asks for nothing.
        OutputError: what a marker names is not there.
    """
    done = False
    for markers, block in ((EQUATION, partial(_equation, place)), (LINES, partial(_lines, place))):
        if markers[0].partition("{}")[0] in text:
            text, done = replace_blocks(text, WRITER, block, markers), True
    return text if done and BLOCK_START.partition("{}")[0] not in text else replace_tables(text, folder)


def _equation(place: Path, file: str) -> str:
    """A method file's equation, as a block of text."""
    docstring = ast.get_docstring(ast.parse(_source(place / file)), clean=False)
    return f"```text\n{equation_text(docstring)}\n```"


def _lines(place: Path, subject: str) -> str:
    """Lines of a file, without their indentation, as a block of code below a link to them."""
    file, *names = subject.split(", ")
    source = _source(place / file)
    tree = ast.parse(source)
    found = [_definition(tree, name, place / file) for name in names]
    first = min(node.lineno for node in (found[0], *found[0].decorator_list))
    last = found[-1].end_lineno
    code = textwrap.dedent("\n".join(source.split("\n")[first - 1:last]))
    return f"[`{Path(file).name}`, lines {first} to {last}]({file}#L{first}-L{last}):\n\n```python\n{code}\n```"


def _source(path: Path) -> str:
    if not path.is_file():
        raise OutputError(f"there is no file {path} to copy from")
    return path.read_text(encoding="utf-8")


def _definition(tree: ast.Module, name: str, path: Path) -> ast.FunctionDef | ast.ClassDef:
    """A function, a class or a method such as LoRALinear.forward."""
    node = tree
    for part in name.split("."):
        node = next((child for child in getattr(node, "body", ()) if getattr(child, "name", None) == part), None)
    if node is None:
        raise OutputError(f"{path} has no {name} to copy")
    return node
