"""The model of a served program: what a request asks of it is counted and bounded.

An engine in this process that answers many requests at once is handed all that wait, whenever it is free;
rows of different clients then share their work as those of an evaluation do.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Protocol, cast

import dspy
from dspy.clients.errors import error_boundary
from dspy.lm15 import Request, Response

from preceptor.errors import ConfigError
from preceptor.lm import prices
from preceptor.lm.dispatch import hide_secrets
from preceptor.lm.meter import BatchingEngine, batching_engine
from preceptor.lm.seam import Around, InThread, every_predictor, given_settings, load_weights
from preceptor.lm.usage import taken

_TOGETHER: Final = 64
"""Requests handed to a batching engine at a time: those that come meanwhile wait for no more than these."""


class Tally:
    """What one request has asked of its models; counts in any number of threads.

    Args:
        max_tokens: Most tokens of each answer; None leaves it to the server's own bound.
        on_text: Is told each piece of the answer's text as it is written, where the model can do so.

    Attributes:
        calls: Answers that came.
        input_tokens: Of all prompts.
        output_tokens: Of all answers.
        dollars: What the calls cost; None where the model's price isn't known.
        was_cut: True if an answer ended at its bound.
    """

    def __init__(self, max_tokens: int | None = None, on_text: Callable[[str], None] | None = None) -> None:
        self.max_tokens = max_tokens
        self.on_text = on_text
        self.calls = self.input_tokens = self.output_tokens = 0
        self.dollars: float | None = 0.0
        self.was_cut = False
        self.loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._under_way = set[Future[Response]]()
        self._is_given_up = False

    def add(self, response: Response, given: int, made: int, dollars: float | None) -> None:
        """Count an answer, the tokens read and written for it, and its price."""
        with self._lock:
            self.calls += 1
            self.input_tokens += given
            self.output_tokens += made
            self.dollars = None if dollars is None or self.dollars is None else self.dollars + dollars
            self.was_cut = self.was_cut or response.finish_reason == "length"

    def wait_for(self, call: Coroutine[Any, Any, Response]) -> Response:
        """Return what the event loop makes of a call, to a program in another thread.

        Raises:
            CancelledError: If the request is given up, or was.
        """
        with self._lock:
            if self._is_given_up:
                call.close()
                raise CancelledError
            future = asyncio.run_coroutine_threadsafe(call, self.loop)
            self._under_way.add(future)
        try:
            return future.result()
        finally:
            with self._lock:
                self._under_way.discard(future)

    def give_up(self) -> None:
        """Cancel the calls that threads wait for, and refuse further ones: a thread can't be cancelled itself."""
        with self._lock:
            self._is_given_up = True
            under_way = list(self._under_way)
        for future in under_way:
            future.cancel()


_TALLY: ContextVar[Tally | None] = ContextVar("tally", default=None)


@contextmanager
def counting(tally: Tally) -> Generator[None]:
    """Count the calls made meanwhile, in this task and the threads it starts."""
    token = _TALLY.set(tally)
    try:
        yield
    finally:
        _TALLY.reset(token)


class AsyncEngine(Protocol):
    """What DSPy asks of an engine that is awaited."""

    async def complete(self, request: Request) -> Response:
        """Answer one request."""
        ...


class Together:
    """The asynchronous door to a batching engine: all that wait are asked at once, when the engine is free."""

    def __init__(self, engine: BatchingEngine) -> None:
        self._engine = engine
        self._waiting: list[tuple[Request, asyncio.Future[Response]]] = []
        self._task: asyncio.Task[None] | None = None

    async def complete(self, request: Request) -> Response:
        """Answer one request."""
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(0)  # those that are about to ask come along
                here = [ticket for ticket in self._waiting if not ticket[1].done()]
                tickets, self._waiting = here[:_TOGETHER], here[_TOGETHER:]
                await asyncio.to_thread(self._ask, tickets, asyncio.get_running_loop())
        finally:
            self._task = None

    def _ask(self, tickets: list[tuple[Request, asyncio.Future[Response]]], loop: asyncio.AbstractEventLoop) -> None:
        try:
            for batch in self._engine.batches([request for request, _ in tickets]):
                for index, result in batch:
                    loop.call_soon_threadsafe(_settle, tickets[index][1], result)
        except Exception as error:  # noqa: BLE001  raised again wherever an answer is awaited
            for _, future in tickets:
                loop.call_soon_threadsafe(_settle, future, error)


def _settle(future: asyncio.Future[Response], result: Response | Exception) -> None:
    if future.done():  # nobody waits any longer
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


