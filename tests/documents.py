"""For tests of the pages: which there are, and the code blocks, tables and links in them and in notebooks."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(page for folder in ("docs", "results", "minipeft", "scripts", "checkpoints/mini")
                         for page in (ROOT / folder).rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_blocks(text, language=""):
    """The contents of a page's code blocks of a language, without the indentation of a list they may stand in."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", content, flags=re.MULTILINE) for indent, content in blocks]


def own_text(text):
    """A page without what scripts write into it, between markers."""
    return re.sub(r"<!-- (\w+) (?:on|of) .*?-->\n.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)


def shell_lines(text):
    """The commands on a page, or what may be some: code in its lines, all lines of blocks that are of no language or
    of the shell's, and in any block those after a $. What is continued on another line is one line here."""
    found, language = [], None
    for line in text.replace("\\\n", " ").split("\n"):
        fence = re.match(r"\s*```(.*)$", line)
        if fence:
            language = None if language is not None else fence[1]
        elif language is None:
            found += re.findall(r"`([^`]+)`", line)
        elif language in ("", "bash") or line.strip().startswith("$ "):
            found.append(line.strip().removeprefix("$ "))
    return found


def commands(text):
    """Each (script, options) that a page shows behind `python` or `torchrun`."""
    found = re.findall(r"(?:python|torchrun\b.*?) scripts/(\S+?\.py)\b(.*?)(?:`|$)", text.replace("\\\n", ""),
                       re.MULTILINE)
    return [(script, shlex.split(options, comments=True)) for script, options in found]


def tables(text):
    """The rows of each Markdown table, without its header: lists of cells."""
    found = re.findall(r"^\|.*\|\n\| [-:| ]+\|\n((?:\|.*\|\n)+)", text, re.MULTILINE)
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in rows.splitlines()] for rows in found]


def without_code(text):
    """A page without its code blocks, in which brackets are no links and # begins no heading."""
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text):
    """The files that a page links to or shows, without anchors."""
    return {target.partition("#")[0] for target in _targets(text)} - {""}


def _targets(text):
    """What a page links to or shows on this machine, with anchors."""
    text = without_code(text)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img[^>]* src="([^"]+)"', text)
    return [target for target in targets if not target.startswith("http")]


def dead_links(text, path):
    """The links of a page at `path`, or of a notebook's text there, that lead to no file, or to no heading in it."""
    dead = []
    for target in _targets(text):
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        if not page.exists() or (anchor and page.suffix == ".md" and anchor not in anchors(page)):
            dead.append(target)  # of a file of code the anchor is lines: see test_chapters_of_methods.py
    return dead


def anchors(page):
    """What the headings of a page are called in links to them, as on GitHub."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def markdown_cells(notebook):
    """The texts of a notebook at this path."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def results_changed():
    """Whether results files differ from the committed ones: whoever trains here has measured anew."""
    return bool(subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", "results/*.json"], cwd=ROOT,
                               capture_output=True, text=True).stdout)
