"""Generation: the cached loop against the plain one, padding, stopping, sampling, and refused input."""

from __future__ import annotations

import pytest
import torch

from minipeft.errors import ConfigError
from minipeft.model.gpt2 import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model
from minipeft.model.kv_cache import KVCache
from minipeft.tasks.decoding import generate, stream

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


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-39, 1e-300])
def test_a_temperature_near_zero_is_greedy(model, make_ids, temperature):
    ids = make_ids(2, 5)
    cold = generate(model, ids, max_new_tokens=15, temperature=temperature, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cold, generate(model, ids, max_new_tokens=15))


def test_top_k_draws_from_the_k_likeliest_and_in_their_proportions(model, make_ids):
    ids, draws = make_ids(1, 5), 20_000
    sampled = generate(model, ids.repeat(draws, 1), max_new_tokens=1, temperature=1.0, top_k=4,
                       generator=torch.Generator().manual_seed(0))[:, -1]
    best = model(ids)[0, -1].topk(4)
    assert set(sampled.tolist()) == set(best.indices.tolist())
    expected = torch.softmax(best.values, dim=0)
    found = sampled.bincount(minlength=97)[best.indices] / draws
    assert ((found - expected).abs() < 5 * (expected / draws).sqrt()).all()


def test_top_p_draws_from_the_fewest_tokens_that_have_so_much_probability(model, make_ids):
    ids = make_ids(1, 5)
    probabilities, order = torch.softmax(model(ids)[0, -1], dim=0).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    for top_p, fewest, draws in ((0.001, 1, 100), (0.2, 2, 5_000), (0.5, 5, 20_000)):
        sampled = generate(model, ids.repeat(draws, 1), max_new_tokens=1, temperature=1.0, top_p=top_p,
                           generator=torch.Generator().manual_seed(0))[:, -1]
        kept = order[before < top_p]
        assert len(kept) >= fewest
        assert set(sampled.tolist()) == set(kept.tolist())
        expected = probabilities[:len(kept)] / probabilities[:len(kept)].sum()
        found = sampled.bincount(minlength=97)[kept] / draws
        assert ((found - expected).abs() < 5 * (expected / draws).sqrt()).all()


def test_top_k_of_one_is_greedy(model, make_ids):
    ids = make_ids(2, 5)
    assert torch.equal(generate(model, ids, max_new_tokens=9, temperature=2.0, top_k=1),
                       generate(model, ids, max_new_tokens=9))


def log_probability(model, prompt, continuation):
    ids = torch.cat((prompt, continuation))[None]
    steps = model(ids)[0, len(prompt) - 1:-1].log_softmax(dim=1)
    return steps.gather(1, continuation[:, None]).sum().item()


def test_beams_as_many_as_there_are_continuations_find_the_likeliest(tiny_config, make_ids):
    tiny_config.vocab_size = 6
    torch.manual_seed(3)
    model = GPT2LMHeadModel(tiny_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    prompt = torch.tensor([1, 4, 2])
    found = generate(model, prompt[None], max_new_tokens=3, num_beams=36)[0, 3:]
    every = torch.cartesian_prod(*[torch.arange(6)] * 3)
    best = max(every, key=lambda continuation: log_probability(model, prompt, continuation))
    assert torch.equal(found, best)


def test_a_cache_with_room_gives_what_one_without_gives_and_forks_stay_apart(model, make_ids):
    ids = make_ids(2, 12)
    with torch.no_grad():
        cache, whole = KVCache(), model(ids)
        logits = [model(ids[:, step:step + 1], cache=cache) for step in range(8)]
        fork = KVCache(list(cache.layers))
        other = model((ids[:, 8:9] + 1) % 97, cache=fork)
        logits += [model(ids[:, step:step + 1], cache=cache) for step in range(8, 12)]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-5)
    assert (other[:, 0] - logits[8][:, 0]).abs().max() > 1e-3
    assert fork.length == 9 and cache.length == 12


