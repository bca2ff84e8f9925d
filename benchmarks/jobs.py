"""Compiles at a time: one after the other, each in a process, or all on one model."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeAlias, TypeVar

import dspy
import torch

from preceptor.cli.view import say
from preceptor.errors import PreceptorError, RunError
from preceptor.lm import elsewhere
from preceptor.lm.elsewhere import asked_at
from preceptor.lm.meter import batching_engine
from preceptor.lm.shared import Answerer, Asker
from preceptor.task import Report


class Named(Protocol):
    """A run, which errors are told of by its name."""

    @property
    def name(self) -> str:
        """As it is told."""
        ...


R = TypeVar("R", bound=Named)
Result: TypeAlias = dict[str, Any]
Measure: TypeAlias = Callable[..., Result]
"""Makes a run; takes `report` and `lm` by name, and can be sent to another process."""


@contextmanager
def spread(
    measure: Measure, runs: Sequence[R], jobs: int, lm: dspy.LM, report: Report
) -> Generator[Iterator[tuple[R, Result]]]:
    """Give each run with its result as it comes.

    With one job, runs are made in this process. With several, each has a process: on a GPU with the model in it, as
    with a model that is asked elsewhere. Models in this process, on a processor, are shared: what the runs ask at
    the same time is answered together (`lm/shared.py`).

    Args:
        measure: Makes one.
        runs: What is to be made.
        jobs: How many at a time.
        lm: The model.
        report: Told of the progress.
    """
    if jobs == 1:
        yield ((one, measure(one, report=report)) for one in runs)
    elif is_shared(lm):
        yield _settled(_on_one_model(measure, runs, jobs, lm), report, len(runs))
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            yield _settled(_as_they_come({pool.submit(measure, one): one for one in runs}), report, len(runs))


def is_shared(lm: dspy.LM) -> bool:
    """Return True if runs made at the same time share a model."""
    return batching_engine(lm) is not None and not torch.cuda.is_available()


def _settled(ends: Iterator[tuple[R, Result | BaseException]], report: Report, runs: int) -> Iterator[tuple[R, Result]]:
    """Yield each run with its result; what one raises is raised when the others are through."""
    errors: list[BaseException] = []
    report("making runs", 0, runs)
    for done, (one, end) in enumerate(ends, 1):
        report("making runs", done, runs)
        if isinstance(end, BaseException):
            errors.append(end)
            say(f"{one.name}: {end}")
        else:
            yield one, end
    if errors:
        raise errors[0]


def _as_they_come(begun: Mapping[Future[Result], R]) -> Iterator[tuple[R, Result | BaseException]]:
    for done in as_completed(begun):
        error = done.exception()
        yield begun[done], done.result() if error is None else error


def _on_one_model(
    measure: Measure, runs: Sequence[R], jobs: int, lm: dspy.LM
) -> Iterator[tuple[R, Result | BaseException]]:
    """Make runs in processes that ask this one's model; the next is begun when one is through."""
    answerer, facts, left, made = Answerer(lm), elsewhere.facts(lm), list(runs), dict[Connection, R]()

    def begin() -> None:
        one, (here, there) = left.pop(0), get_context("spawn").Pipe()
        get_context("spawn").Process(target=_asking, args=(there, facts, measure, one), daemon=True).start()
        there.close()
        made[here] = one
        answerer.join(here)

    while left and len(made) < jobs:
        begin()
    while made:
        ended, end = answerer.until_one_is_through()
        one = made.pop(ended)
        if left:
            begin()
        yield (
            one,
            RunError("Its process ended, and told nothing. Resume with the same command.") if end is None else end,
        )


def _asking(connection: Connection, facts: Mapping[str, Any], measure: Measure, one: Named) -> None:
    """Make one run in this process, with the model of the one that began it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that answers; this one ends with it
    try:
        end: Result | PreceptorError = measure(one, lm=asked_at(Asker(connection, facts), facts))
    except PreceptorError as error:  # raised again in the process that began it
        end = error
    except Exception as error:  # noqa: BLE001  which not every one of can be sent to another process
        traceback.print_exc()
        end = RunError(f"{type(error).__name__}: {error}")
    connection.send(("through", end))
