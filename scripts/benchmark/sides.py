"""What `scripts/benchmark/benchmark.py` measures, each side in a process of its own, one round at a time.

    python scripts/benchmark/sides.py '{"side": "train_ours", ...}'

A side sets itself up, prints one line of JSON when it is warm, and then measures one round for each line it reads, so
that two sides can take turns on one machine. The reference libraries are imported here and nowhere else outside tests.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

Job = dict[str, Any]
PAD = 50256  # GPT-2's end of text, which users of transformers pad with: it finds a text's end by looking for this id


class Turn:
    """The line between a side and the benchmark: wait for a turn, and report what was measured in it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.started = device, 0.0
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints must not be taken for a report

    def wait(self) -> None:
        """Block until it is this side's turn, then start the clock; the end of the input ends the process."""
        if not sys.stdin.readline():
            os._exit(0)
        self.synchronize()
        self.started = time.perf_counter()

    def report(self, **found: Any) -> None:
        """Stop the clock and send what this turn found."""
        self.synchronize()
        found["seconds"] = time.perf_counter() - self.started
        print(json.dumps(found | self.memory()), file=self.out, flush=True)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> dict[str, int]:
        """Peak bytes of this process so far: resident, and on the GPU."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak}


# --- training ---------------------------------------------------------------------------------------------------------

def read_batches(job: Job) -> tuple[list[np.ndarray], list[int], list[list[int]]]:
    """The token ids and labels of the job's texts, and which of them make each batch."""
    with np.load(job["texts"]) as file:
        ends = np.cumsum(file["lengths"])[:-1]
        ids = [row[:job["length"]] for row in np.split(file["ids"].astype(np.int64), ends)]
        labels = file["labels"].tolist()
    return ids, labels, job["batches"]


def batch_length(rows: list[np.ndarray], job: Job) -> int:
    """How long a batch of these texts is: as the longest, or rounded up as this library's training does."""
    from minipeft.data.batches import rounded
    longest = max(map(len, rows))
    return rounded(longest) if job.get("rounded") else longest


