"""Dispatch: deadlines, retries and the shared limit, by hand and with a clock of our own."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import dspy
import pytest
from dspy.lm15 import Config, Message, RefusalPart, Request, Response, TextPart, ThinkingPart, Usage
from dspy.utils.exceptions import (
    ContextWindowExceededError,
    LMAuthError,
    LMError,
    LMInvalidRequestError,
    LMProviderError,
    LMRateLimitError,
    LMServerError,
    LMTimeoutError,
    LMTransportError,
    LMUnsupportedFeatureError,
)

from preceptor.errors import BudgetExhausted, ConfigError
from preceptor.lm.dispatch import (
    BrokenAnswer,
    Door,
    Limiter,
    Patience,
    as_it_failed,
    failure_of,
    hide_secrets,
    is_overload,
    is_transient,
    may_be_billed,
    reason,
    within,
)
from preceptor.testing import ChatServer, simulated


def response(text: str, reason: Any = "stop", tokens: int | None = 1, before: Any = None) -> Response:
    return Response(
        id=None,
        model="m",
        message=Message.assistant([TextPart(text)] if before is None else [before, TextPart(text)]),
        finish_reason=reason,
        usage=Usage(input_tokens=1, output_tokens=tokens),
    )


def request(max_tokens: int | None = None) -> Request:
    return Request(model="m", messages=(Message.user("hello"),), config=Config(max_tokens=max_tokens))


def test_waits_double_and_end_at_a_minute() -> None:
    patience = Patience(first_wait=0.5)
    assert [patience.wait(attempt, LMServerError("x"), 0.0) for attempt in range(9)] == [
        *(0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
        *(60.0, 60.0),
    ]


def test_jitter_takes_off_up_to_half() -> None:
    waits = [Patience(first_wait=4).wait(0, LMServerError("x"), luck) for luck in (0.0, 0.25, 0.999)]
    assert waits == pytest.approx([4.0, 3.5, 2.002])


def test_a_retry_after_is_obeyed_to_the_second_and_one_of_less_than_the_back_off_is_no_haste() -> None:
    assert Patience().wait(2, LMRateLimitError("slow down", retry_after=7.0), 0.9) == 7.0
    assert Patience().wait(4, LMRateLimitError("slow down", retry_after=7.0), 0.5) == 12.0
    assert Patience().wait(1, LMRateLimitError("slow down", retry_after=0.0), 0.0) == 2.0


@pytest.mark.parametrize(
    ("error", "transient", "overload", "billed"),
    [
        (LMRateLimitError("x", status=429), True, True, False),
        (LMServerError("x", status=500), True, False, False),
        (LMServerError("x", status=503), True, True, False),
        (LMTimeoutError("x"), True, True, True),
        (LMTransportError("x"), True, False, True),
        (LMProviderError("not JSON", status=200), True, False, True),
        (LMProviderError("a redirect", status=301), False, False, False),
        (LMInvalidRequestError("x", status=400), False, False, False),
        (LMAuthError("x", status=401), False, False, False),
    ],
)
def test_errors_are_told_apart(error: LMError, transient: bool, overload: bool, billed: bool) -> None:
    assert (is_transient(error), is_overload(error), may_be_billed(error)) == (transient, overload, billed)


def test_attempts_end_after_the_retries_and_for_a_provider_that_wants_too_much_time() -> None:
    patience = Patience(timeout=30, retries=2)
    assert [patience.allows(attempt, LMServerError("x")) for attempt in range(4)] == [True, True, False, False]
    assert patience.allows(0, LMRateLimitError("x", retry_after=30.0))
    assert not patience.allows(0, LMRateLimitError("x", retry_after=31.0))
    assert not patience.allows(0, LMInvalidRequestError("x"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": 0},
        {"retries": -1},
        {"first_wait": -0.1},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"timeout": 1e10},
    ],
)
def test_impossible_patience_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(
        ConfigError, match=r"^Patience needs 0 < timeout <= 2147483, retries >= 0 and first_wait >= 0, got "
    ):
        Patience(**wrong)  # type: ignore[arg-type]  # an int is a float


def as_it_is(answer: Response) -> Response:
    return answer


def test_the_longest_deadline_there_is_can_be_waited_for(server: ChatServer) -> None:
    lm = server.lm()
    door = Door.to(lm, Limiter(1), Patience(timeout=2_147_483))
    assert door.attempt(replace(request(), model=lm.model), as_it_is).message.text == "HELLO"


class TestLimiter:
    def test_overload_halves_the_limit_once_for_calls_sent_together(self) -> None:
        limiter = Limiter(8)
        calls = [limiter.enter() for _ in range(8)]
        for call in calls[:4]:
            limiter.leave(call, LMRateLimitError("x"))
        assert limiter.limit == 4
        for call in calls[4:]:
            limiter.leave(call, LMRateLimitError("x"))
        assert limiter.limit == 4
        limiter.leave(limiter.enter(), LMRateLimitError("x"))
        assert limiter.limit == 2

    def test_it_never_falls_below_one(self) -> None:
        limiter = Limiter(2)
        for _ in range(5):
            limiter.leave(limiter.enter(), LMTimeoutError("x"))
        assert limiter.limit == 1

    def test_a_window_of_good_answers_adds_one_up_to_the_most(self) -> None:
        limiter = Limiter(4)
        limiter.leave(limiter.enter(), LMRateLimitError("x"))
        assert limiter.limit == 2
        for _ in range(3):  # 2 + 1/2 + 1/2.5 + 1/2.9 = 3.24
            limiter.leave(limiter.enter(), None)
        assert limiter.limit == 3
        for _ in range(20):
            limiter.leave(limiter.enter(), None)
        assert limiter.limit == 4

    def test_failures_that_are_no_overload_leave_it_alone(self) -> None:
        limiter = Limiter(4)
        limiter.leave(limiter.enter(), LMServerError("x", status=500))
        assert limiter.limit == 4

    def test_no_more_calls_are_let_in_than_the_limit(self) -> None:
        limiter, inside, most = Limiter(3), [0], [0]
        lock, are_three = threading.Lock(), threading.Event()

        def call() -> None:
            number = limiter.enter()
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                if most[0] == 3:
                    are_three.set()
            are_three.wait(60)
            time.sleep(0.002)
            with lock:
                inside[0] -= 1
            limiter.leave(number, None)

        threads = [threading.Thread(target=call) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most[0] == 3

    def test_a_retry_after_holds_back_every_call(self) -> None:
        limiter = Limiter(4)
        start, place = time.monotonic(), limiter.enter()
        limiter.leave(place, LMRateLimitError("x", retry_after=0.2))
        limiter.enter()
        assert time.monotonic() - start >= 0.2

    @pytest.mark.parametrize(
        ("timeout", "asked", "is_held"), [(30, 30, True), (30, 31, False), (120, 90, True), (120, 121, False)]
    )
    def test_all_are_held_back_where_one_waits_for_its_next_attempt(
        self, timeout: float, asked: float, is_held: bool
    ) -> None:
        patience, error = Patience(timeout=timeout), LMRateLimitError("x", retry_after=asked)
        limiter = Limiter(4, longest=patience.timeout)
        limiter.leave(limiter.enter(), error)
        assert patience.allows(0, error) is is_held
        with pytest.raises(BudgetExhausted) if is_held else nullcontext():
            limiter.enter(0.05 if is_held else 5)

    def test_closing_wakes_those_that_wait(self) -> None:
        limiter, errors = Limiter(1), list[str]()
        limiter.enter()

        def waits() -> None:
            try:
                limiter.enter()
            except LMError as error:
                errors.append(str(error))

        def sleeps() -> None:
            limiter.sleep(60)
            errors.append("awake")

        threads = [threading.Thread(target=waits), threading.Thread(target=sleeps)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        limiter.close()
        for thread in threads:
            thread.join(60)
        assert sorted(errors) == ["Not sent: the compile has stopped.", "awake"]


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    let_go = threading.Event()

    def slow() -> Response:
        let_go.wait(10)
        return response("late")

    with pytest.raises(LMTimeoutError, match=r"^No whole answer within 0\.05 seconds\.$"):
        within(0.05, slow)
    let_go.set()


def test_an_answer_that_comes_as_its_deadline_ends_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Future[Response]):
        def result(self, timeout: float | None = None) -> Response:
            answer = super().result()
            if timeout is not None:
                raise TimeoutError
            return answer

    monkeypatch.setattr("preceptor.lm.dispatch.Future", Late)
    assert within(0.05, lambda: response("yes")).message.text == "yes"


def test_what_was_asked_in_time_is_returned_or_raised() -> None:
    def fails() -> Response:
        raise TimeoutError("the asker's own")

    assert within(5, lambda: response("yes")).message.text == "yes"
    with pytest.raises(TimeoutError, match=r"^the asker's own$"):
        within(5, fails)


@pytest.mark.parametrize(
    ("answer", "bound", "message"),
    [
        (response("", tokens=0), None, "The answer is empty."),
        (response("", before=ThinkingPart("Hm.")), None, "The answer is empty."),
        (response("yes", before=ThinkingPart("Hm.")), None, None),
        (response("", before=RefusalPart("I won't.")), None, None),
        (response("half of", "length", 2), 16, "The answer was cut off after 2 of 16 tokens."),
        (response("all of it", "length", 16), 16, None),
        (response("all of it", "length", None), 16, None),
        (response("whole"), 16, None),
    ],
)
def test_empty_and_cut_answers_are_broken(answer: Response, bound: int | None, message: str | None) -> None:
    class Engine:
        def complete(self, request: Request) -> Response:
            return answer

    lm = dspy.LM("test/m", engine=Engine(), cache=False)
    door = Door.to(lm, Limiter(1), Patience())
    if message is None:
        assert door.attempt(request(bound), as_it_is) is answer
        return
    with pytest.raises(BrokenAnswer) as caught:
        door.attempt(request(bound), as_it_is)
    assert str(caught.value) == message
    assert caught.value.response is answer


def test_a_door_leaves_the_callers_model_alone() -> None:
    lm = dspy.LM("openai/x", api_key="sk-1", num_retries=3)
    door = Door.to(lm, Limiter(1), Patience(timeout=9))
    assert (door.lm.num_retries, door.lm.kwargs["timeout"]) == (0, 10)  # after its deadline, which says why
    assert lm.num_retries == 3
    assert "timeout" not in lm.kwargs
    assert Door.to(dspy.LM("openai/x", timeout=4), Limiter(1), Patience()).lm.kwargs["timeout"] == 4
    assert "timeout" not in Door.to(simulated(lambda request: "x"), Limiter(1), Patience()).lm.kwargs


def test_a_reason_is_one_line_without_the_key() -> None:
    lm = dspy.LM("openai/x", api_key="sk-secret", api_base="http://user:word@host/v1")
    error = LMAuthError("Wrong key sk-secret for http://user:word@host/v1\nSecond line")
    error.__cause__ = ValueError("sk-secret")
    assert reason(hide_secrets(error, lm)) == "LMAuthError: Wrong key [hidden] for [hidden]"
    assert (error.message, error.__cause__) == ("Wrong key [hidden] for [hidden]\nSecond line", None)
    assert reason(ValueError()) == "ValueError: no message"


@pytest.mark.parametrize(
    "error",
    [
        LMServerError("down", model="openai/x"),
        ContextWindowExceededError(message="too long"),
        LMUnsupportedFeatureError("no tools"),
        LMError("x"),
    ],
)
def test_an_error_is_made_again_from_what_is_kept_of_it(error: LMError) -> None:
    again = as_it_failed(*failure_of(error))
    assert (type(again), str(again)) == (type(error), str(error))
    assert type(as_it_failed("TheirOwnError", "x")) is LMError
