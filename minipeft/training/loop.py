"""The fine-tuning loop: forward, backward, clip, step; accumulation, precision, schedule, interruption and resume.

It trains whatever parameters require a gradient, whichever method left them so, and knows no task: the loss comes in as
a function. (One thing it is told of a method: which parameters LoRA+ trains at a higher rate.) A step:

    g     = (1 / T) * sum over the step's micro-batches m of grad S_m
    g     = g * min(1, max_grad_norm / |g|)                              |g|: the length of all gradients as one vector
    theta = theta - rate * (mean / (sqrt(square) + 1e-8) + decay * theta)                 AdamW, for each number theta

S_m is the sum of the losses of micro-batch m's targets. A target is a label that counts (`batch.targets`): one per
text, or one per token that has a label. T is the number of targets of the whole step, in all its batches, micro-batches
and processes; it is counted before the step is cut. So each target counts the same, however the step is cut, and parts
of different size need no weights. By hand: 3 targets have losses of together 3, and 1 target in another micro-batch has
5. The step's loss is (3 + 5) / 4 = 2; the mean of the two means would be (1 + 5) / 2 = 3. An epoch's last step may have
fewer batches, and one of its batches fewer texts: it is a whole step with a smaller T. With class_weights "balanced"
the caller's `loss_sum` multiplies a target's loss by n / (K n_k), for n training texts with K labels, n_k of them with
this one; T stays.

mean and square are AdamW's running means of g (by 0.9) and of g^2 (by 0.999), corrected for their start at 0; decay is
weight_decay in matrices of linear layers, 0 in all else. By hand: in step 1 both means are corrected to g and g^2, so
each theta moves by the rate against g's sign, whatever g is; 0.5 with rate 0.1 and no decay comes to 0.4 or 0.6.

Batches      Texts of similar length: input_ids and attention_mask (B, T), 1 at tokens and 0 at pads, which are on the
             right; labels (B,), or (B, T) with -100 at tokens that have none. The model numbers positions and hides
             pads; virtual tokens, if a method has them, are not in a batch. The logits at its N targets are (N, K).
Precision    What is trained, its gradients and AdamW's means are float32; frozen weights keep their dtype. In bf16 and
             fp16 autocast computes products of matrices in that format; the loss is float32 (tasks/task.py). In fp16
             the loss is multiplied by a scale, lest small gradients become 0, and gradients are divided by it before
             they are clipped. It starts at 65,536 and doubles after 2,000 good steps in a row. If a gradient is
             infinite or NaN, the step is left out and the scale halved; it counts as a step. If every step is like
             that, nothing is trained, and no error comes.
Rate         With N steps and w = round(warmup_ratio * N), in step t, counted from 0, it is
                 t < w     learning_rate * (t + 1) / w
                 t >= w    learning_rate * (1 + cos(pi * (t - w) / (N - w))) / 2
             It would reach 0 in step N, after the last one. Ending early does not change N. By hand, N = 100, w = 6,
             learning_rate 1e-3: 1.67e-4 at t = 0, 1e-3 at t = 5 and 6, 5e-4 at t = 53. w = 0 is no warm-up.
Validation   After every e steps, e = max(1, steps_per_epoch // evaluations_per_epoch), and after the last one; where
             fewer than e steps remain, only the last follows. The best has the best `best_by` and, among equals, the
             lowest loss. Its trained values are copied, and put back at the end.
Signal       SIGINT (Ctrl-C), SIGHUP or SIGTERM: the step in hand is finished, with several processes at most 9 more,
             the state is saved, and `stopped_by` is set. If a validation is due after that step, it comes first; no
             other one is made. Then the model gets the values of the best validation. If there was no validation,
             it keeps its present values. The state has both. If it was the last step, a resumed run takes no further
             step. A second signal raises KeyboardInterrupt at once, and the state saved last stays; but a second
             SIGTERM does nothing.
State        `state_folder`/training_state.safetensors: the trained values (model/NAME), the best ones (extra/NAME),
             AdamW's means (optimizer/exp_avg/NAME, optimizer/exp_avg_sq/NAME), each in its parameter's shape and in
             float32, 16 bytes per trained parameter; the random state; in its header, as JSON, step, curve, settings
             and scale. It is written after each validation, every `save_minutes` between two, and at a signal; a new
             one takes the old one's place when it is whole. A resumed run must have the same `config`, precision,
             `request` and trained parameters. With the same other arguments, too, it ends as if it had never stopped,
             bit for bit, with these exceptions: GPU kernels that add in another order each time; and of several
             processes all but the first draw other dropout, since only the first one's random state is saved.
Randomness   Initial values and dropout come from torch's global generators: the caller seeds them before it makes the
             model, and `train` does not, but in processes other than the first. The state holds the CPU's and, on a
             GPU, this GPU's. The data's order follows from the seed of `batches` and the epoch alone.
NaN          A NaN loss outside of fp16 makes NaN of all that is trained, since clipping divides by |g|; it stays
             so, and the curve shows it. A validation with a NaN loss is never better than an earlier one. If it is the
             first, its values are kept until a finite loss comes.
Cost         Memory: the frozen weights, 20 bytes per trained parameter (4 value, 4 gradient, 8 AdamW, 4 best copy; with
             several processes 4 more to send), and what one micro-batch keeps for its backward pass, however many there
             are. Time: per step a forward pass, and a backward pass of twice that, or once where matrices are frozen;
             per validation a forward pass over all of its texts. Micro-batches add no arithmetic.

Unlike Hugging Face's Trainer: there the rate falls on a straight line, by default without warm-up; a warm-up's first
step has rate 0. There is no validation unless eval_strategy asks for it, and the last values stay unless
load_best_model_at_end is set. weight_decay is 0 by default, and otherwise embeddings decay, too. A classifier's loss is
a mean per micro-batch. Ctrl-C is not caught: what was trained since the last checkpoint is lost.

Papers: AdamW, Loshchilov and Hutter 2017, arXiv 1711.05101. Half a cosine: theirs of 2016, arXiv 1608.03983, which
starts again and again; here once. Clipping: Pascanu et al. 2012, arXiv 1211.5063. The scale of fp16: Micikevicius et
al. 2017, arXiv 1710.03740, whose own is constant.
"""

