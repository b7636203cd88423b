"""Stand-ins for torch and other packages, so that `--help` is there in a third of a second instead of three.

A command's options are made from configuration classes, which stand in the methods' files, beside layers that torch
makes. To print them nothing is computed: so these files are imported with empty things in the place of what is not
Python's own, as Sphinx does it to read docstrings. The process prints its help, and ends.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class StandIn(ModuleType):
    """In the place of a module, and of all that is taken from it: classes to inherit from, decorators, values."""

    __path__: list[str] = []  # it has submodules

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """As a decorator it gives the function back."""
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else self

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[()]:
        return ()

    def __or__(self, other: Any) -> StandIn:  # of two types
        return self

    __ror__ = __getitem__ = __or__


class Finder(MetaPathFinder, Loader):
    """Finds a stand-in for every package but this one and Python's own."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        own = {*sys.stdlib_module_names, "minipeft"}
        return None if name.partition(".")[0] in own else ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


def use() -> None:
    """From now on imports give stand-ins. Where torch is there already it stays, and nothing is gained by any."""
    if "torch" not in sys.modules:
        sys.meta_path.insert(0, Finder())
