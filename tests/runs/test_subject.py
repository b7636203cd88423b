"""subject.py: what cells are thought to take, before any of them has been run."""

from __future__ import annotations

import pytest

from minipeft.runs.budget import Budget, Cell
from minipeft.runs.plan import Options
from minipeft.runs.subject import Estimate, Subject

SIZES = {"train": 100, "validation": 10, "test": 50}
WHOLE = {"train": 1000, "validation": 100, "test": 500}


def beforehand(kind, *values):
    terms = {"dataset": {"name": "films", "sizes": SIZES}}
    subject = Subject("films", Options(), Budget(epochs=2), terms, WHOLE, [], 1.0)
    return Estimate({"films": subject}).beforehand(Cell("films", "lora", 0, kind, values))


def test_what_has_no_budget_learns_from_all_examples_and_is_tested_as_the_others_are():
    final, best = beforehand("final"), beforehand("best")
    testing = 20 + 50 / 1000 * Budget.test_core_seconds  # and starting, and measuring what is forgotten
    assert best - testing == pytest.approx(10 * (final - testing))


def test_more_epochs_and_validations_take_longer():
    assert beforehand("final") < beforehand("best", ("epochs", 3)) < beforehand(
        "best", ("epochs", 3), ("evaluations_per_epoch", 4))
