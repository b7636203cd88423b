"""GPT-2, written out by hand: the whole base model in one file.

A decoder-only Transformer reads token ids and gives, at every position, a vector that has seen that position and all
before it. One of three heads makes of these next-token scores, one label per text, or one label per token.

    x   = wte[ids] + wpe[positions]                                       (B, T, C)
    x   = x + attn.c_proj( softmax(q k^T / sqrt(D) + causal mask) v )     q, k, v = split(attn.c_attn(ln_1(x)))
    x   = x + mlp.c_proj( gelu(mlp.c_fc(ln_2(x))) )                       these two once per block
    out = ln_f(x)                                                         (B, T, C)

    c_attn, c_proj, c_fc    x W^T + bias                                                (..., in) -> (..., out)
    ln_1, ln_2, ln_f        weight * (x - mean(x)) / sqrt(mean((x - mean(x))^2) + 1e-5) + bias, over a token's C numbers
    gelu(x)                 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))           number by number

Dimensions have letters in minipeft/model. In minipeft/methods they have words, such as seq, because there B is LoRA's
matrix. A model's config.json says how large they are; the numbers 1e-5 and 0.1 are from there, too.

    B texts in a batch    T tokens of each in this call    S tokens attention sees (cached + T)    C channels (n_embd)
    H attention heads    D size of one (C / H)    K labels    4C inner size of the MLP (n_inner, if set)

Weights
    wte (vocabulary, C) and wpe (n_positions, C). Per block c_attn (3C, C), attn.c_proj (C, C), c_fc (4C, C) and
    mlp.c_proj (C, 4C), each W as (out, in) with a bias (out,), and two LayerNorms, weight and bias (C,): together
    12 C^2 + 13 C numbers, where the MLP has 4C. Last ln_f. GPT-2 124M has C = 768, H = 12, D = 64 and 12 blocks, in all
    50,257 * 768 + 1,024 * 768 + 12 * (12 * 768 * 768 + 13 * 768) + 2 * 768 = 124,439,808 parameters.
Attention
    c_attn makes (B, T, 3C) from (B, T, C). Split in three, and each in H heads, that is q, k and v, (B, H, T, D). The
    scores q k^T / sqrt(D) are (B, H, T, S). softmax turns each query's S scores into shares, which sum to 1. The values
    times their shares are added up: (B, H, T, D). With the heads side by side it is (B, T, C), and c_proj mixes them.
    By hand: two tokens, D = 4. Token 1 has q k^T = 0, 2 ln 3, by sqrt(4) that is 0, ln 3, so shares 1/4 and 3/4. In a
    channel with v = 4, 8 that gives 1/4 * 4 + 3/4 * 8 = 7. Token 0 sees itself alone: 4.
Causal mask
    A query sees its own token and those before it, cached ones too. Three tokens, and three after two cached ones:
        1 0 0          1 1 1 0 0          for a 1 the equation's mask has 0,
        1 1 0          1 1 1 1 0          for a 0 -infinity
        1 1 1          1 1 1 1 1
Padding
    Pads fill up shorter texts. attention_mask (B, S) is 1 at real tokens, 0 at pads; GPT-2 has no pad token, any id
    will do. Pads on the right, 1 1 1 0 0, need no mask inside, as no real token looks to its right. Pads on the left,
    0 0 1 1 1, are hidden from real tokens; each pad sees itself, as softmax needs a key. Its output means nothing.
Positions
    0 to T - 1, or on from the cache's length, each below n_positions. Pads take positions, too. So with pads on the
    left a caller gives position_ids 0 0 0 1 2, by which each text starts at 0.
Cache
    A call appends k and v of its T tokens, 2 C numbers per block and token. After 5 tokens a KVCache holds (B, H, 5, D)
    of each. A call with the next token alone then has T = 1 and S = 6, computes q, k and v of that token only, looks at
    six keys, and gives (B, 1, C): cache = KVCache(); model(ids, cache=cache); model(next_ids, cache=cache). Its mask
    counts cached tokens, too: (B, 6). After pads, left or right, it needs position_ids: after 0 0 0 1 2 comes 3.
Heads
    `lm_head` gives (B, T, vocabulary) by wte's own matrix, one tensor for both, unless tie_word_embeddings is False.
    `score` gives (B, K) from each text's last real token, which has seen the whole text; `classifier` gives (B, T, K),
    and it alone has a bias. Pretraining knows neither of the last two: they start random, all of minipeft/methods train
    them, and they take no cache. What a head gives are logits; the loss is made of them by the task (minipeft/tasks).
Training
    Freshly loaded, every parameter requires a gradient, 124,441,344 with a `score` for two labels (2, C): what a method
    freezes, it freezes later. An optimizer such as AdamW adds 8 bytes per trained parameter to 4 of its gradient.
Initialization
    Matrices and embeddings are normal with deviation 0.02, each c_proj with 0.02 / sqrt(2 n_layer); biases are 0,
    LayerNorms' weights 1. So GPT-2 124M starts with logits of deviation 0.02 sqrt(C) = 0.55 and a
    loss of about ln 50,257 + 0.55^2 / 2 = 10.98, near the 10.82 of guessing.
Dropout
    In training a number becomes 0 with probability p = 0.1 and is divided by 1 - p otherwise: wte + wpe (embd_pdrop),
    attention's shares (attn_pdrop), both c_proj's results (resid_pdrop), `classifier`'s input (classifier_dropout).
Number formats
    All is float32, unless `from_pretrained` is told another dtype. Under torch.autocast to bfloat16 or float16,
    products with matrices, attention and logits are in that format. Weights stay float32; the
    products take copies of them in that format. x, to which blocks add, is float32.
Cost
    Forward, per token: 24 C^2 operations in the matrices of a block (a product and a sum are two), 4 S C in its
    attention, of which a fused kernel (attention as one operation) may skip what is masked, and 2 C vocabulary in
    lm_head. Backward: 2 times that, about 1 time where matrices are frozen. Memory: the logits, and without gradients
    one block's tensors at a time, (B, T, 4C) the widest; in training 16 C numbers per block and token: what went into
    ln_1, ln_2 and the four matrices (C, C, C, C, C, 4C), q, k and v (3C), and gelu's input (4C). Where matrices are
    frozen, of what went into them attention's output alone is needed: 10 C. Fused kernels hold the scores in parts
    only.
On disk
    `from_pretrained` (pretrained.py) reads config.json (n_embd, n_head, n_layer, n_positions, vocab_size and the rest
    of GPT2Config) and model.safetensors, in which names are the official ones: wte.weight, wpe.weight,
    h.0.attn.c_attn.weight and .bias, ... , ln_f.bias; with a head `transformer.` stands before them. A tensor that is
    missing, or has another shape than config.json says, is a WeightsError that names it. Files with and without it
    load. Hugging Face's GPT-2 computes x W, so a file holds the blocks' matrices as (in, out), such as c_attn (C, 3C);
    weights.py transposes them. A tied lm_head is not in the file.

Paper: Radford, Wu, Child, Luan, Amodei, Sutskever (2019), "Language Models are Unsupervised Multitask Learners". Unlike
the first GPT, this one has a LayerNorm before each layer, not after it. It also has ln_f, smaller values in c_proj at
the start, and more tokens. The paper says 117M where it is 124M. It gives no dropout rate (0.1 is the first GPT's), and
it trains no classifier. OpenAI's code starts wpe with 0.01 and c_proj with 0.02. `Linear` and `Dropout` compute what
torch's do, faster on a CPU.
"""

