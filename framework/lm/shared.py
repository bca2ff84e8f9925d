"""One model for several processes: texts that they ask for at the same time are decoded together.

Decoding reads all of a model's weights for each token, once for all texts that are decoded together. So whoever has
the model waits until all others have asked. Choices are answered first. While nobody asks for any, texts are decoded:
who has all of its own goes on, and what it asks for next joins those that are still on their way. What is answered
together depends on what is asked alone, not on when.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeAlias, cast

import dspy
from dspy.lm15 import Request

from preceptor.lm import elsewhere
from preceptor.lm.elsewhere import Elsewhere, Result
from preceptor.lm.meter import batching_engine
from preceptor.lm.soft import EmbeddingSpace

_Place: TypeAlias = tuple[Connection, int]
"""Who asks, and which of its requests."""


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


@dataclass(slots=True)
class _Begun:
    """What an asker waits for while its texts are decoded.

    Attributes:
        size: Requests it has made.
        answers: Those that there are, by their places.
    """

    size: int
    answers: dict[int, Result]

    @property
    def is_whole(self) -> bool:
        return len(self.answers) == self.size


class _Texts(Protocol):
    """Texts that are decoded together."""

    def add(self, requests: Mapping[_Place, Request]) -> None: ...

    def ended(self) -> dict[_Place, Result]: ...


class _Rounds:
    """Texts of an engine that none can join: those that are there are decoded to their ends.

    Args:
        engine: Takes many requests at once.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._added: dict[_Place, Request] = {}

    def add(self, requests: Mapping[_Place, Request]) -> None:
        """Have more requests answered, in the next round."""
        self._added.update(requests)

    def ended(self) -> dict[_Place, Result]:
        """Answer all that were added."""
        places, requests = list(self._added), list(self._added.values())
        self._added = {}
        return {places[at]: result for batch in self._engine.batches(requests) for at, result in batch}


class Answerer:
    """Answers processes that ask through an `Asker` each, until they are through.

    Args:
        lm: The model, in this process.
    """

    def __init__(self, lm: dspy.LM) -> None:
        self._lm = lm
        self._live: list[Connection] = []
        self._waiting: dict[Connection, list[Request]] = {}
        self._begun: dict[Connection, _Begun] = {}

    @cached_property
    def _engine(self) -> Any:
        return batching_engine(self._lm)

    @cached_property
    def _texts(self) -> _Texts:
        joining = getattr(self._engine, "joining", None)
        return (joining and joining()) or _Rounds(self._engine)

    def join(self, connection: Connection) -> None:
        """Have another process to wait for; what it asks stands behind what those before it ask."""
        self._live.append(connection)

    def until_one_is_through(self) -> tuple[Connection, Any]:
        """Answer, until one says its last word, ("through", anything); return that, None if it is gone without."""
        while True:
            busy = [each for each in self._live if each not in self._waiting and each not in self._begun]
            for ready in wait(busy) if busy else []:
                asker = cast("Connection", ready)
                what, *told = self._heard(asker)
                if what == "through":
                    self._live.remove(asker)
                    return asker, told[0]
            if self._live and len(self._waiting) + len(self._begun) == len(self._live):
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
        """Answer choices; if nobody has all of its answers by them, decode until somebody has."""
        for asker in [asker for asker in self._live if asker in self._waiting]:
            self._begin(asker, self._waiting.pop(asker))
        while not any(begun.is_whole for begun in self._begun.values()):
            for (asker, at), result in self._texts.ended().items():
                self._begun[asker].answers[at] = result
        for asker in [asker for asker in self._live if self._begun[asker].is_whole]:
            begun = self._begun.pop(asker)
            _send(asker, [begun.answers[at] for at in range(begun.size)])

    def _begin(self, asker: Connection, requests: Sequence[Request]) -> None:
        """Answer an asker's choices, and have its texts decoded with those that are on their way."""
        chosen = [at for at, request in enumerate(requests) if _is_choice(request)]
        answered = self._engine.batches([requests[at] for at in chosen]) if chosen else ()
        answers = {chosen[at]: result for batch in answered for at, result in batch}
        self._begun[asker] = _Begun(len(requests), answers)
        self._texts.add({(asker, at): request for at, request in enumerate(requests) if at not in chosen})


def _is_choice(request: Request) -> bool:
    return bool((request.config.extensions or {}).get("choices"))


def _send(asker: Connection, answer: Any) -> None:
    with suppress(OSError):  # who is gone is noticed when it is listened to
        asker.send(answer)
