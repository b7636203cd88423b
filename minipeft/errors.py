"""The errors a user can cause.

Every one of them is a `MinipeftError` whose message is one line: what is wrong, where, and what to do. Scripts print
that line and exit with status 2; library users catch the class.
"""

from __future__ import annotations

from collections.abc import Sequence


class MinipeftError(Exception):
    """Base class of every error caused by input: a file, an option, a configuration, the environment."""


class ConfigError(MinipeftError):
    """A configuration value is of the wrong type, out of range, or not supported."""


class WeightsError(MinipeftError):
    """A base model's folder or file is missing, damaged, or does not hold the expected tensors."""


class AdapterError(MinipeftError):
    """An adapter folder is missing, damaged, or belongs to another method or another base model."""


class InjectionError(MinipeftError):
    """A method cannot be injected into this model: nothing matched, wrong layer type, or already injected."""


class DataError(MinipeftError):
    """A dataset, split or column is missing, empty or unusable."""


class HardwareError(MinipeftError):
    """The device or precision asked for is not available on this machine."""


class TrainingError(MinipeftError):
    """Training came to nothing that could be used."""


class OutputError(MinipeftError):
    """An output folder or file cannot be written."""


class InUseError(OutputError):
    """Another process is writing into the folder."""


class NothingToWriteError(OutputError):
    """A page has no place that is to be written anew."""


def first_few(items: Sequence[str], most: int = 6) -> str:
    """Items for a message's one line, and how many there are beyond the first: "a; b; and 12 more"."""
    return "; ".join([*items[:most], *([f"and {len(items) - most:,} more"] if len(items) > most else [])])
