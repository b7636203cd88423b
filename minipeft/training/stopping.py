"""Being asked to stop: by Ctrl-C, by a closed terminal, by a cluster that wants its machine back.

The three signals SIGINT, SIGHUP and SIGTERM mean the same here: save, and end with exit code 128 + the signal's number.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGTERM") if hasattr(signal, name))
Handler = Callable[[int, "FrameType | None"], None]


class Stopped(KeyboardInterrupt):
    """A signal ended the run.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Within the block the three signals call `handler`. Outside of the main thread, where none arrives, nothing."""
    earlier = {}
    with suppress(ValueError):
        earlier = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


class StopAtOnce:
    """A handler that raises wherever the program is, and remembers it: code in C may swallow the exception.

    Attributes:
        came: the number of the signal that came, or 0.
    """

    came = 0

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        """
        Raises:
            Stopped: always.
        """
        self.came = number
        raise Stopped(number)


@contextmanager
def stop_between_steps() -> Iterator[Callable[[], int]]:
    """Within the block the first signal only raises a flag, so that a step is never cut in half; a second one acts.

    But not a second SIGTERM: whoever sends it may repeat it, in case the first one got lost, and ends with SIGKILL.

    Yields:
        A function that gives the number of the signal that came, or 0: also of one that came before the block, whose
        exception `StopAtOnce` raised in vain.
    """
    came = getattr(signal.getsignal(signal.SIGTERM), "came", 0)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came and number != signal.SIGTERM:
            raise Stopped(number)
        came = number

    with handling(handle):
        yield lambda: came
