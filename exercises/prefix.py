"""Exercise: prefix tuning. Learned keys and values before the text, in every block.

    o = softmax(q [P_k; k]^T / sqrt(D) + mask) [P_v; v]

    q, k, v, o (batch, H, T, D)      P_k, P_v (batch, H, V, D), the same for every text      [;] stacks along T

All of them are in one table (V, 2 L C), with C = H D and L blocks. Row i is virtual token i. Its columns are, block
after block, its key and then its value: 0 to C - 1 the key of block 0, C to 2 C - 1 the value of block 0, 2 C to
3 C - 1 the key of block 1, and so on. Within C the heads follow each other, D each.

With V = 2 and a text of 3 tokens:
                 P_0  P_1   t_0  t_1  t_2        each token of the text sees all of the prefix,
    t_0 sees      1    1     1    0    0         and of the text itself and what is before
    t_1 sees      1    1     1    1    0
    t_2 sees      1    1     1    1    1         positions of t_0, t_1, t_2: 2, 3, 4

attention_mask (batch, T), torch.long, is 1 at the text's real tokens and 0 at pads, on either side; each text has its
own pads. It does not know of the prefix, which is never hidden. No setting of the table gives the base model: a key of
zeros takes its share, too.

Fill in the four holes. Then:  python -m minipeft.check prefix FILE
To read: docs/exercises.md, and afterwards minipeft/methods/prefix.py.
"""

import torch.nn as nn
from torch import Tensor


class Prefix(nn.Module):
    """The table, and attention that finds its keys and values before the text's."""

    def __init__(self, num_virtual_tokens: int, n_layer: int, n_head: int, n_embd: int) -> None:
        """V, L, H and C. To be set:
        self.table     nn.Parameter (V, 2 L C), standard normal
        and what the others need besides
        """
        super().__init__()
        raise NotImplementedError("Prefix.__init__")

    def keys_and_values(self, layer: int, batch: int) -> tuple[Tensor, Tensor]:
        """P_k and P_v of block number `layer`, each (batch, H, V, D)."""
        raise NotImplementedError("Prefix.keys_and_values")

    def positions(self, T: int) -> Tensor:
        """The position ids (T,) of a text of T tokens, whole numbers."""
        raise NotImplementedError("Prefix.positions")

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor,
               attention_mask: Tensor | None = None) -> Tensor:
        """o (batch, H, T, D), from the text's query, key and value in this block, each (batch, H, T, D)."""
        raise NotImplementedError("Prefix.attend")
