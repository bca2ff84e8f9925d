"""Sending calls to a provider: a deadline per attempt, retries with back-off, one shared limit per model.

DSPy's own retries are switched off: they wait without jitter, each call for itself, and nobody counts
them. Here all calls to a model share one limit of concurrency, which halves when the provider says it
is overloaded and grows back with every window of good answers (additive increase, multiplicative
decrease, as in TCP). A Retry-After holds back every call to that model.
"""

from __future__ import annotations

import contextvars
import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast

import dspy
from dspy.clients.errors import error_boundary
from dspy.lm15 import Request, Response, TextPart, ThinkingPart
from dspy.utils import exceptions
from dspy.utils.exceptions import (
    LMAuthError,
    LMBillingError,
    LMConfigurationError,
    LMError,
    LMInvalidRequestError,
    LMProviderError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
    LMUnexpectedError,
    LMUnsupportedModelError,
)

from preceptor.errors import BudgetExhausted, ConfigError, PreceptorError
from preceptor.lm.redaction import hidden
from preceptor.lm.seam import said
from preceptor.lm.usage import taken

FATAL: Final = (LMAuthError, LMBillingError, LMConfigurationError, LMUnsupportedModelError)
"""What no further call can cure; the compile stops at the first."""

_TRANSIENT: Final = (LMRateLimitError, LMServerError, LMTimeoutError, LMTransportError)
_OVERLOADED: Final = (LMRateLimitError, LMTimeoutError)
_Recorded = TypeVar("_Recorded")
_LONGEST_WAIT: Final = 60.0
_TIMEOUT: Final = 120.0
_GRACE: Final = 1.0  # seconds that a socket outlasts the deadline, which says why a call has failed
_LONGEST_TIMEOUT: Final = 2_147_483
"""Seconds; a socket's timeout is an int of milliseconds."""

BROKEN_RETRIES: Final = 3
"""Times an answer that came empty or cut off is asked for again, at once, before it is taken as it is."""
NOT_SENT: Final = "Not sent: the compile has stopped."
"""What a call fails with that waited when others failed for good."""

TOO_LATE: Final = "The next call would pass the budget's seconds; nothing was sent. Resume with a larger budget."
"""What a call fails with that waited, or would, until the time budgeted was over."""

CUT_SHORT: Final = "The last call was cut short: the budget's seconds are over. Resume with a larger budget."
"""What a call fails with that was under way when the time budgeted was over; it is asked again then."""

