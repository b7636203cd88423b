"""The one table of default hyperparameters, by method.

Learning rates, and how texts are cut, were compared on IMDb's validation split with the mini base
(results/tuning_*.json). On the whole training split one epoch already is 1,400 steps.

`method` fills the method's configuration, `training` the TrainingConfig; whatever a user gives replaces an entry.
"""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {"method": {}, "training": {"learning_rate": 3e-4, "epochs": 2}},
    "head": {"method": {}, "training": {"learning_rate": 3e-3, "epochs": 10}},
    "bitfit": {"method": {}, "training": {"learning_rate": 2e-3, "epochs": 1}},
    "dora": {"method": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
             "training": {"learning_rate": 1.5e-3, "epochs": 1}},
    "vera": {"method": {"r": 64, "target_modules": "all-linear"}, "training": {"learning_rate": 1e-2, "epochs": 1}},
    "ia3": {"method": {}, "training": {"learning_rate": 5e-3, "epochs": 1}},
    "adapter": {"method": {"reduction_factor": 8}, "training": {"learning_rate": 1e-3, "epochs": 1}},
    "prompt": {"method": {"prompt_tuning_init": "SAMPLE_VOCAB"}, "training": {"learning_rate": 1e-2, "epochs": 1}},
    "ptuning": {"method": {}, "training": {"learning_rate": 1e-3, "epochs": 1}},
    "prefix": {"method": {}, "training": {"learning_rate": 1e-2, "epochs": 1}},
    "lora": {"method": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
             "training": {"learning_rate": 1.5e-3, "epochs": 3}},
}
# What other tasks need otherwise, compared on their validation splits with the mini base (results/tuning_*.json).
BY_TASK: dict[str, dict[str, dict[str, Any]]] = {
    "tagging": {"bitfit": {"learning_rate": 6e-3}, "ia3": {"learning_rate": 1e-2}},
    # Summaries and German are far from what the base has read: every method has to go far from where it starts.
    "summarisation": {"full": {"learning_rate": 1e-3}, "bitfit": {"learning_rate": 2e-2},
                      "ia3": {"learning_rate": 1e-1}, "adapter": {"learning_rate": 1e-2},
                      "prompt": {"learning_rate": 1e-1}, "prefix": {"learning_rate": 1e-1},
                      "lora": {"learning_rate": 1e-2}},
    "translation": {"full": {"learning_rate": 2e-3}, "bitfit": {"learning_rate": 6e-2},
                    "ia3": {"learning_rate": 3e-1}, "adapter": {"learning_rate": 1e-2},
                    "prompt": {"learning_rate": 3e-1}, "prefix": {"learning_rate": 1e-1},
                    "lora": {"learning_rate": 1e-2}},
}


def table(method: str, task: str = "classification") -> dict[str, dict[str, Any]]:
    """The defaults of a method on a task: what fills its configuration, and what the TrainingConfig."""
    found = DEFAULTS[method]
    return {"method": found["method"], "training": {**found["training"], **BY_TASK.get(task, {}).get(method, {})}}


# Reading: how long a text may be, in tokens, and what is cut from a longer one. A summary's source is longer than most
# texts: mini's 512 positions are used but for those that virtual tokens may need.
MAX_LENGTH, TRUNCATION = 384, "head_tail"
MAX_SUMMARY_LENGTH = 480
# The part of these tokens that is kept free for what is to be written; a summary is a small part of its source.
TARGET_SHARE, SUMMARY_SHARE = 1 / 3, 1 / 6
# Sizes used on a CPU unless --full is given: enough to see a method work in minutes.
CPU_TRAIN_SIZE, CPU_VALIDATION_SIZE, CPU_TEST_SIZE = 4000, 500, 2000
# Texts per forward pass in evaluation: on a CPU as many as fit its cache, on a GPU enough to keep it busy.
EVALUATION_BATCH_SIZE = {"cpu": 16, "cuda": 128}
# Prompts continued at a time: one token of each is little work, so more of them than texts that are read.
GENERATION_BATCH_SIZE = {"cpu": 32, "cuda": 256}
# On little data the table's epochs are too few steps to learn anything: more are taken, up to a limit.
MINIMUM_STEPS, MAXIMUM_EPOCHS = 500, 10
