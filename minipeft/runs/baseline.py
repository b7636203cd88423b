"""What needs no training, tested: the base model as it is, simple guesses, and zero-shot by the language model."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn as nn

from minipeft.files import check_writable, write_json_file
from minipeft.methods.injection import fingerprint, trainable_parameters
from minipeft.model.gpt2 import GPT2LMHeadModel
from minipeft.runs.finetune import test
from minipeft.runs.plan import Options, RunPlan, Say, choose, make_task, silent
from minipeft.runs.record import described, headline
from minipeft.runs.request import check_places, request_of
from minipeft.tasks import classification
from minipeft.training import distributed as parallel
from minipeft.training.hardware import matmul_precision


def baseline(options: Options, say: Say = silent) -> dict[str, Any]:
    """Test the base model and what else needs no training, and write the results file.

    Returns:
        The content of the results file.

    Raises:
        MinipeftError: whatever is wrong with the request.
    """
    say = say if parallel.rank() == 0 else silent
    plan = choose(options, say, baseline=True)
    model = base_of(plan)
    check_places(plan, request_of(plan, fingerprint(model)), say)
    if parallel.rank() == 0:
        check_writable(plan.results_file.parent)
    results = tested(plan, model, say)
    if parallel.rank() == 0:
        write_json_file(plan.results_file, results)
    say(f"wrote {plan.results_file}")
    return results


def base_of(plan: RunPlan) -> nn.Module:
    """The base model, with a head for the plan's task that nobody trained."""
    torch.manual_seed(plan.training.seed)
    return plan.data.task.load_model(plan.model_name, plan.data.label_names)


def tested(plan: RunPlan, model: nn.Module, say: Say = silent) -> dict[str, Any]:
    """What the results file of the baselines says.

    Args:
        model: what `base_of` gives.
    """
    task, request = make_task(plan, model), request_of(plan, fingerprint(model))
    model.to(plan.device)
    untrained = "untrained_head" if plan.data.label_names else "untrained_base"
    found, seconds = task.baselines(plan.data.train, plan.data.test), {}
    found[untrained], seconds[untrained] = test(plan, model, task)
    more = {}
    if tuple(plan.data.label_names) == tuple(classification.ZERO_SHOT_WORDS):
        found["zero_shot"], seconds["zero_shot"] = zero_shot(plan, task.max_length)
        more["zero_shot"] = {"prompt": classification.ZERO_SHOT_PROMPT, "words": classification.ZERO_SHOT_WORDS}
    for name, metrics in found.items():
        say(f"{name.replace('_', ' ')}: {headline(task, metrics)}")
    seconds = {name: round(taken, 2) for name, taken in seconds.items()}
    return {"method": "baseline", **described(plan, task, request), "metrics": found,
               "parameters": {"trainable": 0, "total": trainable_parameters(model).total}, "seconds": seconds,
               "samples_per_second": {name: round(plan.sizes["test"] / max(taken, 0.01), 2)
                                      for name, taken in seconds.items()}, **more}


def zero_shot(plan: RunPlan, max_length: int) -> tuple[dict[str, Any], float]:
    """Metrics of the untrained language model that says how a review goes on, and the seconds that took."""
    model = GPT2LMHeadModel.from_pretrained(plan.model_name).to(plan.device)
    started = time.perf_counter()
    with matmul_precision(plan.options.matmul_precision):
        logits = classification.zero_shot_logits(model, plan.tokenizer, plan.data.test.texts, plan.device,
                                                 plan.precision, max_length, progress="zero-shot")
    seconds = time.perf_counter() - started
    return classification.metrics(logits, plan.data.test.labels, plan.data.label_names), seconds
