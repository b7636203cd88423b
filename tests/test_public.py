"""What `import minipeft` offers: the same to Python, which imports it late, and to editors, which read public.py."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import minipeft

PACKAGE = Path(minipeft.__file__).parent
IMPORTS = [node for node in ast.parse((PACKAGE / "public.py").read_text(encoding="utf-8")).body
           if isinstance(node, ast.ImportFrom)]


def test_every_name_comes_from_its_home_under_its_own_name():
    """`name as name` is how a typed package says that a name is for its users (PEP 484)."""
    for node in IMPORTS:
        (name,) = node.names
        assert name.asname == name.name
        assert getattr(minipeft, name.name) is getattr(importlib.import_module(node.module), name.name)


def test_python_and_editors_find_the_same_names():
    assert sorted(minipeft.__all__) == sorted(name.name for node in IMPORTS for name in node.names)
    assert set(minipeft.__all__) <= set(dir(minipeft))
    (hints,) = (node for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
                if isinstance(node, ast.If))
    assert ast.unparse(hints) == "if _TYPE_CHECKING:\n    from minipeft.public import *"


def test_the_package_says_that_it_has_type_hints():
    assert (PACKAGE / "py.typed").is_file()
