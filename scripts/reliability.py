"""Count the kinds of reported faults that hold, and write results/reliability.json:

    python scripts/reliability.py

Each test that holds one carries `@pytest.mark.kind("section: name")`; a section is one of issue 14, which collected the
reports. A kind holds if at least one of its tests ran here and none of them failed. Needs the dev packages.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from minipeft.commands.start import run
from minipeft.errors import ConfigError
from minipeft.files import write_json_file
from minipeft.training.hardware import machine, versions

SECTIONS = {"0": "data loss", "1": "one parameter, two adapters", "2": "wrappers", "3": "gradient flags",
            "4": "torch.compile", "5": "hooks, transforms, precision, zeros", "6": "adapters in public",
            "7": "the command line", "8": "CUDA without a GPU"}


class Counted:
    """A pytest plugin: how the tests of each kind ended."""

    def __init__(self) -> None:
        self.kind_of: dict[str, str] = {}
        self.ended: dict[str, Counter] = {}
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for item in items:
            if mark := item.get_closest_marker("kind"):
                self.kind_of[item.nodeid] = mark.args[0]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":  # a skip or an error shows before or after the call
            self.ended.setdefault(self.kind_of[report.nodeid], Counter())[report.outcome] += 1
            if report.failed:
                self.failed.append(report.nodeid)


def results_of(counted: Counted) -> dict[str, Any]:
    """What the file says: the counts first, then each kind."""
    kinds = {}
    for kind, ended in counted.ended.items():
        kinds[kind] = {"held": bool(ended["passed"]) and not ended["failed"], **ended}
    sections = {}
    for number, name in SECTIONS.items():
        held = [entry["held"] for kind, entry in kinds.items() if kind.startswith(f"{number}:")]
        sections[f"{number}: {name}"] = {"tried": len(held), "held": sum(held)}
    counts = {"kinds_tried": len(kinds), "kinds_held": sum(entry["held"] for entry in kinds.values()),
              "tests_passed": sum(ended["passed"] for ended in counted.ended.values())}
    return {"counts": counts, "sections": sections, "kinds": kinds, "failed": counted.failed, "machine": machine(),
            "versions": versions()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/reliability.json"), help="default %(default)s")
    arguments = parser.parse_args()
    try:
        import pytest
    except ImportError as error:
        raise ConfigError("counting needs pytest: pip install 'minipeft[dev]'") from error
    counted = Counted()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as under `python -m pytest`: tests start processes
    ended = pytest.main(["-q", "-m", "kind"], plugins=[counted])
    if ended not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):  # stopped: what ran is not all
        return int(ended)
    results = results_of(counted)
    write_json_file(arguments.output, results)
    held, tried = results["counts"]["kinds_held"], results["counts"]["kinds_tried"]
    print(f"{held} of {tried} kinds hold; wrote {arguments.output}")
    return int(held < tried)


if __name__ == "__main__":
    run(main)