def padded(rows: list[np.ndarray], length: int) -> dict[str, Tensor]:
    """What transformers' DataCollatorWithPadding makes of token ids: (B, T) of them, and their mask."""
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, :len(row)] = torch.from_numpy(row)
        mask[number, :len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def train_ours(job: Job, turn: Turn) -> None:
    """minipeft's own loop on the job's batches, a turn being `steps` optimiser steps."""
    from minipeft import GPT2ForSequenceClassification, inject, load_adapter
    from minipeft.data.batches import collate
    from minipeft.methods import METHODS
    from minipeft.methods.injection import trainable_parameters
    from minipeft.tasks.task import Task
    from minipeft.training.hardware import cast_frozen, choose_precision, tokens_per_pass
    from minipeft.training.loop import TrainingConfig, train

    ids, labels, plan = read_batches(job)
    model = GPT2ForSequenceClassification.from_pretrained(job["base"])
    if "adapter" in job:
        load_adapter(model, job["adapter"])
    else:
        inject(model, METHODS[job["method"]].config(**job["method_values"]))
    model.to(turn.device)
    model.transformer.gradient_checkpointing = job.get("gradient_checkpointing", False)
    precision = choose_precision(job["precision"], turn.device)
    cast_frozen(model, precision)
    trained = trainable_parameters(model).trainable

    class TakingTurns:
        """The batches; fetching the first one of a turn reports the turn before and waits."""

        def __len__(self) -> int:
            return len(plan)

        def epoch(self, epoch: int, first: int = 0) -> Iterator[Any]:
            for number, rows in enumerate(plan[first:], start=first):
                if number % job["steps"] == 0:
                    if number:
                        turn.report(step=number)
                    turn.wait()
                yield collate([ids[i] for i in rows], [labels[i] for i in rows],
                              min(job["length"], batch_length([ids[i] for i in rows], job)))

    def last_turn_ends() -> dict[str, float]:
        turn.report(step=len(plan))
        return {"accuracy": 0.0, "loss": 0.0}

    config = TrainingConfig(epochs=1, batch_size=job["batch_size"], learning_rate=job["learning_rate"],
                            warmup_ratio=0.0, evaluations_per_epoch=1)
    history = train(model, TakingTurns(), Task.loss_sum, last_turn_ends, config, precision, job["compile"],
                    tokens_per_pass=tokens_per_pass(turn.device, model.config.n_embd))
    optimiser_values = 2 * trained  # AdamW keeps two running means
    turn.wait()
    turn.report(mean_loss=history.curve[-1]["train_loss"], trained_parameters=trained,
                optimiser_state_bytes=4 * optimiser_values, saved_bytes=_saved_bytes(model, job))


def _saved_bytes(model: nn.Module, job: Job) -> int:
    """The size of the file that holds what was trained."""
    import tempfile

    from minipeft import save_adapter
    with tempfile.TemporaryDirectory() as folder:
        save = model.save_pretrained if job.get("method") == "full" else lambda where: save_adapter(model, where)
        save(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def train_on_more(job: Job, turn: Turn) -> None:
    """LoRA on the bundled base, one epoch of so many reviews a turn, and how long all but the arithmetic takes."""
    from minipeft import GPT2ForSequenceClassification, LoraConfig, get_tokenizer, inject
    from minipeft.data.batches import Batch, BucketedBatches
    from minipeft.data.datasets import load_dataset
    from minipeft.runs.trained import save_finetuned
    from minipeft.tasks import classification
    from minipeft.tasks.task import Task
    from minipeft.training import loop as training
    from minipeft.training.hardware import cast_frozen, choose_precision, tokens_per_pass

    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **named)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
            return result
        return wrapped

    class TimedBatches(BucketedBatches):
        def epoch(self, *arguments: Any, **named: Any) -> Iterator[Batch]:
            batches = super().epoch(*arguments, **named)
            following = timed("bucketing", lambda: next(batches, None))
            while (batch := following()) is not None:
                yield batch

    training.save_training_state = timed("saving", training.save_training_state)
    data, tokenizer, folder = load_dataset(job["dataset"], job["data_dir"]).train, get_tokenizer("mini"), job["folder"]
    examples = data.subset(job["reviews"], seed=0)
    precision = choose_precision("auto", turn.device)
    while True:
        model = GPT2ForSequenceClassification.from_pretrained("mini", num_labels=2)
        inject(model, LoraConfig(r=8, target_modules="all-linear")).to(turn.device)
        cast_frozen(model, precision)
        details = {"label_names": ["negative", "positive"], "max_length": 384, "truncation": "head_tail"}
        save = timed("saving", lambda model=model: save_finetuned(model, folder, "mini", details))
        spent.clear()
        turn.wait()
        ids = timed("tokenising", classification.encode)(examples.texts, tokenizer, 384, "head_tail")
        training.train(model, TimedBatches(ids, examples.labels, job["batch_size"]), Task.loss_sum,
                       lambda: {"accuracy": 0.0, "loss": 0.0}, training.TrainingConfig(epochs=1), precision,
                       save_best=save, state_folder=Path(folder) / "state",
                       tokens_per_pass=tokens_per_pass(turn.device, model.config.n_embd))
        turn.report(**spent)


def train_peft(job: Job, turn: Turn) -> None:
    """transformers' Trainer with peft on the same batches, from the same base and the same adapter."""
    import transformers
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
    transformers.logging.set_verbosity_error()

    ids, labels, plan = read_batches(job)
    base = AutoModelForSequenceClassification.from_pretrained(job["base"], num_labels=2, pad_token_id=PAD)
    model = PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)
    texts = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels)]

    def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [feature["input_ids"] for feature in features]
        return {**padded(rows, batch_length(rows, job)),
                "labels": torch.tensor([feature["labels"] for feature in features])}

    class SameBatches(Trainer):
        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            loader = torch.utils.data.DataLoader(texts, batch_sampler=plan, collate_fn=collate,
                                                 pin_memory=turn.device.type == "cuda")
            return self.accelerator.prepare(loader)

    class TakingTurns(TrainerCallback):
        def on_step_begin(self, arguments: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step % job["steps"] == 0:
                turn.wait()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step % job["steps"] == 0:
                turn.report(step=state.global_step)

    arguments = TrainingArguments(
        output_dir=str(Path(job["texts"]).parent / "trainer"), num_train_epochs=1, learning_rate=job["learning_rate"],
        weight_decay=0.01, lr_scheduler_type="cosine", per_device_train_batch_size=job["batch_size"],
        bf16=job["precision"] == "bf16", torch_compile=job["compile"], use_cpu=turn.device.type == "cpu",
        save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False)
    trainer = SameBatches(model=model, args=arguments, train_dataset=texts, callbacks=[TakingTurns()])
    found = trainer.train()
    turn.wait()
    turn.report(mean_loss=found.training_loss,
                trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))


