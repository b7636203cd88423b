"""features.py: a head is trained on features computed once, and everything else on texts."""

from __future__ import annotations

import pytest
import torch
from helpers import write_datasets

from minipeft.data.batches import BucketedBatches
from minipeft.runs import features
from minipeft.runs.features import FeatureBatches, HeadOnFeatures
from minipeft.runs.finetune import finetune, prepare
from minipeft.runs.plan import choose
from minipeft.runs.trained import load_finetuned


def test_a_head_trained_on_features_computed_once_is_the_head_trained_the_long_way(options, tmp_path, monkeypatch):
    """Without dropout the two differ by nothing but the order in which batches are made of texts of like lengths."""
    runs, computed, pooled_features = {}, [], features.pooled_features

    def noting_features(*arguments, progress):
        computed.append(progress.split()[0])
        return pooled_features(*arguments, progress=progress)

    monkeypatch.setattr(features, "pooled_features", noting_features)
    for recompute in (False, True):
        options_of_run = options("head", recompute_features=recompute, dropout=0.0, training_values={
            "batch_size": 64, "epochs": 5}, output=str(tmp_path / str(recompute)))
        runs[recompute] = finetune(options_of_run)
    cached, recomputed = (load_finetuned(tmp_path / str(recompute))[0].score.weight
                          for recompute in (False, True))
    torch.testing.assert_close(cached, recomputed, atol=1e-5, rtol=1e-4)
    assert runs[False]["metrics"]["test"]["accuracy"] == runs[True]["metrics"]["test"]["accuracy"]
    assert computed == ["training", "validation"]


@pytest.mark.parametrize(("method", "changes", "cached"), [
    ("head", {}, True), ("head", {"recompute_features": True}, False), ("lora", {}, False),
    ("head", {"dataset": "wnut_17"}, False), ("head", {"dropout": 0.1}, False)],
    ids=["head", "recomputed", "lora", "head, tagging", "dropout"])
def test_features_take_the_place_of_texts_where_they_are_all_that_training_needs(options, tmp_path, method, changes,
                                                                                 cached):
    write_datasets(tmp_path / "data")
    data = {"data_dir": str(tmp_path / "data")} if "dataset" in changes else {}
    run = prepare(choose(options(method, **changes, **data)))
    kinds = (HeadOnFeatures, FeatureBatches) if cached else (type(run.model), BucketedBatches)
    assert (type(run.material.model), type(run.material.batches)) == kinds
    assert (run.material.model is run.model) is not cached
    assert (run.material.seconds > 0) is cached


def test_a_validation_on_features_finds_what_one_on_texts_finds(options):
    found = {}
    for recompute in (False, True):
        run = prepare(choose(options("head", recompute_features=recompute)))
        found[recompute] = run.material.validate()
    assert found[False].keys() == found[True].keys()
    assert found[False]["loss"] == pytest.approx(found[True]["loss"], abs=1e-5)
    assert found[False]["confusion_matrix"] == found[True]["confusion_matrix"]


def test_an_epoch_of_features_has_each_once_with_its_label_and_resumes_anywhere():
    batches = FeatureBatches(torch.arange(20.0).view(10, 2), list(range(10)), batch_size=3)
    whole = list(batches.epoch(4))
    assert sorted(torch.cat([batch.labels for batch in whole]).tolist()) == list(range(10))
    for batch in whole:
        assert torch.equal(batch.input_ids, torch.stack((2.0 * batch.labels, 2.0 * batch.labels + 1), dim=1))
    rest = list(batches.epoch(4, first=2))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(whole[2:], rest, strict=True))
