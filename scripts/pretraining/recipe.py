"""Pretraining a language model from scratch: packing, the next-token loss, and a loop that can be resumed.

    loss = mean over positions t of  -log softmax(wte h_t)[token t+1]

Texts are shuffled anew each epoch, joined with <|endoftext|> between them and cut into windows of equal length, so no
position is spent on padding. Which tokens a step sees follows from the seed and the step's number alone: a run that
was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from forward import hidden_states
from torch import Tensor
from tqdm import tqdm

from minipeft.errors import ConfigError
from minipeft.model.gpt2 import GPT2LMHeadModel
from minipeft.training.hardware import computing_in
from minipeft.training.optimizer import adamw
from minipeft.training.state import load_training_state, save_training_state


@dataclass
class PretrainingConfig:
    """The recipe. Tokens per step are `batch_size * window`.

    The rate rises for `warmup_steps`, stays, and falls linearly to zero over the last `decay_ratio` of the steps. Until
    then it does not depend on the run's length, so a run can be made longer or shorter while it goes on.

    Args:
        micro_batch: windows computed at once; the gradients of a step's micro-batches add up.
        muon: train the blocks' matrices by Muon, the rest by AdamW; false: everything by AdamW.
    """

    tokens: int = 30_000_000
    window: int = 512
    batch_size: int = 32
    micro_batch: int = 8
    learning_rate: float = 1.5e-3
    muon: bool = True
    decay_ratio: float = 0.3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    seed: int = 0
    evaluate_every: int = 500
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("tokens", "window", "batch_size", "micro_batch", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if not 0 < self.decay_ratio <= 1:
            raise ConfigError(f"decay_ratio must lie in (0, 1], got {self.decay_ratio}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be finite and not negative, got {self.weight_decay}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be a number from 0 to 2**63 - 1, got {self.seed}")

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return max(1, self.tokens // (self.window * self.batch_size))


def learning_rate_factor(step: int, config: PretrainingConfig) -> float:
    """The factor on the peak rate at `step`, counted from 0: up, level, and down to zero after the last step."""
    decay_steps = max(1, round(config.decay_ratio * config.steps))
    return min(1.0, (step + 1) / max(1, config.warmup_steps), (config.steps - step) / decay_steps)


class MuonAndAdamW:
    """Muon for the matrices of the blocks, AdamW for embeddings, LayerNorms and biases; used as one optimizer.

    Muon (Jordan et al. 2024) makes the momentum of a matrix orthogonal before it is subtracted, so that all directions
    of the matrix learn equally fast. Its step is scaled to the size that AdamW's has, so both take one learning rate.
    """

    def __init__(self, model: nn.Module, config: PretrainingConfig) -> None:
        matrices = {id(module.weight) for block in model.transformer.h for module in block.modules()
                    if isinstance(module, nn.Linear)}
        named = list(model.named_parameters())
        muon = torch.optim.Muon([p for _, p in named if id(p) in matrices], lr=config.learning_rate,
                                weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        others = adamw([(name, p) for name, p in named if id(p) not in matrices], model, config.learning_rate,
                       config.weight_decay, config.betas)
        self.optimizers = (muon, others)
        self.state = others.state  # one for both: a parameter belongs to one of them
        muon.state = self.state
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


class PackedWindows:
    """Texts as one stream of tokens, cut into windows; `batch(step)` is a pure function of the seed and the step.

    Args:
        texts: token ids of each text, without the end-of-text token.
        eos_token_id: the token put before each text.
        window: tokens per window.
        batch_size: windows per step.

    Raises:
        ConfigError: fewer tokens than one batch needs.
    """

    def __init__(self, texts: Sequence[np.ndarray], eos_token_id: int, window: int, batch_size: int, seed: int) -> None:
        self.texts = [np.concatenate(([eos_token_id], text)).astype(np.int32) for text in texts]
        self.window, self.batch_size, self.seed = window, batch_size, seed
        self.tokens = sum(len(text) for text in self.texts)
        self.steps_per_epoch = (self.tokens - 1) // (window * batch_size)
        if self.steps_per_epoch < 1:
            raise ConfigError(f"{self.tokens} tokens do not fill one batch of {batch_size} windows of {window}")
        self._epoch, self._stream = -1, np.empty(0, dtype=np.int32)

    def batch(self, step: int) -> Tensor:
        """(batch_size, window + 1) token ids: inputs and, one to the right, targets."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.texts))
            self._epoch, self._stream = epoch, np.concatenate([self.texts[i] for i in order])
        size = self.window * self.batch_size
        flat = self._stream[index * size:(index + 1) * size + 1]
        starts = np.arange(self.batch_size) * self.window
        return torch.from_numpy(np.stack([flat[s:s + self.window + 1] for s in starts]).astype(np.int64))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a tied output head, without ever holding all the logits.

    For 8,192 tokens and 8,192 entries the logits alone are 256 MB in float32, written and read several times. Here a
    few rows at a time are scored, and their gradients formed at once while they are still in the cache:

        d loss / d logits = (softmax(logits) - onehot(target)) / N
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, embedding: Tensor, targets: Tensor, rows: int) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)                                   # (N, C)
        embedding_grad = torch.zeros_like(embedding)                             # (vocab, C)
        weight = embedding.to(hidden.dtype)
        for start in range(0, len(hidden), rows):
            part = hidden[start:start + rows]                                    # (n, C)
            logits = F.linear(part, weight)                                      # (n, vocab)
            error, part_loss = _softmax(logits, targets[start:start + rows])
            loss += part_loss
            error[torch.arange(len(error), device=error.device), targets[start:start + rows]] -= 1
            hidden_grad[start:start + rows] = error @ weight                     # (n, C)
            embedding_grad += error.t() @ part                                   # (vocab, C)
        ctx.save_for_backward(hidden_grad, embedding_grad)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden_grad, embedding_grad = ctx.saved_tensors
        grad = grad / len(hidden_grad)
        return hidden_grad * grad.to(hidden_grad.dtype), embedding_grad * grad, None, None


