"""The process that `preceptor bench kill` kills: one compile, told what to do by one JSON argument.

It writes the time to stdout when its imports are done and its model is loaded, and ends with 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import dspy
from dspy.lm15 import Request, Response

from preceptor.benchmarks.peers import TOPICS
from preceptor.cli.compiling import _knobs, _method
from preceptor.lm.budget import Budget
from preceptor.lm.local import LocalEngine, LocalLM
from preceptor.lm.prices import price
from preceptor.lm.seam import InThread
from preceptor.modules import Classify
from preceptor.teleprompters import MixtureOfExperts
from preceptor.testing import graded, simulated, system

SIGNATURE: Final = "text -> label: Literal['spam', 'mail']"
INSTRUCTIONS: Final = "Sort the message."
ACCURACY: Final = {
    INSTRUCTIONS: 0.6,
    "Prizes are spam.": 0.95,
    "Say what it is.": 0.5,
    "Who wrote it?": 0.6,
    "Is it an offer?": 0.7,
    "Read it twice.": 0.65,
}
"""Instruction -> share of rows that `simulated` and `http` get right under it."""

CALLS: Final = 600
ROWS: Final = {"simulated": 160, "http": 160, "local": 80}


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a child process is to compile."""

    model: str
    method: str
    knobs: dict[str, str]
    threads: int
    latency: float
    folder: str = ""
    log: str = ""
    url: str = ""


def digest(request: Request) -> str:
    """Return 16 hexadecimal digits that differ where what a model is asked differs."""
    said = [[message.role, message.text] for message in request.messages]
    choices = (request.config.extensions or {}).get("choices")
    parts = json.dumps([system(request), said, request.config.seed, choices])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _texts(count: int) -> dict[str, str]:
    """Return so many messages with their labels."""
    return {
        f"{'Win a prize' if number % 2 else 'Lunch at noon'} {number}": "spam" if number % 2 else "mail"
        for number in range(count)
    }


def answerer() -> Callable[[Request], str]:
    """Return a function that answers like a model of known accuracy; equal requests are answered equally."""
    engine: Any = graded(_texts(ROWS["simulated"]), ACCURACY).engine
    return lambda request: str(engine.complete(request).message.text)


def main(order: Order) -> None:
    """Compile as ordered."""
    kind = _method(order.method)
    own = {"embedder": TOPICS} if kind is MixtureOfExperts else {}
    method = kind(
        metric="accuracy",
        lm=_lm(order),
        budget=Budget(calls=CALLS),
        run_dir=order.folder,
        threads=order.threads,
        **_knobs(kind, order.knobs),
        **own,
    )
    texts = _texts(ROWS[order.model])
    rows = [dspy.Example(text=text, label=label).with_inputs("text") for text, label in texts.items()]
    sys.stdout.write(f"{time.time()}\n")
    sys.stdout.flush()
    method.compile(Classify(SIGNATURE, INSTRUCTIONS), trainset=rows)


def _lm(order: Order) -> dspy.LM:
    if order.model == "http":
        settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 64, "cache": False}
        lm = dspy.LM("openai/kill", api_base=order.url, api_key="none", **settings)
        price(lm, 0, 0, {})  # imports litellm, which takes longer than many a compile
        return lm
    log = os.open(order.log, os.O_WRONLY | os.O_APPEND)

    def note(request: Request) -> None:
        os.write(log, f"{time.time()} {digest(request)}\n".encode())  # one write: whole or not at all

    if order.model == "local":
        local = LocalLM("smollm2-135m")
        engine = _Noted(cast("LocalEngine", local.engine), note)
        return local.copy(engine=engine, async_engine=InThread(engine))
    answer = answerer()

    def respond(request: Request) -> str:
        note(request)
        time.sleep(order.latency)
        return answer(request)

    return simulated(respond, name="kill")


class _Noted:
    """A local engine that writes down every answer it computed, before anyone sees it."""

    def __init__(self, engine: LocalEngine, note: Callable[[Request], None]) -> None:
        self._engine = engine
        self._note = note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __deepcopy__(self, memo: dict[int, object]) -> _Noted:
        return self

    def complete(self, request: Request) -> Response:
        """Answer one request."""
        response = self._engine.complete(request)
        self._note(request)
        return response

    def batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Response | Exception]]]:
        """Answer many requests."""
        for batch in self._engine.batches(requests):
            for index, _ in batch:
                self._note(requests[index])
            yield batch


if __name__ == "__main__":
    main(Order(**json.loads(sys.argv[1])))
