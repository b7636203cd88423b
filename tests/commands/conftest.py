"""What the tests of commands share: a tiny model, a folder of their own, and a way to call a script."""

from __future__ import annotations

import pytest
from helpers import ScriptRunner, write_csv, write_tiny_model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test works in a folder of its own that holds films.csv, so that default paths are harmless."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINIPEFT_DATA", raising=False)
    write_csv("films.csv")
    return tmp_path


@pytest.fixture
def script(monkeypatch, capsys):
    return ScriptRunner(monkeypatch, capsys)
