"""What a side of the benchmark is given: a job, with its texts, and turns to measure in.

Neither this library nor a reference is imported here: a side's peak memory counts, so it imports only what it measures.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
        """Wait for what the GPU still computes."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> dict[str, int]:
        """Peak bytes of this process so far: allocated on the GPU, or resident on a CPU."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak}


def read_batches(job: Job) -> tuple[list[np.ndarray], list[int], list[list[int]]]:
    """The token ids and labels of the job's texts, and which of them make each batch."""
    with np.load(job["texts"]) as file:
        ends = np.cumsum(file["lengths"])[:-1]
        ids = [row[:job["length"]] for row in np.split(file["ids"].astype(np.int64), ends)]
        labels = file["labels"].tolist()
    return ids, labels, job["batches"]


def dropouts(job: Job) -> dict[str, float]:
    """Fields of a base's configuration by which its three dropouts are the job's; none where the base's own count."""
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    return {} if job["dropout"] is None else dict.fromkeys(names, job["dropout"])


def batch_length(rows: list[np.ndarray], job: Job) -> int:
    """How long a batch of these texts is: as the longest, or rounded up as this library's training does."""
    longest = max(map(len, rows))
    if not job.get("rounded"):
        return longest
    from minipeft.data.batches import rounded
    return rounded(longest)


def padded(rows: list[np.ndarray], length: int) -> dict[str, Tensor]:
    """What transformers' DataCollatorWithPadding makes of token ids: (B, T) of them, and their mask."""
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, :len(row)] = torch.from_numpy(row)
        mask[number, :len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}
