"""One model for several processes: texts that they ask for at the same time are decoded together.

Decoding reads all of a model's weights for each token, once for all texts that are decoded together. So whoever has
the model waits until all others have asked. Choices are answered first; texts wait until nobody asks for choices. What
is answered together depends on what is asked alone, not on when.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import dspy
from dspy.lm15 import Request

from preceptor.lm import elsewhere
from preceptor.lm.elsewhere import Elsewhere, Result
from preceptor.lm.meter import batching_engine
from preceptor.lm.soft import EmbeddingSpace


class Asker(Elsewhere):
    """The engine of a process that asks. Its process ends at once when the one that answers is gone.

    Args:
        connection: To the process that answers.
        facts: What the model says of itself.
    """

    def __init__(self, connection: Connection, facts: Mapping[str, Any]) -> None:
        super().__init__(facts)
        self._connection = connection
        self._lock = threading.Lock()

    def batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Result]]]:
        """Yield all (index, answer or error) pairs, once every other process has asked, too."""
        yield list(enumerate(self._asked("batches", list(requests))))

    def count_tokens(self, request: Request) -> int:
        """Return the length of a request's prompt in tokens."""
        return cast("int", self._asked("count_tokens", request))

    @cached_property
    def embedding_space(self) -> EmbeddingSpace | None:
        """What soft tokens for the model have to look like; None if it takes none."""
        return cast("EmbeddingSpace | None", self._asked("embedding_space"))

    def _asked(self, *question: Any) -> Any:
        with self._lock:
            try:
                self._connection.send(question)
                return self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)  # whatever is to be kept is in a ledger, and nobody is left to be told


class Answerer:
    """Answers processes that ask through an `Asker` each, until they are through.

    Args:
        lm: The model, in this process.
    """

    def __init__(self, lm: dspy.LM) -> None:
        self._lm = lm
        self._live: list[Connection] = []
        self._waiting: dict[Connection, list[Request]] = {}

    def join(self, connection: Connection) -> None:
        """Have another process to wait for; what it asks stands behind what those before it ask."""
        self._live.append(connection)

    def until_one_is_through(self) -> tuple[Connection, Any]:
        """Answer, until one says its last word, ("through", anything); return that, None if it is gone without."""
        while True:
            busy = [each for each in self._live if each not in self._waiting]
            for ready in wait(busy) if busy else []:
                asker = cast("Connection", ready)
                what, *told = self._heard(asker)
                if what == "through":
                    self._live.remove(asker)
                    return asker, told[0]
            if len(self._waiting) == len(self._live):
                self._answer()

    def _heard(self, asker: Connection) -> tuple[Any, ...]:
        """Read one message; answer at once what can be, and let requests wait."""
        try:
            message = cast("tuple[Any, ...]", asker.recv())
        except (EOFError, OSError):
            return "through", None
        match message:
            case "batches", requests:
                self._waiting[asker] = cast("list[Request]", requests)
            case "count_tokens", request:
                _send(asker, elsewhere.count_tokens(self._lm, cast("Request", request)))
            case ("embedding_space",):
                _send(asker, elsewhere.embedding_space(self._lm))
            case _:
                pass
        return message

    def _answer(self) -> None:
        """Answer all that wait for choices, or else all."""
        chosen = [asker for asker in self._live if all(map(_is_choice, self._waiting[asker]))] or list(self._live)
        asked = {asker: self._waiting.pop(asker) for asker in chosen}
        together = [request for requests in asked.values() for request in requests]
        engine = cast("Any", batching_engine(self._lm))
        answers = dict(pair for batch in engine.batches(together) for pair in batch)
        in_order = iter([answers[place] for place in range(len(together))])
        for asker, requests in asked.items():
            _send(asker, [next(in_order) for _ in requests])


def _is_choice(request: Request) -> bool:
    return bool((request.config.extensions or {}).get("choices"))


def _send(asker: Connection, answer: Any) -> None:
    with suppress(OSError):  # who is gone is noticed when it is listened to
        asker.send(answer)
