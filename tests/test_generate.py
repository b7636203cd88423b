"""Generation: the cached loop against the plain one, padding, stopping, sampling, and refused input."""

from __future__ import annotations

import pytest
import torch

from minipeft.errors import ConfigError
from minipeft.generate import generate
from minipeft.gpt2 import GPT2LMHeadModel

LENGTHS = [7, 3, 1, 5]


@pytest.fixture
def model(make_model):
    return make_model(GPT2LMHeadModel)


def greedy_without_cache(model, ids, steps):
    """The textbook loop: read everything again for each token."""
    for _ in range(steps):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return ids


def test_greedy_with_cache_equals_the_loop_without(model, make_ids):
    ids = make_ids(3, 7)
    generated = generate(model, ids, max_new_tokens=33)                           # up to the last position
    assert torch.equal(generated, greedy_without_cache(model, ids, 33))
    assert len(generated[:, 7:].unique()) > 5                                     # not a constant: the test can fail


def test_prompts_padded_on_the_left_continue_as_each_does_alone(model, make_ids, make_mask):
    ids, mask = make_ids(len(LENGTHS), max(LENGTHS)), make_mask(LENGTHS, side="left")
    batch = generate(model, ids, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(batch[:, :7], ids)
    for row, length in enumerate(LENGTHS):
        alone = generate(model, ids[row:row + 1, -length:], max_new_tokens=20)
        assert torch.equal(batch[row, -20:], alone[0, -20:])


def test_a_row_that_ended_repeats_the_end_while_the_others_go_on(model, make_ids):
    ids = make_ids(2, 5)
    free = generate(model, ids, max_new_tokens=20)
    ends, goes_on = free[:, 5:].tolist()
    eos = next(token for token in ends if token not in goes_on)
    end = ends.index(eos) + 1
    stopped = generate(model, ids, max_new_tokens=20, eos_token_id=eos)
    assert stopped[:, 5:].tolist() == [ends[:end] + [eos] * (20 - end), goes_on]
    assert ends[end:] != [eos] * (20 - end)                                       # left alone, it would have gone on


def test_generation_ends_once_every_row_has(model, make_ids):
    ids = make_ids(2, 5)
    free = generate(model, ids[:1], max_new_tokens=20)[0, 5:].tolist()
    eos = free[6]
    end = free.index(eos) + 1
    both = generate(model, ids[:1].repeat(2, 1), max_new_tokens=20, eos_token_id=eos)
    assert both[:, 5:].tolist() == [free[:end]] * 2


def test_an_end_token_inside_the_prompt_ends_nothing(model, make_ids):
    ids = make_ids(1, 5)
    absent = next(token for token in range(97) if token not in generate(model, ids, max_new_tokens=9))
    prompt = torch.cat((torch.tensor([[absent]]), ids), dim=1)
    assert generate(model, prompt, max_new_tokens=3, eos_token_id=absent).shape == (1, 9)


def test_sampling_repeats_with_the_seed_and_changes_without(model, make_ids):
    ids = make_ids(2, 5)
    first, again, other = (generate(model, ids, max_new_tokens=15, temperature=1.0,
                                    generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampling_draws_from_softmax_of_logits_over_temperature(model, make_ids):
    ids, draws = make_ids(1, 5), 20_000
    sampled = generate(model, ids.repeat(draws, 1), max_new_tokens=1, temperature=0.7,
                       generator=torch.Generator().manual_seed(0))[:, -1]
    expected = torch.softmax(model(ids)[0, -1] / 0.7, dim=-1)
    # Five standard deviations of a binomial frequency.
    assert ((sampled.bincount(minlength=97) / draws - expected).abs() < 5 * (expected / draws).sqrt() + 1e-4).all()


def test_a_temperature_near_zero_is_greedy(model, make_ids):
    ids = make_ids(2, 5)
    cold = generate(model, ids, max_new_tokens=15, temperature=1e-6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cold, generate(model, ids, max_new_tokens=15))


def test_no_new_tokens_gives_the_prompts_back(model, make_ids):
    assert torch.equal(generate(model, make_ids(2, 5), max_new_tokens=0), make_ids(2, 5))


def test_more_tokens_than_positions_is_refused_before_any_work(model, make_ids):
    with pytest.raises(ConfigError, match="30 prompt tokens and 11 new ones exceed the 40 positions"):
        generate(model, make_ids(1, 30), max_new_tokens=11)


def test_padding_on_the_right_is_refused(model, make_ids, make_mask):
    with pytest.raises(ConfigError, match="padded on the left"):
        generate(model, make_ids(4, 7), attention_mask=make_mask(LENGTHS), max_new_tokens=3)
