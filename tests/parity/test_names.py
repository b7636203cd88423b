"""docs/names.md: the names in its columns "here" and "peft" are there, and those of one row are names of one thing."""

import ast
import dataclasses
import inspect
import re
from typing import NamedTuple

import pytest
import torch
from documents import ROOT, tables
from parity_helpers import load_theirs, move, silent, write_pair

import minipeft
from minipeft.methods import METHODS
from minipeft.methods.injection import active_injections
from minipeft.training.loop import TrainingConfig

peft = pytest.importorskip("peft")
optimizers = pytest.importorskip("peft.optimizers")
HERE = {**{name: getattr(minipeft, name) for name in minipeft.__all__}, "TrainingConfig": TrainingConfig}
THERE = {**vars(peft), "create_loraplus_optimizer": optimizers.create_loraplus_optimizer}
SMALL = {"vera": {"r": 4}, "prompt": {"num_virtual_tokens": 3}, "ptuning": {"num_virtual_tokens": 3},
         "prefix": {"num_virtual_tokens": 3}, "adapter": {"bottleneck_size": 5}}


class Row(NamedTuple):
    """A row of the table, cell by cell."""

    of: str
    paper: str
    here: str
    peft: str
    loralib: str


[TABLE] = tables((ROOT / "docs/names.md").read_text(encoding="utf-8"))
ROWS = [Row(*cells) for cells in TABLE]


def code(cell):
    """The expressions in a cell."""
    return [ast.parse(text, mode="eval").body for text in re.findall(r"`([^`]+)`", cell)]


def of_peft(row):
    """The expressions in the column of peft, which may say that they are those of this library."""
    return code(row.here) if row.peft.startswith("the same") else code(row.peft)


def is_field(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Config")


def is_function(node):
    return isinstance(node, ast.Call) and not is_field(node)


def is_tensor(node):
    return isinstance(node, (ast.Attribute, ast.Subscript))


def test_every_expression_on_the_page_is_of_a_kind_that_is_looked_at():
    for row in ROWS:
        assert code(row.here) or row.here == "-", row
        for node in [*code(row.here), *of_peft(row)]:
            assert is_field(node) or is_function(node) or is_tensor(node) or isinstance(node, ast.Name)
        assert {node.id for node in code(row.here) if isinstance(node, ast.Name)} <= HERE.keys()
        assert row.loralib, row


# --- fields -----------------------------------------------------------------------------------------------------------

def defaults(config_class):
    """Field -> what it is where nothing is given."""
    return {field.name: field.default_factory() if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(config_class)}


@pytest.mark.parametrize(("column", "names"), [(lambda row: code(row.here), HERE), (of_peft, THERE)],
                         ids=["here", "peft"])
def test_a_field_has_the_default_that_the_page_says(column, names):
    found = [node for row in ROWS for node in column(row) if is_field(node)]
    assert len(found) > 30
    for node in found:
        has = defaults(names[ast.unparse(node.func)])
        for keyword in node.keywords:
            assert has[keyword.arg] == ast.literal_eval(keyword.value), ast.unparse(node)


def test_every_field_of_every_method_is_on_the_page():
    found = {(ast.unparse(node.func), keyword.arg) for row in ROWS for node in code(row.here) if is_field(node)
             for keyword in node.keywords}
    for method in METHODS.values():
        name = method.config_class.__name__.replace("Dora", "Lora")           # whose fields DoraConfig has
        assert {(name, field) for field in defaults(method.config_class)} <= found, name


def test_what_peft_is_said_not_to_have_it_has_under_no_such_name():
    for row in ROWS:
        if row.peft == "-":
            assert not [ast.unparse(node) for node in code(row.here) if is_field(node)
                        and ast.unparse(node.func) in vars(peft)]


# --- models -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """One base model in both libraries."""
    return write_pair(tmp_path_factory.mktemp("base"), "SEQ_CLS")


OF = list(dict.fromkeys(row.of for row in ROWS))


@pytest.fixture(scope="module")
def models(pair, tmp_path_factory):
    """What a row is of -> the names that its expressions may use, here and in peft, and whether values are the same.

    peft has loaded what was saved here. Where a network makes the prompt no file holds it: then both models are new.
    """
    found = {}
    for of in OF:
        method, *more = of.replace("all", "lora").split(", ")
        values = {**SMALL.get(method, {}), **{key: ast.literal_eval(value) for key, value in
                                              (word.split("=") for word in more)}}
        ours = move(minipeft.inject(pair.ours(), METHODS[method].config_class(**values)))
        layers = list(active_injections(ours)[0].layers.values())
        found[of] = {"model": ours, "layer": (layers or [None])[0]}, {}, False
        if hasattr(peft, METHODS[method].config_class.__name__) or method == "dora":
            made_by_a_network = method == "ptuning" or "prefix_projection" in values
            if made_by_a_network:
                with silent():
                    theirs = peft.get_peft_model(pair.theirs(), getattr(peft, METHODS[method].config_class.__name__)(
                        task_type="SEQ_CLS", **values))
            else:
                folder = tmp_path_factory.mktemp(method)
                minipeft.save_adapter(ours, folder)
                theirs = load_theirs(pair, folder)
            found[of] = found[of][0], {"model": theirs, "layer": theirs.transformer.h[0].attn.c_attn}, \
                not made_by_a_network
    return found


@pytest.mark.parametrize("of", OF)
def test_a_function_is_there_and_takes_what_the_page_gives_it(models, of):
    ours, theirs, _ = models[of]
    for column, names in ((lambda row: code(row.here), {**HERE, **ours}), (of_peft, {**THERE, **theirs})):
        for node in [node for row in ROWS if row.of == of for node in column(row) if is_function(node)]:
            function = eval(ast.unparse(node.func), dict(names))
            inspect.signature(function).bind(*node.args, **{word.arg: word.value for word in node.keywords})


@pytest.mark.parametrize("of", OF)
def test_two_tensors_in_a_row_are_the_same(models, of):
    ours, theirs, same_values = models[of]
    for row in [row for row in ROWS if row.of == of]:
        here = [node for node in code(row.here) if is_tensor(node)]
        there = [node for node in of_peft(row) if is_tensor(node)]
        values = [as_tensor(node, ours) for node in here]
        for node, value in zip(there, values):
            other = as_tensor(node, theirs)
            other = other.T if other.shape != value.shape and "(in, out)" in row.peft else other
            assert other.shape == value.shape, row
            assert torch.equal(other, value) or not same_values, row
        assert len(there) in (0, len(here)), row


def as_tensor(node, names):
    """What an expression stands for in a model."""
    return torch.as_tensor(eval(ast.unparse(node), dict(names)))
