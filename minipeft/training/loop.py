"""The fine-tuning loop: precision, accumulation, clipping, schedule, best-on-validation, interruption and resume.

It trains whatever parameters require a gradient and knows neither the method that left them trainable nor the task:
the loss comes in as a function.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from minipeft.data.batches import Batch, BucketedBatches
from minipeft.errors import ConfigError
from minipeft.methods.saving import load_training_state, save_training_state
from minipeft.training import distributed as parallel
from minipeft.training.hardware import computing_in
from minipeft.training.optimizer import adamw, warmup_cosine


@dataclass
class TrainingConfig:
    """How to train. Defaults per method are in `defaults.py`.

    Raises:
        ConfigError: a value out of range.
    """

    epochs: int = field(default=2, metadata={"help": "passes over the training split"})
    batch_size: int = field(default=16, metadata={"help": "texts per batch"})
    gradient_accumulation: int = field(default=1, metadata={"help": "batches per optimiser step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    weight_decay: float = field(default=0.01, metadata={"help": "on matrices; never on biases, LayerNorms, embeddings"})
    warmup_ratio: float = field(default=0.06, metadata={"help": "share of the steps on which the rate rises"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are scaled down to this norm"})
    loraplus_lr_ratio: float = field(default=1.0, metadata={"help": "LoRA+: learning rate of LoRA's B over that of A"})
    evaluations_per_epoch: int = field(default=2, metadata={"help": "validations per epoch; the best one is kept"})
    seed: int = field(default=0, metadata={"help": "of initial values, dropout and the order of the data"})

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "gradient_accumulation", "evaluations_per_epoch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm", "loraplus_lr_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.warmup_ratio <= 1 or not 0 <= self.weight_decay < math.inf:
            raise ConfigError("warmup_ratio must lie in [0, 1] and weight_decay must not be negative, got "
                              f"{self.warmup_ratio} and {self.weight_decay}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be a number from 0 to 2**63 - 1, got {self.seed}")


@dataclass
class History:
    """What training leaves behind: the curve, the best validation, the time, and whether Ctrl-C ended it.

    `core_seconds` is the time that this process's threads computed, on a machine busy with other things too.
    """

    curve: list[dict[str, Any]]
    best: dict[str, Any]
    seconds: float
    core_seconds: float
    samples: int
    interrupted: bool = False


@contextmanager
def interrupt_between_steps() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C only raises a flag, so that a step is never cut in half; a second one acts."""
    pressed = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    try:
        earlier = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: signals go elsewhere
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, earlier)


