"""minipeft: parameter-efficient fine-tuning of GPT-2, written to be read.

The names in public.py are imported when the first of them is asked for: a command says `--help` long before torch is
there. Editors and type checkers read them at once.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from minipeft.public import *  # noqa: F403


def __getattr__(name: str) -> object:
    """What Python calls for a name that is not here yet: all of them are imported, and the packages they are in."""
    if name == "__all__" or not name.startswith("_"):
        names = {each: value for each, value in vars(_import_module("minipeft.public")).items() if each[0] != "_"}
        globals().update(names, __all__=list(names))
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module 'minipeft' has no attribute {name!r}")


def __dir__() -> list[str]:
    __getattr__("__all__")
    return sorted(globals())
