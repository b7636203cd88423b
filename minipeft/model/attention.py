"""softmax(q k^T / sqrt(D)) v: by torch's fused kernels or, where that is faster, in blocks of queries.

A block of queries needs no keys after its own last position. So of 256 tokens, in blocks of 32, seven sixteenths of the
scores are never computed, and a block's scores fit a processor's cache. With s the scores of a block, P their softmax,
m the mask of a dropout with probability p, and y the block's output:

    s = q k^T / sqrt(D) + mask                P = softmax(s)              y = (P m) v / (1 - p)
    dv = (P m)^T dy / (1 - p)                 dP = (dy v^T) m / (1 - p)
    ds = P (dP - sum over keys of P dP)       dq = ds k / sqrt(D)         dk = ds^T q / sqrt(D)

Of all this only m is kept for the backward pass, one byte per element; P is computed again there, as the fused kernels
do. On a CPU they know no dropout: with it, torch computes the formula on whole matrices of scores and keeps them.
Without it their y comes faster than in blocks, in bfloat16, and their gradients slower: each does what it is better at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.model.dropout import draw_kept, scale
from minipeft.model.linear import autocast_dtype, carried_out_here

BYTES_PER_BLOCK = 128  # of a column of scores: 32 queries in float32, 64 in bfloat16


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
           training: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, each query looking where `mask` is True; without one, at itself and before.

    Args:
        query: (B, H, T, D); key and value are (B, H, S, D). The queries are the last T of S positions.
        mask: boolean, broadcastable to (B, H, T, S); nothing after the causal triangle may be True.
        dropout: share of the softmax's values that are set to 0 in training.
        training: whether the module that asks is in training mode.

    Returns:
        (B, H, T, D).
    """
    dropout = dropout if training else 0.0
    exact = query.dtype == torch.float32 and autocast_dtype(query) is None
    in_blocks_is_faster = dropout > 0 if exact else query.dtype == torch.bfloat16
    if training and torch.is_grad_enabled() and in_blocks_is_faster and carried_out_here(query):
        return _InBlocks.apply(query, key, value, mask, dropout)
    return fused(query, key, value, mask, dropout)


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """The same by torch's kernels. Arguments are as in `attend`; dropout acts whenever it is given."""
    causal = mask is None and query.shape[2] > 1  # one token after cached ones may look at all of them
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=causal)


def blocks_of(query: Tensor) -> list[tuple[int, int]]:
    """Where each block of queries starts and ends."""
    T, size = query.shape[2], BYTES_PER_BLOCK // query.element_size()
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def hidden_keys(mask: Tensor | None, start: int, end: int, keys: int, like: Tensor) -> Tensor:
    """What is added to the scores of queries start to end: 0 where they may look, else minus infinity.

    Returns:
        (end - start, keys) or, by `mask`, (B, 1, end - start, keys). `keys` is how many these queries can see at most.
    """
    if mask is None:
        hidden = torch.ones(end - start, keys, dtype=torch.bool).triu(keys - (end - start) + 1)
    else:
        hidden = ~mask[..., start:end, :keys]
    return torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)


def in_blocks(q: Tensor, k: Tensor, mask: Tensor | None, dropout: float,
              kept: list[Tensor] | None = None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """P, a block of queries at a time.

    Args:
        q: (B, H, T, D), already divided by sqrt(D).
        kept: what dropout keeps, for each block; drawn if not given.

    Yields:
        Which queries these are, P (B, H, block, keys), and what dropout keeps of it.
    """
    T, S = q.shape[2], k.shape[2]
    for number, (start, end) in enumerate(blocks_of(q)):
        keys = S - T + end
        scores = q[:, :, start:end] @ k[:, :, :keys].transpose(2, 3)                    # (B, H, block, keys)
        shares = scores.add_(hidden_keys(mask, start, end, keys, scores)).softmax(dim=3)
        drawn = kept[number] if kept else draw_kept(shares.shape, dropout) if dropout else None
        yield slice(start, end), shares, drawn


def thinned(shares: Tensor, kept: Tensor | None) -> Tensor:
    """P m."""
    return shares if kept is None else shares * kept.to(shares.dtype)


class _InBlocks(torch.autograd.Function):
    """The formula, with the gradients written out above."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        ctx.dropout = dropout
        if not dropout:
            ctx.save_for_backward(query, key, value, mask)
            return fused(query, key, value, mask)
        B, H, T, D = query.shape
        q, k, v = (query * D**-0.5).contiguous(), key.contiguous(), (value * scale(dropout)).contiguous()
        y = query.new_empty(B, T, H, D).transpose(1, 2)  # heads side by side in memory, as c_proj wants them
        kept_of_blocks = []
        with torch.autocast("cpu", enabled=False):
            for block, shares, kept in in_blocks(q, k, mask, dropout):
                y[:, :, block] = thinned(shares, kept) @ v[:, :, :shares.shape[3]]      # (B, H, block, D)
                kept_of_blocks.append(kept)
        ctx.save_for_backward(query, key, value, mask, *kept_of_blocks)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, *kept_of_blocks = ctx.saved_tensors
        D = query.shape[3]
        q, k, v = (query * D**-0.5).contiguous(), key.contiguous(), (value * scale(ctx.dropout)).contiguous()
        blocks = in_blocks(q, k, mask, ctx.dropout, kept_of_blocks)
        if torch.is_grad_enabled():  # these gradients are to be differentiated, too: let torch write them down
            y = torch.cat([thinned(shares, kept) @ v[:, :, :shares.shape[3]] for _, shares, kept in blocks], dim=2)
            return *torch.autograd.grad(y, (query, key, value), dy, create_graph=True), None, None
        dy = dy.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block, shares, kept in blocks:
            keys = slice(shares.shape[3])
            dv[:, :, keys] += thinned(shares, kept).transpose(2, 3) @ dy[:, :, block]
            dshares = thinned(dy[:, :, block] @ v[:, :, keys].transpose(2, 3), kept)
            dscores = torch._softmax_backward_data(dshares, shares, 3, shares.dtype)    # (B, H, block, keys)
            dq[:, :, block] = dscores @ k[:, :, keys]
            dk[:, :, keys] += dscores.transpose(2, 3) @ q[:, :, block]
        return dq.mul_(D**-0.5), dk, dv.mul_(scale(ctx.dropout)), None, None