@torch.compile(dynamic=False)
def _softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logits) (n, vocab) in the logits' dtype, and the sum of the rows' losses in float32."""
    logits_f32 = logits.float()
    log_sum = torch.logsumexp(logits_f32, dim=1, keepdim=True)                   # (n, 1)
    loss = (log_sum[:, 0] - logits_f32.gather(1, targets[:, None])[:, 0]).sum()
    return torch.exp(logits_f32 - log_sum).to(logits.dtype), loss


def next_token_loss(hidden: Tensor, embedding: Tensor, targets: Tensor, rows: int = 1024) -> Tensor:
    """Mean next-token cross-entropy in nats.

    Args:
        hidden: (B, T, C), the base model's output.
        embedding: (vocab, C), the tied head.
        targets: (B, T) the token that follows each position.
        rows: positions scored at a time.
    """
    hidden = hidden.flatten(0, 1)                                                # (B T, C)
    return _ChunkedCrossEntropy.apply(hidden, embedding, targets.flatten(), rows)


@torch.no_grad()
def validation_loss(model: GPT2LMHeadModel, texts: Sequence[np.ndarray], eos_token_id: int, window: int,
                    precision: torch.dtype, batch_size: int = 16) -> float:
    """Mean nats per token over `texts`, packed into windows in their given order."""
    device = model.lm_head.weight.device
    stream = np.concatenate([np.concatenate(([eos_token_id], text)) for text in texts]).astype(np.int64)
    count = (len(stream) - 1) // window
    inputs = torch.from_numpy(stream[:count * window].reshape(count, window))    # (windows, T)
    targets = torch.from_numpy(stream[1:count * window + 1].reshape(count, window))
    model.eval()
    total = 0.0
    for start in range(0, count, batch_size):
        batch, target = inputs[start:start + batch_size].to(device), targets[start:start + batch_size].to(device)
        with computing_in(precision, device):
            logits = model(batch)                                                # (B, T, vocab)
        total += F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="sum").item()
    model.train()
    return total / (count * window)


def pretrain(model: GPT2LMHeadModel, train: PackedWindows, evaluate: Callable[[], float], config: PretrainingConfig,
             state_folder: Path, precision: torch.dtype = torch.bfloat16, compile_model: bool = True) -> dict:
    """Train `model` in place for `config.steps` steps, saving resumable state as it goes.

    Args:
        model: on the device to train on.
        train: batches by step.
        evaluate: validation loss of the model as it stands, in nats per token.
        state_folder: where state is kept; a run found there goes on.
        precision: bfloat16 runs under autocast, float32 without.

    Returns:
        {"curve": [{"step", "tokens", "train_loss", "validation_loss", "seconds"}, ...], "seconds": total}.
    """
    optimizer = MuonAndAdamW(model, config) if config.muon else adamw(
        model.named_parameters(), model, config.learning_rate, config.weight_decay, config.betas)
    step, extra, _ = load_training_state(state_folder, model, optimizer)
    curve, seconds_before, losses = extra.get("curve", []), extra.get("seconds", 0.0), extra.get("losses", [])
    device = model.lm_head.weight.device
    body = model.transformer
    if compile_model:
        fast = device.type == "cpu" and precision == torch.bfloat16
        body = torch.compile(partial(hidden_states, model.transformer) if fast else model.transformer, dynamic=False)
    started = time.perf_counter()
    model.train()
    bar = tqdm(total=config.steps, initial=step, unit="step", desc="pretraining", mininterval=5)
    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config)
        losses.append(train_step(model, body, optimizer, train.batch(step).to(device), config, precision))
        step += 1
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", refresh=False)
        bar.update()
        seconds = seconds_before + time.perf_counter() - started
        if step % config.evaluate_every == 0 or step == config.steps:
            point = {"step": step, "tokens": step * config.window * config.batch_size, "seconds": round(seconds, 1),
                     "train_loss": round(float(np.mean(losses)), 4), "validation_loss": round(evaluate(), 4)}
            curve.append(point)
            losses = []
            bar.write(f"step {step}: train {point['train_loss']:.3f}, validation {point['validation_loss']:.3f}")
        if step % config.save_every == 0 or not losses:
            save_training_state(state_folder, model, optimizer, step,
                                extra={"curve": curve, "seconds": seconds, "losses": losses})
    bar.close()
    return {"curve": curve, "seconds": curve[-1]["seconds"] if curve else 0.0}


def train_step(model: GPT2LMHeadModel, body: Callable[[Tensor], Tensor], optimizer: Any, batch: Tensor,
               config: PretrainingConfig, precision: torch.dtype) -> float:
    """One optimizer step on a batch of (B, T + 1) token ids, cut into micro-batches; returns the batch's mean loss.

    Args:
        body: what computes the hidden states from token ids.
    """
    total = 0.0
    for tokens in batch.split(config.micro_batch):
        with computing_in(precision, batch.device):
            hidden = body(tokens[:, :-1])                                        # (micro-batch, T, C)
            if precision != torch.float32:
                hidden = hidden.to(precision)
            loss = next_token_loss(hidden, model.lm_head.weight, tokens[:, 1:]) * (len(tokens) / len(batch))
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def bits_per_byte(nats_per_token: float, tokens: int, utf8_bytes: int) -> float:
    """Loss in a unit that does not depend on the vocabulary: bits of surprise per byte of text."""
    return nats_per_token / math.log(2) * tokens / utf8_bytes
