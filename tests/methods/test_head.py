"""Head-only training: the base is a fixed feature extractor, logits = h_last W^T."""

import pytest
import torch
import torch.nn.functional as F

from minipeft import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    HeadConfig,
    inject,
    trainable_parameters,
)
from minipeft.errors import InjectionError

IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 60], [70, 2, 2, 33, 8, 95, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
LABELS = torch.tensor([1, 0])


def sgd(parameters, loss, steps=5):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize(("model_class", "head"), [
    (GPT2ForSequenceClassification, {"score.weight"}),
    (GPT2ForTokenClassification, {"classifier.weight", "classifier.bias"})])
def test_the_head_alone_is_trained_and_nothing_is_replaced(make_model, model_class, head):
    model = make_model(model_class)
    modules = dict(model.named_modules())
    inject(model, HeadConfig())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == head
    assert dict(model.named_modules()) == modules


def test_logits_are_the_last_real_tokens_feature_times_the_head(make_model):
    model = inject(make_model(GPT2ForSequenceClassification), HeadConfig())
    features = model.transformer(IDS, MASK)
    expected = torch.stack((features[0, 6], features[1, 3])) @ model.score.weight.T
    torch.testing.assert_close(model(IDS, MASK), expected)


def test_training_on_features_computed_once_gives_the_same_head_as_training_the_model(make_model):
    model = inject(make_model(GPT2ForSequenceClassification), HeadConfig()).train()
    with torch.no_grad():
        features = model.transformer(IDS, MASK)[torch.arange(2), torch.tensor([6, 3])]
    W = model.score.weight.detach().clone().requires_grad_()
    start = W.detach().clone()
    sgd([model.score.weight], lambda: F.cross_entropy(model(IDS, MASK), LABELS))
    sgd([W], lambda: F.cross_entropy(features @ W.T, LABELS))
    assert (W - start).abs().max() > 1e-2
    torch.testing.assert_close(model.score.weight, W, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        again = model.transformer(IDS, MASK)[torch.arange(2), torch.tensor([6, 3])]
    assert torch.equal(again, features)


def test_a_step_worked_out_by_hand(make_model):
    model = inject(make_model(GPT2ForSequenceClassification), HeadConfig())
    W, h = model.score.weight.detach().clone(), model.transformer(IDS[:1])[0, -1].detach()
    sgd([model.score.weight], lambda: F.cross_entropy(model(IDS[:1]), LABELS[:1]), steps=1)
    error = torch.softmax(W @ h, dim=0) - torch.tensor([0.0, 1.0])              # d loss / d logits
    torch.testing.assert_close(model.score.weight, W - 0.1 * torch.outer(error, h), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_class", [GPT2LMHeadModel, GPT2Model])
def test_a_model_without_a_classification_head_is_refused_and_left_as_it_was(make_model, model_class):
    model = make_model(model_class)
    with pytest.raises(InjectionError, match=f"{model_class.__name__} has no classification head to train"):
        inject(model, HeadConfig())
    assert all(p.requires_grad for p in model.parameters())
    assert not model.__dict__.get("_injections")


@pytest.mark.parametrize("K", [1, 2, 5])
def test_trained_parameters_equal_the_closed_forms_at_gpt2s_size(K):
    for model_class, trained in ((GPT2ForSequenceClassification, 768 * K), (GPT2ForTokenClassification, 768 * K + K)):
        with torch.device("meta"):
            model = model_class(GPT2Config(num_labels=K))
        assert trainable_parameters(inject(model, HeadConfig())).trainable == trained
