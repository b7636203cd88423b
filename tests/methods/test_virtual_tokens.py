"""Virtual tokens, whichever method makes them: never seen outside, right under padding, caching and generation."""

import dataclasses

import pytest
import torch
import torch.nn as nn

from minipeft import (
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    KVCache,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    disable_adapter,
    generate,
    inject,
)
from minipeft.errors import ConfigError
from minipeft.methods.injection import positions_left
from minipeft.model import gpt2

HEADED = [GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification]
LENGTHS = [7, 3, 1, 5]
V = 4
CONFIGS = {"prompt": PromptTuningConfig(num_virtual_tokens=V), "ptuning": PromptEncoderConfig(num_virtual_tokens=V),
           "prefix": PrefixTuningConfig(num_virtual_tokens=V),
           "prefix, projected": PrefixTuningConfig(num_virtual_tokens=V, prefix_projection=True)}
every_method = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def make_tuned(make_model):
    """make_tuned(cls, config): a model with virtual tokens that matter, the same at each call."""

    def make(model_class, config):
        torch.manual_seed(0)
        model = inject(make_model(model_class), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    return make


def greedy_without_cache(model, ids, steps):
    """The textbook loop: read everything again for each token."""
    for _ in range(steps):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return ids


# --- what goes in and comes out ---------------------------------------------------------------------------------------

@every_method
@pytest.mark.parametrize(("model_class", "shape"), [
    (GPT2Model, (3, 7, 24)), (GPT2LMHeadModel, (3, 7, 97)), (GPT2ForSequenceClassification, (3, 2)),
    (GPT2ForTokenClassification, (3, 7, 2))])
def test_outputs_are_as_long_as_the_text_and_differ_from_the_bases(make_tuned, make_ids, model_class, shape, config):
    model, ids = make_tuned(model_class, config), make_ids(3, 7)
    logits = model(ids)
    assert logits.shape == shape
    with disable_adapter(model):
        assert (model(ids) - logits).abs().max() > 1e-2


@every_method
@pytest.mark.parametrize("model_class", HEADED)
def test_embeddings_given_instead_of_ids_give_the_same(make_tuned, make_ids, make_mask, model_class, config):
    model, ids, mask = make_tuned(model_class, config), make_ids(4, 7), make_mask(LENGTHS)
    embeddings = model.transformer.wte(ids)
    assert torch.equal(model(inputs_embeds=embeddings, attention_mask=mask), model(ids, mask))
    assert torch.equal(model(attention_mask=mask, input_ids=ids), model(ids, attention_mask=mask))


@every_method
@pytest.mark.parametrize("model_class", HEADED)
def test_positions_given_are_counted_after_the_virtual_tokens(make_tuned, make_ids, model_class, config):
    model, ids = make_tuned(model_class, config), make_ids(3, 7)
    for position_ids in (torch.arange(7), torch.arange(7)[None], torch.arange(7).expand(3, 7)):
        torch.testing.assert_close(model(ids, position_ids=position_ids), model(ids), atol=1e-6, rtol=1e-6)
    shifted = model(ids, position_ids=torch.arange(7) + 1)
    assert (shifted - model(ids)).abs().max() > 1e-3


@every_method
def test_a_texts_tokens_see_the_virtual_tokens_and_only_earlier_ones_of_the_text(make_tuned, make_ids, config):
    model, ids = make_tuned(GPT2LMHeadModel, config), make_ids(2, 7)
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] + 1) % 97
    difference = (model(changed) - model(ids)).abs().amax(dim=(0, 2))
    assert difference[:4].max() == 0 and difference[4:].min() > 0
    before = model(ids)
    with torch.no_grad():
        first = next(p for name, p in model.named_parameters() if "encoder" in name)
        first.add_(torch.randn_like(first))
    assert ((model(ids) - before).abs().amax(dim=2) > 1e-4).all()


@every_method
def test_all_positions_but_the_virtual_tokens_are_the_texts(make_tuned, make_ids, config):
    model = make_tuned(GPT2LMHeadModel, config)
    assert positions_left(model) == 36
    assert model(make_ids(1, 36)).shape == (1, 36, 97)
    with pytest.raises(ConfigError, match="41 tokens do not fit this model: it has 40 positions"):
        model(make_ids(1, 37))
    with disable_adapter(model):
        assert positions_left(model) == 40 and model(make_ids(1, 40)).shape == (1, 40, 97)


@every_method
@pytest.mark.parametrize(("model_class", "shape"), [
    (GPT2ForSequenceClassification, (3, 2)), (GPT2LMHeadModel, (3, 1, 97))])
