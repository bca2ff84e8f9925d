"""How an optimizer that isn't ours asks: engines that remember and draw, rows in waves, adapters that forgive, silence.

DSPy's optimizers print; what they write is dropped, and nobody else's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from typing import Any, Final, TextIO, cast

import dspy
from dspy.evaluate import evaluate as evaluation
from dspy.lm15 import Request, Response
from dspy.utils.exceptions import AdapterParseError
from dspy.utils.parallelizer import ParallelExecutor

from preceptor.errors import LMFailed
from preceptor.lm.cohort import current
from preceptor.lm.dispatch import is_transient
from preceptor.lm.flow import in_order
from preceptor.lm.ledger import Call, drawn, one_of_several, to_come
from preceptor.lm.meter import MeteredEngine, batching_engine
from preceptor.lm.seam import InThread

Gate = Callable[[], AbstractContextManager[None]]
"""Lets one call through, or raises."""

PROPOSAL: Final = 1024
"""Tokens a proposal may have at least."""

_MARKER: Final = re.compile(r"\[\[ ## \w+ ## \]\]")
"""Of a field, in DSPy's chat format."""

_IS_SILENT: ContextVar[bool] = ContextVar("is_silent", default=False)
_WAVES: ContextVar[dspy.LM | None] = ContextVar("waves", default=None)


class Memory:
    """The answers of one search; equal questions of other threads wait for the first one's answer."""

    def __init__(self) -> None:
        self._answers: dict[str, Response] = {}
        self._locks: dict[str, threading.Lock] = {}

    def answer(self, call: Call, ask: Callable[[], Response]) -> Response:
        """Return the answer to a question, asking for it if there is none yet."""
        is_alone = current() is None  # rows of a cohort wait until all of them ask
        with self._locks.setdefault(call.key, threading.Lock()) if is_alone else nullcontext():
            if call.key not in self._answers:
                self._answers[call.key] = ask()
            return self._answers[call.key]


class Remembering(MeteredEngine):
    """A metered engine that is asked each question once: a repeated one costs nothing."""

    def __init__(self, metered: dspy.LM, memory: Memory, gate: Gate = nullcontext) -> None:
        engine = cast("MeteredEngine", metered.engine)
        super().__init__(engine.lm, engine.meter)
        self._memory = memory
        self._gate = gate

    def complete(self, request: Request) -> Response:
        """Answer one request."""
        with self._gate(), one_of_several():
            call = Call(self.seeded(request), drawn())
            return self._memory.answer(call, lambda: MeteredEngine.complete(self, request))


class Drawing(Remembering):
    """The same for a proposer: where it samples, a repeated question is a new draw, the same in every run.

    Attributes:
        failure: Of the last call that failed, if one did.
        answered: Requests answered.
    """

    def __init__(self, metered: dspy.LM, memory: Memory, gate: Gate, seed: str) -> None:
        super().__init__(metered, memory, gate)
        self.failure: dspy.LMError | None = None
        self.answered = 0
        self._seed = seed
        self._drawn = Counter[str]()
        self._ahead: dict[str, Response | Exception] = {}

    def complete(self, request: Request) -> Response:
        """Answer one request; where several answers are wanted of it, all are asked for with the first, together.

        Raises:
            LMFailed: If the proposer is down. DSPy would go on without the answer, a resumed run with it.
            dspy.LMError: If it can't answer this request.
        """
        wanted = to_come() if request.config.temperature else 1
        calls = [self._call(request, ahead) for ahead in range(wanted)]
        with self._gate(), one_of_several():
            response = self._memory.answer(calls[0], lambda: self._asked(calls))
        self._drawn[Call(request).text] += 1
        self.answered += 1
        return response

    def _call(self, request: Request, ahead: int) -> Call:
        text = Call(request).text
        sample = 0 if request.config.temperature == 0 else self._drawn[text] + ahead
        if "seed" in getattr(self.lm.engine, "supported_params", ()):
            digest = hashlib.sha256(f"{self._seed}\n{text}\n{sample}".encode()).digest()
            config = dataclasses.replace(request.config, seed=int.from_bytes(digest[:4], "big"))
            request = dataclasses.replace(request, config=config)
        return Call(request, sample)

    def _asked(self, calls: Sequence[Call]) -> Response:
        """Return the answer to the first of the calls; those to the others are kept until they are wanted."""
        keys = [call.key for call in calls]
        if keys[0] not in self._ahead:
            self._ahead |= zip(keys, self.meter.ask(self.lm, calls), strict=True)
        result = self._ahead.pop(keys[0])
        if isinstance(result, Response):
            return result
        if is_transient(result):
            raise LMFailed(f"The proposer {self.lm.model} failed: {result}") from result
        self.failure = result if isinstance(result, dspy.LMError) else dspy.LMError(str(result))
        raise self.failure