def head_on_features(job: Job, turn: Turn) -> None:
    """Head-only training: a turn runs the frozen base over its texts once, then trains on what it gave."""
    from minipeft import GPT2ForSequenceClassification, inject
    from minipeft.methods.head import HeadConfig
    from minipeft.tasks import classification
    from minipeft.training.hardware import choose_precision
    from minipeft.training.optimizer import adamw

    ids, labels, plan = read_batches(job)
    model = inject(GPT2ForSequenceClassification.from_pretrained(job["base"]), HeadConfig()).to(turn.device)
    optimizer = adamw([("score.weight", model.score.weight)], model, job["learning_rate"], 0.01)
    precision = choose_precision(job["precision"], turn.device)
    for start in range(0, len(plan), job["steps"]):
        turn.wait()
        for rows in plan[start:start + job["steps"]]:
            features = classification.pooled_features(model, [ids[i] for i in rows], turn.device, precision)
            logits = model.score(features.clone().to(turn.device))
            nn.functional.cross_entropy(logits, torch.tensor([labels[i] for i in rows], device=turn.device)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        turn.report(step=start + job["steps"])
    turn.wait()
    turn.report(trained_parameters=model.score.weight.numel(), optimiser_state_bytes=8 * model.score.weight.numel(),
                saved_bytes=_saved_bytes(model, job))


# --- inference --------------------------------------------------------------------------------------------------------

def classify_ours(job: Job, turn: Turn) -> None:
    """Classify the job's texts; ours sorts them by length unless the batches are to be the reference's."""
    from minipeft import GPT2ForSequenceClassification
    from minipeft.data.batches import collate
    from minipeft.tasks import classification
    from minipeft.training.hardware import cast_frozen, choose_precision, computing_in

    ids, _, plan = read_batches(job)
    precision = choose_precision(job["precision"], turn.device)
    model = GPT2ForSequenceClassification.from_pretrained(job["base"]).to(turn.device).requires_grad_(False)
    cast_frozen(model, precision)
    while True:
        turn.wait()
        if job["matched"]:
            parts = []
            with torch.inference_mode(), computing_in(precision, turn.device):
                for rows in plan:
                    batch = collate([ids[i] for i in rows], [0] * len(rows)).to(turn.device)
                    parts.append(model(batch.input_ids, attention_mask=batch.attention_mask))
            logits = torch.cat(parts)
        else:
            logits = classification.predict_logits(model, [ids[i] for rows in plan for i in rows], turn.device,
                                                   precision)
        turn.report(texts=sum(map(len, plan)), checksum=float(logits.float().abs().sum()))


def classify_transformers(job: Job, turn: Turn) -> None:
    """transformers on the same texts, in batches as they come, padded to the longest."""
    import transformers
    from transformers import AutoModelForSequenceClassification
    transformers.logging.set_verbosity_error()

    ids, _, plan = read_batches(job)
    model = AutoModelForSequenceClassification.from_pretrained(job["base"], num_labels=2, pad_token_id=PAD)
    model = model.eval().to(turn.device)
    while True:
        turn.wait()
        parts = []
        with torch.inference_mode():
            for rows in plan:
                texts = [ids[i] for i in rows]
                batch = padded(texts, max(map(len, texts)))
                batch = {name: tensor.to(turn.device) for name, tensor in batch.items()}
                parts.append(model(**batch).logits)
        turn.report(texts=sum(map(len, plan)), checksum=float(torch.cat(parts).float().abs().sum()))


def _prompts(job: Job, device: torch.device) -> Tensor:
    ids, _, _ = read_batches(job)
    long_enough = [row for row in ids if len(row) >= job["prompt_tokens"]][:job["batch_size"]]
    return torch.from_numpy(np.stack([row[:job["prompt_tokens"]] for row in long_enough])).to(device)


def generate_ours(job: Job, turn: Turn) -> None:
    """Greedy generation with the key-value cache, as predict.py does it."""
    from minipeft import GPT2LMHeadModel
    from minipeft.tasks.decoding import generate
    from minipeft.training.hardware import cast_frozen, choose_precision, computing_in

    precision = choose_precision(job["precision"], turn.device)
    model = GPT2LMHeadModel.from_pretrained(job["base"]).to(turn.device).requires_grad_(False)
    cast_frozen(model, precision)
    prompts = _prompts(job, turn.device)
    while True:
        turn.wait()
        with computing_in(precision, turn.device):
            ids = generate(model, prompts, max_new_tokens=job["new_tokens"])
        turn.report(tokens=len(prompts) * job["new_tokens"], checksum=int(ids.sum()))


def generate_transformers(job: Job, turn: Turn) -> None:
    """transformers' generate, greedy, with its cache."""
    import transformers
    from transformers import AutoModelForCausalLM
    transformers.logging.set_verbosity_error()

    model = AutoModelForCausalLM.from_pretrained(job["base"]).eval().to(turn.device)
    prompts = _prompts(job, turn.device)
    while True:
        turn.wait()
        ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=PAD,
                             max_new_tokens=job["new_tokens"], min_new_tokens=job["new_tokens"])
        turn.report(tokens=len(prompts) * job["new_tokens"], checksum=int(ids.sum()))