@pytest.mark.parametrize("kept", [None, [1, 0], [0]], ids=["emptied", "rows changed places", "one row left"])
def test_what_a_caller_does_to_a_cache_is_what_it_holds(model, make_ids, kept):
    ids = make_ids(2, 12)
    with torch.no_grad():
        caches = [KVCache(), KVCache()]
        for step in range(8):
            model(ids[:, step:step + 1], cache=caches[0])
        caches[0].layers[:] = [] if kept is None else [(key[kept], value[kept]) for key, value in caches[0].layers]
        caches[1].layers = [(key.clone(), value.clone()) for key, value in caches[0].layers]
        rows = caches[0].layers[0][0].shape[0] if caches[0].layers else 2
        one, other = ([model(ids[:rows, step:step + 1], cache=cache) for step in range(8, 12)] for cache in caches)
    torch.testing.assert_close(torch.cat(one, dim=1), torch.cat(other, dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cls", [GPT2Model, GPT2ForSequenceClassification])
def test_what_is_no_language_model_and_what_is_no_batch_is_refused(make_model, make_ids, cls):
    with pytest.raises(ConfigError, match=f"^a {cls.__name__} writes no text"):
        generate(make_model(cls), make_ids(1, 3))
    with pytest.raises(ConfigError, match=r"input_ids must be \(B, T\)"):
        generate(make_model(GPT2LMHeadModel), make_ids(1, 3)[0])


def test_a_stream_gives_the_tokens_of_generate_one_by_one(model, make_ids):
    ids = make_ids(2, 5)
    tokens = list(stream(model, ids, max_new_tokens=6))
    assert torch.equal(torch.stack(tokens, dim=1), generate(model, ids, max_new_tokens=6)[:, 5:])


def test_a_stream_computes_in_inference_mode_and_leaves_it_with_each_token(model, make_ids):
    tokens = stream(model, make_ids(2, 5), max_new_tokens=6)
    for token in tokens:
        assert token.is_inference() and not torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(("values", "message"), [
    ({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_k": 0}, "top_k"),
    ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"), ({"num_beams": 0}, "num_beams"),
    ({"temperature": float("inf")}, "finite"), ({"top_k": 3}, "temperature above 0"),
    ({"top_p": 0.5}, "temperature above 0"), ({"num_beams": 2, "temperature": 1.0}, "does not sample"),
    ({"num_beams": 2, "top_k": 3}, "does not sample"), ({"num_beams": 2, "length_penalty": 11.0}, "length_penalty")])
def test_values_out_of_range_are_refused(model, make_ids, values, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, make_ids(1, 3), **values)


def test_no_prompt_is_refused(model):
    with pytest.raises(ConfigError, match="no prompt"):
        generate(model, torch.zeros(1, 0, dtype=torch.long))


def test_a_mask_may_be_of_any_type(model, make_ids):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = generate(model, make_ids(2, 5), mask, max_new_tokens=4)
    for kind in (torch.bool, torch.float32):
        assert torch.equal(generate(model, make_ids(2, 5), mask.to(kind), max_new_tokens=4), expected)


def test_no_new_tokens_gives_the_prompts_back(model, make_ids):
    assert torch.equal(generate(model, make_ids(2, 5), max_new_tokens=0), make_ids(2, 5))


def test_more_tokens_than_positions_is_refused_before_any_work(model, make_ids):
    with pytest.raises(ConfigError, match="30 prompt tokens and 11 new ones exceed the 40 positions"):
        generate(model, make_ids(1, 30), max_new_tokens=11)


def test_padding_on_the_right_is_refused(model, make_ids, make_mask):
    with pytest.raises(ConfigError, match="padded on the left"):
        generate(model, make_ids(4, 7), attention_mask=make_mask(LENGTHS), max_new_tokens=3)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_what_is_generated_can_be_trained_on(model, num_beams):
    found = generate(model, torch.tensor([[5, 17, 80]]), max_new_tokens=3, num_beams=num_beams)
    model(found).sum().backward()
    assert model.transformer.wpe.weight.grad.abs().sum() > 0