def test_the_largest_number_that_fits_leaves_one_position(make_tuned, make_ids, model_class, shape, config):
    model = make_tuned(model_class, dataclasses.replace(config, num_virtual_tokens=39))
    logits = model(make_ids(3, 1))
    assert logits.shape == shape and logits.isfinite().all()
    with pytest.raises(ConfigError, match="41 tokens do not fit this model: it has 40 positions"):
        model(make_ids(3, 2))


@every_method
def test_20_virtual_tokens_and_a_text_of_5_have_the_positions_masks_and_caches_of_the_docstrings(make_tuned, make_ids,
                                                                                                 config, monkeypatch):
    model = make_tuned(GPT2LMHeadModel, dataclasses.replace(config, num_virtual_tokens=20))
    ids, cache = make_ids(1, 5), KVCache()
    virtual = [] if isinstance(config, PrefixTuningConfig) else list(range(20))
    positions, masks = [], []
    model.transformer.wpe.register_forward_pre_hook(lambda _, args: positions.append(args[0].tolist()))
    seen = gpt2.attention_mask_for
    monkeypatch.setattr(gpt2, "attention_mask_for", lambda mask, *sizes: masks.append(mask) or seen(mask, *sizes))
    model(ids, torch.tensor([[1, 1, 1, 0, 0]]))
    assert positions[-1] == virtual + [20, 21, 22, 23, 24]
    assert masks[-1].tolist() == [[1] * 20 + [1, 1, 1, 0, 0]]
    model(ids, torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 2]]))
    assert positions[-1] == [virtual + [20, 20, 20, 21, 22]]
    assert masks[-1].tolist() == [[1] * 20 + [0, 0, 1, 1, 1]]
    model(ids, torch.tensor([[0, 0, 1, 1, 1]]))
    assert positions[-1] == virtual + [20, 21, 22, 23, 24]
    assert model(ids, cache=cache).shape[1] == 5 and masks[-1] is None and cache.length == 25
    assert model(ids[:, :1], torch.ones(1, 6), cache=cache).shape[1] == 1 and cache.length == 26
    assert positions[-1] == [25] and masks[-1].shape == (1, 26)


# --- padding and pooling ----------------------------------------------------------------------------------------------

@every_method
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_class", HEADED)
def test_a_text_alone_and_in_a_padded_batch_of_mixed_lengths_agree(make_tuned, make_ids, make_mask, model_class, side,
                                                                   config):
    model, ids, mask = make_tuned(model_class, config), make_ids(len(LENGTHS), max(LENGTHS)), make_mask(LENGTHS, side)
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0) if side == "left" else None
    together = model(ids, mask, position_ids)
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row:row + 1, real])
        actual = together[row] if model_class is GPT2ForSequenceClassification else together[row, real]
        torch.testing.assert_close(actual, alone[0], atol=1e-5, rtol=1e-5)


@every_method
@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_in_the_padding_and_how_much_changes_nothing(make_tuned, make_ids, make_mask, side, config):
    model, ids, mask = make_tuned(GPT2ForSequenceClassification, config), make_ids(4, 7), make_mask(LENGTHS, side)
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
    expected = model(ids, mask, position_ids)
    other = torch.where(mask.bool(), ids, (ids + 13) % 97)
    torch.testing.assert_close(model(other, mask, position_ids), expected, atol=1e-6, rtol=1e-6)
    pad = (0, 5) if side == "right" else (5, 0)
    wider = [nn.functional.pad(tensor, pad) for tensor in (ids, mask, position_ids)]
    torch.testing.assert_close(model(*wider), expected, atol=1e-5, rtol=1e-5)


@every_method
def test_a_mask_of_ones_is_no_mask_and_the_callers_tensors_are_not_changed(make_tuned, make_ids, config):
    model, ids, mask = make_tuned(GPT2ForSequenceClassification, config), make_ids(3, 7), torch.ones(3, 7)
    positions = torch.arange(7)
    torch.testing.assert_close(model(ids, mask, positions), model(ids), atol=1e-6, rtol=1e-6)
    assert torch.equal(mask, torch.ones(3, 7)) and torch.equal(positions, torch.arange(7))


@every_method
def test_pooling_takes_the_last_real_token_though_the_pad_id_is_a_real_token_too(make_tuned, make_ids, config):
    model, ids = make_tuned(GPT2ForSequenceClassification, config), make_ids(2, 7)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    ids[0, 3:] = 96
    ids[1, 3:] = 96
    logits = model(ids, mask)
    hidden = model.transformer(ids, mask)
    torch.testing.assert_close(logits, torch.stack((hidden[0, 3], hidden[1, 6])) @ model.score.weight.T)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@every_method