# --- the limit --------------------------------------------------------------------------------------------------------

def matrix_products(job: Job, turn: Turn) -> None:
    """The frozen products of one training step and nothing else: x W^T forwards, and dy W backwards, in each block."""
    C, tokens = job["n_embd"], job["tokens"]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    shapes = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]
    weights = [[torch.randn(out, into, device=turn.device, dtype=dtype) for into, out in shapes]
               for _ in range(job["n_layer"])]
    inputs = {width: torch.randn(tokens, width, device=turn.device, dtype=dtype) for width in (C, 3 * C, 4 * C)}
    while True:
        turn.wait()
        with torch.inference_mode():
            for block in weights:
                for weight in block:
                    inputs[weight.shape[1]] @ weight.T                        # (tokens, in) -> (tokens, out)
                    inputs[weight.shape[0]] @ weight                          # (tokens, out) -> (tokens, in)
        turn.report(operations=sum(2 * 2 * tokens * into * out for into, out in shapes) * job["n_layer"])


def start_up(job: Job, turn: Turn) -> None:
    """From nothing imported to the end of the first training step on the bundled base, as a user's run begins."""
    turn.wait()
    from minipeft import GPT2ForSequenceClassification, LoraConfig, get_tokenizer, inject
    from minipeft.data.batches import BucketedBatches
    from minipeft.data.datasets import load_dataset
    from minipeft.tasks import classification
    from minipeft.tasks.task import Task
    from minipeft.training.hardware import choose_precision, tokens_per_pass
    from minipeft.training.loop import TrainingConfig, train

    data, tokenizer = load_dataset("sample").train, get_tokenizer("mini")
    model = GPT2ForSequenceClassification.from_pretrained("mini", num_labels=2)
    inject(model, LoraConfig(r=8, target_modules="all-linear")).to(turn.device)
    ids = classification.encode(data.texts[:16], tokenizer, 384, "head_tail")
    train(model, BucketedBatches(ids, data.labels[:16], 16), Task.loss_sum,
          lambda: {"accuracy": 0.0, "loss": 0.0}, TrainingConfig(epochs=1),
          choose_precision("auto", turn.device), tokens_per_pass=tokens_per_pass(turn.device, model.config.n_embd))
    turn.report()


SIDES: dict[str, Callable[[Job, Turn], None]] = {
    side.__name__: side for side in (train_ours, train_peft, train_on_more, head_on_features, classify_ours,
                                     classify_transformers, generate_ours, generate_transformers, matrix_products,
                                     start_up)}


def main() -> None:
    job = json.loads(sys.argv[1])
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    turn = Turn(torch.device(job["device"]))
    with contextlib.suppress(BrokenPipeError):
        SIDES[job["side"]](job, turn)


if __name__ == "__main__":
    main()
