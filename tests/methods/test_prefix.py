"""Prefix tuning against its formula: attention(q, [P_k; k], [P_v; v]) in every block."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from minipeft import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    KVCache,
    PrefixTuningConfig,
    inject,
    load_adapter,
    save_adapter,
    trainable_parameters,
)
from minipeft.methods import prefix
from minipeft.methods.injection import active_injections
from minipeft.methods.prefix import PrefixProjection

IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 60], [70, 2, 2, 33, 8, 95, 1]])
H, D = 3, 8


def prefix_of(model):
    return next(iter(active_injections(model)[0].layers.values()))


def written_out(base, table, ids):
    """GPT-2 with a prefix, one head and one query at a time: slots 2i and 2i + 1 of the table are block i's."""
    V, T = len(table), ids.shape[1]
    x = base.wte(ids) + base.wpe(torch.arange(V, V + T))
    for i, block in enumerate(base.h):
        query, key, value = block.attn.c_attn(block.ln_1(x)).split(24, dim=2)
        key = torch.cat((table[:, 2 * i * 24:(2 * i + 1) * 24].expand(len(ids), -1, -1), key), dim=1)
        value = torch.cat((table[:, (2 * i + 1) * 24:(2 * i + 2) * 24].expand(len(ids), -1, -1), value), dim=1)
        attended = torch.zeros_like(x)
        for b in range(len(ids)):
            for head in range(H):
                part = slice(head * D, (head + 1) * D)
                for t in range(T):
                    seen = slice(0, V + t + 1)
                    weights = torch.softmax(key[b, seen, part] @ query[b, t, part] / math.sqrt(D), dim=0)
                    attended[b, t, part] = weights @ value[b, seen, part]
        x = x + block.attn.c_proj(attended)
        x = x + block.mlp(block.ln_2(x))
    return base.ln_f(x)


# --- the formula ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("V", [1, 3])
@pytest.mark.parametrize("projection", [False, True])
@torch.no_grad()
def test_output_equals_attention_written_out(make_model, V, projection):
    torch.manual_seed(0)
    config = PrefixTuningConfig(num_virtual_tokens=V, prefix_projection=projection)
    base, model = make_model(GPT2Model), inject(make_model(GPT2Model), config)
    torch.testing.assert_close(model(IDS), written_out(base, prefix_of(model).encoder(), IDS), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_example_worked_out_by_hand(make_model):
    """Zero keys score 0 against any query. Where the text's keys are zero too, each query spreads its attention evenly:
    over V zero values and the t + 1 values of the text that it sees."""
    model, V = make_model(GPT2Model), 5
    attention = model.h[0].attn
    attention.c_attn.weight[24:48].zero_()                                     # keys
    attention.c_attn.bias[24:48].zero_()
    attention.c_proj.weight.copy_(torch.eye(24))
    attention.c_proj.bias.zero_()
    inject(model, PrefixTuningConfig(num_virtual_tokens=V, init_weights="zero"))
    cache = KVCache(prefix_of(model).keys_and_values(2, torch.float32))
    x = torch.randn(2, 4, 24)
    mask = torch.ones(4, V + 4, dtype=torch.bool).tril(V)
    values = F.linear(x, attention.c_attn.weight[48:], attention.c_attn.bias[48:])
    seen = torch.arange(1, 5)[:, None]
    torch.testing.assert_close(attention(x, mask, cache), values.cumsum(dim=1) / (V + seen), atol=1e-6, rtol=1e-5)


def test_a_zero_start_still_takes_its_share_of_the_softmax(make_model):
    model = make_model(GPT2LMHeadModel)
    base = model(IDS)
    inject(model, PrefixTuningConfig(num_virtual_tokens=3, init_weights="zero"))
    assert torch.equal(prefix_of(model).encoder.weight, torch.zeros(3, 96))
    assert (model(IDS) - base).abs().max() > 1e-3


def test_a_zero_start_of_a_projected_prefix_is_its_last_layers(make_model):
    """As in peft. The network before it is random, so that the last layer has a gradient."""
    model = inject(make_model(GPT2LMHeadModel), PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True,
                                                                   init_weights="zero"))
    encoder = prefix_of(model).encoder
    assert torch.equal(encoder(), torch.zeros(3, 96))
    model(IDS).square().sum().backward()
    assert {name for name, p in encoder.named_parameters() if p.grad.any()} == {"transform.2.weight",
                                                                                "transform.2.bias"}


def test_each_slot_of_the_table_is_the_keys_or_the_values_of_one_block(make_model):
    torch.manual_seed(0)
    model = inject(make_model(GPT2Model), PrefixTuningConfig(num_virtual_tokens=3))
    table = prefix_of(model).encoder.weight
    for i, (key, value) in enumerate(prefix_of(model).keys_and_values(2, torch.float32)):
        for slot, tensor in ((2 * i, key), (2 * i + 1, value)):
            assert tensor.shape == (2, H, 3, D)
            for head in range(H):
                columns = slice(slot * 24 + head * D, slot * 24 + (head + 1) * D)
                assert torch.equal(tensor[0, head], table[:, columns]) and torch.equal(tensor[1], tensor[0])


