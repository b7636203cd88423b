"""BitFit trains what is added, never what is multiplied by; its variant trains the LayerNorms."""

import pytest
import torch

from minipeft import (
    BitFitConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    inject,
    trainable_parameters,
)
from minipeft.methods import bitfit

IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 60], [70, 2, 2, 33, 8, 95, 1]])
BIASES = {f"h.{i}.{name}.bias" for i in (0, 1) for name in (
    "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")} | {"ln_f.bias"}
LAYER_NORMS = {f"{name}.{kind}" for name in ("h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f")
               for kind in ("weight", "bias")}
HEADS = {GPT2Model: set(), GPT2LMHeadModel: set(), GPT2ForSequenceClassification: {"score.weight"},
         GPT2ForTokenClassification: {"classifier.weight", "classifier.bias"}}


@pytest.mark.parametrize(("train", "expected"), [("bias", BIASES), ("layer_norm", LAYER_NORMS)])
@pytest.mark.parametrize("model_class", HEADS)
def test_these_tensors_are_trained_and_no_module_is_replaced(make_model, model_class, train, expected):
    model = make_model(model_class)
    modules = dict(model.named_modules())
    inject(model, BitFitConfig(train=train))
    prefix = "" if model_class is GPT2Model else "transformer."
    assert {name for name, p in model.named_parameters() if p.requires_grad} == (
        {prefix + name for name in expected} | HEADS[model_class])
    assert dict(model.named_modules()) == modules


def test_the_biases_are_the_default():
    assert BitFitConfig() == BitFitConfig(train="bias")


def test_a_step_worked_out_by_hand(make_model):
    """The loss sum(g * y) with y = n(x) * weight + bias has the gradient 14 g for the bias of ln_f, over 14 tokens."""
    model = inject(make_model(GPT2Model), BitFitConfig())
    g, before = torch.arange(24.0), {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    (model(IDS) * g).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.ln_f.bias, before["ln_f.bias"] - 0.5 * 14 * g)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == BIASES


def test_the_variants_step_worked_out_by_hand(make_model):
    """... and sum over the tokens of g * n(x) for the weight of ln_f, n(x) the normalised vector."""
    model = inject(make_model(GPT2Model), BitFitConfig(train="layer_norm"))
    g, seen = torch.arange(24.0), []
    model.ln_f.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    (model(IDS) * g).sum().backward()
    x = seen[0]
    normalised = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(model.ln_f.weight.grad, g * normalised.sum(dim=(0, 1)), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(model.ln_f.bias.grad, 14 * g)


def test_the_tied_embedding_and_the_positions_stay_frozen(make_model):
    for train in ("bias", "layer_norm"):
        model = inject(make_model(GPT2LMHeadModel), BitFitConfig(train=train))
        assert not model.transformer.wte.weight.requires_grad and not model.transformer.wpe.weight.requires_grad
        assert model.lm_head.weight is model.transformer.wte.weight


# --- counts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("L", "C", "m"), [(2, 24, None), (3, 12, 20), (1, 36, 50)])
def test_trained_parameters_equal_the_closed_forms(L, C, m):
    sizes = GPT2Config(vocab_size=97, n_positions=40, n_embd=C, n_layer=L, n_head=3, n_inner=m)
    count = {train: trainable_parameters(inject(GPT2LMHeadModel(sizes), BitFitConfig(train=train))).trainable
             for train in ("bias", "layer_norm")}
    assert count["bias"] == L * (7 * C + (m or 4 * C)) + C
    assert count["layer_norm"] == L * 4 * C + 2 * C
    if m is None:
        assert count["bias"] == L * 11 * C + C


@pytest.mark.parametrize(("train", "trained"), [("bias", 102_144), ("layer_norm", 38_400)])
def test_counts_at_gpt2s_size(train, trained):
    for model_class, head in ((GPT2LMHeadModel, 0), (GPT2ForSequenceClassification, 2 * 768)):
        with torch.device("meta"):
            model = model_class(GPT2Config.official("gpt2"))
        assert trainable_parameters(inject(model, BitFitConfig(train=train))).trainable == trained + head
    assert f"{trained:,}" in bitfit.__doc__
