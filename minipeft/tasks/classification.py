"""Text classification: one label a text, read off the last real token.

    loss = -log softmax(score(h_last))[label]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minipeft import defaults, parallel
from minipeft.data import Batch, in_order_of_length
from minipeft.errors import ConfigError, DataError
from minipeft.gpt2 import GPT2LMHeadModel, last_real_token
from minipeft.hardware import computing_in
from minipeft.tokenizer import Tokenizer

TRUNCATIONS = ("head", "head_tail")
# What a reviewer might write next, after the review and this line. Chosen on IMDb's validation split.
ZERO_SHOT_PROMPT = "\n\nIn short, this movie is"
ZERO_SHOT_WORDS = {"negative": (" bad", " terrible", " awful", " boring", " horrible"),
                   "positive": (" good", " great", " excellent", " wonderful", " amazing")}


def truncate(ids: Sequence[int], max_length: int, how: str) -> np.ndarray:
    """Cut a text to `max_length` tokens.

    Args:
        how: "head" keeps the first tokens; "head_tail" keeps the first quarter and, from the end, the other three
            quarters, where a review has its verdict.
    """
    if len(ids) > max_length:
        if how == "head":
            ids = ids[:max_length]
        else:
            head = max_length // 4
            ids = [*ids[:head], *ids[len(ids) - (max_length - head):]]
    return np.asarray(ids, dtype=np.int32)


def encode(texts: Sequence[str], tokenizer: Tokenizer, max_length: int, truncation: str) -> list[np.ndarray]:
    """Token ids of each text, cut to `max_length`; all texts at once, on all cores.

    Raises:
        ConfigError: an unknown truncation, or max_length below 1.
    """
    check_length(max_length, truncation)
    return [truncate(ids, max_length, truncation) for ids in tokenizer.encode_batch(texts)]


def check_length(max_length: int, truncation: str) -> None:
    """Refuse a length or a truncation that cannot be.

    Raises:
        ConfigError: an unknown truncation, or max_length below 1.
    """
    if truncation not in TRUNCATIONS:
        raise ConfigError(f"truncation must be one of {', '.join(TRUNCATIONS)}, got {truncation!r}")
    if max_length < 1:
        raise ConfigError(f"max_length must be at least 1, got {max_length}")


def loss_sum(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy in nats, summed over the batch: logits (B, K), labels (B,)."""
    return F.cross_entropy(logits.float(), batch.labels, reduction="sum")


def predict_logits(model: nn.Module, ids: Sequence[np.ndarray], device: torch.device, precision: torch.dtype,
                   batch_size: int | None = None, progress: str | None = None) -> Tensor:
    """Label logits (N, K) of every text, in the given order.

    Args:
        batch_size: texts per forward pass; default what suits the device.
        progress: title of a progress bar; None shows none.
    """
    model.eval()
    return _for_each_text(lambda batch: model(batch.input_ids, attention_mask=batch.attention_mask),     # (B, K)
                          ids, device, precision, batch_size, progress)


def pooled_features(model: nn.Module, ids: Sequence[np.ndarray], device: torch.device, precision: torch.dtype,
                    batch_size: int | None = None, progress: str | None = None) -> Tensor:
    """What the head of a sequence classifier sees of every text: (N, C), in the given order."""
    model.eval()

    def last_hidden_state(batch: Batch) -> Tensor:
        hidden = model.transformer(batch.input_ids, attention_mask=batch.attention_mask)                 # (B, T, C)
        return last_real_token(hidden, batch.attention_mask)                                             # (B, C)

    return _for_each_text(last_hidden_state, ids, device, precision, batch_size, progress)


@torch.inference_mode()
def head_logits(head: nn.Module, features: Tensor, device: torch.device) -> Tensor:
    """Label logits (N, K) from `pooled_features`."""
    return head(features.to(device)).float().cpu()


