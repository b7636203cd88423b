"""commands/options.py: options made from a configuration class, and what the command line set of them."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

import pytest

from minipeft.commands.options import Parser, add_dataclass_options, add_method_options, given, new_parser, options_of
from minipeft.errors import ConfigError
from minipeft.settings import POSITIVE_INTEGER, Settings, setting


@dataclass
class Recipe(Settings):
    """One field of each kind that a command line can set, and two that it cannot."""

    size: int = setting(8, "how much, in %", POSITIVE_INTEGER)
    rate: float = setting(0.5, "how fast")
    names: str | list[str] | None = setting(None, "which ones; default the first")
    blocks: int | list[int] | None = setting(None, "where; default all")
    shares: dict[str, float] = setting({}, "JSON: name -> share")
    warm: bool = setting(False, "whether warm")
    start: bool | str = setting(True, "from where", choices=(True, False, "middle"))
    inner: int = setting(3, "not offered", option=False)
    kind: str = setting("fixed", init=False)


def parsed(*options):
    parser = Parser(prog="program")
    add_dataclass_options(parser.add_argument_group("recipe"), Recipe, {"rate": 0.25, "names": "all"})
    return given(parser.parse_args([str(option) for option in options]), Recipe)


@pytest.mark.parametrize(("options", "expected"), [
    ((), {}), (("--size", 2), {"size": 2}), (("--rate", 2), {"rate": 2.0}), (("--rate", "1e-3"), {"rate": 0.001}),
    (("--names", "a"), {"names": ["a"]}), (("--names", "a.b, c_d"), {"names": ["a.b", "c_d"]}),
    (("--names", r"a\.\d+"), {"names": r"a\.\d+"}), (("--names", "all-linear"), {"names": "all-linear"}),
    (("--blocks", 1), {"blocks": 1}), (("--blocks", "1,2"), {"blocks": [1, 2]}),
    (("--shares", '{"a": 0.5}'), {"shares": {"a": 0.5}}), (("--start", "false"), {"start": False}),
    (("--start", "middle"), {"start": "middle"}), (("--warm", "true"), {"warm": True}), (("--warm",), {"warm": True}),
    (("--warm", "--size", 3), {"size": 3, "warm": True}), (("--warm", "Yes"), {"warm": True}),
    (("--warm", 1), {"warm": True}), (("--warm", "no"), {"warm": False}), (("--warm", 0), {"warm": False}),
    (("--blocks", "0, 1"), {"blocks": [0, 1]}), (("--blocks", "-1"), {"blocks": -1})], ids=str)
def test_what_is_given_has_the_type_of_its_field_and_nothing_else_is_there(options, expected):
    found = parsed(*options)
    assert found == expected and [type(value) for value in found.values()] == [
        type(value) for value in expected.values()]


@pytest.mark.parametrize(("options", "message"), [
    (("--size", "x"), "argument --size: 'x' is not int"),
    (("--blocks", "1,x"), "argument --blocks: '1,x' is not int or list[int] or None"),
    (("--warm", "maybe"), "argument --warm: 'maybe' is neither true nor false"),
    (("--shares", "[1]"), "argument --shares: '[1]' is not a JSON object: write it like '{\"c_attn\": 4}', in single "
                          "quotes"),
    (("--names", "a", "b"), "unexpected 'b' after --names: separate by commas, without blanks, as in c_attn,c_proj"),
    (("--blocks", "0", "1"), "unexpected '1' after --blocks: separate by commas, without blanks, as in c_attn,c_proj"),
    (("--size", "1", "2"), "unexpected '2': --help lists what the command takes"),
    (("--inner", 1), "unknown option --inner: --help lists the options"),
    (("--kind", "x"), "unknown option --kind: --help lists the options"),
    (("--rat", 2), "unknown option --rat: did you mean --rate?")])
def test_what_cannot_be_read_is_refused(options, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parsed(*options)


def test_help_shows_choices_and_the_defaults_that_count(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "how much, in %; default 8" in shown and "how fast; default 0.25" in shown
    assert "from where (True,False,middle); default True" in shown and "JSON: name -> share; default none" in shown
    assert "which ones; default all --blocks" in shown  # the one that counts
    assert "where; default all --shares" in shown and "not offered" not in shown


@pytest.mark.parametrize(("command", "method", "option"), [
    ([], "lora", "--lora-alpha"), (["--model", "x", "--method", "prefix"], "prefix", "--prefix-projection"),
    (["--method=full", "--r", "3"], "full", None), (["--method", "nothing"], "nothing", None)])
def test_a_method_that_is_named_anywhere_adds_its_options(command, method, option):
    parser = Parser()
    assert add_method_options(parser, command, also=("nothing",)) == method
    shown = parser.format_help()
    assert (f"method {method}:" in shown) == (option is not None) and (option or "") in shown


def test_a_method_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="unknown method 'nothing': use full, head"):
        add_method_options(Parser(), ["--method", "nothing"])


def test_options_have_what_was_asked_for_and_their_own_defaults_for_the_rest():
    arguments = argparse.Namespace(method="lora", dataset="x.csv", other=1, **{
        "LoraConfig.r": 2, "LoraConfig.bias": None, "TrainingConfig.epochs": 1, "PrefixTuningConfig.r": 3})
    options = options_of(arguments)
    assert (options.method, options.dataset, options.precision) == ("lora", "x.csv", "auto")
    assert (options.method_values, options.training_values) == ({"r": 2}, {"epochs": 1})
    with pytest.raises(ConfigError, match="test_size must be a positive integer"):
        options_of(argparse.Namespace(test_size=0))


@pytest.mark.parametrize(("program", "usage", "example"), [
    ("minipeft train", "usage: minipeft train [-h]", "    minipeft train --epochs 1"),
    ("train.py", "usage: train.py [-h]", "    python scripts/train.py --epochs 1")])
def test_help_names_the_program_as_it_was_started(program, usage, example):
    shown = new_parser(program, "Train:\n\n    minipeft train --epochs 1\n").format_help().splitlines()
    assert shown[0] == usage and example in shown
