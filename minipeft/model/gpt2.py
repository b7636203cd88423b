"""GPT-2, written out by hand: the whole base model in one file.

A decoder-only Transformer reads a sequence of token ids and gives, at every position, a vector that has seen that
position and everything before it. Three heads turn these vectors into next-token scores, one label per text, or one
label per token.

    x   = wte[ids] + wpe[positions]                                       (B, T, C)
    x   = x + attn.c_proj( softmax(q k^T / sqrt(D) + causal mask) v )     q, k, v = split(attn.c_attn(ln_1(x)))
    x   = x + mlp.c_proj( gelu(mlp.c_fc(ln_2(x))) )                       these two once per block
    out = ln_f(x)                                                         (B, T, C)

    c_attn, c_proj, c_fc    x W^T + bias                                                (..., in) -> (..., out)
    ln_1, ln_2, ln_f        weight * (x - mean(x)) / sqrt(var(x) + 1e-5) + bias         over each token's C numbers
    gelu(x)                 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))           number by number

The dimensions in this file and all files of data, tasks and training:

    B batch    T tokens    S tokens seen by attention (cached + T)    C channels (n_embd)
    H heads    D head size (C / H)    K labels    4C n_inner, where that is set

Weights
    wte (vocabulary, C) and wpe (n_positions, C). Per block c_attn (3C, C), attn.c_proj (C, C), c_fc (4C, C) and
    mlp.c_proj (C, 4C), each W as (out, in) with a bias (out,), and two LayerNorms, weight and bias (C,): together
    12 C^2 + 13 C numbers. Last ln_f. GPT-2 124M has C = 768, H = 12, D = 64 and 12 blocks, in all
    50,257 * 768 + 1,024 * 768 + 12 * (12 * 768 * 768 + 13 * 768) + 2 * 768 = 124,439,808 parameters.
Attention
    c_attn makes (B, T, 3C) from (B, T, C). Split in three, and each in H heads, that is q, k and v, (B, H, T, D). The
    scores q k^T / sqrt(D) are (B, H, T, S). softmax turns each query's S scores into shares, which sum to 1. The values
    times their shares are added up: (B, H, T, D). With the heads side by side it is (B, T, C), and c_proj mixes them.
    By hand: two tokens, D = 1, q = 1, 1, k = 0, ln 3, v = 4, 8. Token 0 sees itself: 4. Token 1 has scores 0 and ln 3,
    so shares 1/4 and 3/4: 1/4 * 4 + 3/4 * 8 = 7.
Causal mask
    A query sees its own token and those before it, cached ones too. Three tokens, and three after two cached ones:
        1 0 0          1 1 1 0 0          for a 1 the equation's mask has 0,
        1 1 0          1 1 1 1 0          for a 0 -infinity
        1 1 1          1 1 1 1 1
Padding
    attention_mask (B, S) is 1 at real tokens, 0 at pads; GPT-2 has no pad token, so any id may stand there. Pads on the
    right, 1 1 1 0 0, need no mask inside, as no real token looks to its right. Pads on the left, 0 0 1 1 1, are hidden
    from all other tokens; a pad sees itself, since softmax needs a key. What comes out at a pad means nothing.
Positions
    0 to T - 1, or on from the cache's length; n_positions at most. Pads count. So with pads on the left a caller gives
    position_ids 0 0 0 1 2, by which each text starts at 0.
Cache
    Each call appends k and v of its T tokens, in every block. After 5 tokens a KVCache holds (B, H, 5, D) of each. A
    call with the next token alone then has T = 1 and S = 6, computes q, k and v of that token only, looks at six keys,
    and gives (B, 1, C): cache = KVCache(); model(ids, cache=cache); model(next_ids, cache=cache). The mask of such a
    call counts cached tokens, too: (B, 6). With pads on the left it needs position_ids, too: after 0 0 0 1 2 comes 3.
Heads
    `lm_head` gives (B, T, vocabulary) by wte's own matrix, one tensor for both, unless tie_word_embeddings is False.
    `score` gives (B, K) from each text's last real token, which has seen the whole text; `classifier` gives (B, T, K),
    and it alone has a bias. Pretraining knows neither of the last two: they start random, and every method trains them.
    These two take no cache. All return logits and know no loss: that is the task's (minipeft/tasks).
Initialization
    Matrices and embeddings are normal with deviation 0.02, each c_proj with 0.02 / sqrt(2 n_layer); biases are 0,
    LayerNorms' weights 1 (see pretrained.py).
Dropout
    In training a number becomes 0 with probability p = 0.1 and is divided by 1 - p otherwise: after wte + wpe
    (embd_pdrop), on attention's shares (attn_pdrop), after both c_proj (resid_pdrop), and before `classifier`
    (classifier_dropout).
Number formats
    All is float32, unless `from_pretrained` is told another dtype. Under autocast to bfloat16 or float16 the products
    with matrices and attention are computed in it, from weights cast on the way; the logits come out in it. x, to which
    each block adds, stays float32.
Cost
    Forward, per token: 24 C^2 operations in the matrices of a block (a product and a sum are two), 4 S C in its
    attention, of which a causal kernel may skip what is masked, and 2 C vocabulary in lm_head. Backward: twice that,
    with frozen matrices about once. Memory: without gradients the tensors of one block at a time, of which (B, T, 4C)
    is the widest, and the logits; in training what all blocks keep, 16 C numbers per block and token, with frozen
    matrices 10 C (methods/full.py lists them). Fused kernels hold the scores (B, H, T, S) in parts only.
On disk
    Modules carry the official names: `wte`, `h.0.attn.c_attn`, ...; in a model with a head `transformer.` stands before
    them, as in transformers' files. The matrices of the blocks are stored as (in, out), and `weights.py` transposes
    them when it loads and saves. All else is stored as it is here; an lm_head that is wte is not stored.

Paper: Radford, Wu, Child, Luan, Amodei, Sutskever (2019), "Language Models are Unsupervised Multitask Learners". It
gives no dropout rate, and trains no classifier; 0.1 is the first GPT's. OpenAI's code starts wpe with deviation 0.01,
and every c_proj with 0.02. `Linear` and `Dropout` compute what torch's own do, faster on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minipeft.errors import ConfigError
from minipeft.model.attention import attend
from minipeft.model.config import GPT2Config
from minipeft.model.dropout import Dropout
from minipeft.model.kv_cache import KVCache
from minipeft.model.linear import Linear
from minipeft.model.pretrained import PretrainedModel, initialize


class Attention(nn.Module):
    """Causal multi-head self-attention: softmax(q k^T / sqrt(D)) v, heads side by side."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        query, key, value = self.c_attn(x).split(C, dim=2)                   # each (B, T, C)
        query = query.view(B, T, self.n_head, -1).transpose(1, 2)            # (B, H, T, D)
        key = key.view(B, T, self.n_head, -1).transpose(1, 2)                # (B, H, T, D)
        value = value.view(B, T, self.n_head, -1).transpose(1, 2)            # (B, H, T, D)
        if cache is not None:
            key, value = cache.update(self.layer, key, value)                # (B, H, S, D)
        x = attend(query, key, value, mask, self.attn_pdrop, self.training)  # (B, H, T, D)
        x = x.transpose(1, 2).reshape(B, T, C)                               # (B, T, C)
        return self.resid_dropout(self.c_proj(x))