_REDIRECT: Final = 300
_UNAVAILABLE: Final = 503


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for a provider.

    Attributes:
        timeout: Seconds from sending a request to having its whole answer. An engine object of the
            user's own bounds its calls itself.
        retries: Attempts after the first, for errors that may pass: overload (429), the provider's own
            failures (5xx), timeouts and broken connections. Empty and cut answers are asked for three times more.
        first_wait: Seconds before the first retry; doubled for each further one, at most 60, with a
            random half taken off so that calls don't come back all at once. No retry comes before a Retry-After.

    Raises:
        ConfigError: If the deadline isn't above 0 or is longer than a socket can wait (24 days), or another number is
            below 0.
    """

    timeout: float = _TIMEOUT
    retries: int = 5
    first_wait: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.timeout <= _LONGEST_TIMEOUT and self.retries >= 0 and self.first_wait >= 0):
            raise ConfigError(
                f"Patience needs 0 < timeout <= {_LONGEST_TIMEOUT}, retries >= 0 and first_wait >= 0, got {self}."
            )

    def allows(self, attempt: int, error: Exception) -> bool:
        """Return True if a failed attempt (the first is 0) may be made again.

        A provider that wants more time than an answer may take is not waited for.
        """
        asked = getattr(error, "retry_after", None) or 0.0
        return attempt < self.retries and is_transient(error) and asked <= self.timeout

    def wait(self, attempt: int, error: Exception, luck: float) -> float:
        """Return the seconds to wait after a failed attempt (the first is 0); `luck` is in [0, 1).

        Example:
            >>> [Patience().wait(attempt, ValueError(), luck=0.0) for attempt in (0, 1, 2, 9)]
            [1.0, 2.0, 4.0, 60.0]
            >>> Patience().wait(0, ValueError(), luck=0.5)
            0.75
        """
        asked = getattr(error, "retry_after", None) or 0.0
        return max(float(asked), min(_LONGEST_WAIT, self.first_wait * 2.0**attempt) * (1 - luck / 2))


class NotSent(LMError):
    """A call that waited when others failed for good: no attempt was made."""

    def __init__(self) -> None:
        super().__init__(NOT_SENT)


class BrokenAnswer(LMTransportError):
    """An answer that arrived, but not whole: empty, or cut before its own limit."""

    def __init__(self, message: str, response: Response) -> None:
        super().__init__(message)
        self.response = response


class Limiter:
    """How many calls to one model may be in flight; shared by all threads.

    Args:
        most: Upper bound, and the limit to start with.
        clock: Seconds, for tests.
        longest: Seconds of a Retry-After that holds back all; a longer one is not waited for, as by `Patience.allows`.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic, *, longest: float = _TIMEOUT) -> None:
        self._most = most
        self._longest = longest
        self._limit = float(most)
        self._clock = clock
        self._flying = 0
        self._sent = 0
        self._cut_at = 0
        self._open_again = 0.0
        self._is_closed = False
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        """Calls that may be in flight now."""
        return max(1, int(self._limit))

    def enter(self, seconds: float = math.inf) -> int:
        """Wait for a place; return the number of this call.

        Raises:
            NotSent: If no more calls are let in.
            BudgetExhausted: If there is no place within so many seconds.
        """
        late = self._clock() + seconds
        with self._changed:
            while True:
                if self._is_closed:
                    raise NotSent
                now = self._clock()
                if now >= late:
                    raise BudgetExhausted(TOO_LATE)
                pause = self._open_again - now
                if pause <= 0 and self._flying < self.limit:
                    break
                wait = min(late - now, pause if pause > 0 else math.inf)
                self._changed.wait(wait if wait < math.inf else None)
            self._flying += 1
            self._sent += 1
            return self._sent

    def leave(self, call: int, error: Exception | None) -> None:
        """Give the place back, and learn from how the call went."""
        with self._changed:
            self._flying -= 1
            if error is None:
                self._limit = min(self._most, self._limit + 1 / self._limit)
            elif is_overload(error):
                self._pause(error)
                self._cut(call)
            self._changed.notify_all()

    def _cut(self, call: int) -> None:
        if call > self._cut_at:  # calls sent before the last cut say nothing about the limit since
            self._limit = max(1.0, self._limit / 2)
            self._cut_at = self._sent

    def close(self) -> None:
        """Let no more calls in, and wake those that wait."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def sleep(self, seconds: float) -> None:
        """Wait so long, or until no more calls are let in."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, seconds)

    def _pause(self, error: Exception) -> None:
        seconds = float(getattr(error, "retry_after", None) or 0.0)
        if seconds <= self._longest:
            self._open_again = max(self._open_again, self._clock() + seconds)


@dataclass(slots=True)
class Door:
    """The way to one model.

    Attributes:
        lm: The caller's own model, its retries switched off.
        limiter: Shared by all calls to it.
        patience: Bounds and retries.
        jitter: Spreads retries; never part of a result.
    """

    lm: dspy.LM
    limiter: Limiter
    patience: Patience
    jitter: random.Random = field(default_factory=random.Random)

    @classmethod
    def to(cls, lm: dspy.LM, limiter: Limiter, patience: Patience) -> Door:
        """Return the way to `lm`, which is left as it is."""
        own: dict[str, Any] = {"num_retries": 0}
        if isinstance(lm.engine, str) and "timeout" not in lm.kwargs:
            own["timeout"] = min(patience.timeout + _GRACE, _LONGEST_TIMEOUT)  # closes an abandoned attempt's socket
        return cls(lm.copy(**own), limiter, patience)

    def attempt(
        self,
        request: Request,
        record: Callable[[Response], _Recorded],
        seconds_left: float | None = None,
        *,
        takes_broken: bool = False,
    ) -> _Recorded:
        """Send a request once; return its answer as it was recorded, before its place was given to another.

        Args:
            request: What to send.
            record: Called with the answer; a kill loses no more calls than have a place.
            seconds_left: Of the budget; bounds the wait for a place, and shortens the deadline by what that took.
            takes_broken: Return an answer that is empty or cut off, too.

        Raises:
            LMError: What went wrong.
            BudgetExhausted: If there was no place in time.
        """
        late = time.monotonic() + (math.inf if seconds_left is None else seconds_left)
        number, failure = self.limiter.enter(late - time.monotonic()), None
        try:
            response = self._answer(request, min(self.patience.timeout, late - time.monotonic()))
            if not takes_broken:
                _refuse_broken(self.lm, response, request)
        except Exception as error:
            failure = error
            raise
        else:
            return record(response)
        finally:
            self.limiter.leave(number, failure)

    def pause(self, attempt: int, error: Exception, seconds_left: float | None = None) -> None:
        """Wait before the next attempt.

        Raises:
            BudgetExhausted: At once, if the budget's time would be over by then.
        """
        seconds = self.patience.wait(attempt, error, self.jitter.random())
        if seconds_left is not None and seconds >= seconds_left:
            raise BudgetExhausted(TOO_LATE) from None
        self.limiter.sleep(seconds)

    def _answer(self, request: Request, deadline: float) -> Response:
        engine: Any = self.lm.engine
        if isinstance(engine, str):
            return within(deadline, lambda: self._sent(request))
        with error_boundary(self.lm.model, unexpected=True):
            return cast("Response", engine.complete(request))

    def _sent(self, request: Request) -> Response:
        """Send a request by DSPy; its cache is off, for all draws are alike to it."""
        try:
            return cast("Response", self.lm(request, cache=False))
        except (ValueError, TypeError) as error:  # what DSPy can't write down; no request has left
            raise LMInvalidRequestError(f"It can't be sent: {error}", model=self.lm.model) from error


