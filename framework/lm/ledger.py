"""The ledger: every language-model answer of a run, in one append-only SQLite file.

It is meter, cache and resume in one. An answer is written before anyone sees it, all answers of
one executed batch in one transaction, so a run killed anywhere replays what was paid for.
Values are JSON; nothing in the file is ever executed. Keys and connection settings never enter it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from operator import length_hint
from pathlib import Path
from typing import Any, Final

from dspy._vendor.lm15.serde import request_to_dict, response_from_dict, response_to_dict  # the only door to JSON
from dspy.lm15 import Request, Response

from preceptor.errors import RunError

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, request TEXT NOT NULL, sample INTEGER NOT NULL,
    response TEXT NOT NULL, tokens INTEGER NOT NULL, dollars REAL NOT NULL, seconds REAL NOT NULL,
    written TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
) STRICT;
CREATE TABLE IF NOT EXISTS failures (
    key TEXT NOT NULL, model TEXT NOT NULL, error TEXT NOT NULL, tokens INTEGER NOT NULL, dollars REAL NOT NULL,
    written TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
) STRICT;
CREATE TABLE IF NOT EXISTS given_up (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, error TEXT NOT NULL,
    written TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
) STRICT;
"""
_INSERT: Final = (
    "INSERT OR IGNORE INTO answers (key, model, request, sample, response, tokens, dollars, seconds)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_INSERT_FAILURE: Final = "INSERT INTO failures (key, model, error, tokens, dollars) VALUES (?, ?, ?, ?, ?)"
_INSERT_GIVEN_UP: Final = "INSERT OR IGNORE INTO given_up (key, kind, error) VALUES (?, ?, ?)"
_CHECKPOINT_PAGES: Final = 10_000
"""Pages of 4 kB written between checkpoints: one that waits for the disk keeps every caller waiting."""

_BUSY_SECONDS: Final = 30
"""How long to wait for another process that writes to the same file."""


_DRAW: ContextVar[int] = ContextVar("draw", default=0)
_ROLLOUT: ContextVar[int] = ContextVar("rollout", default=0)
_NEXT: ContextVar[Iterator[int] | None] = ContextVar("next", default=None)
_PART: ContextVar[int] = ContextVar("part", default=0)
_ROLLOUT_NUMBERS: Final = 2**40
"""Rollouts are told apart by their remainder, for a draw's number has 64 bits in the file."""

_ROLLOUTS: Final = 1_000_000
"""Between the draws of one rollout and those of the next."""

_PARTS: Final = 1_000
"""Between the draws of one answer and those of the next, of several asked for at once."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One recorded answer with what it took.

    Attributes:
        response: As the engine gave it.
        tokens: Input and output tokens together.
        dollars: By the model's price.
        seconds: From dispatch to answer; rows of one batch share its time equally.
    """

    response: Response
    tokens: int
    dollars: float
    seconds: float


@dataclass(frozen=True)
class Call:
    """One question to one model: the unit the ledger counts.

    Attributes:
        request: Everything the model is asked, the model's name included.
        sample: Number of this draw among equal requests, from 0.
    """

    request: Request
    sample: int = 0

    @cached_property
    def key(self) -> str:
        """SHA-256 over the request and the number of the draw."""
        return hashlib.sha256(f"{self.text}\n{self.sample}".encode()).hexdigest()

    @cached_property
    def text(self) -> str:
        """The request as canonical JSON."""
        return _json(request_to_dict(self.request))


@contextmanager
def drawing(number: int) -> Generator[None]:
    """Let what a program asks here be draw `number` of each request: answered anew, and billed, unless recorded."""
    token = _DRAW.set(number)
    try:
        yield
    finally:
        _DRAW.reset(token)


@contextmanager
def rollout(number: int | None) -> Generator[None]:
    """Let what is asked here be draws of a rollout's own, of the same `number` in every run; None or 0 is none."""
    token = _ROLLOUT.set(_ROLLOUT.get() if number is None else number % _ROLLOUT_NUMBERS)
    try:
        yield
    finally:
        _ROLLOUT.reset(token)


@contextmanager
def several(count: int) -> Generator[None]:
    """Let each call made here, one after the other, be another of so many answers that one request asks for."""
    token = _NEXT.set(iter(range(count)))
    try:
        yield
    finally:
        _NEXT.reset(token)


@contextmanager
def one_of_several() -> Generator[None]:
    """Make one call; the next of several where there are any."""
    parts = _NEXT.get()
    if parts is None:
        yield
        return
    tokens = _NEXT.set(None), _PART.set(next(parts))
    try:
        yield
    finally:
        _NEXT.reset(tokens[0])
        _PART.reset(tokens[1])


def to_come() -> int:
    """Return how many answers the request that is made here still asks for, the next one included."""
    parts = _NEXT.get()
    return 1 if parts is None else length_hint(parts)


def drawn() -> int:
    """Return the number of the draw that calls made here are, 0 unless something above says otherwise."""
    return _DRAW.get() + _PARTS * _PART.get() + _ROLLOUTS * _ROLLOUT.get()


@dataclass(slots=True, eq=False)
class _Batch:
    """Rows on their way into the file; all of them or none."""

    rows: list[tuple[Any, ...]]
    is_written: bool = False
    error: BaseException | None = None


class Ledger:
    """An open ledger file; safe to share between threads, and with other processes.

    Answers of threads that write at the same moment go into one transaction. A transaction survives the
    death of the process at once, and of the machine as soon as the system has written it to disk.

    Args:
        path: The file, made if absent.
        is_alone: No other process writes to it meanwhile, so that its keys can be kept in memory (some 100 bytes
            each): asking the file for an answer that isn't there costs as much as writing one.

    Raises:
        RunError: If the file can't be opened or written.
    """

    def __init__(self, path: Path, *, is_alone: bool = False) -> None:
        self.path = path
        self._keys: set[str] | None = None
        self._lock = threading.Lock()
        self._waiting: deque[_Batch] = deque()
        try:
            self._db = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False, isolation_level=None)
            self._set_up()
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
            rows = self._db.execute("SELECT key, kind, error FROM given_up")
            self._given_up: dict[str, tuple[str, str]] = {key: (kind, error) for key, kind, error in rows}
            self._given_up_since = set[str]()
            if is_alone:
                self._keys = {key for (key,) in self._db.execute("SELECT key FROM answers")}
        except sqlite3.Error as error:
            raise RunError(f"Can't open the ledger {path}: {error}.") from error

    def _set_up(self) -> None:
        """Make the tables; SQLite doesn't wait by itself where two processes switch a new file's mode at once."""
        end = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.executescript(_SCHEMA)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
                time.sleep(0.01)
            else:
                return

    def find(self, key: str) -> Answer | None:
        """Return the answer recorded under `key`, if any.

        Raises:
            RunError: If the file can't be read.
        """
        if self._keys is not None and key not in self._keys:
            return None
        try:
            with self._lock:
                row = self._db.execute(
                    "SELECT response, tokens, dollars, seconds FROM answers WHERE key = ?", (key,)
                ).fetchone()
        except sqlite3.Error as error:
            raise RunError(f"Can't read the ledger {self.path}: {error}.") from error
        try:
            return Answer(response_from_dict(json.loads(row[0])), *row[1:]) if row else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"Can't read the ledger {self.path}: an answer in it is damaged ({error}).") from error

    def write(self, answers: Sequence[tuple[Call, Answer]]) -> None:
        """Record answers, all or none; they are in the file when this returns.

        Raises:
            RunError: If the disk is full or the file can't be written.
        """
        batch = _Batch([_row(call, answer) for call, answer in answers])
        self._waiting.append(batch)
        with self._lock:
            if not batch.is_written:  # else another thread has taken it along
                self._write_waiting()
        if batch.error is not None:
            raise RunError(
                f"Can't write {len(batch.rows)} answers to {self.path}: {batch.error}. "
                "Free some space, then resume the run."
            ) from batch.error

    def _write_waiting(self) -> None:
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        try:
            self._insert([row for batch in waiting for row in batch.rows])
        except BaseException as error:
            for batch in waiting:
                batch.error = error
            if not isinstance(error, sqlite3.Error):
                raise
        else:
            if self._keys is not None:
                self._keys.update(row[0] for batch in waiting for row in batch.rows)
        finally:
            for batch in waiting:
                batch.is_written = True

    def _insert(self, rows: list[tuple[Any, ...]], into: str = _INSERT) -> None:
        if len(rows) == 1:  # a transaction of its own
            self._db.execute(into, rows[0])
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(into, rows)
            self._db.execute("COMMIT")
        except BaseException:
            self._db.rollback()
            raise

    def write_failure(self, call: Call, error: str, tokens: int, dollars: float) -> None:
        """Record an attempt that failed, with the most it may have cost.

        Raises:
            RunError: If the disk is full or the file can't be written.
        """
        row = (call.key, call.request.model, _storable(error), tokens, dollars)
        with self._writing():
            self._db.execute(_INSERT_FAILURE, row)

    def given_up(self, key: str) -> tuple[str, str] | None:
        """Return the kind and the text of the error that a call is known to end in, if any."""
        return self._given_up.get(key)

    def give_up(self, errors: Mapping[str, tuple[str, str]]) -> None:
        """Record, by their keys, calls that are to fail from now on without being made; all or none.

        Raises:
            RunError: If the disk is full or the file can't be written.
        """
        rows = [(key, kind, _storable(error)) for key, (kind, error) in errors.items()]
        with self._writing():
            self._insert(rows, _INSERT_GIVEN_UP)
        self._given_up.update(errors)
        self._given_up_since.update(errors)

    def take_back(self) -> None:
        """Forget the calls given up since this was opened: what went down has taken the first of them along.

        Raises:
            RunError: If the disk is full or the file can't be written.
        """
        with self._writing():
            while self._given_up_since:
                key = self._given_up_since.pop()
                self._db.execute("DELETE FROM given_up WHERE key = ?", (key,))
                del self._given_up[key]

    @contextmanager
    def _writing(self) -> Generator[None]:
        """Write, no other thread with it; raise what SQLite raises as what the user can do something about."""
        try:
            with self._lock:
                yield
        except sqlite3.Error as problem:
            raise RunError(f"Can't write to {self.path}: {problem}. Free some space, then resume the run.") from problem

    @property
    def failures(self) -> tuple[int, int, float]:
        """Failed attempts, and the tokens and dollars they may have cost."""
        return self._totals("SELECT COUNT(*), TOTAL(tokens), TOTAL(dollars) FROM failures")

    @property
    def paid(self) -> tuple[int, int, float]:
        """Answers, and the tokens and dollars they took."""
        return self._totals("SELECT COUNT(*), TOTAL(tokens), TOTAL(dollars) FROM answers")

    def _totals(self, query: str) -> tuple[int, int, float]:
        with self._lock:
            number, tokens, dollars = self._db.execute(query).fetchone()
        return int(number), int(tokens), float(dollars)

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        """Close the file; the ledger can't be used afterwards."""
        with self._lock:
            self._db.close()


def _row(call: Call, answer: Answer) -> tuple[Any, ...]:
    response, request = _json(response_to_dict(answer.response)), call.request
    return (call.key, request.model, call.text, call.sample, response, answer.tokens, answer.dollars, answer.seconds)


def _json(value: Any) -> str:
    """Return canonical JSON."""
    return _storable(json.dumps(value, sort_keys=True, ensure_ascii=False))


def _storable(text: str) -> str:
    """Return a text that SQLite takes: half a character, as a cut-off answer may end in, is JSON's escape for it."""
    return text.encode("utf-8", "backslashreplace").decode()
