"""A trace as one HTML page to step through, term by term: the equation with the term marked, and the term's numbers.

The page is a file by itself. It loads nothing, works by keyboard and by touch, and without scripts shows all steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor

from minipeft.explain.equation import Term, heading_lines
from minipeft.explain.pictures import TITLES
from minipeft.explain.trace import Computed, Place, Trace
from minipeft.explain.trace_text import HOW_TO_READ, norm, number, shape, verdict
from minipeft.files import write_text_file
from minipeft.methods import METHODS

TEMPLATE = Path(__file__).with_suffix(".html")
BARS, BAR, HEIGHT = 32, 9, 44       # numbers drawn of a tensor; how wide and how high, in the picture's units
ROLES = {"trained": "trained", "frozen": "frozen", "number": "a number", "seen": "seen in the model",
         "computed": "computed"}


def write_page(trace: Trace, path: Path) -> None:
    """Write the page.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text_file(path, page(trace))


def page(trace: Trace) -> str:
    """The page's text."""
    docstring = inspect.getmodule(METHODS[trace.method].plan).__doc__
    title = TITLES.get(trace.method, trace.method)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), steps="\n".join(_steps(trace)), start=escape(trace.start), how=escape(HOW_TO_READ),
        model=escape(trace.model), symbols=escape("\n".join(heading_lines(docstring, "Symbols"))),
        tokens=" ".join(f'<span class="token{" chosen" * (number == trace.token)}">{escape(token)}</span>'
                        for number, token in enumerate(trace.tokens)))


def _steps(trace: Trace) -> Iterator[str]:
    """Every step of the page: forward, then merging or why not."""
    for place in trace.places:
        for line in place.forward:
            yield from _equation(trace, place, line, "forward")
    for place in trace.places if not trace.why_not_merged else ():
        for line in place.merged:
            yield from _equation(trace, place, line, "merge")
    if trace.why_not_merged:
        yield _step("merge", "merging", "", f"<p>{escape(trace.why_not_merged)}</p>")


def _equation(trace: Trace, place: Place, line: Computed, part: str) -> Iterator[str]:
    """A step for each term, the last one with the model's own result beside it."""
    offset = len(line.line.left) + 3
    for term in line.terms:
        whole = term is line.terms[-1]
        marked = (_marked(line.line.text, 0, len(line.line.text)) if whole else
                  _marked(line.line.text, term.start + offset, term.end + offset))
        remark = f'<p class="remark">{escape(line.line.remark)}</p>' if line.line.remark else ""
        name = f"{line.line.left}, by hand" if whole else term.text
        body = remark + (f'<p class="equal">{escape(verdict(line))}</p>' if whole else "") + _card(trace, name, term)
        if whole:
            body += _card(trace, f"{line.line.left}, in the model", Term("", 0, 0, line.model, True))
        yield _step(part, place.name, marked, body)


def _step(part: str, place: str, equation: str, body: str) -> str:
    heading = {"forward": "Forward", "merge": "Merge"}[part]
    equation = f'<p class="equation">{equation}</p>' if equation else ""
    return (f'<li class="step" data-part="{part}"><h2>{heading} <small>{escape(place)}</small></h2>{equation}{body}'
            "</li>")


def _marked(text: str, start: int, end: int) -> str:
    return f"{escape(text[:start])}<mark>{escape(text[start:end])}</mark>{escape(text[end:])}"


def _card(trace: Trace, name: str, term: Term) -> str:
    """A term: its name, what it is, its shape and norm, its first numbers, drawn and written."""
    role, value = trace.role(term), term.value
    if not isinstance(value, Tensor):
        facts, drawn = f"<b>{number(value)}</b>", ""
    else:
        row = trace.row(value)
        found = norm(trace, value)
        facts = f"shape <b>{escape(shape(value))}</b>" + (f" &nbsp; norm <b>{found}</b>" if found else "")
        first = " &nbsp; ".join(f"<span>{number(x)}</span>" for x in row[:4].tolist())
        drawn = f'{_bars(row)}<p class="numbers">{first}{" &nbsp; ..." if len(row) > 4 else ""}</p>'
    return (f'<section class="card {role}"><header><h3>{escape(name)}</h3><span class="role">{ROLES[role]}</span>'
            f"</header><p>{facts}</p>{drawn}</section>")


def _bars(row: Any) -> str:
    """The first numbers of a row as bars, up where positive and down where negative, the largest to the edge."""
    values = row[:BARS].float().nan_to_num(posinf=0, neginf=0)
    largest, half = float(values.abs().max()) or 1.0, HEIGHT / 2
    heights = [half * float(value) / largest for value in values]
    bars = "".join(f'<rect x="{i * BAR}" y="{half - max(height, 0):.1f}" width="{BAR - 2}" '
                   f'height="{abs(height):.1f}"/>' for i, height in enumerate(heights))
    what = f"the first {len(values)} of {len(row)} numbers" if len(row) > len(values) else f"all {len(row)} numbers"
    return (f'<figure><svg viewBox="0 0 {BARS * BAR} {HEIGHT}" role="img" aria-label="{what} as bars">{bars}'
            f'<line x1="0" x2="{len(values) * BAR}" y1="{half}" y2="{half}"/></svg>'
            f"<figcaption>{what}; the largest is {number(largest)}</figcaption></figure>")
