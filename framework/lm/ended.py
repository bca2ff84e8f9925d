"""What ends a run, in a call of a program that may catch whatever is raised and answer something else."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

import dspy

from preceptor.errors import BudgetExhausted, LMFailed, ModelError, RunError, again

ENDS: Final = (BudgetExhausted, LMFailed, ModelError, RunError)
"""What is no row's fault: whatever the program answered, it isn't its answer."""

_NOTED: Final = "preceptor_ended"


@contextmanager
def ending() -> Generator[None]:
    """Run a program; where one of its calls met an end, raise that, whatever the program made of it.

    The note is a setting of DSPy's, which its own threads inherit.
    """
    met: list[BaseException] = []
    with dspy.context(**{_NOTED: met}):
        try:
            yield
        except Exception:
            if not met:
                raise
    if met:
        raise again(met[0])


@contextmanager
def noting() -> Generator[None]:
    """Make a call; note the end it meets for the program that is run, if one is."""
    try:
        yield
    except ENDS as error:
        settings: Any = dspy.settings
        met: list[BaseException] | None = settings.get(_NOTED)
        if met is not None:
            met.append(error)
        raise