@torch.inference_mode()
def _for_each_text(compute: Callable[[Batch], Tensor], ids: Sequence[np.ndarray], device: torch.device,
                   precision: torch.dtype, batch_size: int | None, progress: str | None) -> Tensor:
    """One row for each text, in the given order, computed in batches of texts of similar length.

    Several processes share the texts, and each gets all rows.
    """
    batch_size = batch_size or defaults.EVALUATION_BATCH_SIZE[device.type]
    own = parallel.share_of(len(ids))
    results: list[Tensor] = []
    numbers: list[int] = []
    with tqdm(total=len(own), desc=progress, unit="text", mininterval=1,
              disable=progress is None or parallel.rank() > 0) as bar:
        for rows, batch in in_order_of_length([ids[i] for i in own], [0] * len(own), batch_size):
            with computing_in(precision, device):
                results.append(compute(batch.to(device)).float().cpu())
            numbers += [own[row] for row in rows]
            bar.update(len(rows))
    return parallel.gathered(torch.cat(results), numbers, len(ids))


def metrics(logits: Tensor, labels: Sequence[int]) -> dict[str, Any]:
    """Accuracy with its 95 % interval, F1, mean loss and the confusion matrix of predicted logits (N, K).

    F1 is the positive label's for two labels, and the labels' unweighted mean for more.
    """
    targets = torch.tensor(labels)
    predicted = logits.argmax(dim=1)                                             # (N,)
    K = logits.shape[1]
    confusion = torch.bincount(targets * K + predicted, minlength=K * K).view(K, K)   # rows: true, columns: predicted
    correct = confusion.diag().sum().item()
    f1 = 2 * confusion.diag() / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)
    low, high = wilson_interval(correct, len(labels))
    return {"accuracy": round(correct / len(labels), 6), "accuracy_95_interval": [round(low, 6), round(high, 6)],
            "f1": round((f1[1] if K == 2 else f1.mean()).item(), 6),
            "loss": round(F.cross_entropy(logits, targets).item(), 6), "confusion_matrix": confusion.tolist(),
            "examples": len(labels)}


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a proportion; z = 1.96 gives 95 %. Stays inside [0, 1], unlike p +- z s."""
    p = correct / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def zero_shot_logits(model: GPT2LMHeadModel, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device,
                     precision: torch.dtype, max_length: int, prompt: str = ZERO_SHOT_PROMPT,
                     words: dict[str, tuple[str, ...]] | None = None, batch_size: int | None = None,
                     progress: str | None = None) -> Tensor:
    """Classify by asking the untrained language model how the review goes on.

    logits[k] = log sum over label k's words of p(word | review, prompt): which label's words are the likelier
    continuation. Only words that are one token of the vocabulary are used.

    Returns:
        (N, K), columns in the order of `words`.

    Raises:
        DataError: a label without any one-token word.
    """
    first_tokens = []
    for label, candidates in (words or ZERO_SHOT_WORDS).items():
        tokens = [ids[0] for ids in map(tokenizer.encode, candidates) if len(ids) == 1]
        if not tokens:
            raise DataError(f"no word for {label!r} is a single token of this vocabulary")
        first_tokens.append(torch.tensor(tokens, device=device))
    prompt_ids = np.asarray(tokenizer.encode(prompt), dtype=np.int32)
    if max_length <= len(prompt_ids):
        raise ConfigError(f"max_length={max_length} leaves no room for a review: the prompt alone has "
                          f"{len(prompt_ids)} tokens")
    ids = [np.concatenate((row, prompt_ids))
           for row in encode(texts, tokenizer, max_length - len(prompt_ids), "head_tail")]
    model.eval()

    def label_scores(batch: Batch) -> Tensor:
        hidden = model.transformer(batch.input_ids, attention_mask=batch.attention_mask)             # (B, T, C)
        last = last_real_token(hidden, batch.attention_mask)                                         # (B, C)
        scores = model.lm_head(last).float().log_softmax(dim=-1)                                     # (B, vocab)
        return torch.stack([scores[:, tokens].logsumexp(dim=1) for tokens in first_tokens], dim=1)   # (B, K)

    return _for_each_text(label_scores, ids, device, precision, batch_size, progress)
