"""Cells' files made by hand, for tests of what is made from them."""

from __future__ import annotations

import dataclasses

import numpy as np

from minipeft.runs.cells import packed
from minipeft.training.hardware import machine

TERMS = {"dataset": {"name": "films", "sizes": {"train": 32, "validation": 4, "test": 200}}, "budget": {"tuned": True},
         "task": "classification"}
HEADER = {"headline": "accuracy", "task": "classification"}


def trial_content(cell, terms, score):
    """What the file of a trial holds that reached this validation accuracy."""
    return {"cell": dataclasses.asdict(cell), "terms": terms, "trial": dict(cell.values), "best_by": "accuracy",
            "validation": {"accuracy": score, "loss": 0.5}, "core_seconds": 2.0, "curve": [],
            "process_core_seconds": 36}


def final_content(cell, terms, share, forgotten=0.1):
    """What the file of a method holds that is right on this share of 200 test examples: the first ones."""
    right = (np.arange(200) < share * 200).astype(np.int64)[:, None]
    sizes = {**terms["dataset"]["sizes"], **({"train": cell.size} if cell.size else {})}
    return {**HEADER, "cell": dataclasses.asdict(cell), "terms": terms, "method": cell.method, "seed": cell.seed,
            "dataset": {"sizes": sizes},
            "training_config": {"learning_rate": 1e-3}, "adapter_folder": "somewhere",
            "curve": [{"step": step, "validation_loss": 1 / step} for step in (1, 2)],
            "parameters": {"trainable": 10, "total": 1000}, "seconds": {"test": 2.0}, "each": packed(right),
            "metrics": {"test": {"accuracy": share, "by_label": {}}}, "process_core_seconds": 90,
            "costs": {"adapter_bytes": 40,
                      "forgetting": {"before": 4.0, "after": 4.0 + forgotten, "tokens": 9, "texts": "imdb"}}}


def costs_content(cell, terms, seconds=5.0, memory=None, mergeable="yes"):
    """What the file of a turn holds that measured time and memory; each turn takes a second more."""
    return {"cell": dataclasses.asdict(cell), "terms": terms, "method": cell.method, "machine": machine(),
            "versions": {}, "process_core_seconds": 20,
            "costs": {"core_seconds_per_1000_examples": seconds + cell.seed, "training_memory_bytes": memory,
                      "inference": {"base_seconds": 1.0, "seconds": 1.25, "merged_seconds": 1.0,
                                    "mergeable": mergeable}}}


def baseline_content(cell, terms):
    """What the file of the baselines holds."""
    return {**HEADER, "cell": dataclasses.asdict(cell), "terms": terms, "method": "baseline", "seed": 0,
            "metrics": {"zero_shot": {"accuracy": 0.6}}}
