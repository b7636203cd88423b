"""Text classification: one label per text, read off the last real token.

    loss = -log softmax(score(h_last))[label]
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minipeft.data.batches import Batch
from minipeft.data.examples import Examples, check_texts, clean
from minipeft.data.labels import check_classes, in_order
from minipeft.data.tables import NUMBER
from minipeft.errors import ConfigError, DataError
from minipeft.model.gpt2 import GPT2ForSequenceClassification, GPT2LMHeadModel, last_real_token
from minipeft.model.tokenizer import Tokenizer
from minipeft.settings import setting
from minipeft.tasks.evaluation import predictions
from minipeft.tasks.task import Encoded, Task, check_label_names

# Which tokens of a text that is too long are kept: see `truncate`.
TRUNCATIONS = ("head", "head_tail")
TRUNCATION = "head_tail"
# Labels are imbalanced where one is so many times as frequent as another.
IMBALANCE = 3
# What a reviewer might write next, after the review and this line. Chosen on IMDb's validation split.
ZERO_SHOT_PROMPT = "\n\nIn short, this movie is"
ZERO_SHOT_WORDS = {"negative": (" bad", " terrible", " awful", " boring", " horrible"),
                   "positive": (" good", " great", " excellent", " wonderful", " amazing")}


@dataclass
class Classification(Task):
    """One label per text, from the last real token's vector. `truncation`: what is kept of a longer text."""

    truncation: str = setting(TRUNCATION, choices=TRUNCATIONS)

    name: ClassVar[str] = "classification"
    model_class: ClassVar[type[nn.Module]] = GPT2ForSequenceClassification
    one_label_each: ClassVar[bool] = True
    beside: ClassVar[tuple[str, ...]] = ("macro_f1", "majority_accuracy")

    @classmethod
    def read(cls, texts: list[Any], labels: list[Any], where: str,
             label_names: list[str] | None = None) -> tuple[Examples, list[str]]:
        check_texts(texts, where)
        for row, label in enumerate(labels, start=1):
            if label is None or label == "":
                raise DataError(f"{where}, row {row}: the label is empty")
            if isinstance(label, (list, dict)):
                raise DataError(f"{where}, row {row}: the label is {label!r}, not a single value")
        if label_names is None:
            check_classes(labels, where)
            label_names = in_order({str(label) for label in labels})
            check_label_names(label_names, where)
        number = {name: i for i, name in enumerate(label_names)}
        if unknown := [row for row, label in enumerate(labels, start=1) if str(label) not in number]:
            label = in_order({str(labels[row - 1]) for row in unknown})[0]
            shown = label if NUMBER.fullmatch(label) else repr(label)
            raise DataError(f"{where}: label {shown} is none of {', '.join(label_names)} ({len(unknown):,} rows have "
                            f"such a label, the first is row {unknown[0]:,})")
        return Examples([clean(text) for text in texts], [number[str(label)] for label in labels]), label_names

    def encode(self, examples: Examples) -> Encoded:
        return Encoded(examples, encode(examples.texts, self.tokenizer, self.max_length, self.truncation),
                       examples.labels)

    def evaluate(self, model: nn.Module, encoded: Encoded, device: torch.device, precision: torch.dtype,
                 progress: str | None = None) -> dict[str, Any]:
        logits = predict_logits(model, encoded.ids, device, precision, progress=progress)                # (N, K)
        return metrics(logits, encoded.labels, self.label_names)

    def test_each(self, model: nn.Module, examples: Examples, device: torch.device, precision: torch.dtype,
                  progress: str | None = None) -> tuple[dict[str, Any], np.ndarray | None]:
        """Of each example whether it is right: (N, 1)."""
        encoded = self.encode(examples)
        logits = predict_logits(model, encoded.ids, device, precision, progress=progress)                # (N, K)
        right = (logits.argmax(dim=1) == torch.tensor(encoded.labels)).long()                            # (N,)
        return metrics(logits, encoded.labels, self.label_names), right[:, None].numpy()

    def probabilities(self, model: nn.Module, texts: Sequence[str], device: torch.device, precision: torch.dtype,
                      progress: str | None = None) -> Tensor:
        """The probability of each label for each text: (N, K)."""
        ids = encode([clean(text) for text in texts], self.tokenizer, self.max_length, self.truncation)
        return predict_logits(model, ids, device, precision, progress=progress).softmax(dim=1)

    def predict(self, model: nn.Module, texts: Sequence[str], device: torch.device,
                precision: torch.dtype) -> Iterator[str]:
        """Label, its probability, and the first 80 characters of the text, with tabs between."""
        for text, row in zip(texts, self.probabilities(model, texts, device, precision)):                # (K,)
            label = int(row.argmax())
            yield f"{self.label_names[label]}\t{row[label]:.4f}\t{' '.join(text.split())[:80]}\n"

    def table(self, model: nn.Module, texts: Sequence[str], device: torch.device, precision: torch.dtype,
              progress: str | None = None) -> dict[str, list[Any]]:
        """The label, and a column for each label by its name, which holds its probability.

        Raises:
            DataError: a label is called "prediction", as the first column is.
        """
        if "prediction" in self.label_names:
            raise DataError("one of the labels is called 'prediction', as the table's column is that holds the label: "
                            "predict without a table, or train with another name for it")
        found = self.probabilities(model, texts, device, precision, progress)                            # (N, K)
        return {"prediction": [self.label_names[label] for label in found.argmax(dim=1).tolist()],
                **{name: [round(share, 6) for share in column.tolist()]
                   for name, column in zip(self.label_names, found.T)}}

    def baselines(self, train: Examples, test: Examples) -> dict[str, dict[str, Any]]:
        """The label most frequent in training for every text; as probabilities the labels' shares there."""
        counts = torch.bincount(torch.tensor(train.labels), minlength=len(self.label_names))             # (K,)
        shares = (counts + 1).log().expand(len(test), -1)       # + 1: no logarithm of zero; (N, K)
        return {"most_frequent_label": metrics(shares, test.labels, self.label_names)}

    @classmethod
    def imbalance(cls, train: Examples, label_names: Sequence[str]) -> str | None:
        """In words that labels are of very different frequency, if they are, and what that means; else None."""
        counts = Counter(train.labels)
        often, rarely = (name(counts.values()) for name in (max, min))
        if often < IMBALANCE * rarely:
            return None
        shown = [f"{label_names[label]!r} {count:,}" for label, count in counts.most_common()]
        shown = shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]]
        return (f"{', '.join(shown)} rows: always {label_names[counts.most_common(1)[0][0]]!r} would have accuracy "
                f"{often / len(train):.4f}, so look at macro F1")

    @classmethod
    def balanced_weights(cls, train: Examples, label_names: Sequence[str]) -> list[float]:
        """A weight for each label, n / (K n_k) as scikit-learn's "balanced": all K labels count the same in the loss.

        Their mean over the n training examples is 1. K counts the labels that occur; one that does not has weight 0.
        """
        counts = Counter(train.labels)
        return [len(train) / (len(counts) * counts[label]) if counts[label] else 0.0
                for label in range(len(label_names))]


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
    """Token ids of each text, cut to `max_length` tokens as `truncate` says; all texts at once, on all cores."""
    return [truncate(ids, max_length, truncation) for ids in tokenizer.encode_batch(texts)]


