"""The loss over a vocabulary, computed in pieces: the logits of all tokens never exist at once.

    logits = head(h)          (N, vocab): for 1,024 tokens and GPT-2's 50,257 entries 196 MB in float32, several times
    loss   = sum over the N tokens of -log softmax(logits)[target]

The loss is a sum, so its gradients are sums, too, over pieces of some tokens each. A piece's logits are computed, its
loss, and at once the gradients of its loss: for its hidden states, and for what is trained of the head. Then its logits
are let go, and the backward pass finds the gradients ready. This costs no arithmetic: each product is computed once, as
it would be without pieces. The head is called as a module, whatever stands in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minipeft.model.linear import uncompiled

LossSum = Callable[[Tensor, Tensor], Tensor]
# Logits of a piece, 24 MB of float32 on a CPU: the C library gives memory above 32 MB back to the system each time. Per
# 1,024 tokens a bfloat16 head of 50,257 takes 0.42 s in pieces of 25 MB, 0.56 in pieces of 49. A GPU's size is a guess.
NUMBERS_PER_PIECE = {"cpu": 6 * 2**20, "cuda": 2**26}


@uncompiled
def loss_and_hits(head: nn.Module, hidden: Tensor, targets: Tensor, loss_sum: LossSum,
                  factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss of all tokens, with its gradients, and how many predictions are right.

    Args:
        head: hidden states (n, C) -> logits (n, vocab).
        hidden: (N, C).
        targets: (N,).
        loss_sum: (logits, targets) -> loss summed over them, of some tokens at a time.
        factor: the gradient, a single number, with which the backward pass of this loss is going to begin. Float16
            holds no small numbers, and the gradients within a piece get this factor before they are rounded. Any other
            number is right as well. Default 1.

    Returns:
        (loss, hits): single numbers. The loss can be differentiated once: a second derivative is a RuntimeError.
    """
    parts = pieces(head, hidden, targets)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if len(parts) > 1 and torch.is_grad_enabled() and (hidden.requires_grad or trained):
        factor = torch.ones((), device=hidden.device) if factor is None else factor
        return _LossInPieces.apply(head, targets, loss_sum, factor, hidden, *trained)
    found = [_of_piece(head, *part, loss_sum) for part in parts]
    return sum(loss for loss, _ in found), sum(hits for _, hits in found)


def reading_logits(forward: Callable[..., Tensor]) -> Callable[..., Any]:
    """A model that returns its logits, called like one with a `read_out`: that gets the logits, and an empty head."""
    return lambda read_out, **arguments: read_out(nn.Identity(), forward(**arguments))


@torch.no_grad()
def losses_and_hits(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's cross-entropy in nats and whether its prediction is right, without gradients: (N,) both.

    Args:
        head, hidden, targets: as in `loss_and_hits`.
    """
    losses, hits = [], []
    for part, its_targets in pieces(head, hidden, targets):
        logits = head(part).float()                                              # (n, vocab)
        losses.append(F.cross_entropy(logits, its_targets, reduction="none"))    # (n,)
        hits.append(logits.max(dim=1).indices == its_targets)                    # (n,)
        del logits  # before the next piece's are made
    return torch.cat(losses), torch.cat(hits)


def pieces(head: nn.Module, hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Hidden states (n, C) and targets (n,) of some tokens at a time, equally many but for one.

    All tokens are one piece where their logits are few, or where a head does not say its `out_features`.
    """
    number = -(-len(hidden) * getattr(head, "out_features", 0) // NUMBERS_PER_PIECE[hidden.device.type])
    number = max(1, min(number, len(hidden)))
    return list(zip(hidden.tensor_split(number), targets.tensor_split(number)))


def _of_piece(head: nn.Module, hidden: Tensor, targets: Tensor, loss_sum: LossSum) -> tuple[Tensor, Tensor]:
    logits = head(hidden)                                                        # (n, vocab)
    # `argmax` gives the same numbers, but in bfloat16 on a CPU takes almost six times as long.
    return loss_sum(logits, targets), (logits.detach().max(dim=-1).indices == targets).sum()


class _LossInPieces(torch.autograd.Function):
    """`loss_and_hits`, with gradients that are computed in the forward pass, `factor` times too large."""

    @staticmethod
    def forward(ctx: Any, head: nn.Module, targets: Tensor, loss_sum: LossSum, factor: Tensor, hidden: Tensor,
                *trained: Tensor) -> tuple[Tensor, Tensor]:
        losses, hits, hidden_grads = [], [], []
        trained_grads: list[Tensor | None] = [None] * len(trained)
        for part, its_targets in pieces(head, hidden.detach(), targets):
            part.requires_grad_(hidden.requires_grad)                            # (n, C)
            with torch.enable_grad():
                piece_loss, piece_hits = _of_piece(head, part, its_targets, loss_sum)
            with torch.autocast(hidden.device.type, enabled=False):  # a backward pass has the forward's number formats
                found = list(torch.autograd.grad(piece_loss, [t for t in (part, *trained) if t.requires_grad], factor,
                                                 allow_unused=True))
            if hidden.requires_grad:
                hidden_grads.append(found.pop(0))
            for number, grad in enumerate(found):
                if grad is not None:
                    total = trained_grads[number]
                    trained_grads[number] = grad.clone() if total is None else total.add_(grad)
            losses.append(piece_loss.detach())
            hits.append(piece_hits)
            del piece_loss, found  # before the next piece's are made
        ctx.save_for_backward(factor, torch.cat(hidden_grads) if hidden_grads else None, *trained_grads)
        total_hits = torch.stack(hits).sum()
        ctx.mark_non_differentiable(total_hits)
        return torch.stack(losses).sum(), total_hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: what was saved would pass for constants
            raise RuntimeError("the loss in pieces has no second derivative: compute it from the model's logits")
        factor, *found = ctx.saved_tensors
        return None, None, None, None, *(each if each is None else each * (grad / factor) for each in found)