def within(seconds: float, ask: Callable[[], Response]) -> Response:
    """Return what `ask` returns, or give up on it after so many seconds.

    Sockets have timeouts of their own, but those start anew with every byte that drips in.

    Raises:
        LMTimeoutError: If it took too long; the thread that waits for it is left behind.
    """
    future: Future[Response] = Future()

    def run() -> None:
        try:
            future.set_result(ask())
        except BaseException as error:  # noqa: BLE001  raised again where the answer is awaited
            future.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError as error:
        if future.done():  # just now, or with a TimeoutError of its own
            return future.result()
        raise LMTimeoutError(f"No whole answer within {seconds:g} seconds.") from error


def is_overload(error: Exception) -> bool:
    """Return True if fewer calls at a time might help."""
    return isinstance(error, _OVERLOADED) or getattr(error, "status", None) == _UNAVAILABLE


def is_transient(error: BaseException) -> bool:
    """Return True if the same request may succeed when it is sent again."""
    return isinstance(error, _TRANSIENT) or _is_garbage(error)


def may_pass(error: BaseException) -> bool:
    """Return True if nothing says that the same request would fail again, however late it is sent."""
    return is_transient(error) or isinstance(error, (NotSent, LMUnexpectedError))


def _is_garbage(error: BaseException) -> bool:
    """Return True if the provider said all is well and then sent no answer, as gateways do."""
    status: int | None = getattr(error, "status", None)
    return type(error) is LMProviderError and status is not None and status < _REDIRECT


def may_be_billed(error: BaseException) -> bool:
    """Return True if the provider may have done the work although no whole answer came."""
    return isinstance(error, (LMTimeoutError, LMTransportError)) or not isinstance(error, LMError) or _is_garbage(error)


def reason(error: BaseException) -> str:
    """Return an error's name and first line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def failure_of(error: LMError) -> tuple[str, str]:
    """Return an error's kind and text, as they can be kept."""
    return type(error).__name__, str(error)


def as_it_failed(kind: str, text: str) -> LMError:
    """Return the error that was kept so."""
    made = getattr(exceptions, kind, LMError)
    try:
        return cast("LMError", made(message=text))
    except TypeError:  # it takes more than a message
        return LMError(text)


def hide_secrets(error: LMError, lm: dspy.LM) -> LMError:
    """Return an error without the model's key and address, which some servers repeat, nor its cause."""
    text = hidden(str(error), lm)
    error.message, error.args = text, (text,)
    cause = error.__cause__
    error.__cause__, error.__context__ = cause if isinstance(cause, PreceptorError) else None, None
    return error


def _refuse_broken(lm: dspy.LM, response: Response, request: Request) -> None:
    """Raise if an answer is empty, or cut off before its own limit.

    Raises:
        BrokenAnswer: With the answer.
    """
    if response.finish_reason == "length":
        bound, (_, used) = request.config.max_tokens, taken(lm, response.usage)
        if bound is not None and used is not None and used < bound:
            raise BrokenAnswer(f"The answer was cut off after {used} of {bound} tokens.", response)
    elif not said(response.message) and all(map(_is_talk, response.message.parts)):
        raise BrokenAnswer("The answer is empty.", response)


def _is_talk(part: object) -> bool:
    """Return True for text and thoughts; calls of tools and refusals are answers without a word."""
    return isinstance(part, (TextPart, ThinkingPart))
