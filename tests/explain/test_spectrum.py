"""spectrum.py: singular values and effective ranks of updates that are known, and accuracies of a model that is cut."""

from __future__ import annotations

import pytest
import torch
from helpers import write_tiny_model
from models import CASES, assert_same_tensors, build, copies, perturb

from minipeft import GPT2ForSequenceClassification, LoraConfig, get_tokenizer, inject, save_adapter
from minipeft.data.examples import Examples
from minipeft.errors import ConfigError, InjectionError
from minipeft.explain.spectrum import Update, accuracies, as_text, draw, spectrum_of, updates_of
from minipeft.explain.trace import fresh
from minipeft.methods.injection import active_injections
from minipeft.tasks.classification import Classification


def update_of(values):
    """An update that has these singular values, of a W of ones."""
    values = torch.tensor(values, dtype=torch.float64)
    return Update("h.0.attn.c_attn", torch.ones(5, len(values)), torch.eye(5, len(values)).double(), values,
                  torch.eye(len(values)).double())


@pytest.mark.parametrize(("values", "expected"), [
    ([3.0, 0, 0, 0], 1), ([2.0, 2, 0, 0], 2), ([1.0, 1, 1, 1], 4), ([0.0, 0, 0], 0),
    ([3.0, 1], 4 / 3**0.75)])  # exp of the entropy of 3/4 and 1/4
def test_the_effective_rank_of_known_singular_values(values, expected):
    assert update_of(values).effective_rank == pytest.approx(expected)


def test_cutting_keeps_the_largest():
    update = update_of([4.0, 2.0, 1.0])
    for rank, kept in ((0, []), (1, [4]), (2, [4, 2]), (None, [4, 2, 1])):
        added = update.cut(rank) - update.weight
        assert added.diagonal()[:len(kept)].tolist() == pytest.approx(kept)
        assert int(added.count_nonzero()) == len(kept)


@pytest.mark.parametrize("case", ["lora", "dora everywhere, biases", "vera", "ia3"])
def test_an_update_is_what_merging_adds(tiny_config, case):
    model = perturb(inject(build(GPT2ForSequenceClassification, tiny_config), CASES[case]))
    before, layers = copies(model), active_injections(model)[0].layers
    updates = updates_of(model)
    assert [update.name for update in updates] == list(layers)
    for update in updates:
        torch.testing.assert_close(update.cut(None), layers[update.name].merged()["weight"], atol=1e-6, rtol=1e-6)
        if case == "lora":
            assert len(update.values) == 2
    assert_same_tensors(copies(model), before)


@pytest.mark.parametrize("case", ["head", "bitfit", "houlsby", "prompt", "prefix"])
def test_a_method_that_changes_no_matrix_is_refused(tiny_config, case):
    with pytest.raises(InjectionError, match="changes no matrix"):
        updates_of(inject(build(GPT2ForSequenceClassification, tiny_config), CASES[case]))


def test_the_accuracies_are_those_of_the_cut_model_which_is_whole_again_afterwards(tmp_path):
    tiny = str(write_tiny_model(tmp_path / "tiny"))
    model = perturb(inject(GPT2ForSequenceClassification.from_pretrained(tiny), LoraConfig(r=2)), 0.5)
    task = Classification(get_tokenizer(tiny), ["bad", "good"], 40)
    encoded = task.encode(Examples([f"a film number {i}, {'good' * i}" for i in range(12)], [0, 1] * 6))
    before, updates = copies(model), updates_of(model)
    found = dict(accuracies(model, updates, task, encoded))
    assert list(found) == [0, 1, None]
    cpu = torch.device("cpu")
    assert found[None][0] == task.evaluate(model, encoded, cpu, torch.float32)["accuracy"]
    assert_same_tensors(copies(model), before)
    for layer in active_injections(model)[0].layers.values():
        torch.nn.init.zeros_(layer.lora_B.weight)
    assert found[0][0] == task.evaluate(model, encoded, cpu, torch.float32)["accuracy"]


@pytest.fixture
def adapter(tmp_path):
    """A folder as training leaves it, for the sample's labels."""
    tiny = str(write_tiny_model(tmp_path / "tiny"))
    model, _, _ = fresh(tiny, "lora", {"r": 4})
    save_adapter(model, tmp_path / "adapter", {"task": "classification", "base_model": tiny, "max_length": 30,
                                               "label_names": ["negative", "positive"]})
    return tmp_path / "adapter"


def test_a_folder_s_spectrum_as_tables_and_as_a_picture(adapter, tmp_path):
    found = spectrum_of(adapter)
    text = as_text(found)
    assert list(found.accuracy) == [0, 1, 2, None] and "348 validation reviews" in text
    assert text.count("\n| h.") == len(found.updates) == 8 and "| not cut: 4 |" in text
    draw(found, tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"a \.png or a \.svg file"):
        draw(found, tmp_path / "spectrum.gif")


def test_a_model_with_other_labels_has_a_spectrum_but_no_accuracy(tmp_path):
    tiny = str(write_tiny_model(tmp_path / "tiny"))
    model, _, _ = fresh(tiny, "lora", {})
    save_adapter(model, tmp_path / "adapter", {"task": "classification", "base_model": tiny, "max_length": 30,
                                               "label_names": ["other", "labels"]})
    found = spectrum_of(tmp_path / "adapter")
    assert not found.accuracy and "the sample's reviews have other labels" in as_text(found)
    draw(found, tmp_path / "spectrum.svg")


def test_after_full_fine_tuning_every_matrix_of_the_blocks_has_an_update(tmp_path):
    tiny = str(write_tiny_model(tmp_path / "tiny"))
    model = perturb(GPT2ForSequenceClassification.from_pretrained(tiny))
    updates = updates_of(model, tiny)
    assert len(updates) == 8
    for update in updates:
        torch.testing.assert_close(update.cut(None), model.get_submodule(update.name).weight, atol=1e-5, rtol=1e-5)
    with pytest.raises(InjectionError, match="does not say what it was fine-tuned from"):
        updates_of(model)
