"""Cohorts: rows that wait for each other, so that a batching engine sees them all at once.

An evaluation runs its rows in threads. A row that asks a batching engine waits until every row
still running has asked too, or has finished; one of them then asks for all. Batches are thereby as
large as they can be, and the same in every run, whatever the timing of the threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from preceptor.errors import again

Q = TypeVar("Q")
A = TypeVar("A")
_SEAT: ContextVar[tuple[Cohort[Any, Any], int] | None] = ContextVar("seat", default=None)


@dataclass(slots=True)
class _Ticket(Generic[Q, A]):
    """One question on its way, and its answer once there is one."""

    row: int
    order: int
    question: Q
    answer: A | BaseException | None = None
    answered: bool = False


class Abandoned(BaseException):
    """Raised in rows that wait for others that will never come."""


class Cohort(Generic[Q, A]):
    """Rows 0 to `size - 1`, all of them live from the start.

    Args:
        size: Number of rows.
        ask_all: Answers the questions of all waiting rows, in order of rows; an exception in its
            place is raised in that row's thread.
    """

    def __init__(self, size: int, ask_all: Callable[[list[Q]], Sequence[A | BaseException]]) -> None:
        self._live = set(range(size))
        self._ask_all = ask_all
        self._waiting: list[_Ticket[Q, A]] = []
        self._asking = False
        self._is_abandoned = False
        self._turn = threading.Condition()

    @contextmanager
    def seat(self, row: int) -> Generator[None]:
        """Run one row; on leaving it no longer keeps the others waiting."""
        token = _SEAT.set((self, row))
        try:
            yield
        finally:
            _SEAT.reset(token)
            with self._turn:
                self._live.discard(row)
                if self._is_ready():
                    self._turn.notify()

    def abandon(self) -> None:
        """End the wait of all rows, now and later: not all of them could be begun."""
        with self._turn:
            self._is_abandoned = True
            self._turn.notify_all()

    def ask(self, row: int, question: Q) -> A:
        """Wait for the others, then return the answer.

        Raises:
            Abandoned: If they will never come.
        """
        with self._turn:
            order = sum(ticket.row == row for ticket in self._waiting)
            ticket = _Ticket[Q, A](row, order, question)
            self._waiting.append(ticket)
            while not ticket.answered:
                if self._is_abandoned:
                    raise Abandoned
                if self._is_ready():
                    self._lead()
                else:
                    self._turn.wait()
        if isinstance(ticket.answer, BaseException):
            raise again(ticket.answer)
        return ticket.answer  # type: ignore[return-value]  # answered, and not an exception

    def _is_ready(self) -> bool:
        if self._asking or not self._waiting or len(self._waiting) < len(self._live):
            return False
        return {ticket.row for ticket in self._waiting} >= self._live

    def _lead(self) -> None:
        """Ask for everyone; the lock is let go meanwhile so that finished rows can leave."""
        tickets = sorted(self._waiting, key=lambda ticket: (ticket.row, ticket.order))
        self._waiting = []
        self._asking = True
        self._turn.release()
        answers: Sequence[A | BaseException]
        try:
            answers = self._ask_all([ticket.question for ticket in tickets])
            if len(answers) != len(tickets):
                raise RuntimeError(f"{len(tickets)} questions got {len(answers)} answers")
        except BaseException as error:  # noqa: BLE001  raised again in every waiting thread
            answers = [error] * len(tickets)
        finally:
            self._turn.acquire()
        for ticket, answer in zip(tickets, answers, strict=True):
            ticket.answer, ticket.answered = answer, True
        self._asking = False
        self._turn.notify_all()


def current() -> tuple[Cohort[Any, Any], int] | None:
    """Return the cohort and row this thread runs, if any."""
    return _SEAT.get()