def predict_logits(model: nn.Module, ids: Sequence[np.ndarray], device: torch.device, precision: torch.dtype,
                   batch_size: int | None = None, progress: str | None = None) -> Tensor:
    """Label logits (N, K) of every text, in the given order.

    Args:
        batch_size: texts per forward pass; default what suits the device.
        progress: title of a progress bar; None shows none.
    """
    def logits(batch: Batch) -> Tensor:
        return model(**batch.arguments()).float().cpu()                                                  # (B, K)

    return torch.stack(predictions(model, logits, ids, [0] * len(ids), device, precision, batch_size, progress))


def metrics(logits: Tensor, labels: Sequence[int], names: Sequence[str] | None = None) -> dict[str, Any]:
    """Metrics of predicted logits (N, K), over all labels and "by_label".

    "f1" is the second label's for two labels ("f1_label" names it), and the unweighted mean over labels for more.
    "macro_f1" is that mean for any number, over the labels that are true or predicted somewhere, as scikit-learn's.
    "majority_accuracy" is the accuracy of always guessing the label that is the most frequent here. "loss" is the mean
    cross-entropy, never weighted. Of "confusion_matrix" rows are true labels, columns predicted ones.

    Args:
        names: of the labels; default their numbers.
    """
    targets = torch.tensor(labels)
    predicted = logits.argmax(dim=1)                                             # (N,)
    K = logits.shape[1]
    names = names or [str(label) for label in range(K)]
    confusion = torch.bincount(targets * K + predicted, minlength=K * K).view(K, K)   # rows: true, columns: predicted
    hits, true, guessed = confusion.diag(), confusion.sum(1), confusion.sum(0)   # (K,) each
    correct = hits.sum().item()
    f1 = 2 * hits / (true + guessed).clamp(min=1)
    low, high = wilson_interval(correct, len(labels))
    columns = {"precision": hits / guessed.clamp(min=1), "recall": hits / true.clamp(min=1), "f1": f1}
    by_label = {name: {**{key: round(column[k].item(), 6) for key, column in columns.items()},
                       "examples": int(true[k])} for k, name in enumerate(names)}
    return {"accuracy": round(correct / len(labels), 6), "accuracy_95_interval": [round(low, 6), round(high, 6)],
            "f1": round((f1[1] if K == 2 else f1.mean()).item(), 6), **({"f1_label": names[1]} if K == 2 else {}),
            "macro_f1": round(f1[(true + guessed) > 0].mean().item(), 6),
            "majority_accuracy": round(true.max().item() / len(labels), 6), "by_label": by_label,
            "loss": round(F.cross_entropy(logits, targets).item(), 6), "confusion_matrix": confusion.tolist(),
            "examples": len(labels)}


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a proportion; z = 1.96 gives 95 %. Stays inside [0, 1], unlike p +- z s."""
    p = correct / total
    center = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, center - half), min(1.0, center + half)


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

    def logits(batch: Batch) -> Tensor:
        hidden = model.transformer(batch.input_ids, attention_mask=batch.attention_mask)                 # (B, T, C)
        last = last_real_token(hidden, batch.attention_mask)                                             # (B, C)
        scores = model.lm_head(last).float().log_softmax(dim=-1)                                         # (B, vocab)
        by_label = [scores[:, tokens].logsumexp(dim=1) for tokens in first_tokens]                       # K of (B,)
        return torch.stack(by_label, dim=1).float().cpu()                                                # (B, K)

    return torch.stack(predictions(model, logits, ids, [0] * len(ids), device, precision, batch_size, progress))
