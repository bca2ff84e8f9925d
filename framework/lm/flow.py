"""Rows through a function: in order, a bounded number under way, whatever the number of rows.

Where the model answers one request a call, rows run in threads. Where it answers many at once, waves of rows
sit in a cohort each (`cohort.py`); an engine that runs batches in several places has as many waves under way.
A wave is the same rows in every run, so batches are, too.
"""

from __future__ import annotations

import contextvars
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import islice
from typing import Any, Final, TypeVar

import dspy

from preceptor.lm.cohort import Cohort
from preceptor.lm.meter import ask_cohort, batching_engine, give_up

T = TypeVar("T")
R = TypeVar("R")

COHORT: Final = 64
"""Rows that wait for each other where the model answers many requests at once."""

_AHEAD: Final = 32
"""Rows per thread that are begun or done while an earlier one is still waited for."""


def let_through(lm: dspy.LM) -> int:
    """Return how many calls to a model a budget must have room for at once: waves, or one as long as two."""
    engine = batching_engine(lm)
    return 2 if engine is None else COHORT * int(getattr(engine, "places", 1))


def in_order(lm: dspy.LM, items: Iterable[T], does: Callable[[T], R], threads: int) -> Generator[R]:
    """Yield what `does` makes of each item, in order; memory doesn't grow with their number.

    Args:
        lm: Decides how: a model that is asked many requests at once has rows in cohorts.
        items: Read as they are needed.
        does: Called in threads, with the caller's context. What it raises ends the flow once the rows under way
            are done; those that wait for a provider are given up.
        threads: Items under way where the model answers one request a call; 1 means the caller's own thread.
    """
    if batching_engine(lm) is None:
        yield from _in_threads(items, does, threads, _AHEAD * threads, lambda: give_up(lm))
        return

    places = int(getattr(batching_engine(lm), "places", 1))
    with ThreadPoolExecutor(places * COHORT) as pool:  # a thread for every row under way

        def together(wave: list[T]) -> list[R]:
            return _in_cohort(pool, wave, does)

        with closing(_in_threads(_waves(items), together, places, 2 * places, lambda: None)) as waves:
            for done in waves:
                yield from done


def _in_threads(
    items: Iterable[T], does: Callable[[T], R], threads: int, most: int, on_error: Callable[[], None]
) -> Generator[R]:
    if threads == 1:
        yield from map(does, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from _windowed((submit(pool, does, item) for item in items), most)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            on_error()
            raise


def _windowed(futures: Iterator[Future[R]], most: int) -> Iterator[R]:
    """Yield results in order, with so many begun ahead of the one that is waited for."""
    flying = deque(islice(futures, most - 1))
    for future in futures:
        flying.append(future)
        yield flying.popleft().result()
    while flying:
        yield flying.popleft().result()


def _in_cohort(pool: ThreadPoolExecutor, wave: list[T], does: Callable[[T], R]) -> list[R]:
    """Return what `does` makes of a wave, or raise the first error once all are done."""
    cohort: Cohort[Any, Any] = Cohort(len(wave), ask_cohort)

    def seated(row: int, item: T) -> R:
        with cohort.seat(row):
            return does(item)

    try:
        futures = [submit(pool, seated, row, item) for row, item in enumerate(wave)]
        wait(futures)
    except BaseException:  # Ctrl-C: the rows begun would wait for the others for ever, or ask for more
        cohort.abandon()
        raise
    return [future.result() for future in futures]


def submit(pool: ThreadPoolExecutor, function: Callable[..., R], *args: Any) -> Future[R]:
    """Run a function in a thread of the pool, with the caller's `dspy.context`, which threads don't inherit."""
    return pool.submit(contextvars.copy_context().run, function, *args)


def _waves(items: Iterable[T]) -> Iterator[list[T]]:
    left = iter(items)
    while wave := list(islice(left, COHORT)):
        yield wave
