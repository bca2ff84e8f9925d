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
from collections.abc import Sequence
from dataclasses import dataclass
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
"""


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


@dataclass(frozen=True, slots=True)
class Call:
    """One question to one model: the unit the ledger counts.

    Attributes:
        request: Everything the model is asked, the model's name included.
        sample: Number of this draw among equal requests, from 0.
    """

    request: Request
    sample: int = 0

    @property
    def key(self) -> str:
        """SHA-256 over the request and the number of the draw."""
        return hashlib.sha256(f"{self.text}\n{self.sample}".encode()).hexdigest()

    @property
    def text(self) -> str:
        """The request as canonical JSON."""
        return json.dumps(request_to_dict(self.request), sort_keys=True, ensure_ascii=False)


class Ledger:
    """An open ledger file; safe to share between threads.

    Args:
        path: The file, made if absent.

    Raises:
        RunError: If the file can't be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise RunError(f"Can't open the ledger {path}: {error}.") from error

    def find(self, key: str) -> Answer | None:
        """Return the answer recorded under `key`, if any."""
        with self._lock:
            row = self._db.execute(
                "SELECT response, tokens, dollars, seconds FROM answers WHERE key = ?", (key,)
            ).fetchone()
        return Answer(response_from_dict(json.loads(row[0])), *row[1:]) if row else None

    def write(self, answers: Sequence[tuple[Call, Answer]]) -> None:
        """Record answers, all or none.

        Raises:
            RunError: If the disk is full or the file can't be written.
        """
        rows = [_row(call, answer) for call, answer in answers]
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany(
                    "INSERT OR IGNORE INTO answers (key, model, request, sample, response, tokens, dollars, seconds)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    rows,
                )
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._db.rollback()  # under the lock: another thread's transaction is not ours to undo
                raise RunError(
                    f"Can't write {len(rows)} answers to {self.path}: {error}. Free some space, then resume the run."
                ) from error

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        """Close the file; the ledger can't be used afterwards."""
        with self._lock:
            self._db.close()


def _row(call: Call, answer: Answer) -> tuple[Any, ...]:
    response = json.dumps(response_to_dict(answer.response), ensure_ascii=False)
    request = call.request
    return (call.key, request.model, call.text, call.sample, response, answer.tokens, answer.dollars, answer.seconds)
