"""Generation: the language model reads a source text and writes a target text, its summary or translation.

    sequence = source, separator, target, end of text
    loss     = sum over target tokens and the end of -log softmax(lm_head(h before it))[token]

The separator tells the model to begin the target ("TL;DR:": Radford et al. 2019, section 3.6; "english = german":
section 3.7). The source is read but never scored. A source or a target that is too long loses its end, which is logged.
"""

from __future__ import annotations

import logging
import os
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from minipeft.data.batches import IGNORED_LABEL, Batch
from minipeft.data.examples import Examples, check_text, check_texts
from minipeft.errors import ConfigError, DataError
from minipeft.model.gpt2 import GPT2LMHeadModel
from minipeft.settings import POSITIVE_INTEGER, Range, setting
from minipeft.tasks.decoding import generate, stream
from minipeft.tasks.evaluation import bootstrap_interval, predictions
from minipeft.tasks.task import Encoded, Task
from minipeft.training.hardware import computing_in
from minipeft.training.vocabulary_loss import losses_and_hits

logger = logging.getLogger(__name__)

# A summary's source is longer than most texts. Of mini's 512 positions 32 are left for virtual tokens.
MAX_SUMMARY_LENGTH = 480
# The part of max_length that is kept free for the target; a summary is a small part of its source.
TARGET_SHARE, SUMMARY_SHARE = 1 / 3, 1 / 6
# Prompts continued at a time: one token of each is little work, so more of them than texts that are read.
GENERATION_BATCH_SIZE = {"cpu": 32, "cuda": 256}


