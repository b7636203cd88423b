"""How far a training run is: its curve, its best validation, its running sums and its clock, saved and resumed."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from minipeft.data.batches import Batch
from minipeft.errors import ConfigError
from minipeft.training import distributed as parallel
from minipeft.training.sharding import reshard, spread_like
from minipeft.training.state import damaged, load_training_state, save_training_state


def progress_bar(total: int, unit: str, title: str | None, initial: int = 0) -> tqdm:
    """A bar on a terminal, of the first process alone. In a file or a pipe there is none, only what is written by it.

    Args:
        title: None for no bar.
    """
    hidden = title is None or parallel.rank() > 0 or sys.stderr is None  # as under pythonw
    # None: tqdm's own way to leave bars out where standard error is no terminal
    return tqdm(total=total, initial=initial, unit=unit, desc=title, mininterval=1, disable=True if hidden else None)


@dataclass
class History:
    """What training leaves behind: the curve, the best validation, the time, and whether a signal ended it.

    `core_seconds` is the time that this process's threads computed, on a machine busy with other things too;
    `stopped_by` the number of the signal, or 0.
    """

    curve: list[dict[str, Any]]
    best: dict[str, Any]
    seconds: float
    core_seconds: float
    samples: int
    stopped_by: int = 0


class Stopwatch:
    """Seconds since its start, on the wall and of this process's threads, on top of those of earlier sittings."""

    def __init__(self, seconds: float = 0.0, core_seconds: float = 0.0) -> None:
        self._start, self._core_start = time.perf_counter() - seconds, time.process_time() - core_seconds

    @property
    def seconds(self) -> float:
        """Seconds on the wall."""
        return time.perf_counter() - self._start

    @property
    def core_seconds(self) -> float:
        """Seconds that this process's threads computed."""
        return time.process_time() - self._core_start


