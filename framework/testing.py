"""Stand-ins for language models, public so that new methods are tested the same way.

They are engines behind a real `dspy.LM`: adapters, metering, ledger and threads are the real ones.

    lm = scripted(["yes", "no"])                   # answers from a list, fails when asked once too often
    lm = simulated(lambda request: "yes")          # answers by a function
    lm = coin_flip(["yes", "no"])                  # no instruction can help
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from preceptor.lm.seam import InThread, text_of_parts


class Simulated:
    """An engine that answers by a function; safe to share between threads.

    Attributes:
        requests: What it was asked, in order.
    """

    def __init__(self, answer: Callable[[Request], str], name: str) -> None:
        self._answer = answer
        self._name = name
        self._lock = threading.Lock()
        self.requests: list[Request] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Simulated:
        return self

    def complete(self, request: Request) -> Response:
        """Answer one request; tokens are counted as words."""
        with self._lock:
            self.requests.append(request)
        text = self._answer(request)
        words = sum(len((message.text or "").split()) for message in request.messages) + len(system(request).split())
        return Response(
            id=None,
            model=self._name,
            message=Message.assistant([TextPart(text)]),
            finish_reason="stop",
            usage=Usage(input_tokens=words, output_tokens=len(text.split())),
        )


def simulated(answer: Callable[[Request], str], *, name: str = "model") -> dspy.LM:
    """Return a `dspy.LM` that answers by a function of the request.

    Example:
        >>> lm = simulated(lambda request: prompt(request).upper())
        >>> lm("hello")
        ['HELLO']
    """
    full = f"simulated/{name}"
    engine = Simulated(answer, full)
    settings: dict[str, Any] = {"cache": False, "num_retries": 0, "temperature": 0.0, "max_tokens": 64}
    return dspy.LM(full, engine=engine, async_engine=InThread(engine), **settings)


def scripted(answers: Sequence[str], *, name: str = "script") -> dspy.LM:
    """Return a `dspy.LM` that answers from a list, in order, and fails when asked once too often.

    Example:
        >>> lm = scripted(["yes"])
        >>> lm("Sure?"), len(asked(lm))
        (['yes'], 1)
    """
    left = iter(answers)

    def answer(request: Request) -> str:
        try:
            return next(left)
        except StopIteration:
            raise AssertionError(
                f"{len(answers)} answers scripted, asked once more: {prompt(request)[:80]!r}"
            ) from None

    return simulated(answer, name=name)


def coin_flip(labels: Sequence[str], *, seed: int = 0) -> dspy.LM:
    """Return a `dspy.LM` whose answers have nothing to do with the labels: no instruction can help.

    Each answer is drawn evenly by a hash of seed, instructions and input, so equal requests are
    answered equally. Asked to write an instruction (a request without system message), it writes one
    that no other request gets.
    """

    def answer(request: Request) -> str:
        asked_for = f"{seed}\n{system(request)}\n{prompt(request)}\n{request.config.seed}"
        digest = hashlib.sha256(asked_for.encode()).digest()
        if not system(request):
            draw = hashlib.sha256(digest + bytes([len(asked(lm)) % 256])).hexdigest()[:8]
            return f"Decide by rule {draw}."
        return labels[int.from_bytes(digest[:4], "big") % len(labels)]

    lm = simulated(answer, name=f"coin-{seed}")
    return lm


def asked(lm: dspy.LM) -> list[Request]:
    """Return the requests a simulated model was asked, in order."""
    engine = lm.engine
    assert isinstance(engine, Simulated), "asked() is for the models of preceptor.testing"
    return engine.requests


def prompt(request: Request) -> str:
    """Return a request's last message."""
    return request.messages[-1].text or ""


def system(request: Request) -> str:
    """Return a request's system message, "" if it has none."""
    return text_of_parts(request.system)
