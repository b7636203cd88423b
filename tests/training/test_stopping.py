"""stopping.py: signals between steps, and those whose exception got lost."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from minipeft.training.stopping import StopAtOnce, Stopped, handling, stop_between_steps


def test_the_first_signal_raises_a_flag_and_a_second_ctrl_c_acts():
    with stop_between_steps() as signal_that_came:
        assert signal_that_came() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal_that_came() == signal.SIGTERM
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_whose_exception_somebody_swallowed_stops_the_next_block():
    """As a library in C does that calls back into Python, or an import that may fail."""
    with handling(StopAtOnce()):
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with stop_between_steps() as signal_that_came:
            assert signal_that_came() == signal.SIGTERM
    with handling(StopAtOnce()), stop_between_steps() as signal_that_came:
        assert signal_that_came() == 0