def answered_by(lm: dspy.LM, engine: MeteredEngine) -> dspy.LM:
    """Return a copy of `lm` with another engine."""
    return lm.copy(engine=engine, async_engine=InThread(engine))


def with_room(lm: dspy.LM) -> dspy.LM:
    """Return a copy of `lm` that may write `PROPOSAL` tokens if its bound, often that of a task's answers, is less."""
    bound = lm.kwargs.get("max_tokens")
    return lm.copy(max_tokens=max(bound, PROPOSAL)) if bound else lm


class _InWaves(ParallelExecutor):
    """DSPy's executor, but inside `in_waves` its rows are answered together, in the same waves in every run."""

    def _execute_sequential(self, function: Any, data: Any) -> Any:
        lm = _WAVES.get()
        if lm is None:
            return super()._execute_sequential(function, data)
        new = {id(item): item for item in data}  # GEPA draws a row twice where it runs out of them

        def answered(item: Any) -> Any:
            return function(item) if new.pop(id(item), None) is None else next(answers)

        with closing(in_order(lm, list(new.values()), function, 1)) as answers:
            return super()._execute_sequential(answered, data)


@contextmanager
def in_waves(lm: dspy.LM) -> Generator[None]:
    """Let what DSPy evaluates with one thread ask for many rows at once, if the model answers many at once.

    `dspy.Evaluate` makes its executor itself, so ours takes the place of that; it is DSPy's wherever this isn't on.
    """
    evaluation.ParallelExecutor = _InWaves
    token = _WAVES.set(lm if batching_engine(lm) is not None else None)
    try:
        yield
    finally:
        _WAVES.reset(token)


class Chat(dspy.ChatAdapter):
    """DSPy's adapter, but an answer without field markers is taken whole, for the first field.

    One with other fields' markers is asked for again, as JSON, as DSPy does.
    """

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        """Return the fields, "" for those that are missing."""
        try:
            fields: dict[str, Any] = super().parse(signature, completion)
            return fields
        except AdapterParseError as error:
            found = _found(signature, error)
            if not found and _MARKER.search(completion):
                raise
            return found or _whole(signature, completion)

    def _make_json_adapter_fallback(self) -> dspy.JSONAdapter:
        return _Last()


class Json(dspy.JSONAdapter):
    """DSPy's adapter, but an answer that is no JSON is read as `Chat` reads it."""

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        """Return the fields, "" for those that are missing."""
        try:
            fields: dict[str, Any] = super().parse(signature, completion)
            return fields
        except AdapterParseError as error:
            found = _found(signature, error)
            if not found and error.parsed_result is not None:
                raise  # an object of other fields
            return found or Chat().parse(signature, completion)


class _Last(Json):
    """The same; what can't be read even so is taken whole, without the markers."""

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        try:
            return super().parse(signature, completion)
        except AdapterParseError:
            return _whole(signature, _MARKER.sub("", completion))


def _whole(signature: Any, completion: str) -> dict[str, Any]:
    first, *others = signature.output_fields
    return {first: completion.strip(), **dict.fromkeys(others, "")}


def _found(signature: Any, error: AdapterParseError) -> dict[str, Any]:
    """Return what DSPy could read, the missing fields filled in; nothing if that was nothing."""
    found = cast("dict[str, Any]", error.parsed_result or {})
    return {**dict.fromkeys(signature.output_fields, ""), **found} if found else {}


class _Muted:
    """A stream that drops what is written in silence."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text) if _IS_SILENT.get() else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def muted() -> Generator[None]:
    """Drop what this thread writes to stdout and stderr; what others write passes."""
    out, err = cast("TextIO", _Muted(sys.stdout)), cast("TextIO", _Muted(sys.stderr))
    with redirect_stdout(out), redirect_stderr(err), _silence(is_on=True):
        yield


def heard() -> AbstractContextManager[None]:
    """Let what is written inside `muted` pass again."""
    return _silence(is_on=False)


@contextmanager
def _silence(*, is_on: bool) -> Generator[None]:
    token = _IS_SILENT.set(is_on)
    try:
        yield
    finally:
        _IS_SILENT.reset(token)
