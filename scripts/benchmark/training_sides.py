"""The sides that train: this library's loop, transformers' Trainer with peft, a head on features, and a whole start."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
from job import PAD, Job, Turn, batch_length, dropouts, padded, read_batches
from torch import Tensor

if TYPE_CHECKING:
    from minipeft.data.batches import Batch, BucketedBatches

IGNORED_LABEL = -100  # both libraries' word for a token that has no label
NOTHING_MEASURED = {"accuracy": 0.0, "loss": 0.0}  # what a validation finds that only marks a moment


# --- ours -------------------------------------------------------------------------------------------------------------

class TakingTurns:
    """A job's batches. Fetching the first one of a turn reports the turn before, and waits."""

    def __init__(self, job: Job, turn: Turn) -> None:
        self.job, self.turn = job, turn
        self.ids, self.labels, self.plan = read_batches(job)
        if job["language_model"]:
            self.labels = [np.append(row[1:], IGNORED_LABEL) for row in self.ids]  # of token t, the token after it

    def __len__(self) -> int:
        return len(self.plan)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The only epoch, from its first batch on."""
        from minipeft.data.batches import collate
        for number, numbers in enumerate(self.plan):
            if number % self.job["steps"] == 0:
                if number:
                    self.turn.report(step=number)
                self.turn.wait()
            rows = [self.ids[i] for i in numbers]
            length = min(self.job["length"], batch_length(rows, self.job))
            yield collate(rows, [self.labels[i] for i in numbers], length)

    def end(self) -> dict[str, float]:
        """In place of the validation that ends the training: report the last turn."""
        self.turn.report(step=len(self.plan))
        return NOTHING_MEASURED


def train_ours(job: Job, turn: Turn) -> None:
    """minipeft's own loop on the job's batches, a turn being `steps` optimizer steps."""
    from minipeft import inject, load_adapter
    from minipeft.methods import METHODS
    from minipeft.methods.injection import trainable_parameters
    from minipeft.tasks.classification import Classification
    from minipeft.tasks.generation import Generation
    from minipeft.training.hardware import cast_frozen, choose_precision, tokens_per_micro_batch
    from minipeft.training.loop import TrainingConfig, train

    task = Generation if job["language_model"] else Classification
    model = task.model_class.from_pretrained(job["base"], num_labels=2, **dropouts(job))
    if "adapter" in job:
        load_adapter(model, job["adapter"])
    else:
        inject(model, METHODS[job["method"]].config(**job["method_values"]))
    model.to(turn.device)
    precision = choose_precision(job["precision"], turn.device)
    cast_frozen(model, precision)
    trained = trainable_parameters(model).trainable
    batches = TakingTurns(job, turn)
    config = TrainingConfig(epochs=1, batch_size=job["batch_size"], learning_rate=job["learning_rate"],
                            warmup_ratio=0.0, evaluations_per_epoch=1)
    tokens = (job["micro_batch_size"] * job["length"] if job["micro_batch_size"]
              else tokens_per_micro_batch(turn.device, model.config.n_embd))
    history = train(model, batches, task.loss_sum, batches.end, config, precision, job["compile"],
                    tokens_per_micro_batch=tokens)
    turn.wait()
    turn.report(mean_loss=history.curve[-1]["train_loss"], trained_parameters=trained,
                optimiser_state_bytes=_adamw_bytes(trained), saved_bytes=_saved_bytes(model, job))


def _adamw_bytes(trained: int) -> int:
    """AdamW keeps two running means of each trained parameter, in float32."""
    return 2 * 4 * trained


def _saved_bytes(model: nn.Module, job: Job) -> int:
    """The size of the file that holds what was trained."""
    from minipeft import save_adapter
    with tempfile.TemporaryDirectory() as folder:
        if job.get("method") == "full":
            model.save_pretrained(folder)
        else:
            save_adapter(model, folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def head_on_features(job: Job, turn: Turn) -> None:
    """Head-only training: a turn runs the frozen base over its texts once, then trains on what it gave."""
    from minipeft import GPT2ForSequenceClassification, inject
    from minipeft.methods.head import HeadConfig
    from minipeft.runs.features import pooled_features
    from minipeft.training.hardware import choose_precision
    from minipeft.training.optimizer import adamw

    ids, labels, plan = read_batches(job)
    model = inject(GPT2ForSequenceClassification.from_pretrained(job["base"]), HeadConfig()).to(turn.device)
    optimizer = adamw([model.score.weight], model, job["learning_rate"], 0.01)
    precision = choose_precision(job["precision"], turn.device)
    for start in range(0, len(plan), job["steps"]):
        turn.wait()
        for rows in plan[start:start + job["steps"]]:
            features = pooled_features(model, [ids[i] for i in rows], turn.device, precision)   # (B, C)
            logits = model.score(features.to(turn.device))                                                    # (B, K)
            nn.functional.cross_entropy(logits, torch.tensor([labels[i] for i in rows], device=turn.device)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        turn.report(step=start + job["steps"])
    turn.wait()
    trained = model.score.weight.numel()
    turn.report(trained_parameters=trained, optimiser_state_bytes=_adamw_bytes(trained),
                saved_bytes=_saved_bytes(model, job))


# --- theirs -----------------------------------------------------------------------------------------------------------

def train_peft(job: Job, turn: Turn) -> None:
    """transformers' Trainer with peft on the same batches, from the same base and the same adapter.

    With `micro_batch_size` it is told to compute them in micro-batches of so many texts and to add up their gradients,
    with `cast_base` the base's frozen weights are cast before training instead of at each use.
    """
    import transformers
    from peft import PeftModel
    from transformers import Trainer, TrainerCallback, TrainingArguments
    transformers.logging.set_verbosity_error()

    ids, labels, plan = read_batches(job)
    size = job["micro_batch_size"] or job["batch_size"]
    plan = [rows[start:start + size] for rows in plan for start in range(0, len(rows), size)]
    texts = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels)]

    class SameBatches(Trainer):
        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            loader = torch.utils.data.DataLoader(texts, batch_sampler=plan, collate_fn=lambda rows: _collate(rows, job),
                                                 pin_memory=turn.device.type == "cuda")
            return self.accelerator.prepare(loader)

    class InTurns(TrainerCallback):
        def on_step_begin(self, arguments: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step % job["steps"] == 0:
                turn.wait()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step % job["steps"] == 0:
                turn.report(step=state.global_step)

    model = PeftModel.from_pretrained(_base_for_peft(job), job["adapter"], is_trainable=True)
    arguments = TrainingArguments(
        output_dir=str(Path(job["texts"]).parent / "trainer"), num_train_epochs=1, learning_rate=job["learning_rate"],
        weight_decay=0.01, lr_scheduler_type="cosine", per_device_train_batch_size=size,
        gradient_accumulation_steps=job["batch_size"] // size,
        bf16=job["precision"] == "bf16", torch_compile=job["compile"], use_cpu=turn.device.type == "cpu",
        save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False)
    trainer = SameBatches(model=model, args=arguments, train_dataset=texts, callbacks=[InTurns()])
    # A classifier gives the mean loss of each micro-batch, and the Trainer, which takes it for a share of the batch's,
    # would add up these means and train with the sum.
    trainer.model_accepts_loss_kwargs = job["language_model"]
    found = trainer.train()
    turn.wait()
    turn.report(mean_loss=found.training_loss,
                trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))


def _base_for_peft(job: Job) -> nn.Module:
    """transformers' model; with `cast_base` the weights and biases of its linear layers, all frozen, in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.pytorch_utils import Conv1D
    if job["language_model"]:
        model = AutoModelForCausalLM.from_pretrained(job["base"], **dropouts(job))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(job["base"], num_labels=2, pad_token_id=PAD,
                                                                   **dropouts(job))
    if job["cast_base"]:
        for layer in [module for module in model.modules() if isinstance(module, Conv1D)]:
            layer.to(torch.bfloat16)
    return model


