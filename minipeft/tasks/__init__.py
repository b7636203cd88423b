"""The tasks, one file each: texts to examples, a head, a metric."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path

from minipeft.errors import ConfigError
from minipeft.tasks.classification import Classification
from minipeft.tasks.generation import Summarisation, Translation
from minipeft.tasks.tagging import Tagging
from minipeft.tasks.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Tagging, Summarisation, Translation)}


def find_task(name: str) -> type[Task]:
    """The task of that name or, where it is the path of a .py file, the one that the file defines.

    Raises:
        ConfigError: an unknown name, no such file, or a file that does not define one task.
    """
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    if path.suffix != ".py":
        raise ConfigError(f"unknown task {name!r}: use {', '.join(TASKS)}, or the path of a .py file that defines one")
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    module_name = f"minipeft_task_{path.stem}"
    specification = importlib.util.spec_from_file_location(module_name, path)
    module = sys.modules[module_name] = importlib.util.module_from_spec(specification)  # dataclasses look there
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # whatever a user's own code raises
        raise ConfigError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    defined = [found for found in vars(module).values() if inspect.isclass(found) and issubclass(found, Task)
               and found.__module__ == module_name and not inspect.isabstract(found)]
    if len(defined) != 1:
        raise ConfigError(f"{path} defines {len(defined)} complete tasks; it should define one, a subclass of "
                          "minipeft.tasks.task.Task with all of its methods")
    task = defined[0]
    for base in task.__mro__:
        for field, kind in inspect.get_annotations(base).items():
            if str(kind).startswith("ClassVar") and not hasattr(task, field):
                raise ConfigError(f"{path}: {task.__name__} does not say its {field}")
    if task.name in TASKS:
        raise ConfigError(f"{path}: {task.__name__} needs a name of its own, {task.name!r} is taken")
    return task
