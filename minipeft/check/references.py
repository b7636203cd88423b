"""Stored reference outputs: small cases that peft, transformers or this library has computed.

tests/exercises/references.py makes the file; it says there which of them computed a case, and in which version.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("references.json")


def reference_case(name: str) -> dict[str, Any]:
    """One case by its name in the file; lists of numbers as float tensors, all else (names, whole numbers) as it is."""
    case = json.loads(FILE.read_text(encoding="utf-8"))["cases"][name]
    return {key: torch.tensor(value, dtype=torch.float32) if isinstance(value, list) and key != "names" else value
            for key, value in case.items()}
