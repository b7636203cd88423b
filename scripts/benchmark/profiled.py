"""A turn that is watched by torch.profiler: which operators take its time, and what is copied and cast.

The self time of an operator is what it takes without the operators that it calls. Watching costs time, too: the seconds
of such a turn are no measurement of speed, the shares are what counts.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from job import Turn
from torch.autograd.profiler_util import EventList, FunctionEventAvg
from torch.profiler import ProfilerActivity

TOP = 30  # operators that are kept, the longest ones
# A cast is one kind of copy: every `_to_copy` calls `copy_`.
COPIES, CASTS = "aten::copy_", "aten::_to_copy"


class ProfiledTurn(Turn):
    """A turn whose report says by operator where the time went."""

    def wait(self) -> None:
        """Block until it is this side's turn, then start the profiler and the clock."""
        super().wait()
        on_gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU, *on_gpu])
        self.profiler.start()
        self.started = time.perf_counter()

    def report(self, **found: Any) -> None:
        """Stop the profiler and send what it saw."""
        self.synchronize()
        step_seconds = time.perf_counter() - self.started
        self.profiler.stop()
        super().report(**found, step_seconds=round(step_seconds, 4),
                       **by_operator(self.profiler.key_averages(), self.device.type == "cuda"))


def by_operator(events: EventList, on_gpu: bool = False) -> dict[str, Any]:
    """Seconds, calls and share of the operators with the most self time; calls and seconds of copies and of casts."""
    def seconds(event: FunctionEventAvg) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6

    total = sum(map(seconds, events))
    longest = sorted(events, key=seconds, reverse=True)[:TOP]
    operators = [{"name": event.key, "calls": event.count, "seconds": round(seconds(event), 4),
                  "share": round(seconds(event) / total, 4)} for event in longest]

    def calls(name: str, whole: str) -> dict[str, Any]:
        found = [event for event in events if event.key == name]
        return {"calls": sum(event.count for event in found),
                "seconds": round(sum(getattr(event, whole) for event in found) / 1e6, 4)}

    whole = "device_time_total" if on_gpu else "cpu_time_total"
    return {"self_seconds": round(total, 4), "operators": operators, "copies": calls(COPIES, whole),
            "casts": calls(CASTS, whole)}
