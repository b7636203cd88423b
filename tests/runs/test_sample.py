"""What a newcomer tries first: `make train` with the bundled sample, and the documentation's own sentences."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers import ROOT, load

from minipeft.commands import predict as command
from minipeft.data import datasets
from minipeft.model.hub import MINI_FOLDER
from minipeft.runs import inference
from minipeft.runs.finetune import finetune
from minipeft.runs.plan import Options
from minipeft.tasks.classification import predict_logits

pytestmark = [pytest.mark.slow, pytest.mark.kind("7: what make train trains on the sample works"),
              pytest.mark.skipif(not (MINI_FOLDER / "model.safetensors").is_file(), reason="no bundled model")]


@pytest.fixture(scope="module")
def results_and_model(tmp_path_factory):
    """What scripts/train.py --method lora does where IMDb cannot be had: its results, and the model it leaves."""
    folder = tmp_path_factory.mktemp("sample")
    results = finetune(Options(model="mini", dataset="sample", device="cpu", precision="fp32",
                               output=folder / "adapter", results_dir=folder / "results"))
    return results, inference.load(folder / "adapter", Options(device="cpu", precision="fp32"))


def logits_of(trained, texts):
    return predict_logits(trained.model, [trained.task.tokenizer.encode(text) for text in texts], trained.device,
                          trained.precision)


def examples():
    """(what documentation shows as a sentence to predict, its true label), the positive one first."""
    shown = re.search(r'scripts/predict\.py "(.+)" "(.+)"', (ROOT / "docs/usage.md").read_text(encoding="utf-8"))
    in_help = re.search(r'minipeft predict "(.+)" "(.+)"', command.__doc__)
    return [(text, label) for found in (shown, in_help) for text, label in zip(found.groups(), (1, 0))]


def test_four_fifths_of_the_test_split_are_right(results_and_model):
    test = results_and_model[0]["metrics"]["test"]
    assert test["accuracy"] >= 0.8 and test["examples"] == len(load("sample").test)
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    shown = re.search(r"LoRA gets (\d+) % right", text)
    assert abs(100 * test["accuracy"] - int(shown[1])) <= 3


def test_nine_tenths_of_the_plain_reviews_to_be_validated_are_right(results_and_model):
    lines = (datasets.SAMPLE_FOLDER / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    plain = [row for row in map(json.loads, lines) if row["kind"] == "plain"]
    predicted = logits_of(results_and_model[1], [row["text"] for row in plain]).argmax(dim=1)
    assert (predicted == torch.tensor([row["label"] for row in plain])).float().mean() >= 0.88


def test_the_documentations_sentences_are_judged_right_with_margin(results_and_model):
    texts, labels = zip(*examples())
    assert len(texts) == 4
    probabilities = logits_of(results_and_model[1], texts).softmax(dim=1)
    assert probabilities[range(4), list(labels)].min() >= 0.8, list(zip(texts, probabilities[:, 1].tolist()))


def test_the_validation_loss_does_not_rise_from_the_first_validation_on(results_and_model):
    results = results_and_model[0]
    losses = [point["validation_loss"] for point in results["curve"]]
    assert min(losses) < losses[0] - 0.02 and max(losses) < losses[0] + 0.02
    assert results["metrics"]["best_validation"]["loss"] == min(losses)


def test_it_is_as_sure_as_it_is_right(results_and_model):
    """The expected calibration error in ten bins: how far confidence and accuracy are apart."""
    validation = load("sample").validation
    probabilities = logits_of(results_and_model[1], validation.texts).softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    right = (predicted == torch.tensor(validation.labels)).float()
    bins = (confidence * 10).long().clamp(max=9)
    error = sum((bins == number).float().mean() * (confidence - right)[bins == number].mean().abs()
                for number in bins.unique())
    assert error <= 0.1
