"""Sides that take turns, A B A B: what else the machine does meets all of them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from minipeft.errors import ConfigError

SIDES = Path(__file__).resolve().parent / "sides.py"


class Side:
    """A process that measures one thing, a turn at a time."""

    def __init__(self, **job: Any) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.name = job["side"]
        self.process = subprocess.Popen([sys.executable, str(SIDES), json.dumps(job)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                                        stderr=subprocess.PIPE)

    def turn(self) -> dict[str, Any]:
        """Let it have a turn, and return what it measured."""
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ConfigError(f"{self.name} failed: {self.process.stderr.read().strip().splitlines()[-1:]}")
        return json.loads(line)

    def end(self) -> None:
        """There are no more turns."""
        self.process.stdin.close()
        self.process.wait()


def take_turns(sides: dict[str, Side], rounds: int, last: bool = False) -> dict[str, dict[str, Any]]:
    """All turns of all sides, in alternation; the first of each is not counted.

    Args:
        last: the sides have one more turn, which reports what the run as a whole came to.
    """
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            turns[name].append(side.turn())
    found = {}
    for name, side in sides.items():
        counted = turns[name][1:]
        medians = {key: statistics.median(turn[key] for turn in counted)
                   for key, value in counted[-1].items() if isinstance(value, float)}
        seconds = [turn["seconds"] for turn in counted]
        found[name] = {**counted[-1], **medians, "seconds": round(medians["seconds"], 4),
                       "seconds_low": round(min(seconds), 4), "seconds_high": round(max(seconds), 4),
                       "turns": len(counted)}
        if last:
            found[name] |= {key: value for key, value in side.turn().items() if key != "seconds"}
        side.end()
    return found
