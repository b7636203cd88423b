"""pictures.py: every method can be drawn, and the picture shows what is trained."""

from __future__ import annotations

import pytest

from minipeft.errors import ConfigError, OutputError
from minipeft.explain import pictures
from minipeft.explain.anatomy import injected
from minipeft.methods import METHODS
from minipeft.methods.injection import active_injections

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_drawn_and_every_layer_it_adds_has_a_look(tmp_path, tiny_config, method):
    model = injected(tiny_config, method)
    pictures.draw(model, method, tmp_path / "block.svg")
    picture = (tmp_path / "block.svg").read_text()
    assert picture.startswith("<?xml") and pictures.TRAINED in picture
    assert {type(layer) for layer in active_injections(model)[0].layers.values()} <= pictures.PARTS.keys()
    assert [file.name for file in tmp_path.iterdir()] == ["block.svg"]


def shapes_in(path, color):
    return path.read_text().count(f"fill: {color}")


@pytest.mark.parametrize(("method", "values", "trained"), [
    ("full", {}, 9), ("head", {}, 1), ("bitfit", {}, 8), ("bitfit", {"train": "layer_norm"}, 4),
    ("lora", {"target_modules": ["c_attn"]}, 3), ("lora", {"target_modules": "all-linear"}, 9),
    ("ia3", {}, 3), ("adapter", {}, 5), ("adapter", {"architecture": "parallel"}, 3), ("prefix", {}, 7),
    ("prompt", {}, 4), ("vera", {"target_modules": ["c_attn"]}, 3)])
def test_as_many_shapes_are_in_the_color_of_training_as_there_are_trained_parts(tmp_path, tiny_config, method, values,
                                                                                 trained):
    pictures.draw(injected(tiny_config, method, **values), method, tmp_path / "block.svg")
    assert shapes_in(tmp_path / "block.svg", pictures.TRAINED) == trained + 1  # the legend's


def test_a_png_is_a_png(tmp_path, tiny_config):
    pictures.draw(injected(tiny_config, "lora"), "lora", tmp_path / "block.png")
    assert (tmp_path / "block.png").read_bytes().startswith(b"\x89PNG")


def test_another_kind_of_file_is_refused_before_anything_is_written(tmp_path, tiny_config):
    with pytest.raises(ConfigError, match=r"a \.png or a \.svg file, not 'block.gif'"):
        pictures.draw(injected(tiny_config, "lora"), "lora", tmp_path / "block.gif")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path, tiny_config):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        pictures.draw(injected(tiny_config, "lora"), "lora", tmp_path / "file" / "block.png")
