"""Greedy decoding, sampling and beam search with a key-value cache: a prompt is read once, then each step is one token.

Greedy decoding takes the likeliest token. Sampling draws one from softmax(logits / temperature), perhaps from its top
only (top-k: Fan, Lewis, Dauphin 2018, arXiv 1805.04833; top-p: Holtzman et al. 2019, arXiv 1904.09751). Beam search
follows several continuations at once and returns the one of the highest

    score(y) = log p(y | prompt) / |y|^length_penalty                         |y| counts new tokens, the end included

Greedy decoding and beam search return what transformers' generate returns, token by token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.methods.injection import positions_left
from minipeft.methods.wrappers import unwrapped
from minipeft.model.gpt2 import GPT2LMHeadModel
from minipeft.model.kv_cache import KVCache


def generate(model: GPT2LMHeadModel, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 20,
             temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, num_beams: int = 1,
             length_penalty: float = 1.0, eos_token_id: int | None = None,
             generator: torch.Generator | None = None) -> Tensor:
    """Continue each prompt.

    Args:
        model: a language model, in eval mode.
        input_ids: (B, T) prompts; shorter ones padded on the left.
        attention_mask: (B, T), nonzero at real tokens; None means all are real. It may stay on the CPU, where looking
            at it need not wait for the GPU.
        max_new_tokens: tokens to add.
        temperature: 0 is greedy; above 0 samples from softmax(logits / temperature).
        top_k: sample among the k likeliest tokens only; None: among all.
        top_p: sample among the likeliest tokens that together have this probability; None: among all.
        num_beams: continuations that beam search follows of each prompt; 1 is no beam search.
        length_penalty: exponent of a continuation's length in its score; above 1 favours longer ones.
        eos_token_id: a row that has produced it goes on with it. Generation ends when every row has.
        generator: source of randomness for sampling.

    Returns:
        (B, T + n) token ids, n <= max_new_tokens.

    Raises:
        ConfigError: a value out of range, top_k or top_p where nothing is sampled, beam search combined with sampling,
            an empty prompt, prompts and new tokens that exceed the model's positions, or padding on the right.
    """
    if num_beams > 1 and (temperature > 0 or top_k is not None or top_p is not None):
        raise ConfigError("beam search does not sample: leave out temperature, top_k and top_p, or num_beams")
    if num_beams != 1 and max_new_tokens != 0:
        found = _beam_search(model, input_ids, attention_mask, max_new_tokens, num_beams, length_penalty, eos_token_id)
        return found.clone()  # made outside of inference mode, so that it may take part in training
    steps = stream(model, input_ids, attention_mask, max_new_tokens, temperature, top_k, top_p, eos_token_id, generator)
    return torch.cat((input_ids, *(token[:, None] for token in steps)), dim=1)


@torch.inference_mode()
def stream(model: GPT2LMHeadModel, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 20,
           temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
           eos_token_id: int | None = None, generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """The new tokens of `generate`, (B,) per step, as they come. Arguments and errors as there, without beams.

    Inference mode is on while a step computes, and off again when its tokens are handed out.
    """
    _check_sampling(temperature, top_k, top_p)
    reader = _CachedReader(model, input_ids, attention_mask, max_new_tokens)
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)             # (B,)
    token = None
    for _ in range(max_new_tokens):
        logits = reader.read(input_ids if token is None else token[:, None])                      # (B, vocab)
        token = _sample(logits, temperature, top_k, top_p, generator) if temperature else logits.argmax(dim=1)  # (B,)
        if eos_token_id is not None:
            token = token.masked_fill(finished, eos_token_id)
            finished |= token == eos_token_id
        yield token
        if eos_token_id is not None and finished.all():
            return


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature must be a finite number, 0 or above, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p must lie in (0, 1], got {top_p}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ConfigError("top_k and top_p are for sampling: give a temperature above 0")


class _CachedReader:
    """Reads prompts, then one token per row and step, and gives the next token's logits."""

    def __init__(self, model: GPT2LMHeadModel, input_ids: Tensor, attention_mask: Tensor | None,
                 max_new_tokens: int) -> None:
        if max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens must not be negative, got {max_new_tokens}")
        model = unwrapped(model)
        if not isinstance(model, GPT2LMHeadModel):
            raise ConfigError(f"a {type(model).__name__} writes no text: use a GPT2LMHeadModel")
        if input_ids.dim() != 2:
            raise ConfigError(f"input_ids must be (B, T), one row for each prompt, got {tuple(input_ids.shape)}")
        T, left = input_ids.shape[1], positions_left(model)
        if not T:
            raise ConfigError("there is no prompt: generation goes on from one token at least")
        if T + max_new_tokens > left:
            raise ConfigError(f"{T} prompt tokens and {max_new_tokens} new ones exceed the {left} positions that the "
                              "model has for them")
        # The mask lives on the CPU: the model looks at it in each step.
        everything = torch.ones(input_ids.shape, dtype=torch.long)
        self.mask = everything if attention_mask is None else (attention_mask.cpu() != 0).long()  # (B, S)
        if not bool(self.mask[:, -1].all()):
            raise ConfigError("generation needs prompts padded on the left: each row must end with a real token")
        # The first real token stands at position 0, however many pads precede it.
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)                                    # (B, T)
        self.positions = positions.to(input_ids.device, non_blocking=True)
        self.model, self.cache = model, KVCache()

    def read(self, ids: Tensor) -> Tensor:
        """Logits (B, vocab) after the prompts (B, T) or, later, after one more token (B, 1)."""
        if self.cache.length:
            self.positions = self.positions[:, -1:] + 1                                           # (B, 1)
            self.mask = F.pad(self.mask, (0, 1), value=1)                                         # (B, S)
        hidden = self.model.transformer(ids, self.mask, self.positions, self.cache)               # (B, T or 1, C)
        return self.model.lm_head(hidden[:, -1])                                                  # (B, vocab)

    def repeat(self, times: int) -> None:
        """From now on, so many rows continue each prompt, one after the other."""
        self.positions, self.mask = (x.repeat_interleave(times, dim=0) for x in (self.positions, self.mask))
        self.reorder(torch.arange(len(self.positions), device=self.positions.device) // times)

    def reorder(self, rows: Tensor) -> None:
        """From now on, row i continues what row rows[i] has read. The two are rows of one prompt, in the same place."""
        self.cache.reorder(rows)


def _sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
            generator: torch.Generator | None) -> Tensor:
    """One token per row, (B,), drawn from softmax(logits / temperature), (B, vocab), cut to its top."""
    # From the highest logit down, in float64: however low the temperature, 0 / temperature stays 0.
    logits = logits.double()                                                                      # (B, vocab)
    logits = (logits - logits.amax(dim=1, keepdim=True)) / temperature                            # (B, vocab), <= 0
    if top_k is not None and top_k < logits.shape[1]:
        lowest = logits.topk(top_k, dim=1).values[:, -1:]                                         # (B, 1)
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    probabilities = logits.softmax(dim=1)                                                         # (B, vocab)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True)
        # A token stays while those before it do not have top_p together: so the likeliest always stays.
        ordered = ordered.masked_fill(ordered.cumsum(dim=1) - ordered >= top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@torch.inference_mode()
def _beam_search(model: GPT2LMHeadModel, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int,
                 num_beams: int, length_penalty: float, eos_token_id: int | None) -> Tensor:
    """The best continuation of each prompt among those that `num_beams` beams meet."""
    if num_beams < 1:
        raise ConfigError(f"num_beams must be at least 1, got {num_beams}")
    if not -10 <= length_penalty <= 10:
        raise ConfigError(f"length_penalty must lie in [-10, 10], got {length_penalty}")
    B, device = len(input_ids), input_ids.device
    reader = _CachedReader(model, input_ids, attention_mask, max_new_tokens)
    logits = reader.read(input_ids)                                                               # (B, vocab)
    reader.repeat(num_beams)
    logits = logits.repeat_interleave(num_beams, dim=0)                                           # (B * beams, vocab)
    first_rows = torch.arange(0, B * num_beams, num_beams, device=device)[:, None]                # (B, 1)
    # All beams start alike, so that at first only one of them counts.
    scores = torch.full((B, num_beams), -torch.inf, device=device)                                # (B, beams)
    scores[:, 0] = 0
    prompts = [_Beams(num_beams, length_penalty, eos_token_id) for _ in range(B)]
    for length in range(1, max_new_tokens + 1):
        is_last = length == max_new_tokens
        chosen = [beams.extend(candidates, length, is_last)
                  for beams, candidates in zip(prompts, _candidates(logits, scores))]
        if is_last or all(beams.are_done for beams in prompts):
            break
        scores, beam, token = _columns(chosen, device)                                            # (B, beams) each
        reader.reorder((first_rows + beam).flatten())                                             # (B * beams,)
        logits = reader.read(token.view(-1, 1))                                                   # (B * beams, vocab)
    winners = [beams.ended[0][1] for beams in prompts]
    longest = max(map(len, winners))
    padded = [winner + [eos_token_id or 0] * (longest - len(winner)) for winner in winners]
    return torch.cat((input_ids, torch.tensor(padded, device=device)), dim=1)


def _candidates(logits: Tensor, scores: Tensor) -> list[list[Candidate]]:
    """The likeliest continuations of each prompt by one token, likeliest first, from logits (B * beams, vocab).

    Twice as many as there are beams: even if half of them end here, enough are left to continue.

    Args:
        scores: log p of what each beam holds so far, (B, beams).
    """
    B, beams = scores.shape
    log_probabilities = logits.float().log_softmax(dim=1).view(B, beams, -1)                      # (B, beams, vocab)
    vocab_size = log_probabilities.shape[2]
    totals = (scores[:, :, None] + log_probabilities).flatten(1)                                  # (B, beams * vocab)
    best = totals.topk(min(2 * beams, beams * vocab_size))                                        # (B, 2 * beams)
    # One tensor, so that a GPU is waited for once. float64 holds float32 and the numbers of tokens as they are.
    rows = torch.stack((best.values.double(), best.indices // vocab_size, best.indices % vocab_size), dim=2)
    return [[(score, int(beam), int(token)) for score, beam, token in row] for row in rows.tolist()]


def _columns(chosen: list[list[Candidate]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates as tensors (B, beams) on the device, sent as one: log p, beam, token."""
    score, beam, token = torch.tensor(chosen, dtype=torch.float64).to(device, non_blocking=True).unbind(dim=2)
    return score.float(), beam.long(), token.long()


# log p of a whole continuation, the beam that it continues, its new token.
Candidate = tuple[float, int, int]


class _Beams:
    """The continuations of one prompt: those that are followed, and the best of those that have ended."""

    def __init__(self, size: int, length_penalty: float, eos_token_id: int | None) -> None:
        self.size, self.length_penalty, self.eos_token_id = size, length_penalty, eos_token_id
        self.followed: list[list[int]] = [[] for _ in range(size)]
        self.ended: list[tuple[float, list[int]]] = []                     # (score, tokens), best first
        self.are_done = False

    def extend(self, candidates: list[Candidate], length: int, is_last: bool) -> list[Candidate]:
        """One more token: `size` of the candidates are followed from now on, and those that end are kept if good.

        Args:
            candidates: likeliest first.
            length: tokens that a continuation has now.
            is_last: whether all continuations end here.

        Returns:
            The candidates that are followed.
        """
        chosen = []
        for rank, (score, beam, token) in enumerate(candidates):
            if token == self.eos_token_id or is_last:
                if rank < self.size and not self.are_done and score > -math.inf:
                    self.ended.append((score / length**self.length_penalty, self.followed[beam] + [token]))
            elif len(chosen) < self.size:
                chosen.append((score, beam, token))
        self.ended = sorted(self.ended, key=lambda item: item[0], reverse=True)[:self.size]
        # The prompt is done once enough have ended, and the best that is followed scores no higher than their worst.
        if len(self.ended) == self.size and (
                not chosen or chosen[0][0] / length**self.length_penalty <= self.ended[-1][0]):
            self.are_done = True
        chosen += [(-math.inf, 0, 0)] * (self.size - len(chosen))          # never wins, and keeps the batch's shape
        self.followed = [self.followed[beam] + [token] for _, beam, token in chosen]
        return chosen