from __future__ import annotations

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
from minipeft.model.linear import Linear, uncompiled
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


@uncompiled  # it looks at values, which no compiled program can; the blocks after it compile as one
def attention_mask_for(attention_mask: Tensor | None, T: int, past: int, device: torch.device) -> Tensor | None:
    """The mask that `attend` needs: none without cache and left pads, nor for one token after a cache without pads.

    Args:
        attention_mask: (B, past + T), 1 at real tokens, 0 at pads; None means all are real. It may stay on the CPU:
            then looking at it, which this does, need not wait for the GPU.
        T: tokens in this call.
        past: tokens in the cache before it.

    Returns:
        A boolean tensor, True where query may look at key, broadcastable to (B, H, T, past + T). Or None, which means
        causal: several tokens see themselves and what is before, one sees all keys.

    Raises:
        ConfigError: attention_mask is of another width.
    """
    if attention_mask is None:
        padded = False
    elif torch.jit.is_tracing() or torch.compiler.is_compiling():
        padded = True  # `jit.trace` and `export` record a program, which has to be right for every mask
    else:
        if attention_mask.shape[1] != past + T:
            raise ConfigError(f"attention_mask is {attention_mask.shape[1]} wide, for {past} cached and {T} new tokens")
        on_the_left = bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any())
        padded = on_the_left or not bool(attention_mask[:, :past].all())                   # or within the cache
    if not padded and (past == 0 or T == 1):
        return None
    # Query i stands at position past + i of the keys: the causal triangle is aligned to the lower right corner.
    mask = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)             # (T, S)
    if padded:
        itself = mask.triu(past)  # the diagonal: a pad still sees itself, as a row without a key is NaN in some kernels
        mask = (mask & attention_mask[:, None, None, :].bool().to(device, non_blocking=True)) | itself   # (B, 1, T, S)
    return mask