class MLP(nn.Module):
    """The feed-forward layer: widen, gelu, narrow."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.inner_size)
        self.c_proj = Linear(config.inner_size, config.n_embd)
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")                         # (B, T, 4C)
        return self.dropout(self.c_proj(x))                                  # (B, T, C)


class Block(nn.Module):
    """One Transformer block: attention, then feed-forward, each added to what came in."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable`, but only while something is being compiled. To use it is to import all of the compiler,
    which takes as long as the rest of torch."""
    disabled = torch._disable_dynamo(function)  # imports it when it is called

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return (disabled if torch.compiler.is_compiling() else function)(*arguments, **named)

    return call


@uncompiled  # what it returns depends on values; the blocks after it compile as one
def attention_mask_for(attention_mask: Tensor | None, T: int, past: int, device: torch.device) -> Tensor | None:
    """The mask `scaled_dot_product_attention` needs, or None where plain causal attention is already right.

    Right padding in this call needs no mask: a real token never looks to its right, and the fast causal kernel stays
    usable. A single new token may look at all of a cache without pads. All other cases get a boolean mask.

    Args:
        attention_mask: (B, past + T), 1 at real tokens, 0 at pads; None means all are real. It may stay on the CPU:
            then looking at it, which this does, need not wait for the GPU.
        T: tokens in this call.
        past: tokens in the cache before it.

    Returns:
        A boolean tensor, True where query may look at key, broadcastable to (B, H, T, past + T); or None.
    """
    if attention_mask is None:
        padded = False
    elif torch.jit.is_tracing() or torch.compiler.is_compiling():
        padded = True  # a recorded program has to be right for every mask, not for this one
    else:
        on_the_left = bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any())
        padded = on_the_left or not bool(attention_mask[:, :past].all())                   # or within the cache
    if not padded and (past == 0 or T == 1):
        return None
    # Query i stands at position past + i of the keys: the causal triangle is aligned to the lower right corner.
    mask = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)             # (T, S)
    if padded:
        itself = mask.triu(past)  # a pad still sees itself: a row that sees nothing is NaN in some kernels
        mask = (mask & attention_mask[:, None, None, :].bool().to(device, non_blocking=True)) | itself   # (B, 1, T, S)
    return mask


class GPT2Model(PretrainedModel):
    """Embeddings, blocks and the final LayerNorm: token ids in, hidden states out.

    With `gradient_checkpointing` (default False) training keeps of each block its input alone, (B, T, C), and computes
    the block again in the backward pass. That is about a third more arithmetic where all weights are trained, and half
    more where the matrices are frozen.
    """

    prefix = ""  # before its tensors' names; "transformer." in the classes with a head

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        initialize(self, config)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, cache: KVCache | None = None,
                inputs_embeds: Tensor | None = None) -> Tensor:
        """Hidden states after the last block.

        Args:
            input_ids: (B, T) token ids; or give inputs_embeds instead, beside which they are not read.
            attention_mask: (B, S), 1 at real tokens, 0 at pads, S counting cached tokens; None means all are real.
            position_ids: (B, T) or (T,); default counts up from the cache's length. One beyond the table is torch's
                own IndexError, and on a GPU a failed assertion.
            cache: keys and values of earlier tokens; this call's are appended to it.
            inputs_embeds: (B, T, C) vectors to use in place of wte[input_ids].

        Returns:
            (B, T, C).

        Raises:
            ConfigError: nothing to read; more tokens than n_positions; gradient checkpointing beside a cache to fill.
        """
        check_not_empty(input_ids if inputs_embeds is None else inputs_embeds)
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds      # (B, T, C)
        recomputed = self.gradient_checkpointing and self.training
        if recomputed and cache is not None and cache.kept:  # a prefix's cache is not: nobody reads it afterwards
            raise ConfigError("gradient checkpointing computes each block twice and fills no cache: call model.eval()")
        T, past = x.shape[1], cache.length if cache is not None else 0
        if position_ids is None:
            if past + T > self.config.n_positions:
                raise ConfigError(f"{past + T} tokens do not fit this model: it has {self.config.n_positions} "
                                  "positions; truncate the text")
            position_ids = torch.arange(past, past + T, device=x.device)         # (T,)
        x = self.drop(x + self.wpe(position_ids))                                # (B, T, C)
        mask = attention_mask_for(attention_mask, T, past, x.device)
        for block in self.h:
            if recomputed:
                x = checkpoint(_recomputable, block, x, mask, cache, use_reentrant=False)       # (B, T, C)
            else:
                x = block(x, mask, cache)                                        # (B, T, C)
        return self.ln_f(x)


def check_not_empty(x: Tensor | None) -> None:
    """Refuse a call without input, a batch without a text, (0, T) or (0, T, C), and texts without a token.

    Raises:
        ConfigError: saying which it is.
    """
    if x is None or 0 in x.shape[:2]:
        found = "neither input_ids nor inputs_embeds" if x is None else f"{x.shape[0]} texts of {x.shape[1]} tokens"
        raise ConfigError(f"there is nothing to read: {found}")


def _recomputable(block: Block, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
    """A block that may run twice: what it appends goes to a copy of the cache, which training has no use for."""
    return block(x, mask, None if cache is None else KVCache(cache.layers))


class GPT2LMHeadModel(PretrainedModel):
    """GPT-2 with its language-model head: next-token scores, by the transposed input embedding."""

    head = "lm_head"
    task_type = "CAUSAL_LM"

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = GPT2Model(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        initialize(self.lm_head, config)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    @property
    def tied(self) -> dict[str, str]:
        return {"lm_head.weight": "transformer.wte.weight"} if self.config.tie_word_embeddings else {}

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, cache: KVCache | None = None, inputs_embeds: Tensor | None = None,
                positions: Tensor | None = None, read_out: Callable[[nn.Module, Tensor], Any] | None = None) -> Any:
        """Next-token logits (B, T, vocab_size) or, with `positions` (N,), (N, vocab_size) at those only.

        `positions` are tokens' numbers in the batch, row after row: b T + t. With `read_out` there are no logits: what
        `read_out(lm_head, x)` gives is returned, such as a loss. Other arguments are as in `GPT2Model.forward`.
        """
        x = self.transformer(input_ids, attention_mask, position_ids, cache, inputs_embeds)           # (B, T, C)
        x = x if positions is None else x.flatten(0, 1).index_select(0, positions)     # (B, T, C) or (N, C)
        return self.lm_head(x) if read_out is None else read_out(self.lm_head, x)


class GPT2ForSequenceClassification(PretrainedModel):
    """GPT-2 with one label per text: a linear layer on the last real token, which has seen the whole text."""

    head = "score"
    has_new_head = True
    task_type = "SEQ_CLS"

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = GPT2Model(config)
        self.score = Linear(config.n_embd, config.num_labels, bias=False)
        initialize(self.score, config)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Label logits (B, K), read at each text's last real token; without a mask that is the last position."""
        x = self.transformer(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds)    # (B, T, C)
        return self.score(last_real_token(x, attention_mask))                                         # (B, K)


