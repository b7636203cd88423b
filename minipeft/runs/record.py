"""What one run writes: what every results file says, and its headline for people."""

from __future__ import annotations

from typing import Any

from minipeft.runs.plan import RunPlan, dtype_name
from minipeft.tasks.task import Task
from minipeft.training import distributed as parallel
from minipeft.training.hardware import machine, peak_memory_bytes, versions


def headline(task: Task, metrics: dict[str, Any]) -> str:
    """The metric of a test that counts most, with its interval where there is one and others beside it, as a line."""
    low, high = metrics.get(f"{task.headline}_95_interval", (None, None))
    interval = "" if low is None else f" (95 % interval {low:.4f} to {high:.4f})"
    others = "".join(f", {key.replace('_', ' ')} {metrics[key]:.4f}" for key in task.beside if key in metrics)
    return f"{task.headline} {metrics[task.headline]:.4f}{interval}{others}"


def described(plan: RunPlan, task: Task, request: dict[str, Any]) -> dict[str, Any]:
    """What the results file of every run says: what was asked for, on what, with what and where it ran."""
    options, data = plan.options, plan.data
    return {"request": request, "base_model": {"name": plan.model_name, "fingerprint": request["base_fingerprint"]},
            "task": task.name, "headline": task.headline,
            "dataset": {"name": data.name, "source": data.source, "sizes": plan.sizes,
                        **{key: value for key, value in task.details().items() if key != "task"}},
            "choices": plan.choices, "precision": dtype_name(plan.precision), "compile": options.compile,
            "processes": parallel.world_size(), "sharded": options.shard, "machine": machine(),
            "versions": versions(), "seed": plan.training.seed, "peak_memory_bytes": peak_memory_bytes(plan.device)}
