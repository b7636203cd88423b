"""What the tests of whole runs share: a tiny model on disk, runs of a second, and the models that they train."""

from __future__ import annotations

import pytest
from helpers import write_csv, write_tiny_model

from minipeft.runs.plan import Options
from minipeft.tasks import classification
from minipeft.training import loop


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def options(tiny_model, tmp_path, monkeypatch):
    """options(method, **changes): a run of a second on a tiny model and forty rows, writing below tmp_path."""
    monkeypatch.delenv("MINIPEFT_DATA", raising=False)
    write_csv(tmp_path / "films.csv")

    def make(method="lora", training_values=None, **changes):
        training = {"epochs": 3, "batch_size": 4, "learning_rate": 2e-2, **(training_values or {})}
        return Options(**{"method": method, "model": str(tiny_model), "dataset": str(tmp_path / "films.csv"),
                          "precision": "fp32", "max_length": 48, "output": str(tmp_path / "output" / method),
                          "results_dir": str(tmp_path / "results"), "training_values": training, **changes})

    return make


@pytest.fixture
def trained_model(monkeypatch):
    """A list that will hold the model of each training, as training left it."""
    models = []
    train = loop.train

    def noting_train(model, *arguments, **named):
        models.append(model)
        return train(model, *arguments, **named)

    monkeypatch.setattr(loop, "train", noting_train)
    return models


@pytest.fixture
def no_work(monkeypatch):
    """Training or testing anything fails the test."""
    monkeypatch.setattr(loop, "train", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr(classification, "predict_logits", lambda *a, **k: pytest.fail("tested"))
