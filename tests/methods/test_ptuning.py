"""P-tuning: the prompt is what an MLP or an LSTM makes of trained embeddings; only the prompt is kept."""

import re

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

from minipeft import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PromptEncoderConfig,
    inject,
    load_adapter,
    save_adapter,
    trainable_parameters,
)
from minipeft.methods import ptuning
from minipeft.methods.injection import active_injections
from minipeft.methods.ptuning import PromptEncoder
from minipeft.methods.virtual_tokens import Table

IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 60], [70, 2, 2, 33, 8, 95, 1]])
LSTM = {"encoder_reparameterization_type": "LSTM"}


def encoder(V=3, width=4, hidden=5, **fields):
    torch.manual_seed(0)
    config = PromptEncoderConfig(num_virtual_tokens=V, **fields)
    return PromptEncoder(width, hidden, config, torch.device("cpu")).double()


def prompt_of(model):
    return next(iter(active_injections(model)[0].layers.values())).encoder


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def lstm_direction(x, lstm, layer, reverse):
    """One direction of one layer, written out: (V, inputs) -> (V, h). The gates lie in the order i, f, g, o."""
    W, U, b, c = (getattr(lstm, f"{name}_l{layer}{'_reverse' if reverse else ''}")
                  for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = state = torch.zeros(U.shape[1], dtype=x.dtype)
    outputs = {}
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        i, f, g, o = (W @ x[t] + b + U @ h + c).chunk(4)
        state = torch.sigmoid(f) * state + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(state)
        outputs[t] = h
    return torch.stack([outputs[t] for t in range(len(x))])


# --- the formula ------------------------------------------------------------------------------------------------------

def test_an_example_worked_out_by_hand():
    made = PromptEncoder(2, 1, PromptEncoderConfig(num_virtual_tokens=2), torch.device("cpu"))
    first, second, third = (made.mlp_head[i] for i in (0, 2, 4))
    with torch.no_grad():
        made.embedding.weight.copy_(torch.tensor([[1, 2], [-3, 1]]))
        for layer, weight, bias in ((first, [[1, 1]], [1]), (second, [[2]], [-1]), (third, [[1], [-1]], [0, 10])):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
    # [1, 2]: 1 + 2 + 1 = 4, 2 * 4 - 1 = 7, [7, 3].   [-3, 1]: -3 + 1 + 1 = -1, relu 0, -1, relu 0, [0, 10].
    assert torch.equal(made(), torch.tensor([[7.0, 3.0], [0.0, 10.0]]))


def test_the_mlp_is_three_linear_layers_with_relu_between():
    made = encoder()
    E, layers = made.embedding.weight, [layer for layer in made.modules() if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [(5, 4), (5, 5), (4, 5)]
    inner = linear(linear(E, layers[0]).clamp(min=0), layers[1]).clamp(min=0)
    torch.testing.assert_close(made(), linear(inner, layers[2]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_lstm_reads_the_embeddings_both_ways_and_an_mlp_narrows_what_it_says(layers):
    made = encoder(encoder_num_layers=layers, **LSTM)
    x = made.embedding.weight
    for layer in range(layers):
        x = torch.cat([lstm_direction(x, made.lstm, layer, reverse) for reverse in (False, True)], dim=1)    # (V, 2h)
    first, second = (layer for layer in made.mlp_head if isinstance(layer, nn.Linear))
    assert first.weight.shape == (10, 10) and second.weight.shape == (4, 10)
    torch.testing.assert_close(made(), linear(linear(x, first).clamp(min=0), second), atol=1e-12, rtol=0)


@pytest.mark.parametrize("fields", [{}, LSTM], ids=["MLP", "LSTM"])
def test_gradients_pass_gradcheck_in_float64(fields):
    made = encoder(V=2, width=3, hidden=2, **fields)
    values = {name: p.detach().clone().requires_grad_() for name, p in made.named_parameters()}

    def output(*tensors):
        return torch.func.functional_call(made, dict(zip(values, tensors)), ())

    assert torch.autograd.gradcheck(output, tuple(values.values()))


@pytest.mark.parametrize("fields", [{}, LSTM], ids=["MLP", "LSTM"])
def test_the_base_model_reads_what_the_encoder_makes_before_the_text(make_model, fields):
    base = make_model(GPT2Model)
    model = inject(make_model(GPT2Model), PromptEncoderConfig(num_virtual_tokens=3, **fields))
    embeddings = torch.cat((prompt_of(model)().expand(2, 3, 24), base.wte(IDS)), dim=1)
    torch.testing.assert_close(model(IDS), base(inputs_embeds=embeddings)[:, 3:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("fields", [{}, LSTM], ids=["MLP", "LSTM"])
def test_the_embeddings_start_standard_normal_and_the_network_uniform(fields):
    made = encoder(V=300, width=400, hidden=25, **fields)
    assert made.embedding.weight.std().item() == pytest.approx(1, abs=0.01)
    linears = [layer for layer in made.modules() if isinstance(layer, nn.Linear)]
    bounds = {p: layer.in_features**-0.5 for layer in linears for p in layer.parameters()}
    bounds |= {p: 1 / 5 for p in made.lstm.parameters()} if fields else {}
    assert len(bounds) == len(list(made.parameters())) - 1
    for parameter, bound in bounds.items():
        assert 0.8 * bound < parameter.abs().max() <= bound


def test_dropout_acts_between_the_lstms_layers_in_training_only():
    made = encoder(encoder_dropout=0.5, **LSTM)
    assert made.lstm.dropout == 0.5
    assert not torch.equal(made.train()(), made()) and torch.equal(made.eval()(), made())


def test_the_width_of_the_encoder_is_the_models_unless_told_otherwise(make_model):
    for hidden, expected in ((None, 24), (7, 7)):
        model = inject(make_model(GPT2Model), PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=hidden))
        assert prompt_of(model).mlp_head[0].out_features == expected
        assert not any(isinstance(module, nn.LSTM) for module in model.modules())


# --- what is kept -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fields", [{}, LSTM, {**LSTM, "encoder_dropout": 0.5}], ids=["MLP", "LSTM", "dropout"])
@pytest.mark.parametrize("training", [False, True])
def test_only_the_prompt_is_stored_and_a_loaded_model_holds_a_plain_table(make_model, tmp_path, fields, training):
    model = inject(make_model(GPT2LMHeadModel), PromptEncoderConfig(num_virtual_tokens=3, **fields))
    expected, logits = prompt_of(model)().detach(), model(IDS)
    save_adapter(model.train(training), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert list(stored) == ["prompt_embeddings"]
    torch.testing.assert_close(stored["prompt_embeddings"], expected, atol=1e-6, rtol=1e-5)
    loaded = load_adapter(make_model(GPT2LMHeadModel), tmp_path)
    assert isinstance(prompt_of(loaded), Table)
    assert torch.equal(prompt_of(loaded).weight, stored["prompt_embeddings"])
    assert trainable_parameters(loaded).trainable == 3 * 24
    torch.testing.assert_close(loaded(IDS), logits, atol=1e-6, rtol=1e-6)


# --- counts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("V", "C", "h"), [(3, 24, 24), (7, 24, 5), (1, 12, 40)])
def test_trained_parameters_equal_the_closed_forms(V, C, h):
    def trained(**fields):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=40, n_embd=C, n_layer=1, n_head=3))
        config = PromptEncoderConfig(num_virtual_tokens=V, encoder_hidden_size=h, **fields)
        return trainable_parameters(inject(model, config)).trainable

    assert trained() == V * C + C * h + h * h + h * C + 2 * h + C
    assert trained(encoder_num_layers=9) == trained()                          # the LSTM's, and the LSTM's alone
    for n in (1, 2, 3):
        narrowing = (4 * h * h + 2 * h) + (2 * h * C + C)
        assert trained(encoder_num_layers=n, **LSTM) == (
            V * C + 8 * h * (C + h + 2) + (n - 1) * 8 * h * (3 * h + 2) + narrowing)


def test_the_count_at_gpt2s_size():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config.official("gpt2"))
    trained = trainable_parameters(inject(model, PromptEncoderConfig())).trainable
    assert trained == 20 * 768 + 3 * 768 * 768 + 3 * 768 == 1_787_136


def test_dropout_within_an_lstm_of_one_layer_does_nothing_and_torch_warns_in_the_words_of_the_docstring():
    words = re.search(r'torch warns: "(.*?)"', " ".join(ptuning.__doc__.split()))[1]
    with pytest.warns(UserWarning, match=re.escape(words)):
        made = encoder(**LSTM, encoder_num_layers=1, encoder_dropout=0.5)
    assert torch.equal(made.train()(), made.eval()())
