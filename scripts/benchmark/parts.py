"""The parts of the benchmark: which sides each compares, on which texts, and the ratios that come out."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from turns import Side, take_turns

from minipeft import GPT2Config, GPT2ForSequenceClassification, LoraConfig, inject, save_adapter
from minipeft.data.batches import BucketedBatches, number_of_micro_batches
from minipeft.data.datasets import load_dataset
from minipeft.explain.memory import training_operations
from minipeft.methods.injection import trainable_parameters
from minipeft.model.tokenizer import get_tokenizer
from minipeft.tasks.classification import Classification
from minipeft.training.hardware import choose_device, tokens_per_micro_batch

PARTS = ("limit", "training", "methods", "inference", "growth", "start_up")
SHAPES = {"gpt2": {}, "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2}}
# Of LoRA's training: optimizer steps per turn, and what each side is told. Batches of similar length are also rounded.
BEST = {"precision": "bf16", "compile": True, "rounded": True}
TRAINING_ROWS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "matched": (1, {}, {}), "default": (2, {"precision": "auto", "rounded": True}, {}), "best": (2, BEST, BEST)}
ROUNDS_OF_LONG = 3  # turns that count, at most, where a turn takes most of a minute
METHOD_VALUES: dict[str, dict[str, Any]] = {
    "full": {}, "lora": {"r": 8, "lora_alpha": 16}, "prefix": {"num_virtual_tokens": 20},
    "prompt": {"num_virtual_tokens": 20}, "adapter": {"reduction_factor": 16}, "ia3": {}, "head": {}}


def against(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """How many times as fast one side is as another, and its share of the other's memory."""
    return {"speedup": round(theirs["seconds"] / ours["seconds"], 3),
            "memory_ratio": round(ours["peak_memory_bytes"] / theirs["peak_memory_bytes"], 3)}


def report(name: str, ratios: dict[str, Any]) -> None:
    """Print a row's ratios."""
    print(f"{name}: {ratios['speedup']} times as fast, {ratios['memory_ratio']} of the memory", flush=True)


