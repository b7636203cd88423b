"""The house: wings import downwards only, no circles, short files and functions, and a short way to the formula."""

from __future__ import annotations

import ast
import inspect
import io
import runpy
import sys
import textwrap
import tokenize
from pathlib import Path

import pytest
import torch
from helpers import write_csv, write_tiny_model

import minipeft
from minipeft import GPT2LMHeadModel, LoraConfig, inject
from minipeft.commands.train import main
from minipeft.methods.lora import LoRALinear, low_rank_pair

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minipeft"
# From the ground up: a wing may import itself and those before it.
FLOORS = ("errors", "files", "settings", "model", "methods", "data", "training", "tasks", "runs", "report", "explain",
          "check", "commands", "public", "__init__", "__main__")
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 370, 50


# --- walls ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short_enough_to_hold_in_ones_head(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES_OF_A_FILE
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse(text))
            if isinstance(node, functions)}
    assert not {name: lines for name, lines in long.items() if lines > MOST_LINES_OF_A_FUNCTION}


def module_of(file):
    """minipeft/methods/lora.py -> ("methods", "lora"); a wing's own __init__ is its name alone."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def imports_of(file):
    """The modules of this package that a file imports, wherever in it, those for type hints left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_hints = {node for branch in ast.walk(tree) if isinstance(branch, ast.If)
                 and ast.unparse(branch.test) == "TYPE_CHECKING" for node in ast.walk(branch)}
    modules = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in for_hints and (node.module or "").startswith("minipeft"):
            package = tuple(node.module.split(".")[1:])
            for name in node.names:
                inside = (*package, name.name)
                found.add(inside if inside in modules else package or ("__init__",))
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_wing_imports_only_itself_and_what_lies_below(file):
    own = module_of(file)[0]
    above = {imported for imported in imports_of(file) if FLOORS.index(imported[0]) > FLOORS.index(own)}
    assert not above


def test_no_two_files_import_each_other_by_any_way_round():
    imports = {module_of(file): imports_of(file) for file in PACKAGE.rglob("*.py")}
    while leaves := {module for module, wanted in imports.items() if not wanted & imports.keys() - {module}}:
        imports = {module: wanted for module, wanted in imports.items() if module not in leaves}
    assert not imports, "these stand in a circle"


# --- the way to the formula -------------------------------------------------------------------------------------------

def own_calls(call):
    """The minipeft functions that run during `call()`: {code: the chain of those that led to it, itself the last}."""
    chains = {}

    def on_event(frame, event, _):
        if event == "call" and PACKAGE in Path(frame.f_code.co_filename).parents and frame.f_code not in chains:
            chain, above = [], frame
            while above is not None:
                if PACKAGE in Path(above.f_code.co_filename).parents:
                    chain.insert(0, above.f_code)
                above = above.f_back
            chains[frame.f_code] = chain

    sys.setprofile(on_event)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {code: chain for code, chain in chains.items() if not code.co_name.startswith("<")}


def lines_of_code(code):
    """Number of source lines of a function that hold code: no blank lines, comments or docstring."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    source = io.StringIO(textwrap.dedent(inspect.getsource(code)))
    lines, previous = set(), tokenize.NEWLINE
    for token in tokenize.generate_tokens(source.readline):
        docstring = token.type == tokenize.STRING and previous == tokenize.INDENT
        if token.type not in skipped and not docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
        previous = token.type
    return len(lines)


def names(codes):
    return [code.co_name for code in codes]


def file_of(code):
    return Path(code.co_filename).name


SPEED_ONLY = {"linear.py", "dropout.py", "low_rank.py"}


def test_from_inject_to_the_line_that_makes_a_and_to_the_formula(tiny_config):
    """At most 5 calls one inside the other, and 120 lines of code with every helper that runs on the way.

    Left out are functions that only refuse, which are called check..., and what they call; and the files that do for
    speed what torch's own functions do.
    """
    model = GPT2LMHeadModel(tiny_config)
    config, layer = LoraConfig(), LoRALinear(torch.nn.Linear(6, 8), 2, 4, LoraConfig())
    injecting, forward = own_calls(lambda: inject(model, config)), own_calls(lambda: layer(torch.randn(2, 6)))
    assert names(injecting[low_rank_pair.__code__]) == ["inject", "plan", "__init__", "low_rank_pair"]
    assert names(forward[LoRALinear.forward.__code__]) == ["forward"]
    on_the_way = {code for code, chain in {**injecting, **forward}.items()
                  if not any(name.startswith("check") for name in names(chain)) and file_of(code) not in SPEED_ONLY}
    assert sum(map(lines_of_code, on_the_way)) <= 120, {code.co_name: lines_of_code(code) for code in on_the_way}
    chain = {file_of(code) for code in [*injecting[low_rank_pair.__code__], LoRALinear.forward.__code__]}
    assert chain == {"__init__.py", "lora.py"}


def run_script(name):
    """One of scripts/ to its end, as `python scripts/NAME` runs it."""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    assert ended.value.code is None


def test_from_the_script_to_the_line_that_makes_a_and_to_the_formula(tmp_path, monkeypatch, tiny_config):
    """At most 8 calls one inside the other from the command's main on, and 250 lines with `inject`'s helpers."""
    arguments = ["--model", write_tiny_model(tmp_path / "model"), "--dataset", write_csv(tmp_path / "films.csv"),
                 "--epochs", 1, "--max-length", 16, "--output", tmp_path / "adapter", "--results-dir", tmp_path]
    monkeypatch.setattr(sys, "argv", ["train.py", "--full", "--device", "cpu", *map(str, arguments)])
    calls = own_calls(lambda: run_script("train.py"))
    way_in = calls[main.__code__][:-1]
    assert names(way_in) == ["script", "start", "run", "_import_and_call"]
    calls = {code: chain[len(way_in):] for code, chain in calls.items()}
    to_a, to_formula = calls[low_rank_pair.__code__], calls[LoRALinear.forward.__code__]
    base = {code for code in to_formula if file_of(code) == "gpt2.py"}  # the model itself is no detour
    assert names(to_a) == ["main", "finetune", "prepare", "inject", "plan", "__init__", "low_rank_pair"]
    assert len(to_a) <= 8 and len(set(to_formula) - base) <= 8
    model, config = GPT2LMHeadModel(tiny_config), LoraConfig()
    inject_alone = own_calls(lambda: inject(model, config))
    inject_alone = {code for code, chain in inject_alone.items()
                    if not any(name.startswith("check") for name in names(chain))}
    on_the_way = {*to_a, *to_formula, *inject_alone} - base
    assert sum(map(lines_of_code, on_the_way)) <= 250, {code.co_name: lines_of_code(code) for code in on_the_way}


def test_the_line_counter_counts_code_only():
    def example(a,
                b):
        """A docstring
        of two lines."""
        # a comment

        text = """two
        lines"""
        return a, b, text  # the signature's two lines, the string's two and this one

    assert lines_of_code(example.__code__) == 5


def test_the_package_lies_where_these_tests_look():
    assert Path(minipeft.__file__).parent == PACKAGE
