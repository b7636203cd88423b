"""For tests of the pages: which there are, and the code blocks, tables and links in them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "results").rglob("*.md"))]


def code_blocks(text, language=""):
    """The contents of a page's code blocks of a language, without the indentation of a list they may stand in."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", content, flags=re.MULTILINE) for indent, content in blocks]


def own_text(text):
    """A page without what scripts write into it, between markers."""
    return re.sub(r"<!-- (\w+) (?:on|of) .*?-->\n.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)


def tables(text):
    """The rows of each Markdown table, without its header: lists of cells."""
    found = re.findall(r"^\|.*\|\n\| [-:| ]+\|\n((?:\|.*\|\n)+)", text, re.MULTILINE)
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in rows.splitlines()] for rows in found]


def links(text):
    """The files that a page links to or shows, without anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img[^>]* src="([^"]+)"', text)
    return {target.partition("#")[0] for target in targets if not target.startswith("http")} - {""}


def results_changed():
    """Whether results files differ from the committed ones: whoever trains here has measured anew."""
    return bool(subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", "results/*.json"], cwd=ROOT,
                               capture_output=True, text=True).stdout)
