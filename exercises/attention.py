"""Exercise: causal self-attention, as in GPT-2.

    q, k, v = split(c_attn(x))                       c_attn makes 3 C channels: q's, then k's, then v's
    o = softmax(q k^T / sqrt(D) + mask) v            for each head by itself
    y = c_proj(o)                                    heads side by side again

    x, y (batch, T, C)      q, o (batch, H, T, D)      k, v (batch, H, S, D)      C = H D      S = cached tokens + T

Head 0 owns the first D of q's C channels, head 1 the next D, and so on. A query sees its own token and those before it,
cached ones too; where it sees nothing, the mask is -infinity and the share is 0:

    three tokens     1 0 0        three after     1 1 1 0 0
                     1 1 0        two cached      1 1 1 1 0
                     1 1 1                        1 1 1 1 1

attention_mask (batch, S) is 1 at real tokens and 0 at pads, which may stand on either side. No real token sees a pad.
What comes out at a pad means nothing, but is a number: a query that saw no key at all would be NaN. So a pad sees
itself.

Fill in the six holes. Then:  python -m minipeft.check attention FILE
To read: docs/exercises.md, and afterwards minipeft/model/gpt2.py.
"""

import torch.nn as nn
from torch import Tensor


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """(batch, T, C) -> (batch, H, T, D)."""
    raise NotImplementedError("split_heads")


def merge_heads(x: Tensor) -> Tensor:
    """(batch, H, T, D) -> (batch, T, C); it undoes split_heads."""
    raise NotImplementedError("merge_heads")


def visible(T: int, S: int, attention_mask: Tensor | None = None) -> Tensor:
    """Where a query may look: a boolean tensor, True where it may.

    Args:
        T: queries, which are the last T of the S keys' tokens.
        S: keys.
        attention_mask: (batch, S), torch.long, or None: there are no pads.

    Returns:
        (T, S) without an attention_mask, (batch, 1, T, S) with one.
    """
    raise NotImplementedError("visible")


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, each query looking where mask is True.

    Args:
        query: (batch, H, T, D).
        key, value: (batch, H, S, D).
        mask: what `visible` returns.

    Returns:
        (batch, H, T, D).
    """
    raise NotImplementedError("attend")


class Attention(nn.Module):
    """Causal multi-head self-attention, with biases and without dropout."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        """C and H. To be set:
        self.c_attn     nn.Linear from C to 3 C, with nn.Linear's own start
        self.c_proj     nn.Linear from C to C, the same
        and what forward needs besides
        """
        super().__init__()
        raise NotImplementedError("Attention.__init__")

    def forward(self, x: Tensor, attention_mask: Tensor | None = None,
                past: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (batch, T, C) -> y (batch, T, C).

        Args:
            attention_mask: (batch, S), or None.
            past: keys and values of earlier tokens, each (batch, H, S - T, D), or None: S is T.
        """
        raise NotImplementedError("Attention.forward")