class Progress:
    """What a run knows of itself. `save` writes all of it; `resume` goes on from there.

    Attributes:
        step: optimizer steps taken.
        samples: texts seen.
        curve: a point for each validation.
        best: the best validation so far; empty before the first.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, best_by: str,
                 folder: Path | None, settings: dict[str, Any], save_minutes: float = math.inf) -> None:
        """
        Args:
            best_by: the metric that decides which validation is the best: the highest, or the lowest "loss".
            folder: where the state is kept; None keeps nothing.
            settings: what must be the same in a resumed run, as JSON.
            save_minutes: `is_due` so long after the last `save`.
        """
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.best_by, self.folder, self.settings = best_by, folder, settings
        self.step, self.samples, self.clock = 0, 0, Stopwatch()
        self.curve: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self._save_seconds, self._saved_at = 60 * save_minutes, time.monotonic()
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._best_values: dict[str, Tensor] = {}
        # Of this process, since the last validation: loss and hits, and over how many targets of all processes.
        self._sums, self._targets = torch.zeros(2, device=next(model.parameters()).device), 0

    def count(self, batches: Sequence[Batch], sums: Sequence[Tensor]) -> None:
        """One more optimizer step was taken.

        Args:
            batches: what all processes together computed.
            sums: this process's loss and hits, (2,) for each of its micro-batches.
        """
        self.step += 1
        self.samples += sum(len(batch.labels) for batch in batches)
        self._targets += sum(len(batch.targets) for batch in batches)
        for part in sums:
            self._sums += part

    def running(self) -> dict[str, str]:
        """For a progress bar: loss and accuracy since the last validation, of this process's share, and speed."""
        loss, accuracy = (self._sums / (self._targets / parallel.world_size())).tolist()
        return {"loss": f"{loss:.3f}", "accuracy": f"{accuracy:.3f}",
                "samples_per_s": f"{self.samples / self.clock.seconds:.1f}"}

    def validated(self, found: dict[str, Any], rate: float, steps_per_epoch: int) -> bool:
        """Add a point to the curve and begin the sums anew; the trained values are kept if they are the best so far.

        Args:
            found: the validation's metrics, "loss", "accuracy" and `best_by` among them.
            rate: the learning rate of the last step.

        Returns:
            Whether they are.
        """
        loss, hits = parallel.total(self._sums)
        self.curve.append({
            "step": self.step, "epoch": round(self.step / steps_per_epoch, 3), "learning_rate": rate,
            "train_loss": round(loss / self._targets, 4), "train_accuracy": round(hits / self._targets, 4),
            "validation_loss": found["loss"], "validation_accuracy": found["accuracy"],
            f"validation_{self.best_by}": found[self.best_by], "seconds": round(self.clock.seconds, 2)})
        self._sums.zero_()
        self._targets = 0
        is_best = not self.best or self._score(found) > self._score(self.best)
        if is_best:
            self.best = {"step": self.step, **{key: found[key] for key in ("accuracy", "loss", self.best_by)}}
            self._best_values = {name: p.detach().clone() for name, p in self._trained.items()}
        return is_best

    def _score(self, found: dict[str, Any]) -> tuple[float, float]:
        """How good a validation is; of two with the same metric, the one of lower loss is better. A loss that is no
        number is the worst: what was trained is broken, even where its guesses happen to be right."""
        if not math.isfinite(found["loss"]):
            return -math.inf, -math.inf
        return -found["loss"] if self.best_by == "loss" else found[self.best_by], -found["loss"]

    def since_best(self) -> int:
        """How many validations came after the best one."""
        return sum(point["step"] > self.best["step"] for point in self.curve) if self.best else 0

    def line(self, steps: int) -> str:
        """The last point of the curve for people, of a run of so many steps."""
        point, by = self.curve[-1], self.best_by
        others = "" if by in ("loss", "accuracy") else f", {by} {point[f'validation_{by}']:.4f}"
        return (f"step {self.step}/{steps}: train loss {point['train_loss']:.3f}, validation loss "
                f"{point['validation_loss']:.3f}, validation accuracy {point['validation_accuracy']:.4f}{others}")

    def is_due(self) -> bool:
        """Whether it is time to save again."""
        return self.folder is not None and time.monotonic() - self._saved_at >= self._save_seconds

    def save(self) -> None:
        """Write everything that `resume` needs. Of several processes all must call."""
        self._saved_at = time.monotonic()
        if self.folder is not None:
            save_training_state(self.folder, self.model, self.optimizer, self.step, tensors=self._best_values, extra={
                "settings": self.settings, "curve": self.curve, "best": self.best, "samples": self.samples,
                "seconds": self.clock.seconds, "core_seconds": self.clock.core_seconds,
                "running": [*parallel.total(self._sums), self._targets], "scaler": self.scaler.state_dict()})

    def resume(self) -> None:
        """Go on from what `save` left in the folder, if anything: model, optimizer, random state and all of this.

        Raises:
            ConfigError: a run with other settings left it.
            OutputError: it is damaged, or belongs to a model with other parameters.
        """
        if self.folder is None:
            return
        step, extra, tensors = load_training_state(self.folder, self.model, self.optimizer)
        if not step:
            return
        try:
            self._take_over(step, extra, tensors)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise damaged(self.folder, f"{type(error).__name__}: {error}") from error

    def resumed(self, steps: int, ends_at: Callable[[int, int], bool]) -> str:
        """`resume`, and in words where a run of so many steps goes on, or that its training has ended.

        Args:
            ends_at: (step, validations since the best one) -> whether it has: see `loop.Schedule`.
        """
        self.resume()
        if not self.step:
            return f"nothing to resume in {self.folder}: training from the start"
        ended = ends_at(self.step, self.since_best())
        return f"resumed at step {self.step} of {steps}" + ": this training has ended" * ended

    def _take_over(self, step: int, extra: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from a state's content, whatever is wrong with it raising one of Python's errors."""
        wanted = json.loads(json.dumps(self.settings))  # as it reads after a trip through the state's header
        changed = [key for key in wanted if extra["settings"].get(key) != wanted[key]]
        if changed:
            raise ConfigError(f"{self.folder} was left by a run with other settings ({', '.join(changed)}): give "
                              "them as they were, or start anew without --resume")
        self.step, self.samples, self.curve, self.best = step, extra["samples"], extra["curve"], extra["best"]
        self.clock = Stopwatch(extra["seconds"], extra["core_seconds"])
        *sums, self._targets = extra["running"]  # of all processes: the first one carries them on
        if parallel.rank() == 0:
            self._sums += torch.tensor(sums, device=self._sums.device)
        self.scaler.load_state_dict(extra["scaler"])
        self._best_values = {name: spread_like(self._trained[name], value) for name, value in tensors.items()}

    @torch.no_grad()
    def restore_best(self) -> None:
        """Give the model the values of its best validation, if there was one."""
        for name, value in self._best_values.items():
            self._trained[name].copy_(value)
        reshard(self.model)

    def history(self, stopped_by: int) -> History:
        """What is left of the run."""
        return History(self.curve, self.best, self.clock.seconds, self.clock.core_seconds, self.samples, stopped_by)