@dataclass
class Generation(Task):
    """What summaries and translations share.

    Attributes:
        max_new_tokens: room for a target, the end included; default target_share of max_length. The source
            has the rest.

    Raises:
        ConfigError: a value out of range, or no room for a source.
    """

    max_new_tokens: int | None = setting(None, within=Range("at least 2, a token and the end", lambda n: n >= 2))

    model_class: ClassVar[type[nn.Module]] = GPT2LMHeadModel
    columns: ClassVar[tuple[str, str]] = ("source", "target")
    best_by: ClassVar[str] = "loss"
    separator: ClassVar[str]
    target_share: ClassVar[float] = TARGET_SHARE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens is None:
            self.max_new_tokens = max(2, int(self.max_length * self.target_share))
        self.separator_ids = self.tokenizer.encode(self.separator)
        self.source_length = self.max_length - len(self.separator_ids) - self.max_new_tokens
        if self.source_length < 1:
            raise ConfigError(f"max_length={self.max_length} has no room for a source, {len(self.separator_ids)} "
                              f"tokens of separator and {self.max_new_tokens} new tokens")

    @classmethod
    def read(cls, texts: list[Any], labels: list[Any], where: str,
             label_names: list[str] | None = None) -> tuple[Examples, list[str]]:
        """A source is a text or a list of sentences, a target a text or a list of texts of which any will do."""
        check_texts([source_text(text) for text in texts], where, "source")
        references = [label if isinstance(label, list) else [label] for label in labels]
        for row, targets in enumerate(references, start=1):
            if not targets:
                raise DataError(f"{where}, row {row}: there is no target")
            for target in targets:
                check_text(target, f"{where}, row {row}", "target")
        return Examples(texts, references), []

    def prompts(self, texts: Sequence[Any]) -> list[np.ndarray]:
        """Token ids of each source, cut to its room, and of the separator."""
        sources = self.tokenizer.encode_batch([source_text(text) for text in texts])
        _log_cut("sources", sources, self.source_length)
        return [np.asarray(ids[:self.source_length] + self.separator_ids, dtype=np.int32) for ids in sources]

    def encode(self, examples: Examples) -> Encoded:
        """Training sequences. The first of several targets is learned; label t is the token after token t."""
        prompts = self.prompts(examples.texts)
        targets = self.tokenizer.encode_batch([" " + references[0].strip() for references in examples.labels])
        longest = self.max_new_tokens - 1
        _log_cut("targets", targets, longest)
        ids, labels = [], []
        for prompt, target in zip(prompts, targets):
            target = np.asarray([*target[:longest], self.tokenizer.eos_token_id])
            ids.append(np.concatenate((prompt, target[:-1])))                              # (T,)
            labels.append(np.concatenate((np.full(len(prompt) - 1, IGNORED_LABEL), target)))                 # (T,)
        return Encoded(examples, ids, labels)

    def evaluate(self, model: nn.Module, encoded: Encoded, device: torch.device, precision: torch.dtype,
                 progress: str | None = None) -> dict[str, Any]:
        """Loss and accuracy per target token, each given the true ones before it: quick, and no measure of quality."""
        def sums(batch: Batch) -> list[Tensor]:
            """For each row (3,): its loss, its hits, its tokens."""
            read_out = partial(losses_and_hits, targets=batch.targets)
            losses, hits = model(**batch.arguments(), read_out=read_out)                               # (N,) both
            by_token = torch.stack((losses, hits, torch.ones_like(hits)), dim=1).cpu()                 # (N, 3)
            return [tokens.sum(dim=0) for tokens in by_token.split(batch.targets_of_rows)]             # (3,) each

        found = predictions(model, sums, encoded.ids, encoded.labels, device, precision, progress=progress)
        loss, hits, tokens = torch.stack(found).double().sum(dim=0).tolist()
        return {"loss": round(loss / tokens, 6), "accuracy": round(hits / tokens, 6)}

    def generate_texts(self, model: nn.Module, texts: Sequence[Any], device: torch.device, precision: torch.dtype,
                       progress: str | None = None, **decoding: Any) -> list[str]:
        """The model's summary or translation of each text, on one line.

        Args:
            decoding: arguments of `generate`; greedy without any.
        """
        def continued(batch: Batch) -> list[str]:
            """What the model writes after each prompt of a batch."""
            input_ids, mask = padded_left(batch.input_ids, batch.attention_mask)                       # (B, T) each
            ids = generate(model, input_ids, mask, eos_token_id=self.tokenizer.eos_token_id,
                           **{"max_new_tokens": self.max_new_tokens, **decoding})                      # (B, T + new)
            return [self._text(new) for new in ids[:, input_ids.shape[1]:].tolist()]

        prompts, beams = self.prompts(texts), max(1, decoding.get("num_beams", 1))  # each of which is a row
        return predictions(model, continued, prompts, [0] * len(prompts), device, precision,
                           max(1, GENERATION_BATCH_SIZE[device.type] // beams), progress)

    def table(self, model: nn.Module, texts: Sequence[str], device: torch.device, precision: torch.dtype,
              progress: str | None = None, **decoding: Any) -> dict[str, list[Any]]:
        """The summary or translation."""
        return {"prediction": self.generate_texts(model, texts, device, precision, progress, **decoding)}

    def _text(self, ids: list[int]) -> str:
        """The text of new tokens, up to the end of text, on one line."""
        eos = self.tokenizer.eos_token_id
        return " ".join(self.tokenizer.decode(ids[:ids.index(eos)] if eos in ids else ids).split())

    def test(self, model: nn.Module, examples: Examples, device: torch.device, precision: torch.dtype,
             progress: str | None = None) -> dict[str, Any]:
        return self.test_each(model, examples, device, precision, progress)[0]

    def test_each(self, model: nn.Module, examples: Examples, device: torch.device, precision: torch.dtype,
                  progress: str | None = None) -> tuple[dict[str, Any], np.ndarray | None]:
        written = self.generate_texts(model, examples.texts, device, precision, progress)
        found = {**self.metrics(written, examples.labels),
                 **self.evaluate(model, self.encode(examples), device, precision)}
        return found, self.counts(written, examples.labels)

    def counts(self, written: list[str], references: list[list[str]]) -> np.ndarray | None:
        """What each text adds to the headline: see `test_each`."""
        return None

    @abstractmethod
    def metrics(self, written: list[str], references: list[list[str]]) -> dict[str, Any]:
        """How close the written texts come to their references, with 95 % intervals."""

    def predict(self, model: nn.Module, texts: Sequence[str], device: torch.device, precision: torch.dtype,
                **decoding: Any) -> Iterator[str]:
        """Each summary or translation, piece by piece as it is generated, and a line break.

        Args:
            decoding: arguments of `stream`; greedy without any. Beam search knows its text at the end only: for that
                there is `generate_texts`.

        Raises:
            ConfigError: beam search.
        """
        model.eval()
        decoding = {"max_new_tokens": self.max_new_tokens, **decoding}
        if decoding.pop("num_beams", 1) != 1 or "length_penalty" in decoding:
            raise ConfigError("a length penalty is for beam search, with num_beams above 1; and what beams find is "
                              "known only at the end: use generate_texts")
        for prompt in self.prompts(texts):
            tokens = stream(model, torch.from_numpy(prompt).long()[None].to(device),
                            eos_token_id=self.tokenizer.eos_token_id, **decoding)                      # (1,) each
            ids: list[int] = []
            printed = text = ""
            while True:
                with computing_in(precision, device):  # left before each `yield`: see `predicting`
                    token = next(tokens, None)
                new = None if token is None else int(token)
                if new in (None, self.tokenizer.eos_token_id):
                    break
                ids.append(new)
                text = self._text(ids)
                if not text.endswith("\ufffd"):  # part of a character that has further bytes to come
                    yield text[len(printed):]
                    printed = text
            yield text[len(printed):] + "\n"


@dataclass
class Summarization(Generation):
    """A summary after "TL;DR:", judged by ROUGE (Lin 2004); of several references the closest counts.

    The package rouge-score compares runs of the letters a to z and digits: it is made for English.
    """

    max_length: int = setting(MAX_SUMMARY_LENGTH, within=POSITIVE_INTEGER)

    name: ClassVar[str] = "summarization"
    headline: ClassVar[str] = "rougeL"
    metric_package: ClassVar[str | None] = "rouge_score"
    separator: ClassVar[str] = "\nTL;DR:"
    target_share: ClassVar[float] = SUMMARY_SHARE

    def metrics(self, written: list[str], references: list[list[str]]) -> dict[str, Any]:
        found: dict[str, Any] = {"examples": len(written)}
        for kind, values in self.scores(written, references, "rouge1", "rouge2", "rougeL").items():
            found[kind] = round(float(values.mean()), 4)
            found[f"{kind}_95_interval"] = bootstrap_interval(lambda rows: values[rows].mean(), len(values))
        return found

    @staticmethod
    def scores(written: list[str], references: list[list[str]], *kinds: str) -> dict[str, np.ndarray]:
        """Each text's ROUGE of these kinds, from 0 to 100: (N,) each."""
        from rouge_score.rouge_scorer import RougeScorer
        scorer = RougeScorer(list(kinds), use_stemmer=False)
        found = [scorer.score_multi(targets, text) for text, targets in zip(written, references)]
        return {kind: np.array([100 * score[kind].fmeasure for score in found]) for kind in kinds}

    def counts(self, written: list[str], references: list[list[str]]) -> np.ndarray | None:
        """Each text's ROUGE-L in thousandths: (N, 1)."""
        return np.rint(1000 * self.scores(written, references, "rougeL")["rougeL"])[:, None].astype(np.int64)

    @classmethod
    def headline_of(cls, sums: np.ndarray, examples: int) -> np.ndarray:
        """The mean ROUGE-L."""
        return sums[..., 0] / (1000 * examples)

    def baselines(self, train: Examples, test: Examples) -> dict[str, dict[str, Any]]:
        """Lead-1: the first sentence of the source is its summary."""
        return {"lead_1": self.metrics([first_sentence(text) for text in test.texts], test.labels)}


class Translation(Generation):
    """A translation after "=", judged by BLEU (Papineni et al. 2002) and chrF (Popović 2015), as sacrebleu has them."""

    name: ClassVar[str] = "translation"
    headline: ClassVar[str] = "bleu"
    metric_package: ClassVar[str | None] = "sacrebleu"
    separator: ClassVar[str] = " ="

    def metrics(self, written: list[str], references: list[list[str]]) -> dict[str, Any]:
        from sacrebleu.metrics import BLEU, CHRF
        from sacrebleu.significance import PairedTest
        most = max(map(len, references))
        columns = [[targets[i] if i < len(targets) else None for targets in references] for i in range(most)]
        with _sacrebleu_seed():  # one system and none to pair it with: its scores, and their intervals by bootstrap
            signatures, scores = PairedTest([(self.name, written)], {"bleu": BLEU(), "chrf": CHRF()}, columns,
                                            test_type="bs", n_samples=1000)()
        found: dict[str, Any] = {"examples": len(written)}
        for name, (title, signature) in zip(("bleu", "chrf"), signatures.items()):
            score = scores[title][0]
            for key in ("bs", "seed"):  # these are of the interval: the score has the same signature without one
                signature.update(key, None)
            # sacrebleu's interval: the samples' mean, plus and minus half of the distance between their percentiles.
            low, high = max(0.0, score.mean - score.ci), min(100.0, score.mean + score.ci)
            found |= {name: round(float(score.score), 4), f"{name}_signature": signature.format(),
                      f"{name}_95_interval": [round(float(low), 6), round(float(high), 6)]}
        return found

    def counts(self, written: list[str], references: list[list[str]]) -> np.ndarray | None:
        """What BLEU sums up over texts: lengths of text and reference, right runs of 1 to 4 words, all: (N, 10)."""
        from sacrebleu.metrics import BLEU
        bleu = BLEU(effective_order=True)  # for single texts; what it counts is the same
        found = [bleu.sentence_score(text, targets) for text, targets in zip(written, references)]
        return np.array([[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in found])

    @classmethod
    def headline_of(cls, sums: np.ndarray, examples: int) -> np.ndarray:
        """BLEU of all texts together."""
        from sacrebleu.metrics import BLEU

        def bleu(row: np.ndarray) -> float:
            row = np.rint(row).astype(int)
            lengths, right, runs = row[:2].tolist(), row[2:6].tolist(), row[6:].tolist()
            return BLEU.compute_bleu(right, runs, *lengths, smooth_method="exp").score

        return np.apply_along_axis(bleu, -1, sums)

    def baselines(self, train: Examples, test: Examples) -> dict[str, dict[str, Any]]:
        """The source as it is, and a dictionary: each word becomes the target word that goes with it best."""
        dictionary = word_dictionary(train)
        copied = [source_text(text) for text in test.texts]
        translated = [_joined([dictionary.get(word, word) for word in _words(text)]) for text in copied]
        return {"copy_source": self.metrics(copied, test.labels),
                "word_dictionary": self.metrics(translated, test.labels)}


@contextmanager
def _sacrebleu_seed() -> Iterator[None]:
    """Let sacrebleu draw the same samples in every run; it takes its seed from this environment variable alone."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = "12345"  # sacrebleu's own default
    try:
        yield
    finally:
        del os.environ["SACREBLEU_SEED"]
        if before is not None:
            os.environ["SACREBLEU_SEED"] = before


def _log_cut(what: str, texts: list[list[int]], longest: int) -> None:
    if cut := sum(len(text) > longest for text in texts):
        logger.warning("%d of %d %s have more than %d tokens; what comes after was cut", cut, len(texts), what, longest)


def source_text(source: Any) -> Any:
    """A source's text, its sentences joined where it is a list of them."""
    return " ".join(source) if isinstance(source, list) and all(isinstance(part, str) for part in source) else source


def first_sentence(source: str | list[str]) -> str:
    """The first of a list of sentences. A text's ends at the first of . ! ? that a space follows."""
    return source[0] if isinstance(source, list) else re.split(r"(?<=[.!?])\s", source, maxsplit=1)[0]


def padded_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, T), padded on the right, with their padding moved to the left."""
    T = input_ids.shape[1]
    pads = T - attention_mask.sum(dim=1, keepdim=True)                                                 # (B, 1)
    source = (torch.arange(T) - pads) % T                                                              # (B, T)
    return input_ids.gather(1, source.to(input_ids.device, non_blocking=True)), attention_mask.gather(1, source)


def word_dictionary(pairs: Examples) -> dict[str, str]:
    """For each source word the target word that goes with it best: 2 n(both) / (n(source word) + n(target word)),
    counted in sentences (Dice 1945)."""
    sources: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    together: Counter[tuple[str, str]] = Counter()
    for source, references in zip(pairs.texts, pairs.labels):
        own, opposite = set(_words(source_text(source))), set(_words(references[0]))
        sources.update(own)
        targets.update(opposite)
        together.update((a, b) for a in own for b in opposite)
    best: dict[str, tuple[float, str]] = {}
    for (a, b), count in together.items():
        best[a] = max(best.get(a, (0.0, "")), (2 * count / (sources[a] + targets[b]), b))
    return {word: found for word, (_, found) in best.items()}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _joined(words: list[str]) -> str:
    return re.sub(r" ([.,;:!?])", r"\1", " ".join(words))
