from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import dspy
import pytest

from preceptor.errors import LMFailed
from preceptor.lm import flow
from preceptor.lm.cohort import current
from preceptor.lm.flow import in_order, let_through
from preceptor.testing import simulated

LM = simulated(lambda request: "x")


@pytest.mark.parametrize("threads", [1, 4])
def test_results_come_in_order_whoever_is_done_first(threads: int) -> None:
    def slow(item: int) -> int:
        time.sleep(0.002 * (item % 3 == 0))
        return -item

    assert list(in_order(LM, range(50), slow, threads)) == [-item for item in range(50)]


def test_items_are_read_as_they_are_needed() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(10_000):
            read.append(item)
            yield item

    with closing(in_order(LM, items(), lambda item: item, 2)) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        assert len(read) <= 3 + 2 * 32


def test_an_error_ends_the_flow_and_nothing_more_is_begun() -> None:
    begun: list[int] = []
    first = threading.Event()

    def does(item: int) -> int:
        begun.append(item)
        if item == 5:
            first.set()
            raise LMFailed("no more")
        return item

    with pytest.raises(LMFailed, match="no more"):
        list(in_order(LM, range(10_000), does, 2))
    assert first.is_set()
    assert len(begun) <= 5 + 1 + 2 * 32


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_have_the_caller_s_context(threads: int) -> None:
    with dspy.context(lm=LM):
        seen = list(in_order(LM, range(4), lambda item: dspy.settings.lm is LM, threads))
    assert seen == [True] * 4


class Batching:
    """An engine that would answer many requests at once, in one place or in several."""

    supports_choices = False
    supported_params: frozenset[str] = frozenset()

    def __init__(self, places: int | None) -> None:
        if places:
            self.places = places

    def batches(self, requests: Any) -> Iterator[Any]:
        yield from ()

    def complete(self, request: Any) -> Any:
        raise AssertionError


@pytest.mark.parametrize(("places", "calls"), [(None, 64), (1, 64), (3, 192)])
def test_a_budget_must_have_room_for_a_wave_in_every_place(places: int | None, calls: int) -> None:
    assert let_through(dspy.LM("batching", engine=Batching(places), cache=False)) == calls
    assert let_through(LM) == 2


@pytest.mark.timeout(60)
def test_ctrl_c_while_rows_that_wait_for_each_other_are_begun_ends_them(
    monkeypatch: pytest.MonkeyPatch, smollm: dspy.LM
) -> None:
    begun: list[int] = []
    submit = flow.submit

    def interrupted(pool: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Future[Any]:
        if len(begun) == 3:
            raise KeyboardInterrupt
        begun.append(len(begun))
        return submit(pool, function, *args)

    def asks(item: int) -> str:
        seat = current()
        assert seat is not None
        return str(seat[0].ask(seat[1], item))

    monkeypatch.setattr(flow, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(in_order(smollm, range(8), asks, 1))
    assert begun == [0, 1, 2]


@pytest.mark.timeout(60)
def test_ctrl_c_while_a_batch_is_answered_begins_no_other(monkeypatch: pytest.MonkeyPatch, smollm: dspy.LM) -> None:
    asked: list[int] = []
    is_asked = threading.Event()

    def interrupted(futures: Any) -> None:
        assert is_asked.wait(30)
        raise KeyboardInterrupt

    def together(questions: Any) -> list[str]:
        asked.append(len(questions))
        is_asked.set()
        time.sleep(0.2)  # it is under way when the wait is interrupted
        return ["a"] * len(questions)

    def asks(item: int) -> None:
        seat = current()
        assert seat is not None
        for number in range(4):
            seat[0].ask(seat[1], number)

    monkeypatch.setattr(flow, "ask_cohort", together)
    monkeypatch.setattr(flow, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(in_order(smollm, range(8), asks, 1))
    assert asked == [8]
