"""Noticing a program that asks a model past its meter, as `with dspy.context(lm=...)` in a `forward` does."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import dspy
from dspy.utils.callback import BaseCallback

from preceptor.errors import ConfigError
from preceptor.lm.meter import MeteredEngine

_COUNTED: Final[ContextVar[str]] = ContextVar("preceptor_counted_call", default="")
"""The metered call that is under way here, "" if none is: the model behind it is asked by the meter."""


class _Bypassing(BaseCallback):
    """Hears of calls, and keeps the names of models that were asked past the meter."""

    def __init__(self) -> None:
        self.models: list[str] = []

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        del inputs
        if is_metered(instance):
            _COUNTED.set(call_id)
        elif not _COUNTED.get():
            self.models.append(str(instance.model))

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        del outputs, exception
        if _COUNTED.get() == call_id:
            _COUNTED.set("")


def is_metered(lm: Any) -> bool:
    """Return True if a model's calls are counted and recorded."""
    return isinstance(getattr(lm, "engine", None), MeteredEngine)


@contextmanager
def refusing_bypasses() -> Generator[None]:
    """Listen to what is asked inside, which costs some time a call.

    Threads that a program begins without DSPy's settings aren't heard.

    Raises:
        ConfigError: At the end, if a model was asked past the meter.
    """
    heard = _Bypassing()
    with dspy.context(callbacks=[*(dspy.settings.callbacks or ()), heard]):
        yield
    if heard.models:
        raise ConfigError(
            f"The program asks {heard.models[0]} by itself: no budget bounds such calls, none is kept. Let "
            "predictors take the model they are given, or set one of their own before compiling: predictor.lm = lm."
        )