class GPT2Model(PretrainedModel):
    """Embeddings, blocks and the final LayerNorm: token ids in, hidden states out.

    With `gradient_checkpointing` (default False) training keeps of each block its input alone, (B, T, C), and computes
    the block again in the backward pass: a third more arithmetic where all is trained, half more with frozen matrices.
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
            input_ids: (B, T) token ids below vocab_size; or give inputs_embeds, beside which they are not read.
            attention_mask: (B, S), 1 at real tokens, 0 at pads, S counting cached tokens; None means all are real.
            position_ids: (B, T) or (T,); default counts up from the cache's length. One beyond its table, as an id
                beyond wte, is torch's own IndexError, and on a GPU a failed assertion.
            cache: keys and values of earlier tokens; this call's are appended; not in training with checkpointing.
            inputs_embeds: (B, T, C) vectors to use in place of wte[input_ids].

        Returns:
            (B, T, C).

        Raises:
            ConfigError: nothing to read; too many tokens; a mask or position_ids of another width; checkpointing
                beside a cache to fill.
        """
        check_not_empty(input_ids if inputs_embeds is None else inputs_embeds)
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds      # (B, T, C)
        recomputed = self.gradient_checkpointing and self.training
        if recomputed and cache is not None and cache.kept:  # `kept`: read after this call, as a prefix's cache is not
            raise ConfigError("gradient checkpointing computes each block twice and fills no cache: call model.eval()")
        T, past = x.shape[1], cache.length if cache is not None else 0
        if position_ids is None:
            if past + T > self.config.n_positions:
                raise ConfigError(f"{past + T} tokens do not fit this model: it has {self.config.n_positions} "
                                  "positions; truncate the text")
            position_ids = torch.arange(past, past + T, device=x.device)         # (T,)
        elif position_ids.shape[-1] != T:
            raise ConfigError(f"position_ids are for {position_ids.shape[-1]} tokens, and {T} are read")
        x = self.drop(x + self.wpe(position_ids))                                # (B, T, C)
        mask = attention_mask_for(attention_mask, T, past, x.device)
        for block in self.h:
            arguments = x, mask, cache
            x = checkpoint(block, *arguments, use_reentrant=False) if recomputed else block(*arguments)   # (B, T, C)
        return self.ln_f(x)


def check_not_empty(x: Tensor | None) -> None:
    """Refuse a call without input, a batch without a text, (0, T) or (0, T, C), and texts without a token.

    Raises:
        ConfigError: saying which it is.
    """
    if x is None or 0 in x.shape[:2]:
        found = "neither input_ids nor inputs_embeds" if x is None else f"{x.shape[0]} texts of {x.shape[1]} tokens"
        raise ConfigError(f"there is nothing to read: {found}")


class GPT2LMHeadModel(PretrainedModel):
    """GPT-2 with its language-model head: next-token scores, by the transposed wte or, untied, a matrix of its own."""

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
    """The hidden state of each text's last real token; of a text of pads only, its first position's.

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
