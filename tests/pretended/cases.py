"""What is tried on the pretended GPU, in worker.py's process: whole fine-tunings with tiny models, and parts of them.

Each case returns what it found, as JSON; the tests say what it should have been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import mistakes
import torch
from device import GPU, Mixed, PretendedGPU
from helpers import write_datasets, write_tiny_model
from safetensors import safe_open

from minipeft import GPT2LMHeadModel, PrefixTuningConfig, inject, load_adapter, save_adapter
from minipeft.errors import HardwareError
from minipeft.model.gpt2 import MLP
from minipeft.runs.finetune import finetune
from minipeft.runs.inference import load, predict
from minipeft.runs.plan import Options
from minipeft.training import loop
from minipeft.training.progress import Progress
from minipeft.training.stopping import Stopped

torch.set_num_threads(1)
logging.disable(logging.WARNING)
DATASETS = {"classification": "sst2", "tagging": "wnut_17", "summarization": "scitldr", "translation": "multi30k"}
SMALL = {"lora": {"r": 2, "lora_dropout": 0.0}, "dora": {"r": 2, "lora_dropout": 0.0}, "vera": {"r": 4},
         "prompt": {"num_virtual_tokens": 2}, "ptuning": {"num_virtual_tokens": 2},
         "prefix": {"num_virtual_tokens": 2}, "adapter": {"bottleneck_size": 2}}


@functools.cache
def place():
    """The folder that worker.py was given, with the tiny model and the tiny datasets."""
    folder = Path(sys.argv[2])
    write_datasets(folder / "data")
    write_tiny_model(folder / "base", classifier_dropout=0.0)
    os.environ["MINIPEFT_DATA"] = str(folder / "data")
    return folder


def options(method, task, precision, device="cuda", output="adapter", training=None, **more):
    writes = task in ("summarization", "translation")
    return Options(method=method, model=str(place() / "base"), dataset=DATASETS[task], device=device,
                   precision=precision, max_length=40, max_new_tokens=4 if writes else None,
                   output=str(place() / output), results_dir=str(place() / "results"),
                   method_values=SMALL.get(method, {}), training_values={"epochs": 1, "batch_size": 4,
                                                                         **(training or {})}, overwrite=True, **more)


@contextlib.contextmanager
def counting_in_steps(gpu):
    """Within the block: what the host waited for in optimizer steps, by what and where, the count after them too."""
    found = Counter()

    def counted(function):
        def call(*arguments):
            before = gpu.waits.copy()
            result = function(*arguments)
            found.update(gpu.waits - before)
            return result
        return call

    with patch.object(loop, "optimizer_step", counted(loop.optimizer_step)), \
            patch.object(Progress, "count", counted(Progress.count)):
        yield found


def listed(waits):
    """A counter of waits as JSON takes it, most first."""
    return [[what, where, count] for (what, where), count in waits.most_common()]


def losses(results):
    """Training loss at each validation, and the best validation's loss."""
    return [point["train_loss"] for point in results["curve"]] + [results["metrics"]["best_validation"]["loss"]]


def fine_tuning(method, task, precision, **more):
    """One whole run on the GPU, from names to the tested adapter."""
    with PretendedGPU() as gpu, counting_in_steps(gpu) as in_steps:
        found = finetune(options(method, task, precision, dropout=0.0, **more))
    return {"losses": losses(found), "waits_in_steps": listed(in_steps), "products": dict(gpu.products),
            "steps": found["curve"][-1]["step"], "read_too_early": sum(
                count for (what, _), count in gpu.waits.items() if what == "read before it has come")}


def on_the_cpu(method, task):
    """The same run on the CPU, in float32: what it should come to."""
    return losses(finetune(options(method, task, "fp32", device="cpu", dropout=0.0)))


def resuming(method, task, precision):
    """A run that is cut off after its third step and resumed, and one that is not; both with dropout."""
    def run(output, resume=False):
        return finetune(options(method, task, precision, output=output, dropout=0.2, resume=resume,
                                training={"epochs": 2}))

    @contextlib.contextmanager
    def asked_to_stop():
        asked = iter([0, 0, 0])
        yield lambda: next(asked, 2)

    with PretendedGPU():
        whole = run("whole")
        with patch.object(loop, "stop_between_steps", asked_to_stop), contextlib.suppress(Stopped):
            run("cut")
        with safe_open(next((place() / "cut/training_state").glob("*.safetensors")), framework="pt") as file:
            saved = list(file.keys())
        torch.rand(5, device="cuda")  # something else was drawn in between
        again = run("cut", resume=True)
    files = [place() / name / "adapter_model.safetensors" for name in ("whole", "cut")]
    return {"losses": [losses(whole), losses(again)], "random_state_saved": "random/cuda" in saved,
            "adapters": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]}


def writing(num_beams, padded):
    """Texts written by a language model: how often the host waits per token, and what is written here and on a CPU."""
    fine_tuned = options("lora", "translation", "fp32", output="writer")
    texts = ["a dog", "a good film, a bad film" if padded else "a cat"]

    def written(device):
        trained = load(place() / "writer", dataclasses.replace(fine_tuned, device=device))
        return trained, lambda: trained.task.generate_texts(trained.model, texts, trained.device, trained.precision,
                                                            num_beams=num_beams, max_new_tokens=new_tokens)
    new_tokens = 8
    if not (place() / "writer").is_dir():
        finetune(dataclasses.replace(fine_tuned, device="cpu"))
    expected = written("cpu")[1]()
    with PretendedGPU() as gpu:
        trained, write = written("cuda")
        gpu.waits.clear()
        found = write()
        waits = listed(gpu.waits)
        sampled = list(predict(trained, texts[:1], temperature=1.0, seed=3, max_new_tokens=4))
    return {"waits": waits, "tokens": new_tokens, "texts": [found, expected], "sampled": len(sampled) > 0}


def loading_an_adapter():
    """The GPU's random state before and after an adapter is loaded whose values start random there."""
    folder = str(place() / "prefix")
    with PretendedGPU() as gpu:
        model = inject(GPT2LMHeadModel.from_pretrained(place() / "base").to(GPU), PrefixTuningConfig())
        save_adapter(model, folder)
        bare = GPT2LMHeadModel.from_pretrained(place() / "base").to(GPU)
        before, asked = gpu.random_state.tolist(), gpu.states_asked
        load_adapter(bare, folder)
        after = gpu.random_state.tolist()
        inject(GPT2LMHeadModel.from_pretrained(place() / "base").to(GPU), PrefixTuningConfig())
        return {"kept": after == before, "drawn_by_injecting": gpu.random_state.tolist() != after,
                "states_asked": gpu.states_asked - asked}


def a_model_on_the_cpu():
    """A run on the CPU of a machine that has a GPU: is the GPU's random state asked for?"""
    with PretendedGPU() as gpu:
        finetune(options("lora", "classification", "fp32", device="cpu", output="on_cpu", training={"epochs": 2}))
    return {"states_asked": gpu.states_asked}


def out_of_memory():
    """What a run says whose memory is not enough."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with PretendedGPU(), patch.object(MLP, "forward", full):
        try:
            finetune(options("lora", "classification", "bf16"))
        except HardwareError as error:
            return str(error)


def mistake(name):
    """A run with a mistake planted in the library: how it ended, or what was noticed."""
    planted = mistakes.PLANTED[name]
    with planted.change():
        try:
            return (resuming if planted.resumes else fine_tuning)(planted.method, planted.task, "bf16")
        except (Mixed, RuntimeError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
