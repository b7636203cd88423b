"""What a trained model costs beside its quality: disk, extra time at inference, and what the base forgot.

    forgetting = nats per token of held-out texts, the adapter in place, minus the base's own
    log p(next token | text) = log softmax(h wte^T)        h (T, C): hidden states, wte (vocab, C): the tied embedding

A classifier's base is a language model still, and this says how much of one. Head-only training changes no hidden
state: it forgets nothing, by definition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from minipeft.data.batches import IGNORED_LABEL, Batch
from minipeft.data.datasets import data_folder, load_dataset
from minipeft.data.examples import Examples
from minipeft.errors import InjectionError
from minipeft.methods.folder import read_details
from minipeft.methods.injection import active_injections
from minipeft.methods.switch import disable_adapter, merge, unmerge
from minipeft.model.gpt2 import GPT2LMHeadModel
from minipeft.runs.finetune import Run
from minipeft.tasks import task_for
from minipeft.tasks.evaluation import evaluation_batches, predicting, predictions
from minipeft.training.hardware import cast_frozen
from minipeft.training.vocabulary_loss import losses_and_hits

# Of forgetting: so many held-out texts, so many of their first tokens; of the time at inference, so many of these.
TEXTS, TOKENS, TIMED_TEXTS, TIMED_ROUNDS = 128, 256, 32, 5


def encoded(run: Run, texts: Sequence[str]) -> list[np.ndarray]:
    """The first tokens of each text, (T,) each."""
    return [np.asarray(row[:min(TOKENS, run.model.config.n_positions // 2)], dtype=np.int32)
            for row in run.plan.tokenizer.encode_batch(texts)]


def held_out(data_dir: str | Path | None) -> tuple[str, Examples]:
    """Texts that pretraining did not see, and their dataset: of IMDb's validation split where it is at hand, else of
    the bundled sample's; the same ones whatever is trained on."""
    folder = data_folder(data_dir)
    name = "imdb" if folder is not None and (folder / "imdb").is_dir() else "sample"
    return name, load_dataset(name, task_for(name), data_dir).validation.subset(TEXTS, seed=0)


def adapter_bytes(folder: Path) -> int:
    """What a trained model takes on disk; of full fine-tuning, all of it."""
    return sum((folder / name).stat().st_size for name in read_details(folder)["files"])


# --- forgetting -------------------------------------------------------------------------------------------------------

def forgotten(run: Run) -> dict[str, Any]:
    """What the base has forgotten of held-out texts: nats per token before and after training, and over how many."""
    plan, (name, texts) = run.plan, held_out(run.plan.options.data_dir)
    ids = [row for row in encoded(run, texts.texts) if len(row) > 1]
    base = cast_frozen(GPT2LMHeadModel.from_pretrained(plan.model_name).requires_grad_(False).to(plan.device),
                       plan.precision)
    before, after = (language_loss(model, ids, plan.device, plan.precision) for model in (base, run.model))
    return {"texts": f"{name} validation", "fingerprint": texts.fingerprint(),
            "tokens": sum(map(len, ids)) - len(ids), "before": round(before, 5), "after": round(after, 5)}


def language_loss(model: nn.Module, ids: Sequence[np.ndarray], device: torch.device, precision: torch.dtype) -> float:
    """Mean nats per token of texts, each token given those before it in its text, by the model as a language model.

    Args:
        model: with any head; what is injected is in place. Its tied embedding is the output head.
        ids: of each text, (T,), at least two.
    """
    wte = model.transformer.wte.weight                                                            # (vocab, C)
    head = nn.Linear(wte.shape[1], wte.shape[0], bias=False, device="meta")
    head.weight = wte

    def losses(batch: Batch) -> list[float]:
        hidden = model.transformer(batch.input_ids, attention_mask=batch.attention_mask)          # (B, T, C)
        by_token, _ = losses_and_hits(head, hidden.flatten(0, 1)[batch.positions], batch.targets)  # (N,)
        return [tokens.sum().item() for tokens in by_token.double().cpu().split(batch.targets_of_rows)]

    labels = [np.append(row[1:], IGNORED_LABEL).astype(np.int64) for row in ids]                  # (T,) each
    found = predictions(model, losses, ids, labels, device, precision, batch_size=8)
    return sum(found) / (sum(map(len, ids)) - len(ids))


# --- inference --------------------------------------------------------------------------------------------------------

def inference_of(run: Run) -> dict[str, Any]:
    """Seconds of a pass over some held-out texts: of the base, with the adapter unmerged, and merged.

    Returns:
        {"base_seconds", "seconds", "merged_seconds", "mergeable": "yes", "no" or "nothing to merge"}. Where the method
        trains the base's own tensors, and nothing is added, there is nothing to merge. base_seconds is None where the
        base is gone, merged_seconds where nothing merges.
    """
    model, device = run.model, run.plan.device
    ids = encoded(run, held_out(run.plan.options.data_dir)[1].texts[:TIMED_TEXTS])
    batches = [batch for _, batch in evaluation_batches(ids, [0] * len(ids), device)]

    def one_pass() -> float:
        with predicting(model, device, run.plan.precision):
            return _seconds(lambda: [model.transformer(batch.input_ids, attention_mask=batch.attention_mask)
                                     for batch in batches], device)

    mergeable = _mergeable(model)
    base, own, merged = [], [], []
    one_pass()  # what is prepared once is prepared
    for _ in range(TIMED_ROUNDS):  # in turn: a machine that is busy for a while is busy for all three
        own.append(one_pass())
        with suppress(InjectionError), disable_adapter(model):
            base.append(one_pass())
        if mergeable == "yes":
            merge(model)
            merged.append(one_pass())
            unmerge(model)
    seconds = {name: round(min(times), 5) if times else None
               for name, times in (("base_seconds", base), ("seconds", own), ("merged_seconds", merged))}
    return {**seconds, "texts": len(ids), "tokens": sum(map(len, ids)), "mergeable": mergeable}


def _mergeable(model: nn.Module) -> str:
    """As a results file has it; the model is left as it was."""
    if not any(injection.layers for injection in active_injections(model)):
        return "nothing to merge"
    try:
        merge(model)
    except InjectionError:
        return "no"
    unmerge(model)
    return "yes"


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """What a call takes: on a CPU the time that it computes, whatever else runs there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started
