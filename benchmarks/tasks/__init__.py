"""Published tasks, one a file; a file that defines `TASK` or `TASKS` is one more."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from preceptor.benchmarks.tasks.published import Hub, Parts, Published
from preceptor.errors import ConfigError

__all__ = ["Hub", "Parts", "Published", "find", "known"]


@cache
def known() -> dict[str, Published]:
    """Return every task by name."""
    return {task.name: task for task in _found()}


def find(name: str) -> Published:
    """Return the task of that name.

    Raises:
        ConfigError: If there is none.
    """
    tasks = known()
    if name not in tasks:
        raise ConfigError(f"No task {name!r}; there are {', '.join(sorted(tasks))}.")
    return tasks[name]


def _found() -> Iterator[Published]:
    for module in iter_modules(__path__):
        loaded = import_module(f"{__name__}.{module.name}")
        yield from getattr(loaded, "TASKS", [loaded.TASK] if hasattr(loaded, "TASK") else [])
