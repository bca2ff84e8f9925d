"""Cohorts: every row that still runs is asked in the same batch, whatever the timing."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import dspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.lm.cohort import Cohort, current

Batches = list[list[str]]


def run(
    plans: list[list[str]], batches: Batches, *, pauses: list[float] | None = None, order: list[int] | None = None
) -> list[list[str]]:
    """Run one row per plan, a plan being the row's questions; record the batches, return the answers."""

    def ask_all(questions: list[str]) -> list[str | BaseException]:
        batches.append(questions)
        return [question.upper() for question in questions]

    cohort = Cohort[str, str](len(plans), ask_all)

    def row(number: int) -> list[str]:
        with cohort.seat(number):
            answers: list[str] = []
            for question in plans[number]:
                if pauses:
                    time.sleep(pauses[number])  # only to vary the timing
                answers.append(cohort.ask(number, question))
            return answers

    with ThreadPoolExecutor(len(plans)) as pool:
        futures = {number: pool.submit(row, number) for number in order or range(len(plans))}
        return [futures[number].result(timeout=300) for number in range(len(plans))]


def test_all_rows_are_asked_at_once_in_the_order_of_rows() -> None:
    batches: Batches = []
    answers = run([["a"], ["b"], ["c"]], batches, order=[2, 0, 1])
    assert batches == [["a", "b", "c"]]
    assert answers == [["A"], ["B"], ["C"]]


def test_rows_that_ask_nothing_do_not_keep_the_others_waiting() -> None:
    batches: Batches = []
    answers = run([[], ["b"], [], ["d"]], batches)
    assert batches == [["b", "d"]]
    assert answers == [[], ["B"], [], ["D"]]


def test_rows_with_two_questions_share_the_second_batch() -> None:
    batches: Batches = []
    answers = run([["a1", "a2"], ["b1"], ["c1", "c2"]], batches)
    assert batches == [["a1", "b1", "c1"], ["a2", "c2"]]
    assert answers == [["A1", "A2"], ["B1"], ["C1", "C2"]]


def test_a_row_that_breaks_leaves_and_the_others_go_on() -> None:
    batches: Batches = []

    def ask_all(questions: list[str]) -> list[str | BaseException]:
        batches.append(questions)
        return list(questions)

    cohort = Cohort[str, str](2, ask_all)

    def breaks() -> None:
        with cohort.seat(0):
            raise KeyError("row 0")

    def asks() -> str:
        with cohort.seat(1):
            return cohort.ask(1, "b")

    with ThreadPoolExecutor(2) as pool:
        answered, broken = pool.submit(asks), pool.submit(breaks)
        assert answered.result(timeout=300) == "b"
        with pytest.raises(KeyError, match="row 0"):
            broken.result(timeout=300)
    assert batches == [["b"]]


def in_threads(size: int, ask: Callable[[int], str]) -> list[str]:
    """Return each row's answer, or the text of its error."""

    def caught(row: int) -> str:
        try:
            return ask(row)
        except ValueError as error:
            return f"error: {error}"

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(caught, row) for row in range(size)]
        return [future.result(timeout=300) for future in futures]


def test_an_error_of_the_whole_batch_reaches_every_row() -> None:
    def ask_all(questions: list[str]) -> list[str | BaseException]:
        raise ValueError(f"{len(questions)} questions lost")

    cohort = Cohort[str, str](3, ask_all)

    def ask(row: int) -> str:
        with cohort.seat(row):
            return cohort.ask(row, "q")

    assert in_threads(3, ask) == ["error: 3 questions lost"] * 3


def test_an_error_of_one_question_reaches_its_row_only() -> None:
    def ask_all(questions: list[str]) -> list[str | BaseException]:
        return [ValueError(question) if question == "q1" else question for question in questions]

    cohort = Cohort[str, str](3, ask_all)

    def ask(row: int) -> str:
        with cohort.seat(row):
            return cohort.ask(row, f"q{row}")

    assert in_threads(3, ask) == ["q0", "error: q1", "q2"]


def test_only_one_batch_is_asked_at_a_time() -> None:
    running, most = count(), [0]
    inside = threading.Semaphore(1)

    def ask_all(questions: list[str]) -> list[str | BaseException]:
        assert inside.acquire(blocking=False), "two batches at once"
        most[0] = next(running)
        inside.release()
        return list(questions)

    cohort = Cohort[str, str](8, ask_all)

    def ask(row: int) -> str:
        with cohort.seat(row):
            return "".join(cohort.ask(row, f"{turn}") for turn in range(row + 1))

    assert in_threads(8, ask) == ["0", "01", "012", "0123", "01234", "012345", "0123456", "01234567"]
    assert most == [7]


def test_the_seat_tells_a_thread_its_cohort_and_row() -> None:
    cohort = Cohort[str, str](2, list)
    assert current() is None
    with cohort.seat(1):
        assert current() == (cohort, 1)
    assert current() is None


def expected(plans: list[list[str]]) -> Batches:
    """Return the batches that rows asking in step would make."""
    turns = range(max(map(len, plans)))
    return [[plan[turn] for plan in plans if turn < len(plan)] for turn in turns]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_timing_gives_the_same_batches(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=8))
    plans = [[f"{row}.{turn}" for turn in range(length)] for row, length in enumerate(lengths)]
    pauses = data.draw(st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.002]), min_size=len(plans), max_size=len(plans)))
    order = data.draw(st.permutations(range(len(plans))))
    batches: Batches = []

    answers = run(plans, batches, pauses=pauses, order=list(order))

    assert batches == expected(plans)
    assert answers == [[question.upper() for question in plan] for plan in plans]


def test_a_wrong_number_of_answers_is_an_error_not_a_hang() -> None:
    cohort: Cohort[str, str] = Cohort(1, lambda _: [])
    with cohort.seat(0), pytest.raises(RuntimeError, match=r"^1 questions got 0 answers$"):
        cohort.ask(0, "Sure?")


def test_an_error_that_many_rows_wait_for_is_raised_as_a_copy_in_each() -> None:
    error = dspy.LMServerError("down", model="simulated/model", status=503)
    error.__cause__ = OSError(110, "timed out")

    def ask_all(questions: list[str]) -> list[str | BaseException]:
        raise error

    cohort, raised = Cohort[str, str](8, ask_all), dict[int, BaseException]()

    def row(number: int) -> None:
        with cohort.seat(number):
            try:
                cohort.ask(number, "?")
            except dspy.LMServerError as met:
                raised[number] = met

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(row, range(8)))

    assert len({id(each) for each in [error, *raised.values()]}) == 9
    assert {(type(each), str(each)) for each in raised.values()} == {(dspy.LMServerError, str(error))}
    assert all(vars(each) == vars(error) and each.__cause__ is error.__cause__ for each in raised.values())
    frames = [len(list(traceback.walk_tb(each.__traceback__))) for each in raised.values()]
    assert set(frames) == {frames[0]}, "no row's traceback holds another's"