from __future__ import annotations

import inspect
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from minipeft.data.batches import Batch, BucketedBatches
from minipeft.errors import ConfigError, DataError
from minipeft.settings import NOT_NEGATIVE, POSITIVE, POSITIVE_INTEGER, SEED, SHARE, Settings, setting
from minipeft.training import distributed as parallel
from minipeft.training.hardware import computing_in, out_of_memory, ran_out_of_memory
from minipeft.training.optimizer import adamw, warmup_cosine
from minipeft.training.progress import History, Progress, progress_bar
from minipeft.training.stopping import stop_between_steps
from minipeft.training.vocabulary_loss import LossSum, loss_and_hits, reading_logits

STEPS_BETWEEN_QUESTIONS = 10  # so often several processes ask each other: did one get a signal, is it time to save?


@dataclass
class TrainingConfig(Settings):
    """How to train. Each method's defaults for a run are in runs/defaults.py.

    Raises:
        ConfigError: a value of the wrong type, or out of range.
    """

    epochs: int = setting(2, "passes over the training split", POSITIVE_INTEGER)
    batch_size: int = setting(16, "texts per batch", POSITIVE_INTEGER)
    gradient_accumulation: int = setting(1, "batches per optimizer step", POSITIVE_INTEGER)
    learning_rate: float = setting(1e-3, "peak learning rate", POSITIVE)
    weight_decay: float = setting(0.01, "on matrices; never on biases, LayerNorms, embeddings", NOT_NEGATIVE)
    warmup_ratio: float = setting(0.06, "share of the steps on which the rate rises", SHARE)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", POSITIVE)
    loraplus_lr_ratio: float = setting(1.0, "LoRA+: learning rate of LoRA's B over that of A", POSITIVE)
    evaluations_per_epoch: int = setting(2, "validations per epoch, about; the best one is kept", POSITIVE_INTEGER)
    patience: int | None = setting(None, "end early after so many validations without a better one", POSITIVE_INTEGER)
    class_weights: str = setting("none", "balanced: rare labels count as much as frequent ones in the loss",
                                 choices=("none", "balanced"))
    seed: int = setting(0, "of initial values, dropout and the order of the data", SEED)


