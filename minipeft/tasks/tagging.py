"""Tagging: one label per word, such as the names of people and places in a sentence.

A word is one or more tokens. Its tag is read off its first token, in training and in prediction; the word's other
tokens carry no label, since they would count long words more often than short ones.

    loss = sum over words of -log softmax(classifier(h_first token))[tag]

A causal model reads from left to right: at a word's first token it knows what came before, not the rest of the word.
A sentence of more than `max_length` tokens is read in several windows, cut between words; every word is tagged.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from minipeft.data.batches import IGNORED_LABEL, Batch
from minipeft.data.examples import Examples, check_text
from minipeft.errors import DataError
from minipeft.model.gpt2 import GPT2ForTokenClassification
from minipeft.tasks.evaluation import bootstrap_interval, predictions
from minipeft.tasks.task import Encoded, Task, check_label_names

logger = logging.getLogger(__name__)


@dataclass
class Tagging(Task):
    """One tag per word, in the BIO scheme: B- begins an entity, I- goes on with it, O is outside of any."""

    name: ClassVar[str] = "tagging"
    model_class: ClassVar[type[nn.Module]] = GPT2ForTokenClassification
    columns: ClassVar[tuple[str, str]] = ("tokens", "ner_tags")
    best_by: ClassVar[str] = "f1"
    headline: ClassVar[str] = "f1"
    metric_package: ClassVar[str | None] = "seqeval"

    @classmethod
    def read(cls, texts: list[Any], labels: list[Any], where: str,
             label_names: list[str] | None = None) -> tuple[Examples, list[str]]:
        """Words and tags, each a list or, as in a .csv file, a text with spaces between."""
        texts, labels = ([_words(cell) for cell in column] for column in (texts, labels))
        if not texts:
            raise DataError(f"{where}: there is no sentence at all")
        for row, (words, tags) in enumerate(zip(texts, labels), start=1):
            if not isinstance(words, list) or not isinstance(tags, list):
                raise DataError(f"{where}, row {row}: words and tags should be lists, or texts with spaces between")
            if not words:
                raise DataError(f"{where}, row {row}: there is no word")
            if len(words) != len(tags):
                raise DataError(f"{where}, row {row}: {len(words)} words have {len(tags)} tags")
            for word in words:
                check_text(word, f"{where}, row {row}", "word")
        names = label_names or _tag_names(labels, where)
        check_label_names(names, where)
        number = {**{name: i for i, name in enumerate(names)}, **({i: i for i in range(len(names))})}
        for row, tags in enumerate(labels, start=1):
            for tag in tags:
                if not isinstance(tag, (str, int)) or tag not in number:
                    raise DataError(f"{where}, row {row}: tag {tag!r} is none of {', '.join(names)}")
        return Examples(texts, [[number[tag] for tag in tags] for tags in labels]), names

    def encode(self, examples: Examples) -> Encoded:
        """Windows of whole words. A single word of more than `max_length` tokens loses its end, and is counted."""
        known: dict[str, list[int]] = {}
        vocabulary = sorted({word for words in examples.texts for word in words})
        for word, tokens in zip(vocabulary, self.tokenizer.encode_batch([" " + word for word in vocabulary])):
            known[word] = tokens
        encoded = Encoded(examples, [], [], [])
        shortened = 0
        for owner, (words, tags) in enumerate(zip(examples.texts, examples.labels)):
            ids: list[int] = []
            labels: list[int] = []
            for word, tag in zip(words, tags):
                tokens = known[word][:self.max_length]
                shortened += len(known[word]) > self.max_length
                if len(ids) + len(tokens) > self.max_length:
                    self._close(encoded, owner, ids, labels)
                    ids, labels = [], []
                ids += tokens
                labels += [tag] + [IGNORED_LABEL] * (len(tokens) - 1)
            self._close(encoded, owner, ids, labels)
        if shortened:
            logger.warning("%d words have more than max_length=%d tokens; what comes after was cut", shortened,
                           self.max_length)
        return encoded

    @staticmethod
    def _close(encoded: Encoded, owner: int, ids: list[int], labels: list[int]) -> None:
        encoded.ids.append(np.asarray(ids, dtype=np.int32))
        encoded.labels.append(np.asarray(labels, dtype=np.int64))
        encoded.owners.append(owner)

    def word_logits(self, model: nn.Module, encoded: Encoded, device: torch.device, precision: torch.dtype,
                    progress: str | None = None) -> list[torch.Tensor]:
        """Tag logits of each example's words, (words, K) each, whatever windows they were in."""

        def logits_of_rows(batch: Batch) -> Sequence[torch.Tensor]:
            logits = model(**batch.arguments()).float().cpu()                             # (words of the batch, K)
            return logits.split(batch.targets_of_rows)                                    # (words of a row, K) each

        windows = predictions(model, logits_of_rows, encoded.ids, encoded.labels, device, precision, progress=progress)
        parts: list[list[torch.Tensor]] = [[] for _ in encoded.examples.texts]
        for owner, window in zip(encoded.owners, windows):
            parts[owner].append(window)
        return [torch.cat(own) for own in parts]

    def evaluate(self, model: nn.Module, encoded: Encoded, device: torch.device, precision: torch.dtype,
                 progress: str | None = None) -> dict[str, Any]:
        return self._evaluated(model, encoded, device, precision, progress)[0]

    def test_each(self, model: nn.Module, examples: Examples, device: torch.device, precision: torch.dtype,
                  progress: str | None = None) -> tuple[dict[str, Any], np.ndarray | None]:
        """Of each sentence how many entities are right, are true, are predicted: (N, 3)."""
        found, tags = self._evaluated(model, self.encode(examples), device, precision, progress)
        return found, self.entity_counts(tags, examples.labels)

    @classmethod
    def headline_of(cls, sums: np.ndarray, examples: int) -> np.ndarray:
        """F1 of whole entities: 2 right / (true + predicted)."""
        return 2 * sums[..., 0] / np.maximum(1, sums[..., 1] + sums[..., 2])

    def _evaluated(self, model: nn.Module, encoded: Encoded, device: torch.device, precision: torch.dtype,
                   progress: str | None) -> tuple[dict[str, Any], list[list[int]]]:
        """The metrics, and the predicted tags."""
        logits = self.word_logits(model, encoded, device, precision, progress)
        labels = torch.tensor([tag for tags in encoded.examples.labels for tag in tags])                 # (words,)
        tags = [rows.argmax(dim=1).tolist() for rows in logits]
        loss = round(F.cross_entropy(torch.cat(logits), labels).item(), 6)
        return {**self.metrics(tags, encoded.examples.labels), "loss": loss}, tags

    def entity_counts(self, predicted: list[list[int]], true: list[list[int]]) -> np.ndarray:
        """Of each sentence how many entities are right, are true, are predicted: (N, 3)."""
        from seqeval.metrics.sequence_labeling import get_entities
        entities = [[set(get_entities([self.label_names[tag] for tag in tags])) for tags in column]
                    for column in (true, predicted)]
        return np.array([[len(a & b), len(a), len(b)] for a, b in zip(*entities)])                       # (N, 3)

    def metrics(self, predicted: list[list[int]], true: list[list[int]]) -> dict[str, Any]:
        """Precision, recall and F1 of whole entities, together and by type, by seqeval; accuracy of single words.

        An entity counts as found if its type, its first and its last word are right.
        """
        from seqeval.metrics import classification_report
        names = self.label_names
        true_names = [[names[tag] for tag in tags] for tags in true]
        predicted_names = [[names[tag] for tag in tags] for tags in predicted]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # seqeval's mean over types, where there is none
            report = classification_report(true_names, predicted_names, output_dict=True, zero_division=0)
        counts = self.entity_counts(predicted, true)                                                     # (N, 3)

        def f1(rows: np.ndarray) -> float:
            return self.headline_of(counts[rows].sum(axis=0), len(rows))

        right = sum(a == b for rows in zip(true, predicted) for a, b in zip(*rows))
        whole = report["micro avg"]
        return {"f1": round(float(whole["f1-score"]), 6), "f1_95_interval": bootstrap_interval(f1, len(true)),
                "precision": round(float(whole["precision"]), 6), "recall": round(float(whole["recall"]), 6),
                "by_type": {kind: {"precision": round(float(row["precision"]), 6),
                                   "recall": round(float(row["recall"]), 6), "f1": round(float(row["f1-score"]), 6),
                                   "entities": int(row["support"])}
                            for kind, row in report.items() if not kind.endswith(" avg")},
                "accuracy": round(right / sum(map(len, true)), 6), "examples": len(true),
                "words": sum(map(len, true))}

    def tags(self, model: nn.Module, sentences: list[list[str]], device: torch.device, precision: torch.dtype,
             progress: str | None = None) -> list[list[str]]:
        """A tag for each word of each sentence."""
        examples = Examples(sentences, [[0] * len(words) for words in sentences])
        logits = self.word_logits(model, self.encode(examples), device, precision, progress)
        return [[self.label_names[tag] for tag in rows.argmax(dim=1).tolist()] for rows in logits]

    def predict(self, model: nn.Module, texts: Sequence[str | list[str]], device: torch.device,
                precision: torch.dtype) -> Iterator[str]:
        """Each text's words, with a slash and the tag behind those that have one."""
        sentences = list(map(_words, texts))
        for words, tags in zip(sentences, self.tags(model, sentences, device, precision)):
            yield " ".join(word if tag == "O" else f"{word}/{tag}" for word, tag in zip(words, tags)) + "\n"

    def table(self, model: nn.Module, texts: Sequence[str | list[str]], device: torch.device, precision: torch.dtype,
              progress: str | None = None) -> dict[str, list[Any]]:
        """A list of tags, one for each word of a text or, where that is a list of words, of these."""
        return {"prediction": self.tags(model, list(map(_words, texts)), device, precision, progress)}

    def baselines(self, train: Examples, test: Examples) -> dict[str, dict[str, Any]]:
        """Each word gets the tag that it had most often in training, and unknown ones the tag most frequent there."""
        tags_of: dict[str, Counter[int]] = defaultdict(Counter)
        overall: Counter[int] = Counter()
        for words, tags in zip(train.texts, train.labels):
            overall.update(tags)
            for word, tag in zip(words, tags):
                tags_of[word][tag] += 1
        usual = overall.most_common(1)[0][0]
        best = {word: counts.most_common(1)[0][0] for word, counts in tags_of.items()}
        guessed = [[best.get(word, usual) for word in words] for words in test.texts]
        return {"most_frequent_tag": self.metrics(guessed, test.labels)}


def _words(cell: Any) -> Any:
    """The words, or tags, of a cell: a text's are between its blanks, and a list's are as they are."""
    return cell.split() if isinstance(cell, str) else cell


def _tag_names(labels: list[list[Any]], where: str) -> list[str]:
    """The tags of a column, O first.

    Raises:
        DataError: a tag that is not in the BIO scheme, or only one.
    """
    for row, tags in enumerate(labels, start=1):
        for tag in tags:
            if not isinstance(tag, str) or (tag != "O" and tag[:2] not in ("B-", "I-")) or len(tag) == 2:
                raise DataError(f"{where}, row {row}: tag {tag!r} is neither O nor of the form B-type or I-type"
                                + ("; tags are given by name" if isinstance(tag, int) else ""))
    names = {tag for tags in labels for tag in tags} | {"O"}
    if len(names) < 2:
        raise DataError(f"{where}: all words have the tag O; there is nothing to learn")
    return ["O", *sorted(names - {"O"}, key=lambda tag: (tag[2:], tag))]
