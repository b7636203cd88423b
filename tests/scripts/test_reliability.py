"""scripts/reliability.py: a kind holds if a test of it passed and none failed; results/ has one made of these tests."""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
from helpers import read_json

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reliability():
    specification = importlib.util.spec_from_file_location("reliability", ROOT / "scripts" / "reliability.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_kind_holds_if_a_test_of_it_passed_and_none_failed(reliability):
    counted = reliability.Counted()
    counted.ended = {"0: whole": Counter(passed=2), "7: broken": Counter(passed=3, failed=1),
                     "8: not tried": Counter(skipped=1)}
    found = reliability.results_of(counted)
    assert found["counts"] == {"kinds_tried": 3, "kinds_held": 1, "tests_passed": 5}
    assert min(found) == "counts"  # the file, whose keys are sorted, begins with them
    assert [found["kinds"][kind]["held"] for kind in counted.ended] == [True, False, False]
    assert found["sections"]["0: data loss"] == {"tried": 1, "held": 1}
    assert found["sections"]["7: the command line"] == {"tried": 1, "held": 0}


def test_the_file_names_the_kinds_that_the_tests_hold():
    marked = {kind for path in (ROOT / "tests").rglob("test_*.py")
              for kind in re.findall(r'mark\.kind\("([^"]+)"\)', path.read_text(encoding="utf-8"))}
    assert marked - {"..."} == set(read_json(ROOT / "results" / "reliability.json")["kinds"])


def test_every_kind_names_a_section(reliability):
    assert {kind.split(":")[0] for kind in read_json(ROOT / "results" / "reliability.json")["kinds"]} == set(
        reliability.SECTIONS)
