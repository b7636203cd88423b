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
from minipeft.settings import NOT_NEGATIVE, POSITIVE, POSITIVE_INTEGER, SEED, SHARE, Settings, setting
from minipeft.training.hardware import computing_in
from minipeft.training.optimizer import adamw
from minipeft.training.state import load_training_state, save_training_state
from minipeft.training.vocabulary_loss import loss_and_hits, losses_and_hits


@dataclass
class PretrainingConfig(Settings):
    """The recipe. Tokens per step are `batch_size * window`.

    The rate rises for `warmup_steps`, stays, and falls linearly to zero over the last `decay_ratio` of the steps. Until
    then it does not depend on the run's length, so a run can be made longer or shorter while it goes on.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    tokens: int = setting(30_000_000, "tokens to train on, all epochs together", POSITIVE_INTEGER)
    window: int = setting(512, "tokens per window, and the model's positions", POSITIVE_INTEGER)
    batch_size: int = setting(32, "windows per step", POSITIVE_INTEGER)
    micro_batch: int = setting(8, "windows computed at once; their gradients add up to the step's", POSITIVE_INTEGER)
    learning_rate: float = setting(3e-3, "peak", POSITIVE)
    muon: bool = setting(True, "Muon for the blocks' matrices; false: AdamW for everything")
    decay_ratio: float = setting(0.3, "share of the steps, the last ones, over which the rate falls to zero", SHARE)
    warmup_steps: int = setting(100, "steps over which the rate rises", NOT_NEGATIVE)
    weight_decay: float = setting(0.1, "on matrices", NOT_NEGATIVE)
    betas: list[float] = setting([0.9, 0.95], option=False)
    max_grad_norm: float = setting(1.0, "the gradient is scaled down to this norm", POSITIVE)
    seed: int = setting(0, "of the initial values, of dropout and of the texts' order", SEED)
    evaluate_every: int = setting(200, "steps between evaluations", POSITIVE_INTEGER)
    save_every: int = setting(25, "steps between saves of the state; an evaluation saves, too", POSITIVE_INTEGER)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, self.tokens // (self.window * self.batch_size))


def learning_rate_factor(step: int, config: PretrainingConfig, begun: int = 0) -> float:
    """The factor on the peak rate at `step`, counted from 0: up, level, and down to zero after the last step.

    Args:
        begun: the step at which the optimizer had no moments yet.
    """
    decay_steps = max(1, round(config.decay_ratio * config.steps))
    return min(1.0, (step - begun + 1) / max(1, config.warmup_steps), (config.steps - step) / decay_steps)


def make_optimizer(model: GPT2LMHeadModel, config: PretrainingConfig) -> MuonAndAdamW | torch.optim.AdamW:
    """The optimizer that the recipe asks for."""
    if config.muon:
        return MuonAndAdamW(model, config)
    return adamw(model.parameters(), model, config.learning_rate, config.weight_decay, tuple(config.betas))


class MuonAndAdamW:
    """Muon for the matrices of the blocks, AdamW for embeddings, LayerNorms and biases; used as one optimizer.

    Muon (Jordan et al. 2024) makes the momentum of a matrix orthogonal before it is subtracted, so that all directions
    of the matrix learn equally fast. Its step is scaled to the size that AdamW's has, so both take one learning rate.

    Attributes:
        state: of both: a parameter belongs to one of them.
        param_groups: of both, for setting the learning rate.
    """

    def __init__(self, model: GPT2LMHeadModel, config: PretrainingConfig) -> None:
        matrices = {id(module.weight) for module in model.transformer.h.modules() if isinstance(module, nn.Linear)}
        parameters = list(model.parameters())
        self.muon = torch.optim.Muon([p for p in parameters if id(p) in matrices], lr=config.learning_rate,
                                     weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = adamw([p for p in parameters if id(p) not in matrices], model, config.learning_rate,
                           config.weight_decay, tuple(config.betas))
        self.state = self.muon.state = self.adamw.state
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)


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


@torch.compile(dynamic=False)
def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Next-token cross-entropy in nats, summed: logits (n, vocab), targets (n,). Compiled, it reads the logits once."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


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
        read_out = partial(losses_and_hits, targets=target.flatten())
        with computing_in(precision, device):
            losses, _ = model(batch, positions=torch.arange(target.numel(), device=device), read_out=read_out)
        total += losses.sum().item()
    model.train()
    return total / (count * window)


def pretrain(model: GPT2LMHeadModel, train: PackedWindows, evaluate: Callable[[], float], config: PretrainingConfig,
             state_folder: Path, precision: torch.dtype = torch.bfloat16, compile_model: bool = True,
             start: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train `model` in place for `config.steps` steps, saving resumable state as it goes.

    Args:
        model: on the device to train on.
        train: batches by step.
        evaluate: validation loss of the model as it stands, in nats per token.
        state_folder: where state is kept; a run found there goes on.
        precision: bfloat16 runs under autocast, float32 without.
        start: {"step", "curve", "seconds", "losses"} of an unfinished run whose weights the model has; None or step 0
            for a new run.

    Returns:
        {"curve": [{"step", "tokens", "train_loss", "validation_loss", "seconds"}, ...], "seconds": total}.
    """
    optimizer = make_optimizer(model, config)
    step, saved, _ = load_training_state(state_folder, model, optimizer)
    start = start or {"step": 0}
    begun = start["step"]
    if not saved:
        step, saved = begun, start
    curve, losses = saved.get("curve", []), saved.get("losses", [])  # losses: of each step since the last evaluation
    body = _body(model, precision, compile_model)
    started = time.perf_counter() - saved.get("seconds", 0.0)
    model.train()
    bar = tqdm(total=config.steps, initial=step, unit="step", desc="pretraining", mininterval=5)
    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config, begun)
        losses.append(train_step(model, body, optimizer, train.batch(step), config, precision))
        step += 1
        bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", refresh=False)
        bar.update()
        seconds = time.perf_counter() - started
        if step % config.evaluate_every == 0 or step == config.steps:
            curve.append({"step": step, "tokens": step * config.window * config.batch_size,
                          "seconds": round(seconds, 1), "train_loss": round(float(np.mean(losses)), 4),
                          "validation_loss": round(evaluate(), 4)})
            losses = []
            bar.write("step {step}: train {train_loss:.3f}, validation {validation_loss:.3f}".format(**curve[-1]))
        if step % config.save_every == 0 or not losses:
            save_training_state(state_folder, model, optimizer, step,
                                extra={"curve": curve, "seconds": seconds, "losses": losses})
    bar.close()
    return {"curve": curve, "seconds": curve[-1]["seconds"] if curve else 0.0}


