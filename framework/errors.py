"""Every error this package raises on purpose.

PreceptorError
├── ConfigError          the caller passed something unusable; also a ValueError
│   ├── DataError        a row, a column or a file of data can't be used
│   ├── MetricError      a metric raised, or returned something that is no score
│   ├── Unaffordable     the budget can't pay for the least this compile needs
│   └── RunError         a run folder that can't be written, or belongs to other inputs
├── ModelError           a model can't be found, fetched, verified or loaded
├── InputTooLong         a prompt doesn't fit the model's context
├── ArtifactError        a saved program is incomplete, altered or from another version
├── BudgetExhausted      the next call would pass the budget; the run can be resumed
├── LMFailed             too many calls or rows failed to go on; the run can be resumed
└── ParseError           a model answered, but not in the agreed form; carries the answer
"""

from __future__ import annotations

from typing import TypeVar

E = TypeVar("E", bound=BaseException)


class PreceptorError(Exception):
    """Base class: catch this to catch everything preceptor raises itself."""


class ConfigError(PreceptorError, ValueError):
    """A parameter is outside what is defined."""


class DataError(ConfigError):
    """Rows that can't be used; the message names the file, the row or the field."""


class MetricError(ConfigError):
    """A metric raised, or returned something that is no score."""


class Unaffordable(ConfigError):
    """The budget is smaller than the least the compile needs; no call was made."""


class RunError(ConfigError):
    """A run folder that can't be written, or that belongs to other inputs."""


class ModelError(PreceptorError):
    """A model can't be found, fetched, verified or loaded."""


class InputTooLong(PreceptorError):
    """A prompt is longer than the model's context."""


class ArtifactError(PreceptorError):
    """A saved program is incomplete, altered or of an unknown version."""


class BudgetExhausted(PreceptorError):
    """The next call would pass the budget. Nothing was dispatched."""


class LMFailed(PreceptorError):
    """The language model, or the program itself, failed on too many rows to make an honest choice."""


class ParseError(PreceptorError):
    """A language model answered, but the answer lacks the agreed form.

    Attributes:
        answer: The model's full answer.
    """

    def __init__(self, message: str, *, answer: str) -> None:
        super().__init__(f"{message} Answer began: {answer[:80]!r}")
        self.answer = answer


def again(error: E) -> E:
    """Return a copy to raise elsewhere: an exception raised twice holds both tracebacks, and may be its own cause."""
    copied = type(error).__new__(type(error), *error.args)
    vars(copied).update(vars(error))
    copied.__cause__, copied.__suppress_context__ = error.__cause__, True
    return copied.with_traceback(error.__traceback__)