class Hosted:
    """The asynchronous door to a model that DSPy reaches over HTTP."""

    def __init__(self, lm: dspy.LM) -> None:
        self._lm = lm

    async def complete(self, request: Request) -> Response:
        """Answer one request, telling its text piece by piece to whoever listens."""
        tally = _TALLY.get()
        if tally is None or tally.on_text is None:
            return cast("Response", await self._lm.acall(request))
        with dspy.context(send_stream=_Listener(tally.on_text)):
            return cast("Response", await self._lm.acall(request))


class _Listener:
    """Stands where DSPy expects the sending end of a stream."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text

    async def send(self, chunk: Any) -> None:
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            self._on_text(text)


class Counted(Around):
    """The engine of a served model: counts and bounds each call, then passes it on."""

    def __init__(self, lm: dspy.LM, max_tokens: int) -> None:
        super().__init__(lm)
        self.asynchronous = _door(lm)
        self._max_tokens = max_tokens
        self._is_priced = _is_priced(lm)
        prices.price(lm, 0, 0, {})  # loads the table here, not in a request

    async def acomplete(self, request: Request) -> Response:
        """Answer one request."""
        tally = _TALLY.get()
        try:
            response = await self.asynchronous.complete(self._bounded(request, tally))
        except dspy.LMError as error:
            raise hide_secrets(error, self.lm) from error.__cause__
        return self._counted(response, tally)

    def complete(self, request: Request) -> Response:
        """Answer one request to a program that doesn't await; the event loop asks for it, in another thread."""
        tally = _TALLY.get()
        if tally is not None and tally.loop.is_running() and tally.loop is not _running_loop():
            return tally.wait_for(self._for(tally, request))
        bounded = self._bounded(request, tally)
        engine: Any = self.lm.engine
        response = self.lm(bounded) if isinstance(engine, str) else engine.complete(bounded)
        return self._counted(cast("Response", response), tally)

    async def _for(self, tally: Tally, request: Request) -> Response:
        with counting(tally), dspy.context(disable_history=True, trace=None):
            return await self.acomplete(request)

    def _bounded(self, request: Request, tally: Tally | None) -> Request:
        asked = tally.max_tokens if tally is not None and tally.max_tokens is not None else self._max_tokens
        most = min(asked, self._max_tokens)
        config = request.config
        if config.max_tokens is not None and config.max_tokens <= most:
            return request
        return dataclasses.replace(request, config=dataclasses.replace(config, max_tokens=most))

    def _counted(self, response: Response, tally: Tally | None) -> Response:
        if tally is not None:
            given, made = (count or 0 for count in taken(self.lm, response.usage))
            tally.add(response, given, made, prices.price(self.lm, given, made, {}) if self._is_priced else None)
        return response


class _Awaited:
    """The asynchronous door to a counted engine."""

    def __init__(self, engine: Counted) -> None:
        self._engine = engine

    def __deepcopy__(self, memo: dict[int, Any]) -> _Awaited:
        return self

    async def complete(self, request: Request) -> Response:
        """Answer one request."""
        return await self._engine.acomplete(request)


class _ServedLM(dspy.LM):
    """A `dspy.LM` that hands a request it is given as one straight to its engine; DSPy takes two threads for it."""

    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """Answer a request, or whatever else DSPy takes."""
        if not isinstance(prompt, Request) or kwargs:
            return await super().acall(prompt, messages=messages, **kwargs)
        with error_boundary(self.model, unexpected=True):
            return await cast("Counted", self.engine).acomplete(prompt)


def served(lm: dspy.LM, max_tokens: int) -> dspy.LM:
    """Return a `dspy.LM` of the same name and settings whose calls are counted, bounded and don't block.

    One in this process has its weights read, so that no request waits for them.

    Args:
        lm: The program's own.
        max_tokens: Most tokens of one answer.
    """
    load_weights(lm)
    engine = Counted(lm, max_tokens)
    return _ServedLM(
        lm.model,
        model_type=cast("Any", lm.model_type),
        engine=engine,
        async_engine=_Awaited(engine),
        cache=False,
        num_retries=0,
        **given_settings(lm),
    )


def serve_own_models(program: dspy.Module, max_tokens: int) -> None:
    """Make the models that predictors of a loaded program have of their own served ones, too."""
    made: dict[int, dspy.LM] = {}
    for _, predictor in every_predictor(program):
        own = predictor.lm
        if own is not None and not isinstance(own.engine, Counted):
            predictor.lm = made.setdefault(id(own), served(own, max_tokens))


def _door(lm: dspy.LM) -> AsyncEngine:
    engine: Any = lm.engine
    if isinstance(engine, str):
        return Hosted(lm)
    batching = batching_engine(lm)
    if batching is not None:
        return Together(batching)
    return cast("AsyncEngine", lm._async_engine_spec or InThread(engine))


def _is_priced(lm: dspy.LM) -> bool:
    try:
        prices.check(lm, {})
    except ConfigError:
        return False
    return True


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