def train(model: nn.Module, batches: BucketedBatches, loss_sum: Callable[[Tensor, Batch], Tensor],
          validate: Callable[[], dict[str, Any]], config: TrainingConfig, precision: torch.dtype = torch.float32,
          compile_model: bool = False, save_best: Callable[[], None] = lambda: None, state_folder: Path | None = None,
          resume: bool = False, request: dict[str, Any] | None = None, best_by: str = "accuracy",
          tokens_per_pass: int | None = None) -> History:
    """Train the parameters that require a gradient, in place, and leave the model with its best validation's values.

    Args:
        model: on its device; parameters that are trained in float32. Under torchrun each process has one (parallel.py).
        batches: the training data.
        loss_sum: (logits, batch) -> loss summed over the batch.
        validate: figures of the model as it stands, "loss" and "accuracy" among them.
        precision: of the forward pass; parameters and optimiser stay float32.
        compile_model: run the forward and backward pass through torch.compile.
        save_best: called whenever a validation is the best so far, and at an interruption before the first one.
        state_folder: where to keep what resuming needs; None keeps nothing.
        resume: go on from `state_folder`, if it holds anything.
        request: what else must be the same in a resumed run: data, base model, method.
        best_by: the figure that decides which validation is the best: the highest, or the lowest "loss".
        tokens_per_pass: larger batches are computed in pieces of about so many tokens, whose gradients add up to the
            batch's: the same step but for rounding, in less memory. None computes a batch at once.

    Returns:
        The history. After Ctrl-C `interrupted` is true, and `state_folder` can be resumed from.
    """
    device = next(model.parameters()).device
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(trained.items(), model, config.learning_rate, config.weight_decay,
                      loraplus_lr_ratio=config.loraplus_lr_ratio)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    steps_per_epoch = -(-len(batches) // config.gradient_accumulation)
    total_steps = steps_per_epoch * config.epochs
    warmup_steps = round(config.warmup_ratio * total_steps)
    evaluate_every = max(1, steps_per_epoch // config.evaluations_per_epoch)
    forward = parallel.synchronised(model)
    forward = torch.compile(forward, dynamic=True) if compile_model else forward

    step, samples, curve, best, best_values, seconds_before, core_seconds_before = 0, 0, [], {}, {}, 0.0, 0.0
    totals, seen = torch.zeros(2, device=device), 0  # loss and hits since the last validation, of this process
    settings = {**asdict(config), "precision": str(precision), **(request or {})}
    if resume and state_folder is not None:
        step, extra, tensors = load_training_state(state_folder, model, optimizer)
        if step:
            wanted = json.loads(json.dumps(settings))  # as it reads after a trip through the state's header
            changed = [key for key in wanted if extra["settings"].get(key) != wanted[key]]
            if changed:
                raise ConfigError(f"{state_folder} was left by a run with other settings ({', '.join(changed)}): give "
                                  "them as they were, or start anew without --resume")
            curve, best, samples, seconds_before, core_seconds_before = (
                extra[key] for key in ("curve", "best", "samples", "seconds", "core_seconds"))
            *saved_totals, seen = extra["running"]  # of all processes: the first one carries them on
            if parallel.rank() == 0:
                totals += torch.tensor(saved_totals, device=device)
            scaler.load_state_dict(extra["scaler"])
            best_values = {name: parallel.spread_like(trained[name], value) for name, value in tensors.items()}
    if parallel.rank() > 0:
        torch.manual_seed(config.seed + parallel.rank() + step * parallel.world_size())  # dropout differs by process
    started, core_started = time.perf_counter(), time.process_time()

    def seconds() -> float:
        return seconds_before + time.perf_counter() - started

    def core_seconds() -> float:
        return core_seconds_before + time.process_time() - core_started

    def save_state() -> None:
        if state_folder is not None:
            save_training_state(state_folder, model, optimizer, step, tensors=best_values, extra={
                "settings": settings, "curve": curve, "best": best, "samples": samples, "seconds": seconds(),
                "core_seconds": core_seconds(), "running": [*parallel.total(totals), seen],
                "scaler": scaler.state_dict()})

    model.train()
    stream = _micro_batches(batches, step, steps_per_epoch, config.gradient_accumulation)
    with interrupt_between_steps() as interrupted, \
            tqdm(total=total_steps, initial=step, unit="step", desc="training", mininterval=1,
                 disable=parallel.rank() > 0) as bar:
        while step < total_steps and not parallel.any_of(interrupted(), device):
            rate = config.learning_rate * warmup_cosine(step, total_steps, warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_factor"]
            group_of_batches = next(stream)
            size = sum(len(batch.targets) for batch in group_of_batches)
            passes = [piece for batch in group_of_batches for piece in parallel.share(batch).passes(tokens_per_pass)]
            for number, batch in enumerate(passes, start=1):
                batch = batch.to(device)
                with parallel.without_sending(forward, more_to_come=number < len(passes)):
                    with computing_in(precision, device):
                        logits = forward(**batch.arguments())
                    loss = loss_sum(logits, batch)
                    # Gradients are averaged over processes, and the loss is to be a sum over all of them.
                    scaler.scale(loss / size * parallel.world_size()).backward()
                totals += torch.stack((loss.detach(), (logits.detach().argmax(dim=-1) == batch.targets).sum()))
                del logits, loss
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step, seen = step + 1, seen + size
            samples += sum(len(batch.labels) for batch in group_of_batches)
            bar.update()
            if step % 10 == 0:
                loss_now, accuracy_now = (totals / seen).tolist()
                bar.set_postfix(loss=f"{loss_now:.3f}", accuracy=f"{accuracy_now:.3f}",
                                samples_per_s=f"{samples / seconds():.1f}", refresh=False)
            if (step % evaluate_every == 0 and total_steps - step >= evaluate_every) or step == total_steps:
                found, (whole_loss, whole_hits) = validate(), parallel.total(totals)
                curve.append({"step": step, "epoch": round(step / steps_per_epoch, 3), "learning_rate": rate,
                              "train_loss": round(whole_loss / seen, 4),
                              "train_accuracy": round(whole_hits / seen, 4),
                              "validation_loss": found["loss"], "validation_accuracy": found["accuracy"],
                              f"validation_{best_by}": found[best_by], "seconds": round(seconds(), 2)})
                if parallel.rank() == 0:
                    others = "" if best_by in ("loss", "accuracy") else f", {best_by} {found[best_by]:.4f}"
                    bar.write(f"step {step}/{total_steps}: train loss {curve[-1]['train_loss']:.3f}, validation loss "
                              f"{found['loss']:.3f}, validation accuracy {found['accuracy']:.4f}{others}")
                seen = 0
                totals.zero_()
                if not best or _rank(found, best_by) > _rank(best, best_by):
                    best = {"step": step, **{key: found[key] for key in ("accuracy", "loss", best_by)}}
                    best_values = {name: p.detach().clone() for name, p in trained.items()}
                    save_best()
                model.train()
                save_state()
        stopped = step < total_steps
    if stopped:
        save_state()
    with torch.no_grad():
        for name, value in best_values.items():
            trained[name].copy_(value)
    parallel.reshard(model)
    if not best:
        save_best()
    model.eval()
    return History(curve, best, seconds(), core_seconds(), samples, stopped)


def _rank(found: dict[str, Any], best_by: str) -> tuple[float, float]:
    """How good a validation is; of two with the same figure, as 0 may be at first, the one of lower loss is better."""
    return -found["loss"] if best_by == "loss" else found[best_by], -found["loss"]


def _micro_batches(batches: BucketedBatches, step: int, steps_per_epoch: int,
                   accumulation: int) -> Iterator[list[Batch]]:
    """The batches of each optimiser step, from `step` on and without end."""
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    while True:
        waiting: list[Batch] = []
        for batch in batches.epoch(epoch, first=step_in_epoch * accumulation):
            waiting.append(batch)
            if len(waiting) == accumulation:
                yield waiting
                waiting = []
        if waiting:
            yield waiting
        epoch, step_in_epoch = epoch + 1, 0
