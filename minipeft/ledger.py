"""What training costs, on paper: arithmetic in operations and memory in bytes, before anything is run.

Notation as in gpt2.py: B batch, T tokens, C channels, H heads, r rank.
"""

from __future__ import annotations

from minipeft.config import GPT2Config


def training_operations(config: GPT2Config, batch_size: int, length: int, r: int) -> int:
    """Floating-point operations of one training step with LoRA on c_attn (multiply and add counted as two).

    A frozen product costs 2 in out a token forwards and as much backwards, for the gradient of its input; a trained
    one as much again, for its own. Attention looks back only, so half of its T x T scores count, and its backward pass
    twice. Not counted are elementwise work and the embeddings; nothing is computed below the first trained parameter.
    """
    C, tokens = config.n_embd, batch_size * length
    inner = config.inner_size
    linear = C * 3 * C + C * C + 2 * C * inner                                  # numbers in a block's four matrices
    lora = r * (C + 3 * C)
    attention = 2 * length * C                                                  # a token: q k^T and the sum over v
    forward = 2 * linear + 2 * lora + attention
    backward = 2 * linear + 4 * lora + 2 * attention
    below_first = 2 * C * 3 * C + 2 * r * C                                     # input of the first block's c_attn
    return tokens * (config.n_layer * (forward + backward) - below_first)