def _body(model: GPT2LMHeadModel, precision: torch.dtype, compile_model: bool) -> Callable[[Tensor], Tensor]:
    """What computes hidden states from token ids: compiled, and on a CPU in bfloat16 by what is faster there."""
    if not compile_model:
        return model.transformer
    fast = model.lm_head.weight.device.type == "cpu" and precision == torch.bfloat16
    return torch.compile(partial(hidden_states, model.transformer) if fast else model.transformer, dynamic=False)


def train_step(model: GPT2LMHeadModel, body: Callable[[Tensor], Tensor], optimizer: MuonAndAdamW | torch.optim.AdamW,
               batch: Tensor, config: PretrainingConfig, precision: torch.dtype) -> float:
    """One optimizer step; returns the batch's mean loss in nats per token.

    Args:
        body: what computes the hidden states from token ids.
        batch: (B, T + 1) token ids, computed in micro-batches.
    """
    total, device = 0.0, model.lm_head.weight.device
    targets = batch[:, 1:].numel()
    for tokens in batch.to(device).split(config.micro_batch):
        with computing_in(precision, device):
            hidden = body(tokens[:, :-1]).flatten(0, 1)                          # (micro-batch * T, C)
            loss, _ = loss_and_hits(model.lm_head, hidden, tokens[:, 1:].flatten(), loss_sum)
        (loss / targets).backward()
        total += loss.item() / targets
    nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def bits_per_byte(nats_per_token: float, tokens: int, utf8_bytes: int) -> float:
    """Loss in a unit that does not depend on the vocabulary: bits of surprise per byte of text."""
    return nats_per_token / math.log(2) * tokens / utf8_bytes