def _collate(features: list[dict[str, Any]], job: Job) -> dict[str, Tensor]:
    """A batch for the Trainer: ids and mask (B, T), labels (B,) or, of a language model, (B, T)."""
    rows = [feature["input_ids"] for feature in features]
    batch = padded(rows, batch_length(rows, job))
    if not job["language_model"]:
        return {**batch, "labels": torch.tensor([feature["labels"] for feature in features])}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
    labels[:, 0] = IGNORED_LABEL  # nothing predicts it, but the Trainer would count it in the mean
    return {**batch, "labels": labels}


# --- a user's run -----------------------------------------------------------------------------------------------------

class TimedBatches:
    """Batches that note the seconds a run spends on making them, and on saving.

    The loop saves between a validation and the moment at which it asks for the next batch, so nothing in it need be
    replaced to measure that: `validate`, which validates nothing, starts that clock, and `saved` stops it.
    """

    def __init__(self, batches: BucketedBatches, spent: dict[str, float], turn: Turn) -> None:
        self.batches, self.spent, self.turn = batches, spent, turn
        self.saving_since: float | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch."""
        batches = self.batches.epoch(epoch, first)
        while True:
            self.saved()
            started = time.perf_counter()
            batch = next(batches, None)
            self.spent["bucketing"] += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def validate(self) -> dict[str, float]:
        """In place of a validation: whatever comes after it is saving."""
        self.turn.synchronize()
        self.saving_since = time.perf_counter()
        return NOTHING_MEASURED

    def saved(self) -> None:
        """Saving is over, if any was going on."""
        if self.saving_since is not None:
            self.spent["saving"] += time.perf_counter() - self.saving_since
        self.saving_since = None


def train_on_more(job: Job, turn: Turn) -> None:
    """LoRA on the bundled base, one epoch of so many reviews per turn, and how long all but the arithmetic takes."""
    from minipeft import GPT2ForSequenceClassification, LoraConfig, get_tokenizer, inject
    from minipeft.data.batches import BucketedBatches
    from minipeft.data.datasets import load_dataset
    from minipeft.runs.trained import save_finetuned
    from minipeft.tasks.classification import Classification
    from minipeft.training.hardware import cast_frozen, choose_precision, tokens_per_micro_batch
    from minipeft.training.loop import TrainingConfig, train

    folder, precision = Path(job["folder"]), choose_precision("auto", turn.device)
    data = load_dataset(job["dataset"], Classification, job["data_dir"])
    examples = data.train.subset(job["reviews"], seed=0)
    task = Classification(get_tokenizer("mini"), data.label_names)
    while True:
        model = GPT2ForSequenceClassification.from_pretrained("mini", num_labels=2)
        inject(model, LoraConfig(r=8, target_modules="all-linear")).to(turn.device)
        cast_frozen(model, precision)
        spent: dict[str, float] = defaultdict(float)
        turn.wait()
        ids = task.encode(examples).ids
        spent["tokenising"] = time.perf_counter() - turn.started
        batches = TimedBatches(BucketedBatches(ids, examples.labels, job["batch_size"]), spent, turn)
        train(model, batches, task.loss_sum, batches.validate, TrainingConfig(epochs=1), precision,
              save_best=lambda model=model: save_finetuned(model, folder, task.details()),
              state_folder=folder / "state",
              tokens_per_micro_batch=tokens_per_micro_batch(turn.device, model.config.n_embd))
        batches.saved()
        turn.report(**spent)


def start_up(job: Job, turn: Turn) -> None:
    """From nothing imported to the end of the first training step on the bundled base, as a user's run begins."""
    turn.wait()
    from minipeft import GPT2ForSequenceClassification, LoraConfig, get_tokenizer, inject
    from minipeft.data.batches import BucketedBatches
    from minipeft.data.datasets import load_dataset
    from minipeft.tasks.classification import Classification
    from minipeft.training.hardware import choose_precision, tokens_per_micro_batch
    from minipeft.training.loop import TrainingConfig, train

    data = load_dataset("sample", Classification)
    task, examples = Classification(get_tokenizer("mini"), data.label_names), data.train.take(range(16))
    model = GPT2ForSequenceClassification.from_pretrained("mini", num_labels=2)
    inject(model, LoraConfig(r=8, target_modules="all-linear")).to(turn.device)
    train(model, BucketedBatches(task.encode(examples).ids, examples.labels, 16), task.loss_sum,
          lambda: NOTHING_MEASURED, TrainingConfig(epochs=1), choose_precision("auto", turn.device),
          tokens_per_micro_batch=tokens_per_micro_batch(turn.device, model.config.n_embd))
    turn.report()