class Benchmark:
    """The material all parts share (a base with random weights, an adapter, tokenized reviews) and the parts."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.device = choose_device(options.device)
        self.rounds = 2 if options.quick else options.rounds
        onednn = self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.libraries = ("torch", "onednn") if onednn else ("torch",)  # that multiply matrices
        self.shape = "tiny" if options.quick else "gpt2"
        self.batch_size = 4 if options.quick else 16
        self.lengths = (32, 64) if options.quick else (256, 512)
        torch.manual_seed(0)
        self.config = GPT2Config(**SHAPES[self.shape], num_labels=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = GPT2ForSequenceClassification(self.config)
        self.parameters = trainable_parameters(model).total
        model.save_pretrained(folder / "base")
        inject(model, LoraConfig(**METHOD_VALUES["lora"]))
        torch.nn.init.normal_(model.score.weight, std=0.02)
        save_adapter(model, folder / "adapter")
        data = load_dataset(options.dataset, Classification, options.data_dir)
        self.dataset = data.name
        examples = data.train.subset(min(2048, len(data.train)), seed=0)
        self.reviews, self.labels = examples.texts, examples.labels
        ids = get_tokenizer("gpt2" if options.dataset == "imdb" else "mini").encode_batch(self.reviews)
        self.ids = [np.asarray(row[:1024], dtype=np.int64) for row in ids]
        self.texts = self.write_texts("texts", self.ids)

    def write_texts(self, name: str, ids: list[np.ndarray]) -> str:
        """A file of token ids for the sides to read; the labels are those of the first reviews."""
        path = self.folder / f"{name}.npz"
        np.savez(path, ids=np.concatenate(ids), lengths=[len(row) for row in ids], labels=self.labels[:len(ids)])
        return str(path)

    def description(self) -> dict[str, Any]:
        """What benchmark.json says of the material."""
        return {"model": {"shape": self.shape, "parameters": self.parameters, "weights": "random"},
                "dataset": self.dataset, "batch_size": self.batch_size}

    def job(self, side: str, **values: Any) -> dict[str, Any]:
        """What a side is told: these defaults, and `values`."""
        return {"side": side, "device": self.device.type, "base": str(self.folder / "base"),
                "texts": self.texts, "batch_size": self.batch_size, "learning_rate": 1e-4,
                "precision": "fp32", "compile": False, "batches": [], "length": self.lengths[0], "dropout": None,
                "language_model": False, "micro_batch_size": None, "cast_base": False, "profiled": False, **values}

    def batches(self, count: int, steps: int, length: int, grouped: bool, full: bool = False) -> list[list[int]]:
        """Numbers of the texts of `count` batches; the texts of every `steps` batches, a turn, are always the same.

        Args:
            grouped: sort the texts of a turn by length before cutting them into batches, as training does.
            full: only texts of `length` tokens or more, so that nothing is padded.
        """
        size = self.batch_size
        numbers = [i for i, row in enumerate(self.ids) if not full or len(row) >= length]
        numbers = (numbers * (1 + count * size // max(1, len(numbers))))[:count * size]
        if not grouped:
            return [numbers[start:start + size] for start in range(0, len(numbers), size)]
        batches = []
        for start in range(0, len(numbers), size * steps):
            turn = numbers[start:start + size * steps]
            order = BucketedBatches([self.ids[i][:length] for i in turn], [0] * len(turn), size, pool=steps).order(0)
            batches += [[turn[i] for i in rows] for rows in order]
        return batches

    def rounds_at(self, length: int) -> int:
        """How many turns count with texts of so many tokens: of the longer ones fewer, to save time."""
        return min(self.rounds, ROUNDS_OF_LONG) if length > self.lengths[0] else self.rounds

    def micro_batch_size(self, length: int) -> int:
        """How many texts this library computes at once; --quick takes half a batch, to have several."""
        if self.options.quick:
            return self.batch_size // 2
        tokens = tokens_per_micro_batch(self.device, self.config.n_embd)
        return -(-self.batch_size // number_of_micro_batches(self.batch_size, length, tokens))

    # --- the parts ----------------------------------------------------------------------------------------------------

    def training(self) -> dict[str, Any]:
        """Ours against transformers + peft: matched, default and best."""
        rows = {}
        for length, row in itertools.product(self.lengths, TRAINING_ROWS):
            if row.startswith(self.options.only):
                rows[f"{row} {length}"] = found = self.training_row(length, *TRAINING_ROWS[row])
                report(f"{row} {length}", found)
        return rows

    def training_row(self, length: int, steps: int, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
        """Both sides, each with its own settings, on the same texts."""
        sides, rounds = {}, self.rounds_at(length)
        for name, side, values in (("ours", "train_ours", ours), ("peft", "train_peft", theirs)):
            batches = self.batches(steps * (rounds + 1), steps, length, values.get("rounded", False))
            sides[name] = Side(**self.job(side, adapter=str(self.folder / "adapter"), length=length, steps=steps,
                                          batches=batches, **values))
        found = take_turns(sides, rounds, last=True)
        for side in found.values():
            side["samples_per_second"] = round(steps * self.batch_size / side["seconds"], 3)
        return found | against(found["ours"], found["peft"])

    def methods(self) -> dict[str, Any]:
        """Every method against full fine-tuning, on full-length texts, in the default precision and in float32."""
        rows: dict[str, Any] = {}
        for precision in ("fp32", "auto"):
            if not precision.startswith(self.options.only):
                continue
            common = {"steps": 1, "batches": self.batches(self.rounds + 1, 1, self.lengths[0], False, full=True),
                      "precision": precision}
            sides = {name: Side(**self.job("head_on_features" if name == "head" else "train_ours", method=name,
                                           method_values=values, **common))
                     for name, values in METHOD_VALUES.items()}
            rows[precision] = take_turns(sides, self.rounds, last=True)
            for name, own in rows[precision].items():
                own["method_values"] = METHOD_VALUES[name]
                if name != "full":
                    ratios = against(own, rows[precision]["full"])
                    own |= {f"{key}_vs_full": value for key, value in ratios.items()}
                    report(f"{precision} {name}, against full", ratios)
        return rows

    def limit(self) -> dict[str, Any]:
        """A LoRA step's arithmetic per second as a share of plain matrix products', by the faster of the libraries that
        torch has, on the same threads."""
        rows = {}
        length = self.lengths[0]
        for precision in ("fp32", "bf16"):
            steps = 2
            batches = self.batches(steps * (self.rounds + 1), steps, length, False, full=True)
            size = self.micro_batch_size(length)
            products = {"n_embd": self.config.n_embd, "n_layer": self.config.n_layer, "precision": precision,
                        "tokens": size * length, "micro_batches": self.batch_size // size}
            found = take_turns({
                "lora": Side(**self.job("train_ours", adapter=str(self.folder / "adapter"), steps=steps,
                                        batches=batches, precision=precision)),
                **{f"products_{by}": Side(**self.job("matrix_products", by=by, **products)) for by in self.libraries}},
                self.rounds)
            operations = steps * training_operations(self.config, self.batch_size, length,
                                                     r=METHOD_VALUES["lora"]["r"])
            achieved = operations / found["lora"]["seconds"]
            rates = {by: found[f"products_{by}"]["operations"] / found[f"products_{by}"]["seconds"]
                     for by in self.libraries}
            ceiling = max(rates.values())
            rows[precision] = {"achieved_flops": round(achieved), "products_flops": round(ceiling),
                               "products_flops_by": {by: round(rate) for by, rate in rates.items()},
                               "mfu": round(achieved / ceiling, 3), **found}
            print(f"{precision}: {achieved / 1e9:.0f} of {ceiling / 1e9:.0f} GFLOP/s, {achieved / ceiling:.3f}",
                  flush=True)
        return rows

    def inference(self) -> dict[str, Any]:
        """Classification and greedy generation against transformers: in float32, and each as used by default."""
        rows: dict[str, Any] = {}

        def compare(name: str, what: str, ours: Side, theirs: Side) -> None:
            found = take_turns({"ours": ours, "transformers": theirs}, self.rounds)
            for side in found.values():
                side[f"{what}_per_second"] = round(side[what] / side["seconds"], 2)
            rows[name] = found | against(found["ours"], found["transformers"])
            report(name, rows[name])

        batches = self.batches(4, 4, self.lengths[0], False)
        for row, precision in (("matched", "fp32"), ("default", "auto")):
            if not row.startswith(self.options.only):
                continue
            ours = {"matched": row == "matched", "precision": precision}
            compare(f"classification {row}", "texts", Side(**self.job("classify_ours", batches=batches, **ours)),
                    Side(**self.job("classify_transformers", batches=batches)))
            for batch_size in (1, 8):
                size = {"batch_size": batch_size, "prompt_tokens": self.lengths[0] // 4,
                        "new_tokens": self.lengths[0] // 4}
                compare(f"generation {row} {batch_size}", "tokens",
                        Side(**self.job("generate_ours", precision=precision, **size)),
                        Side(**self.job("generate_transformers", **size)))
        return rows

    def growth(self) -> dict[str, Any]:
        """Seconds and bytes against length, batch size and number of reviews, per unit of work."""
        lengths, sizes = ((16, 32, 64), (2, 4)) if self.options.quick else ((128, 256, 512, 1024), (2, 4, 8, 16, 32))
        return {"length": {str(length): self.step_of(length, 4) for length in lengths},
                "batch_size": {str(size): self.step_of(128, size) for size in sizes},
                "reviews": self.growth_in_reviews()}

    def step_of(self, length: int, size: int) -> dict[str, Any]:
        """A LoRA step on `size` texts of exactly `length` tokens."""
        texts = [np.resize(self.ids[i], length) for i in range(size * (self.rounds + 1))]
        batches = [list(range(start, start + size)) for start in range(0, len(texts), size)]
        job = self.job("train_ours", adapter=str(self.folder / "adapter"), steps=1, batches=batches, length=length,
                       texts=self.write_texts("growth", texts), batch_size=size)
        found = take_turns({"ours": Side(**job)}, self.rounds)["ours"]
        operations = training_operations(self.config, size, length, r=METHOD_VALUES["lora"]["r"])
        print(f"{length} tokens, batches of {size}: {found['seconds']} s per step", flush=True)
        return {"seconds": found["seconds"], "peak_memory_bytes": found["peak_memory_bytes"],
                "seconds_per_tflop": round(found["seconds"] / operations * 1e12, 4)}

    def growth_in_reviews(self) -> dict[str, Any]:
        """Seconds per review against the number of training reviews (mini, one epoch), and what is not arithmetic."""
        counts = [16, 32, 64] if self.options.quick else [128, 256, 512, 1024]
        sides = {count: Side(**self.job("train_on_more", dataset=self.options.dataset, data_dir=self.options.data_dir,
                                        reviews=count, folder=str(self.folder / f"trained_{count}")))
                 for count in counts}
        rows = {}
        for count, found in take_turns(sides, min(self.rounds, ROUNDS_OF_LONG)).items():
            aside = {key: round(found[key], 4) for key in ("tokenising", "bucketing", "saving")}
            rows[str(count)] = {
                **aside, **{key: found[key] for key in ("seconds", "seconds_low", "seconds_high", "peak_memory_bytes")},
                "seconds_per_review": round(found["seconds"] / count, 5),
                "share_aside": round(sum(aside.values()) / found["seconds"], 5)}
            print(f"{count} reviews: {rows[str(count)]}", flush=True)
        return rows

    def start_up(self) -> dict[str, Any]:
        """From the start of Python to the end of the first training step, with the bundled base."""
        seconds = []
        for _ in range(self.rounds + 1):
            started = time.perf_counter()
            side = Side(**self.job("start_up"))
            side.turn()
            seconds.append(time.perf_counter() - started)
            side.end()
        print(f"start-up: {statistics.median(seconds[1:]):.2f} s", flush=True)
        return {"seconds": round(statistics.median(seconds[1:]), 3), "seconds_low": round(min(seconds[1:]), 3),
                "seconds_high": round(max(seconds[1:]), 3)}
