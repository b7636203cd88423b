"""softmax(q k^T / sqrt(D)) v: by torch's fused kernels or, where that is faster, in blocks of queries.

A block of queries needs no keys after its own last position. So of 512 tokens, in blocks of 128, three eighths of the
scores are never computed, and a block's scores fit a processor's cache. With s the scores of a block, P their softmax,
m the mask of a dropout with probability p, and y the block's output:

    s = q k^T / sqrt(D) + mask                P = softmax(s)              y = (P m) v / (1 - p)
    dv = (P m)^T dy / (1 - p)                 dP = (dy v^T) m / (1 - p)
    ds = P (dP - sum over keys of P dP)       dq = ds k / sqrt(D)         dk = ds^T q / sqrt(D)

Of all this only m is kept for the backward pass, one byte per element; P is computed again there, as the fused kernels
do. On a CPU they know no dropout: with it, torch computes the formula on whole matrices of scores and keeps them.
Without it their y comes faster than in blocks, in bfloat16, and their gradients slower: each does what it is better at.
Where a CPU cannot multiply bfloat16, both compute in float32 (linear.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minipeft.model.dropout import draw_kept, scale
from minipeft.model.linear import autocast_dtype, carried_out_here, through_float32

BYTES_PER_BLOCK = 256  # of a column of scores: 64 queries in float32, 128 in bfloat16


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
           training: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, each query looking where `mask` is True; without one, at itself and before.

    Args:
        query: (B, H, T, D); key and value are (B, H, S, D). The queries are the last T of S positions.
        mask: boolean, (T, S) or (B, 1, T, S), with a True in each row; nothing after the causal triangle may be True.
        dropout: share of the softmax's values that are set to 0 in training.
        training: whether the module that asks is in training mode.

    Returns:
        (B, H, T, D).
    """
    if carried_out_here(query, key, value) and through_float32(query.dtype):  # compiled, the second is never asked
        with torch.autocast("cpu", enabled=False):
            return attend(query.float(), key.float(), value.float(), mask, dropout, training).to(query.dtype)
    dropout = dropout if training else 0.0
    exact = query.dtype == torch.float32 and autocast_dtype(query) is None
    in_blocks_is_faster = dropout > 0 if exact else query.dtype == torch.bfloat16
    if training and torch.is_grad_enabled() and in_blocks_is_faster and carried_out_here(query):
        return _InBlocks.apply(query, key, value, mask, dropout)
    return fused(query, key, value, mask, dropout)


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """The same by torch's kernels. Arguments are as in `attend`; dropout acts whenever it is given."""
    causal = mask is None
    if query.shape[2] == 1:  # one token after cached ones may look at all; an `and` would be compiled as a symbol
        causal = False
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=causal)


def blocks_of(query: Tensor) -> list[tuple[int, int]]:
    """Where each block of queries starts and ends, the last one first."""
    T, size = query.shape[2], BYTES_PER_BLOCK // query.element_size()
    return [(start, min(start + size, T)) for start in range(0, T, size)][::-1]


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


class Block(NamedTuple):
    """Some queries, and the keys and values that they can see; N is B H.

    Attributes:
        queries: which of the T they are.
        q: (N, block, D), divided by sqrt(D).
        k, v: (N, keys, D).
        shares: (N, block, keys), P.
        kept: (N, block, keys), what dropout keeps of P; None for all.
    """

    queries: slice
    q: Tensor
    k: Tensor
    v: Tensor
    shares: Tensor
    kept: Tensor | None

    def thinned(self, shares: Tensor) -> Tensor:
        """What dropout leaves of P, or of its gradient."""
        return shares if self.kept is None else shares * self.kept.to(shares.dtype)

    def y(self) -> Tensor:
        """(N, block, D), what these queries find."""
        return self.thinned(self.shares) @ self.v


def in_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float,
              kept: Sequence[Tensor] = ()) -> Iterator[Block]:
    """All blocks, the last one first: from one to the next fewer keys are left. What products are made of lies side by
    side in memory, as else each product would first copy it.

    Args:
        kept: what dropout keeps, for each block; drawn if not given. Values are divided by 1 - p.
    """
    (B, H, T, D), S = query.shape, key.shape[2]
    k, v = key.reshape(B * H, S, D), (value * scale(dropout) if dropout else value).reshape(B * H, S, D)
    for number, (start, end) in enumerate(blocks_of(query)):
        keys = S - T + end
        q = query[:, :, start:end].reshape(B * H, end - start, D) * D**-0.5                  # (N, block, D)
        k, v = k[:, :keys].contiguous(), v[:, :keys].contiguous()                           # (N, keys, D)
        scores = (q @ k.transpose(1, 2)).view(B, H, end - start, keys)                      # (B, H, block, keys)
        shares = scores.add_(hidden_keys(mask, start, end, keys, scores)).softmax(dim=3).flatten(0, 1)
        drawn = kept[number] if kept else draw_kept(shares.shape, dropout) if dropout else None
        yield Block(slice(start, end), q, k, v, shares, drawn)


class _InBlocks(torch.autograd.Function):
    """The formula, with the gradients written out above."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        ctx.dropout = dropout
        if not dropout:
            ctx.save_for_backward(query, key, value, mask)
            return fused(query, key, value, mask)
        B, H, T, D = query.shape
        y = query.new_empty(B, T, H, D).transpose(1, 2)  # heads side by side in memory, as c_proj wants them
        kept_of_blocks = []
        with torch.autocast("cpu", enabled=False):
            for block in in_blocks(query, key, value, mask, dropout):
                y[:, :, block.queries] = block.y().view(B, H, -1, D)
                kept_of_blocks.append(block.kept)
        ctx.save_for_backward(query, key, value, mask, *kept_of_blocks)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, *kept_of_blocks = ctx.saved_tensors
        B, H, T, D = query.shape
        blocks = in_blocks(query, key, value, mask, ctx.dropout, kept_of_blocks)
        if torch.is_grad_enabled():  # these gradients are to be differentiated, too: let torch write them down
            parts = [block.y().view(B, H, -1, D) for block in blocks]
            y = torch.cat(parts[::-1], dim=2)                                               # (B, H, T, D)
            wanted = [tensor for tensor in (query, key, value) if tensor.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None
        dq, dk, dv = query.new_empty(B, T, H, D).transpose(1, 2), None, None
        for block in blocks:
            dy_block = dy[:, :, block.queries].reshape(block.q.shape)                       # (N, block, D)
            dshares = block.thinned(dy_block @ block.v.transpose(1, 2))                     # (N, block, keys)
            dscores = torch._softmax_backward_data(dshares, block.shares, 2, dshares.dtype)
            dq[:, :, block.queries] = (dscores @ block.k * D**-0.5).view(B, H, -1, D)
            dk = _plus(dk, dscores.transpose(1, 2) @ block.q)                               # (N, S, D)
            dv = _plus(dv, block.thinned(block.shares).transpose(1, 2) @ dy_block)
        if ctx.dropout:
            dv.mul_(scale(ctx.dropout))
        return dq, dk.view(key.shape), dv.view(key.shape), None, None


def _plus(whole: Tensor | None, part: Tensor) -> Tensor:
    """The sum over blocks so far, (N, S, D), after a block with (N, keys, D); the first one has all S keys."""
    if whole is None:
        return part
    whole[:, :part.shape[1]] += part
    return whole
