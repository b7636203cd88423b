"""What a learner's file cannot take away from the grader: its output, its end, and the settings of torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch


class Lent:
    """Standard output as the file sees it: what it closes stays open."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def close(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded() -> Iterator[None]:
    """Run what is inside, and put back what it has changed.

    A file that ends the process at once would end it with the exit code of a right answer: os._exit raises SystemExit.
    """
    stdout, end, gradients, dtype = sys.stdout, os._exit, torch.is_grad_enabled(), torch.get_default_dtype()
    sys.stdout, os._exit = Lent(stdout), _end
    try:
        yield
    finally:
        sys.stdout, os._exit = stdout, end
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)


def _end(code: int) -> NoReturn:
    raise SystemExit(code)
