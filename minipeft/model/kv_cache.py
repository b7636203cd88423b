"""What attention looks back at: the keys and values of tokens it has already seen.

Generation fills a cache token by token; prefix tuning fills one from parameters. Attention sees no difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

MORE_ROOM = 32  # tokens that there is room for, at least, when keys and values move to a larger place


class KVCache:
    """Keys and values of tokens already seen, one pair per block: what attention can look back at.

    Generation fills it as it goes, so each step computes one token. Each tensor is (B, H, S, D). Without gradients
    they lie in larger ones with room for tokens to come, so that a step writes its own token and copies nothing else.

    Args:
        layers: what it starts with; default nothing.
        kept: whether somebody reads it after the call that it is given to. If not, it keeps what it started with alone.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]] | None = None, kept: bool = True) -> None:
        self.layers, self.kept = list(layers or []), kept
        # Of each block the larger tensors, and the part of them that was given out last.
        self.room: dict[int, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

    @property
    def length(self) -> int:
        """Number of cached tokens."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append this step's (B, H, T, D) keys and values; return all (B, H, S, D) of them."""
        if layer == len(self.layers):
            self.layers.append((key, value))
        elif not self.kept:
            return self._appended(layer, key, value)  # and forgets it: all blocks' would lie there until the call ends
        elif torch.is_grad_enabled():
            self.layers[layer] = self._appended(layer, key, value)
            self.room.pop(layer, None)  # it does not hold these
        else:
            self.layers[layer] = self._append_in_place(layer, key, value)
        return self.layers[layer]

    def _appended(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        past_key, past_value = self.layers[layer]
        return torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)

    def _append_in_place(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        past = self.layers[layer]
        S, end = past[0].shape[2], past[0].shape[2] + key.shape[2]
        room, given = self.room.get(layer, (None, None))
        # A caller may have replaced what was given; what was made in inference mode can be written to there alone.
        if past is not given or room[0].shape[2] < end or (
                room[0].is_inference() and not torch.is_inference_mode_enabled()):
            more = end + max(MORE_ROOM, end // 4)
            room = tuple(tensor.new_empty(*tensor.shape[:2], more, tensor.shape[3]) for tensor in past)
            for whole, tensor in zip(room, past):
                whole[:, :, :S] = tensor
        for whole, tensor in zip(room, (key, value)):
            whole[:, :, S:end] = tensor
        self.room[layer] = room, tuple(whole[:, :, :end] for whole in room)
        return self.room[layer][1]

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row rows[i] has seen: beam search drops some continuations and forks others."""
        for layer, given in enumerate(self.layers):
            room, last = self.room.get(layer, (None, None))
            if given is last:  # with its room, so that the next step need not copy it again
                room, S = tuple(whole[rows] for whole in room), given[0].shape[2]
                self.layers[layer] = tuple(whole[:, :, :S] for whole in room)
                self.room[layer] = room, self.layers[layer]
            else:
                self.layers[layer] = tuple(tensor[rows] for tensor in given)
