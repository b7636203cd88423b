"""Write the model of an unfinished pretraining run, as its last saved state has it, as a float16 model folder.

    python scripts/pretraining/snapshot.py checkpoints/pretraining_state checkpoints/pretraining_snapshot

`pretrain.py --init-from checkpoints/pretraining_snapshot` goes on from it, where the state itself is lost.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from pretrain import CONFIG_FILE, START_FILE

from minipeft.commands.start import run
from minipeft.files import read_json_file, write_json_file
from minipeft.model.gpt2 import GPT2Config, GPT2LMHeadModel
from minipeft.model.tokenizer import VOCABULARY_FILE
from minipeft.training.state import load_training_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path, help="the run's --state folder")
    parser.add_argument("output", type=Path, help="model folder to write")
    arguments = parser.parse_args()
    model = GPT2LMHeadModel(GPT2Config.from_dict(read_json_file(arguments.state / CONFIG_FILE)))
    # Only the weights are wanted; the optimizer takes in moments that nobody will use.
    step, saved, _ = load_training_state(arguments.state, model, torch.optim.SGD(model.parameters()))
    model.save_pretrained(arguments.output, dtype=torch.float16)
    shutil.copyfile(arguments.state / VOCABULARY_FILE, arguments.output / VOCABULARY_FILE)
    start = read_json_file(arguments.state / START_FILE)
    write_json_file(arguments.output / START_FILE, start | saved | {"step": step})
    print(f"wrote the model of step {step:,} to {arguments.output}")


if __name__ == "__main__":
    run(main)