def test_the_projection_is_two_linear_layers_with_tanh_between():
    made = PrefixProjection(3, 4, 5, 16, torch.device("cpu")).double()
    first, second = (layer for layer in made.modules() if isinstance(layer, nn.Linear))
    inner = torch.tanh(made.embedding.weight @ first.weight.T + first.bias)
    assert made.embedding.weight.shape == (3, 4) and first.weight.shape == (5, 4) and second.weight.shape == (16, 5)
    torch.testing.assert_close(made(), inner @ second.weight.T + second.bias, atol=1e-12, rtol=0)


def test_gradients_of_the_projection_pass_gradcheck_in_float64():
    made = PrefixProjection(2, 3, 4, 6, torch.device("cpu")).double()
    values = {name: p.detach().clone().requires_grad_() for name, p in made.named_parameters()}

    def output(*tensors):
        return torch.func.functional_call(made, dict(zip(values, tensors)), ())

    assert torch.autograd.gradcheck(output, tuple(values.values()))


def test_the_first_token_stands_at_position_v(make_model):
    model = inject(make_model(GPT2Model), PrefixTuningConfig(num_virtual_tokens=5, init_weights="zero"))
    expected = model(IDS)
    with torch.no_grad():
        model.wpe.weight[:5] = torch.nan                                       # positions nothing stands at
        model.wpe.weight[12:] = torch.nan
    assert torch.equal(model(IDS), expected)


def test_on_a_bfloat16_base_the_prefix_is_float32_and_its_keys_bfloat16(make_model):
    model = inject(make_model(GPT2LMHeadModel).bfloat16(), PrefixTuningConfig(num_virtual_tokens=3))
    assert prefix_of(model).encoder.weight.dtype == torch.float32
    model(IDS).float().sum().backward()
    gradient = prefix_of(model).encoder.weight.grad
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.abs().max() > 0


# --- the start and what is kept ---------------------------------------------------------------------------------------

def test_a_prefix_starts_standard_normal_and_decided_by_the_seed(make_model):
    def start(seed):
        model = make_model(GPT2Model)
        torch.manual_seed(seed)
        return prefix_of(inject(model, PrefixTuningConfig())).encoder.weight.detach()

    drawn = start(1)
    assert drawn.shape == (20, 96)
    assert drawn.mean().abs() < 0.1 and drawn.std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(drawn, start(1)) and not torch.equal(drawn, start(2))


def test_a_projections_embeddings_start_standard_normal_and_its_network_uniform():
    torch.manual_seed(0)
    made = PrefixProjection(300, 400, 25, 64, torch.device("cpu"))
    assert made.embedding.weight.std().item() == pytest.approx(1, abs=0.01)
    for layer, bound in ((made.transform[0], 1 / 20), (made.transform[2], 1 / 5)):
        for parameter in layer.parameters():
            assert 0.8 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize(("hidden", "width"), [(None, 24), (7, 7)])
def test_only_the_projected_table_is_stored_and_a_loaded_model_holds_it_plain(make_model, tmp_path, hidden, width):
    config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=hidden)
    model = inject(make_model(GPT2ForSequenceClassification), config)
    assert prefix_of(model).encoder.transform[0].out_features == width
    expected = prefix_of(model).encoder().detach()
    save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(stored) == ["base_model.score.weight", "prompt_embeddings"]
    assert torch.equal(stored["prompt_embeddings"], expected)
    loaded = load_adapter(make_model(GPT2ForSequenceClassification), tmp_path)
    assert torch.equal(prefix_of(loaded).encoder.weight, expected)
    assert not hasattr(prefix_of(loaded).encoder, "transform")
    assert torch.equal(loaded(IDS), model(IDS))


# --- counts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("V", "L", "C", "h"), [(3, 2, 24, 24), (7, 3, 12, 5), (1, 1, 36, 50)])
def test_trained_parameters_equal_the_closed_forms(V, L, C, h):
    def trained(**fields):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=40, n_embd=C, n_layer=L, n_head=3))
        return trainable_parameters(inject(model, PrefixTuningConfig(num_virtual_tokens=V, **fields))).trainable

    assert trained() == trained(init_weights="zero") == 2 * V * L * C
    assert trained(prefix_projection=True, encoder_hidden_size=h) == (
        V * C + C * h + h + 2 * L * C * h + 2 * L * C)


@pytest.mark.parametrize(("name", "trained"), [("gpt2", 368_640), ("gpt2-large", 2 * 20 * 36 * 1280)])
def test_counts_at_the_official_sizes(name, trained):
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config.official(name))
    assert trainable_parameters(inject(model, PrefixTuningConfig())).trainable == trained
    assert "2 * 20 * 12 * 768 = 368,640" in prefix.__doc__
