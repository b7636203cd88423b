"""The tasks, one file each: texts to examples, a head, metrics. And which one a name, a file or a dataset means."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path

from minipeft.data.datasets import KNOWN, NAMED
from minipeft.errors import ConfigError, DataError
from minipeft.tasks.classification import Classification
from minipeft.tasks.generation import Summarization, Translation
from minipeft.tasks.tagging import Tagging
from minipeft.tasks.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Tagging, Summarization, Translation)}
OLD_NAMES = {"summarisation": "summarization"}  # in adapter folders and results files that are there already


def task_name(text: str) -> str:
    """A task's name as it is spelled today, from a command line, an adapter folder or a results file."""
    return OLD_NAMES.get(text, text)


def task_for(dataset: str, asked: str | None = None) -> type[Task]:
    """The task that a dataset is read for.

    Args:
        dataset: a name in KNOWN, "sample", or the path of a user's own file.
        asked: a name in TASKS or the path of a .py file that defines a task. A user's own file is by default for
            classification; a known dataset has its own task, and no other.

    Raises:
        ConfigError: an unknown task.
        DataError: a task that the dataset is not for.
    """
    default = TASKS[KNOWN[dataset].task if dataset in KNOWN else "classification"]
    task = default if asked is None else find_task(asked)
    if dataset in NAMED and task is not default:
        raise DataError(f"{dataset} is for {default.name}, not for {task.name}")
    return task


def find_task(name: str) -> type[Task]:
    """The task of that name or, where it is the path of a .py file, the one that the file defines.

    Raises:
        ConfigError: an unknown name, no such file, or a file that does not define one task.
    """
    if task_name(name) in TASKS:
        return TASKS[task_name(name)]
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
    _check_class(defined[0], path)
    return defined[0]


def _check_class(task: type[Task], path: Path) -> None:
    """Refuse a user's own task that lacks a class variable, or has the name of another task.

    Raises:
        ConfigError: saying which.
    """
    for base in task.__mro__:
        for field, kind in inspect.get_annotations(base).items():
            if str(kind).startswith("ClassVar") and not hasattr(task, field):
                raise ConfigError(f"{path}: {task.__name__} does not say its {field}")
    if task_name(task.name) in TASKS:
        raise ConfigError(f"{path}: {task.__name__} needs a name of its own, {task.name!r} is taken")