def test_the_gradient_of_a_padded_batch_is_the_sum_of_its_texts_gradients(make_tuned, make_ids, make_mask, config):
    def gradients(texts):
        model = make_tuned(GPT2ForSequenceClassification, config).train()
        for text in texts:
            model(*text).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    ids, mask = make_ids(len(LENGTHS), max(LENGTHS)), make_mask(LENGTHS)
    alone = gradients([(ids[row:row + 1, :length],) for row, length in enumerate(LENGTHS)])
    for name, gradient in gradients([(ids, mask)]).items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, alone[name], atol=1e-5, rtol=1e-4)


# --- caching and generation -------------------------------------------------------------------------------------------

@every_method
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 3, 1], [9]], ids=str)
@pytest.mark.parametrize("with_mask", [False, True])
def test_feeding_token_by_token_equals_the_full_forward(make_tuned, make_ids, chunks, with_mask, config):
    model, ids, cache, logits, done = make_tuned(GPT2LMHeadModel, config), make_ids(3, 9), KVCache(), [], 0
    for size in chunks:
        mask = torch.ones(3, done + size, dtype=torch.long) if with_mask else None
        logits.append(model(ids[:, done:done + size], mask, cache=cache))
        done += size
        assert cache.length == V + done
    assert [part.shape[1] for part in logits] == chunks
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids), atol=1e-5, rtol=1e-5)


@every_method
def test_feeding_left_padded_texts_token_by_token_equals_each_text_alone(make_tuned, make_ids, make_mask, config):
    model, ids, mask = make_tuned(GPT2LMHeadModel, config), make_ids(4, 7), make_mask(LENGTHS, side="left")
    positions, cache = (mask.cumsum(dim=1) - 1).clamp(min=0), KVCache()
    steps = [model(ids[:, t:t + 1], mask[:, :t + 1], positions[:, t:t + 1], cache) for t in range(7)]
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row:row + 1, -length:])[0]
        torch.testing.assert_close(torch.cat(steps, dim=1)[row, -length:], alone, atol=1e-5, rtol=1e-5)


@every_method
def test_greedy_generation_equals_the_loop_without_cache(make_tuned, make_ids, config):
    model, ids = make_tuned(GPT2LMHeadModel, config), make_ids(3, 7)
    generated = generate(model, ids, max_new_tokens=29)                        # up to the last position
    assert torch.equal(generated, greedy_without_cache(model, ids, 29))
    assert len(generated[:, 7:].unique()) > 3                                  # not a constant: the test can fail
    with disable_adapter(model):
        assert not torch.equal(generate(model, ids, max_new_tokens=29), generated)


@every_method
def test_prompts_padded_on_the_left_continue_as_each_does_alone(make_tuned, make_ids, make_mask, config):
    model, ids, mask = make_tuned(GPT2LMHeadModel, config), make_ids(4, 7), make_mask(LENGTHS, side="left")
    batch = generate(model, ids, attention_mask=mask, max_new_tokens=15)
    for row, length in enumerate(LENGTHS):
        alone = generate(model, ids[row:row + 1, -length:], max_new_tokens=15)
        assert torch.equal(batch[row, -15:], alone[0, -15:])


@every_method
def test_generating_more_than_fits_beside_the_virtual_tokens_is_refused_before_any_work(make_tuned, make_ids, config):
    model = make_tuned(GPT2LMHeadModel, config)
    with pytest.raises(ConfigError, match="positions"):
        generate(model, make_ids(1, 30), max_new_tokens=8)                     # 4 + 30 + 8 > 40
    assert generate(model, make_ids(1, 30), max_new_tokens=6).shape == (1, 36)


@every_method
def test_two_caches_do_not_share_anything(make_tuned, make_ids, config):
    model, first, second = make_tuned(GPT2LMHeadModel, config), KVCache(), KVCache()
    expected = model(make_ids(2, 4))
    model(make_ids(2, 4), cache=first)
    model(make_ids(2, 4, seed=1), cache=second)
    assert torch.equal(model(make_ids(2, 4)), expected)
    torch.testing.assert_close(model(make_ids(2, 4)[:, :1], cache=first),
                               model(torch.cat((make_ids(2, 4), make_ids(2, 4)[:, :1]), dim=1))[:, -1:],
                               atol=1e-5, rtol=1e-5)
