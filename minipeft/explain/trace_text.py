"""A trace as text for a terminal: a line for each term of the equation, its shape, its norm and a few numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from minipeft.explain.anatomy import GRAY, ORANGE, PLAIN
from minipeft.explain.equation import Term
from minipeft.explain.trace import ALLOWED, Computed, Trace

NUMBERS = 4      # how many of a tensor's numbers are printed
WIDTH = 34       # of the column of terms; a longer one stands on a line of its own
HOW_TO_READ = ("Of what has a row for each token, (1, ..., tokens, n), norm and numbers are those of the token's row. "
               "Of a matrix, the norm is that of all of it, and the numbers are the first row's.")


def number(value: float) -> str:
    return f"{value:.4g}"


def numbers(trace: Trace, value: Any, most: int = NUMBERS) -> str:
    """The first numbers of a tensor's row, or the one number."""
    if not isinstance(value, Tensor):
        return number(value)
    row = trace.row(value)
    return "  ".join(f"{number(x):>10}" for x in row[:most].tolist()) + ("  ..." if len(row) > most else "")


def shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else "a number"


def norm(trace: Trace, value: Any) -> str:
    found = trace.norm(value) if isinstance(value, Tensor) else None
    return "" if found is None else number(found)


def verdict(line: Computed) -> str:
    if not line.difference:
        return "equal, bit for bit"
    return f"equal: the two differ by {line.difference:.1e} of the largest number; {ALLOWED:g} would be allowed"


def heading(trace: Trace) -> str:
    """What was traced, in one sentence."""
    return (f"{trace.method} in {trace.model}, block {trace.block}, while it reads {len(trace.tokens)} tokens; the one "
            f"looked at is number {trace.token}, {trace.tokens[trace.token]!r}")


def as_text(trace: Trace, color: bool = False) -> str:
    """The whole trace: forward, then merging, or why the method does not merge."""
    intro = [f"{heading(trace)}.", f"tokens: {' | '.join(trace.tokens)}", f"adapter: {trace.start}",
             f"Trained tensors are marked *. {HOW_TO_READ}"]
    lines = [wrapped for line in intro for wrapped in textwrap.wrap(line, 118)]
    for place in trace.places:
        lines += ["", place.name]
        for line in place.forward:
            lines += _equation(trace, line, color)
    for line in trace.not_here:
        lines += ["", *textwrap.wrap(f"{line.text}   {line.remark}".rstrip(), 118),
                  "  holds nowhere in this model: something that it needs is not there"]
    for place in trace.places if not trace.why_not_merged else ():
        lines += ["", f"merged: {place.name}"]
        for line in place.merged:
            lines += _equation(trace, line, color)
    if trace.why_not_merged:
        lines += ["", *textwrap.wrap(f"merging: {trace.why_not_merged}", 118)]
    return "\n".join(lines)


def _equation(trace: Trace, line: Computed, color: bool) -> Iterator[str]:
    """An equation, a line for each of its terms, and the model's own result."""
    yield from ("", *textwrap.wrap(line.line.text, 118))
    if line.line.remark:
        yield f"    ({line.line.remark})"
    yield f"    {'term':{WIDTH}}{'shape':18}{'norm':>10}  {'numbers':>10}"
    for term in line.terms[:-1]:
        yield from _row(trace, term.text, term, color)
    yield from _row(trace, f"= {line.line.left}, by hand", line.terms[-1], color)
    yield from _row(trace, f"  {line.line.left}, in the model", Term("", 0, 0, line.model, False), color)
    yield f"    {verdict(line)}"


def _row(trace: Trace, name: str, term: Term, color: bool) -> Iterator[str]:
    role, value = trace.role(term), term.value
    if len(name) >= WIDTH:
        yield from textwrap.wrap(name, 112, initial_indent="    ", subsequent_indent="    ")
        name = ""
    mark = "  * " if role == "trained" else "    "
    text = f"{mark}{name:{WIDTH}}{shape(value):18}{norm(trace, value):>10}  {numbers(trace, value)}"
    paint = {"trained": ORANGE, "frozen": GRAY}.get(role, "") if color else ""
    yield f"{paint}{text}{PLAIN if paint else ''}"
