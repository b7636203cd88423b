"""Text generation with a key-value cache: the prompt is read once, then each step computes one token."""

from __future__ import annotations

import torch
from torch import Tensor

from minipeft.errors import ConfigError
from minipeft.gpt2 import GPT2LMHeadModel, KVCache
from minipeft.methods.surgery import positions_left


@torch.inference_mode()
def generate(model: GPT2LMHeadModel, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 20,
             temperature: float = 0.0, eos_token_id: int | None = None,
             generator: torch.Generator | None = None) -> Tensor:
    """Continue each prompt, greedily or by sampling.

    Args:
        model: a language model, in eval mode.
        input_ids: (B, T) prompts; shorter ones padded on the left.
        attention_mask: (B, T), nonzero at real tokens; None means all are real.
        max_new_tokens: tokens to add.
        temperature: 0 takes the likeliest token; above 0 samples from softmax(logits / temperature).
        eos_token_id: a row that has produced it goes on with it. Generation ends when every row has.
        generator: source of randomness for sampling.

    Returns:
        (B, T + n) token ids, n <= max_new_tokens.

    Raises:
        ConfigError: prompts and new tokens exceed the model's positions, or padding on the right.
    """
    T = input_ids.shape[1]
    if T + max_new_tokens > positions_left(model):
        raise ConfigError(f"{T} prompt tokens and {max_new_tokens} new ones exceed the {positions_left(model)} "
                          "positions that the model has for them")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if not bool((attention_mask[:, -1] != 0).all()):
        raise ConfigError("generation needs prompts padded on the left: each row must end with a real token")
    # The first real token stands at position 0, however many pads precede it.
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)                       # (B, T)
    cache, ids, step_ids = KVCache(), input_ids, input_ids
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)                # (B,)
    for _ in range(max_new_tokens):
        hidden = model.transformer(step_ids, attention_mask, position_ids, cache)        # (B, T or 1, C)
        logits = model.lm_head(hidden[:, -1])                                            # (B, vocab)
        if temperature > 0:
            probabilities = torch.softmax(logits.float() / temperature, dim=-1)
            token = torch.multinomial(probabilities, 1, generator=generator)             # (B, 1)
        else:
            token = logits.argmax(dim=-1, keepdim=True)                                  # (B, 1)
        if eos_token_id is not None:
            token = token.masked_fill(finished[:, None], eos_token_id)
            finished |= token[:, 0] == eos_token_id
        ids = torch.cat((ids, token), dim=1)
        if finished.all() and eos_token_id is not None:
            break
        step_ids = token
        position_ids = position_ids[:, -1:] + 1                                          # (B, 1)
        attention_mask = torch.cat((attention_mask, torch.ones_like(token)), dim=1)      # (B, S)
    return ids
