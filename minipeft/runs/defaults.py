"""The one table of what a run takes where its user gives nothing, by method.

A configuration made in Python has peft's defaults, so that code written for peft means the same here. A run of
`scripts/train.py --method NAME` has those of the table below, which suit this library's models and data better:

    method   field               Config()  --method      why
    lora     lora_alpha          8         16            twice r, as is usual
    lora     target_modules      None      all-linear    None is c_attn alone; QLoRA needed all to equal `full`
    dora     lora_alpha          8         16            as lora
    dora     target_modules      None      all-linear    as lora
    vera     r                   256       64            256 is all of mini's width
    vera     target_modules      None      all-linear    as lora
    adapter  reduction_factor    16        8             of mini's 256 channels 16 leaves few
    prompt   prompt_tuning_init  RANDOM    SAMPLE_VOCAB  real words' vectors are the better start (Lester et al.)

Learning rates and epochs were compared on IMDb's validation split, and on other tasks' own, with the first
version of the mini base (results/tuning_*.json). On IMDb's whole training split one epoch already is 1,400 steps.
"""

from __future__ import annotations

from typing import Any

from minipeft.errors import ConfigError

# "method" fills the method's configuration and "training" the TrainingConfig; what a user gives replaces an entry.
# "rates" are the learning rates of other tasks than classification. Summaries and German are far from what the base has
# read: every method has to go far from where it starts.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {"method": {}, "training": {"learning_rate": 3e-4, "epochs": 2},
             "rates": {"summarization": 1e-3, "translation": 2e-3}},
    "head": {"method": {}, "training": {"learning_rate": 3e-3, "epochs": 10}, "rates": {}},
    "bitfit": {"method": {}, "training": {"learning_rate": 2e-3, "epochs": 1},
               "rates": {"tagging": 6e-3, "summarization": 2e-2, "translation": 6e-2}},
    "lora": {"method": {"lora_alpha": 16, "target_modules": "all-linear"},
             "training": {"learning_rate": 1.5e-3, "epochs": 3},
             "rates": {"summarization": 1e-2, "translation": 1e-2}},
    "dora": {"method": {"lora_alpha": 16, "target_modules": "all-linear"},
             "training": {"learning_rate": 1.5e-3, "epochs": 1}, "rates": {}},
    "vera": {"method": {"r": 64, "target_modules": "all-linear"},
             "training": {"learning_rate": 1e-2, "epochs": 1}, "rates": {}},
    "ia3": {"method": {}, "training": {"learning_rate": 5e-3, "epochs": 1},
            "rates": {"tagging": 1e-2, "summarization": 1e-1, "translation": 3e-1}},
    "adapter": {"method": {"reduction_factor": 8}, "training": {"learning_rate": 1e-3, "epochs": 1},
                "rates": {"summarization": 1e-2, "translation": 1e-2}},
    "prompt": {"method": {"prompt_tuning_init": "SAMPLE_VOCAB"}, "training": {"learning_rate": 1e-2, "epochs": 1},
               "rates": {"summarization": 1e-1, "translation": 3e-1}},
    "ptuning": {"method": {}, "training": {"learning_rate": 1e-3, "epochs": 1}, "rates": {}},
    "prefix": {"method": {}, "training": {"learning_rate": 1e-2, "epochs": 1},
               "rates": {"summarization": 1e-1, "translation": 1e-1}},
}


def table(method: str, task: str = "classification") -> dict[str, dict[str, Any]]:
    """The defaults of a method on a task: {"method": fields of its configuration, "training": of TrainingConfig}.

    Raises:
        ConfigError: it has no row yet.
    """
    if method not in DEFAULTS:
        raise ConfigError(f"{method} has no row in minipeft/runs/defaults.py: give it one, with a first learning rate")
    found = DEFAULTS[method]
    rate = found["rates"].get(task, found["training"]["learning_rate"])
    return {"method": found["method"], "training": {**found["training"], "learning_rate": rate}}


# Examples used on a CPU unless --full is given: enough to see a method work in minutes.
CPU_SIZES = {"train": 4000, "validation": 500, "test": 2000}
# On little data the table's epochs are too few steps to learn anything: more are taken, up to a limit.
MINIMUM_STEPS, MAXIMUM_EPOCHS = 500, 10
# A classifier soon knows few examples by heart, and then it is sure where it is wrong, which accuracy does not show. On
# fewer than these it takes smaller and fewer steps, the lowest validation loss is kept, and training ends when it no
# longer falls. Compared on the bundled sample's validation split.
FEW_EXAMPLES, MINIMUM_STEPS_ON_FEW, PATIENCE_ON_FEW = 1500, 180, 3
RATES_ON_FEW = {"lora": 6e-4, "dora": 6e-4}