class GPT2ForTokenClassification(PretrainedModel):
    """GPT-2 with one label per token: dropout and a linear layer at every position."""

    head = "classifier"
    has_new_head = True
    task_type = "TOKEN_CLS"

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = GPT2Model(config)
        self.dropout = Dropout(config.classifier_dropout)
        self.classifier = Linear(config.n_embd, config.num_labels)
        initialize(self.classifier, config)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
                positions: Tensor | None = None) -> Tensor:
        """Label logits (B, T, K) or, with `positions` (N,) as `GPT2LMHeadModel` has them, (N, K) at those only."""
        x = self.transformer(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds)    # (B, T, C)
        x = x if positions is None else x.flatten(0, 1).index_select(0, positions)     # (B, T, C) or (N, C)
        return self.classifier(self.dropout(x))


def last_real_token(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The hidden state of each text's last real token.

    Args:
        x: (B, T, C).
        attention_mask: (B, T), 1 at real tokens, 0 at pads, on either side; None means all are real.

    Returns:
        (B, C).
    """
    if attention_mask is None:
        return x[:, -1]
    positions = torch.arange(x.shape[1], device=attention_mask.device)                                # (T,)
    last = (positions * (attention_mask != 0)).argmax(dim=1)                                          # (B,)
    return x[torch.arange(x.shape[0], device=x.device), last.to(x.device, non_blocking=True)]
