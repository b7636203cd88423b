"""anatomy.py: the printed tree and the tables say what an injected model really trains."""

from __future__ import annotations

import pytest
from helpers import write_tiny_model

from minipeft.errors import ConfigError
from minipeft.explain.anatomy import config_of, counts_table, injected, render, shapes_only, tree
from minipeft.methods import METHODS
from minipeft.methods.injection import trainable_parameters
from minipeft.model.config import GPT2Config


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", ["gpt2", "gpt2-xl"])
def test_every_method_can_be_counted_at_official_sizes_without_any_weights(method, size):
    model = injected(GPT2Config.official(size), method)
    assert all(parameter.is_meta for parameter in model.parameters())
    count = trainable_parameters(model)
    assert 0 < count.trainable <= count.total and count.total >= {"gpt2": 124e6, "gpt2-xl": 1557e6}[size]


@pytest.mark.parametrize("method", METHODS)
def test_the_first_line_of_the_tree_counts_the_whole_model(tiny_config, method):
    model = injected(tiny_config, method)
    lines = tree(model)
    assert (lines[0].trained, lines[0].count) == trainable_parameters(model)
    assert "(score) Linear" in [line.text.strip() for line in lines]


def test_blocks_that_are_alike_are_folded_and_a_block_that_differs_is_shown(tiny_config):
    tiny_config.n_layer = 5
    assert "1 to 4: as 0" in [line.text.strip() for line in tree(shapes_only(tiny_config))]
    one_adapted = injected(tiny_config, "lora", target_modules=["c_attn"], layers_to_transform=[2])
    texts = [line.text.strip() for line in tree(one_adapted)]
    assert {"1: as 0", "(2) Block", "4: as 3"} <= set(texts)
    assert texts.count("(c_attn) LoRALinear") == 1


def test_the_folded_blocks_are_counted(tiny_config):
    lines = tree(injected(tiny_config, "lora", r=2))
    blocks = next(line for line in lines if line.text.strip() == "(h) ModuleList")
    shown = next(line for line in lines if line.text.strip() == "(0) Block")
    folded = next(line for line in lines if line.text.strip() == "1: as 0")
    assert (shown.count + folded.count, shown.trained + folded.trained) == (blocks.count, blocks.trained)


def test_what_is_trained_is_starred_and_colored_and_nothing_else(tiny_config):
    lines = tree(injected(tiny_config, "head"))
    plain, colored = render(lines, color=False), render(lines, color=True)
    starred = [line.split()[0] for line in plain.splitlines() if "*" in line]
    assert starred == ["(model)", "(score)", "weight"]
    assert "\033[" not in plain and colored.count("\033[1;33m") == 3


def test_sizes_are_those_of_a_folder_with_an_official_name_as_wherever_a_model_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_of("gpt2-xl") == config_of("openai-community/gpt2-xl") == GPT2Config.official("gpt2-xl")
    write_tiny_model(tmp_path / "gpt2")
    assert config_of("gpt2").n_layer == 2


def test_a_table_has_a_row_for_each_method_and_a_column_for_each_size(tiny_config):
    rows = counts_table({"tiny": tiny_config, "gpt2": GPT2Config.official("gpt2")}).splitlines()
    assert rows[0] == "| method | tiny | gpt2 |" and [row.split(" | ")[0].strip("| ") for row in rows[2:]] == [*METHODS]
    assert "| head | 48 (" in rows[3] and "1,536 (0.001 %)" in rows[3]


def test_a_field_the_method_does_not_know_is_refused(tiny_config):
    with pytest.raises(ConfigError, match="has no field rank"):
        injected(tiny_config, "lora", rank=4)
