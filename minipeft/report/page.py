"""A comparison as one HTML page: a table to sort and to filter, and a picture whose axis can be chosen.

The page is a file by itself. It loads nothing, works by keyboard and by touch, and without scripts shows its tables.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from minipeft.files import write_text_file
from minipeft.report.families import (
    FAMILIES,
    Cost,
    family_of,
    forgotten_of,
    in_figures,
    main_of,
    memory_of,
    seconds_of,
)
from minipeft.report.findings import Finding, findings
from minipeft.report.tables import ELSEWHERE, PICTURES, SEEN_ONCE_HEADING
from minipeft.runs.comparison import metric_of, shown_rank, shown_settings
from minipeft.runs.results import BASELINES

TEMPLATE = Path(__file__).with_suffix(".html")
# A row's keys with what the table calls them; numbers are sorted as numbers, and an axis may show them.
COLUMNS = {"name": "method", "quality": "", "interval": "95 % interval", "rank": "rank", "seeds": "seeds",
           "parameters": "trained parameters",
           "seconds": "core seconds per 1,000 examples", "memory": "MiB that training adds", "bytes": "adapter, bytes",
           "forgotten": "forgotten, nats", "extra": "extra time at inference, %", "merges": "merges",
           "settings": "settings"}
AXES = ("parameters", "forgotten", "seconds", "memory", "bytes", "extra")


def write_page(comparison: dict[str, Any], tuning: dict[str, Any], path: Path) -> None:
    """Write the page.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text_file(path, page(comparison, tuning))


def page(comparison: dict[str, Any], tuning: dict[str, Any]) -> str:
    """The page's text."""
    main, (supported, seen) = main_of(comparison["datasets"]), findings(comparison, tuning)
    names = sorted(comparison["datasets"], key=lambda name: (name != main, name))
    datasets = {name: dataset_of(name, comparison["datasets"][name]) for name in names}
    data = {"columns": COLUMNS, "axes": AXES, "families": [family.name for family in FAMILIES], "datasets": datasets}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        data=json.dumps(data).replace("<", "\\u003c"), tables="\n".join(map(_plain_table, datasets.values())),
        tuned=_tuned(comparison["datasets"][main]["terms"]), machine=escape(_machines(comparison["datasets"])),
        findings=_listed("ol", supported) + (f"\n<p>{SEEN_ONCE_HEADING}</p>\n{_listed('ul', seen)}" if seen else ""))


def _listed(kind: str, found: list[Finding]) -> str:
    """A list of findings, each with links to its pictures, which lie beside the page."""
    links = [", ".join(f'<a href="{PICTURES}/{escape(name)}.svg">{escape(name)}</a>' for name in finding.pictures)
             for finding in found]
    items = "\n".join(f"<li>{escape(finding.text)} ({link})</li>" for finding, link in zip(found, links))
    return f"<{kind}>\n{items}\n</{kind}>"


def _tuned(terms: dict[str, Any]) -> str:
    """How settings came about, in a sentence."""
    return ("A learning rate over two decades and, where a method has one, its size were chosen in the same way for "
            "all, on validation examples." if terms["budget"]["tuned"] else "Settings are each method's defaults.")


def _machines(datasets: dict[str, Any]) -> str:
    """With which machine each dataset's costs were measured."""
    found: dict[str, list[str]] = {}
    for name, content in datasets.items():
        machine = content["machine"]
        found.setdefault("{processor}, {instructions}, {cores} cores".format(**machine) if machine else
                         "not measured yet", []).append(name)
    return "; ".join(f"{said} ({', '.join(names)})" for said, names in found.items())


def dataset_of(name: str, content: dict[str, Any]) -> dict[str, Any]:
    """What the page knows of one dataset: its metric and its rows."""
    metric = metric_of(content)
    rows = [_row(method, row, content, "method") for method, row in content["methods"].items()]
    rows += [_row(f"{method}, without the budget", row, content, "best") for method, row in content["best"].items()]
    rows += [{"name": BASELINES.get(key, key), "kind": "baseline", "parameters": 0,
              "quality": in_figures(content, values[metric.key])} for key, values in content["baselines"].items()]
    rows += [{"name": said, "kind": "elsewhere", "quality": in_figures(content, value)}
             for said, value in ELSEWHERE.get(name, ())]
    return {"name": name, "quality": metric.heading + (", %" if metric.share else ""), "rows": rows}


def _row(name: str, row: dict[str, Any], content: dict[str, Any], kind: str) -> dict[str, Any]:
    extra = row["inference"]["extra"]
    scaled = {key: None if row[value] is None else in_figures(content, row[value])
              for key, value in (("quality", "mean"), ("quality_spread", "deviation"))}
    low, high = (in_figures(content, bound) for bound in row["interval_95"]) if row["interval_95"] else (None, None)
    return {
        "name": name, "kind": kind, "family": FAMILIES.index(family_of(name.split(",")[0])), **scaled, "low": low,
        "high": high, "interval": "" if low is None else f"{low:.2f} to {high:.2f}", "rank": shown_rank(row),
        "parameters": row["trained_parameters"],
        **_cost("seconds", seconds_of(row)), **_cost("memory", memory_of(row), 2**20),
        **_cost("forgotten", forgotten_of(row)), "bytes": row["adapter_bytes"]["mean"],
        "extra": None if extra is None else round(100 * extra, 1),
        "merges": row["inference"]["mergeable"], "seeds": len(row["seeds"]),
        "settings": shown_settings(row)}


def _cost(key: str, cost: Cost | None, one: int = 1) -> dict[str, float]:
    """A cost and its deviation, by the page's names; nothing where it was not measured."""
    return {} if cost is None else {key: round(cost.mean / one, 4), f"{key}_spread": round(cost.deviation / one, 4)}


def _plain_table(dataset: dict[str, Any]) -> str:
    """The names and qualities, for a reader without scripts."""
    rows = "".join(f"<tr><td>{escape(row['name'])}</td><td>{row['quality']:.2f}</td></tr>"
                   for row in sorted(dataset["rows"], key=lambda row: -row["quality"]))
    return (f"<h2>{escape(dataset['name'])}</h2><table><thead><tr><th>method</th><th>{escape(dataset['quality'])}</th>"
            f"</tr></thead><tbody>{rows}</tbody></table>")
