"""Exercise: prompt tuning. Learned input vectors before the text.

    x = [P; wte[ids]] + wpe[positions]        positions 0, 1, 2, ..., V + T - 1
    hidden = blocks(x)                        the frozen model
    y = hidden[V:]                            the prompt's own positions are cut off

    ids (batch, T)      P (V, C) trained      x, hidden (batch, V + T, C)      y (batch, T, C)      [;] stacks along T

P starts as the embeddings of a text's words: with V = 5 and the ids 7, 8 it is a copy of the rows 7, 8, 7, 8, 7 of wte.
Training P does not move the words. attention_mask (batch, T) is 1 at real tokens and 0 at pads, on either side; the
model gets one that knows of the prompt, too, which is never hidden. A classifier reads each text's last real token.

Fill in the five holes. Then:  python -m minipeft.check prompt FILE
To read: docs/exercises.md, and afterwards minipeft/methods/prompt.py.
"""

import torch.nn as nn
from torch import Tensor


class Prompt(nn.Module):
    """V learned vectors, put before each text and cut off behind the model."""

    def __init__(self, num_virtual_tokens: int, wte: nn.Embedding, ids: list[int]) -> None:
        """V, the frozen embeddings (vocabulary, C), and the ids of the text that P starts as.

        To be set:
            self.prompt     nn.Parameter (V, C): a copy of the ids' rows of wte, again and again, cut to V
            and what the others need besides; wte is no part of this module
        """
        super().__init__()
        raise NotImplementedError("Prompt.__init__")

    def embed(self, input_ids: Tensor, wte: nn.Embedding, wpe: nn.Embedding) -> Tensor:
        """input_ids (batch, T) -> x (batch, V + T, C), what the first block reads."""
        raise NotImplementedError("Prompt.embed")

    def extend_mask(self, attention_mask: Tensor) -> Tensor:
        """attention_mask (batch, T) -> (batch, V + T), in the same dtype."""
        raise NotImplementedError("Prompt.extend_mask")

    def strip(self, hidden: Tensor) -> Tensor:
        """hidden (batch, V + T, C) -> y (batch, T, C)."""
        raise NotImplementedError("Prompt.strip")

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """hidden (batch, V + T, C) and attention_mask (batch, T) -> each text's last real token (batch, C)."""
        raise NotImplementedError("Prompt.pool")
