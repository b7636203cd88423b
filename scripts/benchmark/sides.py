"""One side of what `scripts/benchmark/benchmark.py` compares, in a process of its own.

    python scripts/benchmark/sides.py '{"side": "train_ours", ...}'

A side sets itself up in silence. Then it measures one turn for each line that it reads and answers with one line of
JSON: the seconds, the peak memory so far, and what else it found. So two sides can take turns on one machine. Their
first turns warm up and are not counted; a side that trains has one turn more, which reports on the run as a whole.
The reference libraries are imported by the sides named after them, and nowhere else outside of the tests.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable

import torch
from inference_sides import classify_ours, classify_transformers, generate_ours, generate_transformers, matrix_products
from job import Job, Turn
from profiled import ProfiledTurn
from training_sides import head_on_features, start_up, train_on_more, train_ours, train_peft

SIDES: dict[str, Callable[[Job, Turn], None]] = {
    side.__name__: side for side in (train_ours, train_peft, train_on_more, head_on_features, classify_ours,
                                     classify_transformers, generate_ours, generate_transformers, matrix_products,
                                     start_up)}


def main() -> None:
    job = json.loads(sys.argv[1])
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    turn = (ProfiledTurn if job["profiled"] else Turn)(torch.device(job["device"]))
    with contextlib.suppress(BrokenPipeError):
        SIDES[job["side"]](job, turn)


if __name__ == "__main__":
    main()