class Schedule(NamedTuple):
    """When what happens, counted in optimizer steps."""

    steps_per_epoch: int
    steps: int
    warmup_steps: int
    evaluate_every: int
    peak_rate: float
    batches_per_step: int
    patience: int | None

    @classmethod
    def of(cls, config: TrainingConfig, batches: int) -> Schedule:
        """The schedule of a run whose epoch has so many batches."""
        steps_per_epoch = -(-batches // config.gradient_accumulation)
        steps = steps_per_epoch * config.epochs
        return cls(steps_per_epoch, steps, round(config.warmup_ratio * steps),
                   max(1, steps_per_epoch // config.evaluations_per_epoch), config.learning_rate,
                   config.gradient_accumulation, config.patience)

    def rate(self, step: int) -> float:
        """The learning rate at a step, counted from 0."""
        return self.peak_rate * warmup_cosine(step, self.steps, self.warmup_steps)

    def validates_after(self, step: int) -> bool:
        """Whether a validation follows after so many steps: every `evaluate_every`, and at the end. One that would come
        less than `evaluate_every` before the end is left out."""
        left = self.steps - step
        return left == 0 or (step % self.evaluate_every == 0 and left >= self.evaluate_every)

    def ends_at(self, step: int, since_best: int) -> bool:
        """Whether all steps are taken, or `patience` validations have come since the best one."""
        return step >= self.steps or (self.patience is not None and since_best >= self.patience)

    def batches_from(self, step: int, batches: BucketedBatches) -> Iterator[list[Batch]]:
        """The batches of each step, from `step` on and without end; an epoch's last step may have fewer."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        while True:
            waiting: list[Batch] = []
            for batch in batches.epoch(epoch, first=step_in_epoch * self.batches_per_step):
                waiting.append(batch)
                if len(waiting) == self.batches_per_step:
                    yield waiting
                    waiting = []
            if waiting:
                yield waiting
            epoch, step_in_epoch = epoch + 1, 0


class Learner:
    """A model and all that an optimizer step needs to change it.

    Attributes:
        synchronized: the model; of several processes, wrapped so that the backward pass averages their gradients.
        forward: calls it, compiled if asked, with `read_out`, which makes the loss. `GPT2LMHeadModel` gives `read_out`
            its head and the hidden states; of models that know no `read_out` it gets the logits instead.
        trained: the parameters that require a gradient.
        scaler: keeps small gradients above zero in float16; otherwise it does nothing.
    """

    def __init__(self, model: nn.Module, loss_sum: LossSum, config: TrainingConfig, precision: torch.dtype,
                 compile_model: bool, tokens_per_micro_batch: int | None) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.loss_sum, self.precision, self.max_grad_norm = loss_sum, precision, config.max_grad_norm
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.trained:
            raise ConfigError("nothing to train: no parameter of the model requires a gradient; inject a method first")
        self.optimizer = adamw(self.trained, model, config.learning_rate, config.weight_decay,
                               loraplus_lr_ratio=config.loraplus_lr_ratio)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.synchronized = parallel.synchronized(model)
        forward = torch.compile(self.synchronized, dynamic=True) if compile_model else self.synchronized
        has_wide_head = "read_out" in inspect.signature(type(model).forward).parameters
        self.forward = forward if has_wide_head else reading_logits(forward)

    def micro_batches(self, batches: list[Batch]) -> list[Batch]:
        """This process's share of the batches, in parts that are computed one after the other."""
        return [part for batch in batches
                for part in parallel.share(batch).micro_batches(self.tokens_per_micro_batch)]

    @contextmanager
    def explaining_out_of_memory(self, batches: list[Batch]) -> Iterator[None]:
        """A block that computes these batches: running out of memory in it becomes one line that says what to change.

        Raises:
            HardwareError: that line.
        """
        try:
            yield
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            rows, length = max((part.attention_mask.shape for part in self.micro_batches(batches)), key=math.prod)
            checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
            raise out_of_memory(self.device, rows, length, checkpointing) from error


def optimizer_step(learner: Learner, batches: list[Batch], rate: float) -> list[Tensor]:
    """Forward, backward, clip, step: lower the mean loss over the batches once.

    Args:
        batches: of all processes; each computes its share of them.
        rate: the learning rate, before LoRA+'s factor.

    Returns:
        For each of this process's micro-batches (2,): the sum of its losses, and how many predictions are right.

    Raises:
        DataError: see `_targets_in`.
    """
    scaler, optimizer, sums = learner.scaler, learner.optimizer, []
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    targets = _targets_in(batches)
    # 1 / targets makes the sum of losses a mean. Processes average their gradients where a sum is meant: world_size.
    factor = scaler.scale(torch.full((), parallel.world_size() / targets, device=learner.device))
    micro_batches = learner.micro_batches(batches)
    for number, batch in enumerate((part.to(learner.device) for part in micro_batches), start=1):
        # The backward pass begins with `factor` in place of 1. Over a large vocabulary `loss_and_hits` computes some
        # gradients in the forward pass already, and has to know it there.
        read_out = partial(loss_and_hits, targets=batch.targets, loss_sum=learner.loss_sum, factor=factor)
        with parallel.without_sending(learner.synchronized, more_to_come=number < len(micro_batches)):
            with computing_in(learner.precision, learner.device):
                loss, hits = learner.forward(**batch.arguments(), read_out=read_out)
            loss.backward(factor)
        sums.append(torch.stack((loss.detach(), hits)))                          # (2,)
        del loss, hits  # and the graph with it
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(learner.trained, learner.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return sums


def _targets_in(batches: list[Batch]) -> int:
    """How many targets a step has.

    Raises:
        DataError: none, so there is nothing to learn.
    """
    targets = sum(len(batch.targets) for batch in batches)
    if not targets:
        raise DataError(f"nothing to learn in a step of {sum(len(batch.labels) for batch in batches)} texts: none of "
                        "their tokens has a label")
    return targets


def train(model: nn.Module, batches: BucketedBatches, loss_sum: LossSum, validate: Callable[[], dict[str, Any]],
          config: TrainingConfig, precision: torch.dtype = torch.float32, compile_model: bool = False,
          save_best: Callable[[], None] = lambda: None, state_folder: Path | None = None, resume: bool = False,
          request: dict[str, Any] | None = None, best_by: str = "accuracy", tokens_per_micro_batch: int | None = None,
          save_minutes: float = 10.0, say: Callable[[str], None] = lambda line: None) -> History:
    """Train the parameters that require a gradient, in place, and leave the model with its best validation's values.

    Of N processes each computes every Nth row of each batch; all take the same step, and all call `validate`.

    Args:
        model: on its device, with float32 in what requires a gradient. Under torchrun each process has a copy.
        batches: the training data.
        loss_sum: (logits, targets) -> loss summed over them; of a language model, for some tokens at a time.
        validate: metrics of the model as it stands, "loss" and "accuracy" among them.
        precision: of the forward pass; parameters and optimizer stay float32.
        compile_model: run the forward and backward pass through torch.compile.
        save_best: called whenever a validation is the best so far, and at an interruption before the first one.
        state_folder, save_minutes: where the state is saved, after each validation and so often between; None: nowhere.
        resume, say: go on from `state_folder` if it holds a state, and say so. Else the first save replaces that.
        request: what else must be the same in a resumed run: data, base model, method.
        best_by: the metric that decides which validation is the best: the highest, or the lowest "loss".
        tokens_per_micro_batch: larger batches are computed in micro-batches of about so many tokens, whose gradients
            add up to the batch's: the same step but for rounding and what dropout draws, in less memory. None: no cut.

    Returns:
        The history. After a signal `stopped_by` is its number, in each process, and `state_folder` can be resumed from.

    Raises:
        ConfigError: no parameter requires a gradient, or the state in `state_folder` is of other settings.
        OutputError: that state is damaged, or of other parameters.
        DataError: a step without any target.
        HardwareError: too little memory for a step. `validate` raises its own errors. The state saved last stays.
    """
    schedule = Schedule.of(config, len(batches))
    learner = Learner(model, loss_sum, config, precision, compile_model, tokens_per_micro_batch)
    progress = Progress(model, learner.optimizer, learner.scaler, best_by, state_folder,
                        {**asdict(config), "precision": str(precision), **(request or {})}, save_minutes)
    if resume:
        say(progress.resumed(schedule.steps, schedule.ends_at))
    # Not in the first process, which keeps the random state that its caller, or `resume`, gave it.
    parallel.seed_by_rank(config.seed + progress.step * parallel.world_size())
    stopped_by = _take_steps(learner, schedule, progress, batches, validate, save_best)
    if stopped_by:
        progress.save()
    progress.restore_best()
    if not progress.best:
        save_best()
    model.eval()
    return progress.history(stopped_by)


def _take_steps(learner: Learner, schedule: Schedule, progress: Progress, batches: BucketedBatches,
                validate: Callable[[], dict[str, Any]], save_best: Callable[[], None]) -> int:
    """The loop itself: optimizer steps, with validations between them, to the end, early or not, or a signal.

    Returns:
        The number of the signal that ended it, or 0; where another process got it, SIGINT's.
    """
    def asked(here: bool) -> bool:
        """Whether `here` is true in any process. All must know in the same step; asking takes time, so they do it every
        STEPS_BETWEEN_QUESTIONS steps."""
        return here if parallel.world_size() == 1 else (
            progress.step % STEPS_BETWEEN_QUESTIONS == 0 and parallel.any_of(here, learner.device))

    learner.model.train()
    batches_of_steps = schedule.batches_from(progress.step, batches)
    with stop_between_steps() as signal_that_came, \
            progress_bar(schedule.steps, "step", "training", initial=progress.step) as bar:
        while not schedule.ends_at(progress.step, progress.since_best()) and not asked(bool(signal_that_came())):
            step_batches, rate = next(batches_of_steps), schedule.rate(progress.step)
            with learner.explaining_out_of_memory(step_batches):
                progress.count(step_batches, optimizer_step(learner, step_batches, rate))
            bar.update()
            if progress.step % 10 == 0 and not bar.disable:  # to know the loss, a GPU is waited for
                bar.set_postfix(**progress.running(), refresh=False)
            if schedule.validates_after(progress.step):
                is_best = progress.validated(validate(), rate, schedule.steps_per_epoch)
                if parallel.rank() == 0:
                    bar.write(progress.line(schedule.steps))
                if is_best:
                    save_best()
                learner.model.train()
                progress.save()
            elif asked(progress.is_due()):
                progress.save()
    # Asked once more: a signal that came to one process alone, after the last question, has to stop all of them.
    came = signal_that_came()
    anywhere = parallel.any_of(bool(came), learner.device)
    return came or (signal.SIGINT if anywhere else 0)
