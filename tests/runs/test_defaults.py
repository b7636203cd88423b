"""defaults.py: where a run starts from, and that its docstring says where that differs from a configuration's own."""

from __future__ import annotations

import dataclasses
import re

import pytest
from helpers import ROOT

from minipeft.methods import METHODS, full
from minipeft.runs import defaults
from minipeft.tasks import TASKS
from minipeft.training.loop import TrainingConfig


def test_the_docstring_lists_every_default_that_differs_between_python_and_a_run():
    written = {(method, field): (own, ours) for method, field, own, ours in re.findall(
        r"^    (\w+) +(\w+) +(\S+) +(\S+)  +\S", defaults.__doc__, re.MULTILINE) if method != "method"}
    differ = {}
    for method, found in defaults.DEFAULTS.items():
        own = {field.name: field.default for field in dataclasses.fields(METHODS[method].config_class)}
        differ |= {(method, field): (str(own[field]), str(value)) for field, value in found["method"].items()}
    assert written == differ
    assert all(own != ours for own, ours in differ.values())


def test_every_method_has_a_row_that_makes_its_configurations():
    assert defaults.DEFAULTS.keys() == METHODS.keys()
    for method in METHODS:
        table = defaults.table(method)
        METHODS[method].config(**table["method"])
        TrainingConfig(**table["training"])
        assert set(defaults.DEFAULTS[method]["rates"]) <= set(TASKS) - {"classification"}


@pytest.mark.parametrize(("method", "task", "rate"), [
    ("bitfit", "classification", 2e-3), ("bitfit", "tagging", 6e-3), ("lora", "tagging", 1.5e-3),
    ("prefix", "translation", 1e-1), ("ia3", "translation", 3e-1), ("vera", "summarization", 1e-2),
    ("full", "a user's own", 3e-4)])
def test_a_task_has_its_own_learning_rate_where_one_was_found_and_nothing_else(method, task, rate):
    table = defaults.table(method, task)
    assert table["training"] == {**defaults.DEFAULTS[method]["training"], "learning_rate": rate}
    assert table["method"] == defaults.DEFAULTS[method]["method"]


def test_the_documentation_says_what_few_examples_are():
    text = " ".join((ROOT / "docs" / "usage.md").read_text(encoding="utf-8").split())
    assert f"With fewer than {defaults.FEW_EXAMPLES:,} examples" in text and defaults.PATIENCE_ON_FEW == 3
    assert set(defaults.RATES_ON_FEW) == {"lora", "dora"} and "LoRA and DoRA at a lower rate" in text
    assert all(rate < defaults.table(method)["training"]["learning_rate"]
               for method, rate in defaults.RATES_ON_FEW.items())


def test_the_file_of_full_fine_tuning_says_the_defaults_of_its_step():
    text, config = " ".join(full.__doc__.split()), TrainingConfig()
    assert f"max_grad_norm at most, by default {config.max_grad_norm:g}." in text
    assert f"`weight_decay`, by default {config.weight_decay:g}, for the matrices" in text
    rate = defaults.table("full")["training"]["learning_rate"]
    assert float(re.search(r"--method full` takes (\S+) for classification", text)[1]) == rate
