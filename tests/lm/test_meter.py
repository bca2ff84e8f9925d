"""The meter: counted, recorded and replayed, over HTTP and in this process."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Config, Message, Request, Response, TextPart, Usage
from dspy.utils.exceptions import LMInvalidRequestError, LMRateLimitError, LMServerError, LMTimeoutError

from preceptor.errors import BudgetExhausted, ConfigError, InputTooLong
from preceptor.lm.budget import Account, Budget, Cost, Purse
from preceptor.lm.cohort import Cohort
from preceptor.lm.dispatch import Patience
from preceptor.lm.flow import in_order
from preceptor.lm.ledger import Answer, Call, Ledger, drawing
from preceptor.lm.local import LocalEngine
from preceptor.lm.meter import Meter, MeteredEngine, ask_cohort, batching_engine
from preceptor.modules import Generate
from preceptor.testing import ChatServer, Faults, asked, simulated

KEY = b"sk-secret-0123456789"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite")
    yield opened
    opened.close()


def meter(ledger: Ledger, budget: Budget | None = None, *, threads: int = 8) -> Meter:
    return Meter(ledger, Account(budget or Budget()), threads=threads)


def request(lm: dspy.LM, text: str, **config: Any) -> Request:
    return Request(model=lm.model, messages=(Message.user(text),), config=Config(**config))


def text(result: Response | Exception) -> str:
    assert isinstance(result, Response), result
    return result.message.text or ""


def bytes_of(ledger: Ledger) -> bytes:
    """Return all that lies on disk, the write-ahead log included."""
    return b"".join(path.read_bytes() for path in ledger.path.parent.iterdir())


def test_calls_and_tokens_are_counted(ledger: Ledger, server: ChatServer) -> None:
    metered = meter(ledger)
    lm = metered.wrap(server.lm())
    assert [lm("one"), lm("two")] == [["ONE"], ["TWO"]]
    assert metered.account.spent == metered.account.billed == Cost(2, 4, 0.0)
    assert [each.body["messages"][0]["content"] for each in server.requests] == ["one", "two"]


def test_a_recorded_answer_is_replayed_without_a_second_request(ledger: Ledger, server: ChatServer) -> None:
    first = meter(ledger).wrap(server.lm())("one")
    again = meter(ledger)

    assert again.wrap(server.lm())("one") == first == ["ONE"]

    assert server.count == 1
    assert again.account.spent == Cost(1, 2, 0.0)
    assert again.account.billed == Cost()


def test_settings_of_the_model_reach_the_server(ledger: Ledger, server: ChatServer) -> None:
    meter(ledger).wrap(server.lm(temperature=0.25, max_tokens=99))("one")
    [received] = server.requests
    assert (received.body["temperature"], received.body["max_completion_tokens"]) == (0.25, 99)
    assert received.headers["authorization"] == "Bearer sk-secret-0123456789"


def test_keys_and_addresses_stay_out_of_the_ledger(ledger: Ledger, server: ChatServer) -> None:
    lm = meter(ledger).wrap(server.lm())
    assert lm("one") == ["ONE"]
    written = bytes_of(ledger)
    assert b"ONE" in written
    assert KEY not in written
    assert b"127.0.0.1" not in written
    assert KEY.decode() not in repr(lm.kwargs)


def test_dspys_own_cache_answers_no_metered_call(ledger: Ledger, server: ChatServer) -> None:
    server.answer = lambda body: str(server.count)
    lm = server.lm(cache=True, temperature=1.0)
    call = request(lm, f"a number, please, {server.url}")
    results = meter(ledger, threads=1).ask(lm, [Call(call, sample) for sample in range(3)])
    assert [text(result) for result in results] == ["1", "2", "3"]


@pytest.mark.parametrize("threads", [1, 8, 64])
def test_a_budget_of_calls_is_never_passed(ledger: Ledger, server: ChatServer, threads: int) -> None:
    metered = meter(ledger, Budget(calls=20))
    lm = metered.wrap(server.lm())
    start = threading.Barrier(threads)

    def work(worker: int) -> int:
        start.wait()
        answered = 0
        with contextlib.suppress(dspy.LMError):
            for n in range(40):
                assert lm(f"{worker} {n}") == [f"{worker} {n}"]
                answered += 1
        return answered

    with ThreadPoolExecutor(threads) as pool:
        answered = sum(pool.map(work, range(threads)))

    assert answered == server.count == len(ledger) == 20
    assert metered.account.spent == Cost(20, 80, 0.0)


def test_an_exhausted_budget_names_itself_and_sends_nothing(ledger: Ledger, server: ChatServer) -> None:
    metered = meter(ledger, Budget(calls=2))
    lm = server.lm()
    with pytest.raises(BudgetExhausted, match="calls to 3, past the budget of 2; nothing was sent"):
        metered.ask(lm, [Call(request(lm, str(n))) for n in range(5)])
    assert server.count == len(ledger) == 2


def test_tokens_are_bounded_before_the_call_is_sent(ledger: Ledger, server: ChatServer) -> None:
    lm = server.lm(max_tokens=50)
    with pytest.raises(BudgetExhausted, match="tokens to 181, past the budget of 150"):
        meter(ledger, Budget(tokens=150)).ask(lm, [Call(request(lm, "one", max_tokens=50))])  # 3 + 64 + 64 + 50
    assert server.count == 0


def test_equal_calls_at_once_are_billed_once(ledger: Ledger, server: ChatServer) -> None:
    metered = meter(ledger)
    lm = metered.wrap(server.lm())
    start = threading.Barrier(16)

    def ask(_: int) -> list[str]:
        start.wait()
        return list(lm("same"))

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))

    assert answers == [["SAME"]] * 16
    assert server.count == 1
    assert metered.account.spent == Cost(16, 32, 0.0)
    assert metered.account.billed == Cost(1, 2, 0.0)


def test_an_error_is_not_recorded_and_the_call_can_be_made_again(ledger: Ledger, server: ChatServer) -> None:
    metered = meter(ledger, Budget(calls=1))
    lm = server.lm()
    server.inject(Faults(kinds=("bad_request",)))
    [failed] = metered.ask(lm, [Call(request(lm, "one"))])
    assert isinstance(failed, dspy.LMError)
    assert str(failed) == "[openai/model] The request is malformed."
    assert len(ledger) == 0
    assert metered.account.spent == Cost()
    assert metered.account.calls_left == 1

    server.inject(None)

    assert [text(result) for result in metered.ask(lm, [Call(request(lm, "one"))])] == ["ONE"]


def test_the_asynchronous_door_is_metered_too(ledger: Ledger, server: ChatServer) -> None:
    metered = meter(ledger)
    lm = metered.wrap(server.lm())
    assert asyncio.run(lm.acall("one")) == ["ONE"]
    assert metered.account.spent == Cost(1, 2, 0.0)


def test_a_wrapped_model_is_metered_once(ledger: Ledger) -> None:
    metered = meter(ledger, Budget(calls=3))
    numbers = iter("123")
    lm = metered.wrap(simulated(lambda request: next(numbers)))
    assert metered.wrap(lm) is lm
    assert copy.deepcopy(lm).engine is lm.engine

    results = metered.ask(lm, [Call(request(lm, "a number, please"), sample) for sample in range(3)])

    assert sorted(text(result) for result in results) == ["1", "2", "3"]
    assert metered.account.spent.calls == len(ledger) == 3


def test_a_wrapped_model_keeps_its_name_and_settings(ledger: Ledger) -> None:
    lm = meter(ledger).wrap(dspy.LM("openai/gpt-4o-mini", temperature=0.5, max_tokens=7, api_key="sk-x"))
    assert (lm.model, lm.kwargs) == ("openai/gpt-4o-mini", {"temperature": 0.5, "max_tokens": 7})


def test_a_reasoning_model_can_be_wrapped(ledger: Ledger) -> None:
    lm = meter(ledger).wrap(dspy.LM("openai/o3-mini", temperature=1.0, max_tokens=16000))
    assert lm.kwargs == {"temperature": 1.0, "max_completion_tokens": 16000}


@pytest.mark.parametrize("budget", [Budget(tokens=100), Budget(dollars=1)])
def test_a_bound_per_call_is_needed_to_budget_tokens_or_dollars(ledger: Ledger, budget: Budget) -> None:
    with pytest.raises(
        ConfigError,
        match=r"A budget of tokens or dollars needs a bound per call: dspy\.LM\('openai/gpt-4o', max_tokens=512\)\.",
    ):
        meter(ledger, budget).check(dspy.LM("openai/gpt-4o"))


def test_dollars_need_a_known_price(ledger: Ledger) -> None:
    metered = meter(ledger, Budget(dollars=1))
    unknown = dspy.LM("openai/nobody-knows-this", max_tokens=5)
    for lm in (unknown, metered.wrap(unknown)):
        with pytest.raises(ConfigError, match="No price is known for openai/nobody-knows-this"):
            metered.check(lm)


def test_calls_and_minutes_need_no_bound_and_no_price(ledger: Ledger) -> None:
    meter(ledger, Budget(calls=1, seconds=1)).check(dspy.LM("openai/nobody-knows-this"))
    meter(ledger, Budget(tokens=1)).check(dspy.LM("openai/nobody-knows-this", max_tokens=5))


def choice(lm: dspy.LM, question: str) -> Request:
    return request(lm, question, extensions={"choices": ["yes", "no"]})


def test_a_batching_engine_is_found_through_the_meter(ledger: Ledger, smollm: dspy.LM, engine: LocalEngine) -> None:
    lm = meter(ledger).wrap(smollm)
    assert batching_engine(lm) is batching_engine(smollm) is engine
    assert batching_engine(simulated(lambda request: "yes")) is None
    assert isinstance(lm.engine, MeteredEngine)
    assert lm.engine.supports_choices
    assert "temperature" in lm.engine.supported_params


def test_batches_are_recorded_and_replayed(ledger: Ledger, smollm: dspy.LM) -> None:
    calls = [Call(choice(smollm, question)) for question in ("Is water wet?", "Is fire cold?")]
    fresh, replayed = meter(ledger), meter(ledger)

    first = fresh.ask(smollm, calls)
    second = replayed.ask(smollm, calls)

    assert first == second
    assert {text(result) for result in first} <= {"yes", "no"}
    tokens = sum(result.usage.total_tokens or 0 for result in first if isinstance(result, Response))
    assert fresh.account.spent == fresh.account.billed == replayed.account.spent == Cost(2, tokens, 0.0)
    assert replayed.account.billed == Cost()


def test_equal_calls_of_one_batch_count_alike_when_resumed(ledger: Ledger, smollm: dspy.LM) -> None:
    calls = [Call(choice(smollm, "Is water wet?"))] * 3
    fresh, resumed = meter(ledger), meter(ledger)
    assert len(set(map(text, fresh.ask(smollm, calls)))) == 1
    assert len(set(map(text, resumed.ask(smollm, calls)))) == 1
    assert fresh.account.spent.calls == resumed.account.spent.calls == 3
    assert (fresh.account.billed.calls, resumed.account.billed.calls) == (1, 0)


def test_a_batch_the_budget_can_not_pay_for_is_not_run(ledger: Ledger, smollm: dspy.LM) -> None:
    metered = meter(ledger, Budget(calls=1))
    with pytest.raises(BudgetExhausted, match="calls to 2"):
        metered.ask(smollm, [Call(choice(smollm, question)) for question in ("a", "b")])
    assert len(ledger) == 0
    assert metered.account.calls_left == 1


def test_tokens_of_a_batch_are_bounded_by_the_tokenizer(ledger: Ledger, smollm: dspy.LM, engine: LocalEngine) -> None:
    call = choice(smollm, "Is water wet?")
    length = engine.count_tokens(call)
    [result] = meter(ledger, Budget(tokens=length + 4)).ask(smollm, [Call(call)])
    assert text(result) in {"yes", "no"}
    with pytest.raises(BudgetExhausted, match=f"past the budget of {length + 2}"):
        meter(ledger, Budget(tokens=length + 2)).ask(smollm, [Call(choice(smollm, "Is water dry?"))])


@pytest.mark.parametrize("budget", [Budget(), Budget(tokens=100_000)])
def test_an_input_too_long_fails_alone(ledger: Ledger, smollm: dspy.LM, budget: Budget) -> None:
    metered = meter(ledger, budget)
    too_long, fine = metered.ask(smollm, [Call(choice(smollm, "word " * 9000)), Call(choice(smollm, "Is water wet?"))])
    assert isinstance(too_long, InputTooLong)
    assert text(fine) in {"yes", "no"}
    assert metered.account.spent.calls == len(ledger) == 1


def test_an_input_too_long_for_a_single_call_says_so(ledger: Ledger, smollm: dspy.LM) -> None:
    with pytest.raises(InputTooLong, match=r"reads at most \d+ tokens"):
        meter(ledger).ask_one(smollm, Call(request(smollm, "word " * 20_000)))
    assert len(ledger) == 0


def test_a_cohort_asks_engine_by_engine_and_answers_row_by_row(ledger: Ledger) -> None:
    metered = meter(ledger, threads=1)
    upper = simulated(lambda request: (request.messages[-1].text or "").upper(), name="upper")
    lower = simulated(lambda request: (request.messages[-1].text or "").lower(), name="lower")
    engines: list[Any] = [metered.wrap(lm).engine for lm in (upper, lower)]
    lms = [upper, lower, upper, lower]
    questions = [(engines[row % 2], Call(request(lm, f"Row {row}"))) for row, lm in enumerate(lms)]

    assert [text(result) for result in ask_cohort(questions)] == ["ROW 0", "row 1", "ROW 2", "row 3"]
    assert [one.messages[-1].text for one in asked(upper)] == ["Row 0", "Row 2"]


def test_a_model_is_kept_with_the_way_to_it_so_that_no_other_is_taken_for_it(ledger: Ledger) -> None:
    metered, lm = meter(ledger), simulated(lambda _: "yes")
    metered.ask_one(lm, Call(request(lm, "Are you there?")))
    there = weakref.ref(lm)
    del lm
    gc.collect()
    assert there() is not None, "its id could be that of the next model"


def test_rows_of_a_cohort_reach_the_engine_together(ledger: Ledger, smollm: dspy.LM, engine: LocalEngine) -> None:
    metered = meter(ledger)
    lm = metered.wrap(smollm)
    cohort = Cohort[Any, Any](4, ask_cohort)

    def row(number: int) -> str:
        with cohort.seat(number):
            return text(lm(choice(lm, f"Is {number} even?")))

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(row, range(4)))

    alone = [text(engine.complete(choice(smollm, f"Is {number} even?"))) for number in range(4)]
    assert together == alone
    assert metered.account.spent.calls == len(ledger) == 4


def test_another_draw_of_a_request_is_asked_and_recorded_apart(ledger: Ledger) -> None:
    lines = iter(["one", "two"])
    lm = meter(ledger).wrap(simulated(lambda request: next(lines)))
    said: list[str] = []
    for number in (0, 1, 0, 1):
        with drawing(number):
            said += lm("hello")
    assert said == ["one", "two", "one", "two"]
    assert ledger.paid == (2, 4, 0.0)  # a word asked and one answered, twice


def test_nothing_is_kept_of_a_call_that_is_over(ledger: Ledger) -> None:
    metering = meter(ledger)
    lm = metering.wrap(simulated(lambda request: "x"))
    for number in range(20):
        lm(f"text {number}")
    assert len(metering._claims) == 0


class Moody:
    """Answers nothing, and fails at some of its calls."""

    def __init__(self, fails_at: tuple[int, ...] = ()) -> None:
        self.calls = 0
        self._fails_at = fails_at

    def complete(self, request: Request) -> Response:
        self.calls += 1
        assert self.calls < 20, "it is asked on and on"
        if self.calls in self._fails_at:
            raise LMRateLimitError("slow down")
        message = Message.assistant([TextPart("")])
        usage = Usage(input_tokens=10, output_tokens=0)
        return Response(id=None, model="test/m", message=message, finish_reason="stop", usage=usage)


def asked_once(ledger: Ledger, engine: Moody, account: Account) -> Response:
    lm = dspy.LM("test/m", engine=engine, cache=False)
    metered = Meter(ledger, account, patience=Patience(first_wait=0))
    return metered.ask_one(lm, Call(request(lm, "one")))


@pytest.mark.parametrize("fails_at", [(), (1,), (4,), (2, 5)])
def test_an_answer_that_comes_broken_four_times_is_taken_whatever_fails_between(
    ledger: Ledger, fails_at: tuple[int, ...]
) -> None:
    engine = Moody(fails_at)
    assert asked_once(ledger, engine, Account(Budget())).message.text == ""
    assert engine.calls == 4 + len(fails_at)


@pytest.mark.parametrize("account", [Account(Budget()), Purse(Budget(), Cost(), Cost())])
def test_an_answer_taken_broken_counts_once_and_as_no_failure(ledger: Ledger, account: Account) -> None:
    asked_once(ledger, Moody(), account)
    assert account.spent == account.billed == Cost(1, 10)
    assert account.lost == Cost(3, 30)
    assert (ledger.paid, ledger.failures) == ((1, 10, 0.0), (3, 30, 0.0))


def test_calls_that_were_not_sent_are_no_failures(ledger: Ledger, server: ChatServer) -> None:
    metered = meter(ledger)
    lm = server.lm()
    metered.ask_one(lm, Call(request(lm, "one")))
    metered.give_up()
    [refused] = metered.ask(lm, [Call(request(lm, "two"))])
    assert str(refused) == "Not sent: the compile has stopped."
    assert (metered.account.lost, ledger.failures) == (Cost(), (0, 0, 0.0))
    assert metered.account.spent == Cost(1, 2)


def test_who_waits_for_a_place_is_refused_when_the_time_is_over(ledger: Ledger, server: ChatServer) -> None:
    server.inject(Faults(kinds=("hang",)))
    lm = server.lm()
    patience, start = Patience(timeout=600, retries=0), time.monotonic()
    metered = Meter(ledger, Account(Budget(seconds=3)), threads=1, patience=patience)
    with ThreadPoolExecutor(2) as pool:
        sent = pool.submit(metered.ask_one, lm, Call(request(lm, "one")))
        while not server.count:
            time.sleep(0.005)
        waiting = pool.submit(metered.ask_one, lm, Call(request(lm, "two")))
    assert time.monotonic() - start < 100
    errors = [sent.exception(), waiting.exception()]
    assert [type(error) for error in errors] == [BudgetExhausted] * 2
    assert "pass the budget's seconds; nothing was sent" in str(errors)
    assert (server.count, metered.account.lost.calls) == (1, 1)


def test_a_deadline_is_what_the_wait_for_a_place_has_left(ledger: Ledger, server: ChatServer) -> None:
    def slow(body: dict[str, Any]) -> str:
        time.sleep(1.5)
        return "yes"

    server.answer = slow
    lm = server.lm()
    metered = Meter(ledger, Account(Budget(seconds=2.5)), threads=1, patience=Patience(retries=0))
    with ThreadPoolExecutor(2) as pool:
        asked_for = [pool.submit(metered.ask_one, lm, Call(request(lm, text))) for text in ("one", "two")]
    assert sorted(type(each.exception()).__name__ for each in asked_for) == ["BudgetExhausted", "NoneType"]


def test_a_call_the_budgets_seconds_cut_short_is_asked_again_with_a_larger_one(
    ledger: Ledger, server: ChatServer
) -> None:
    server.inject(Faults(kinds=("hang",)))
    lm, call = server.lm(), Call(request(server.lm(), "one"))
    short = Meter(ledger, Account(Budget(seconds=2)), patience=Patience(timeout=60, retries=0))
    with pytest.raises(
        BudgetExhausted, match=r"cut short: the budget's seconds are over\. Resume with a larger budget"
    ):
        short.ask_one(lm, call)
    short.accept_failures()
    assert short.account.lost.calls == 1

    server.inject(None)
    assert text(meter(ledger, Budget(seconds=300)).ask_one(lm, call)) == "ONE"


def test_a_call_that_takes_longer_than_its_own_deadline_has_failed(ledger: Ledger, server: ChatServer) -> None:
    server.inject(Faults(kinds=("hang",)))
    lm, call = server.lm(), Call(request(server.lm(), "one"))
    patient = Meter(ledger, Account(Budget(seconds=300)), patience=Patience(timeout=0.4, retries=0))
    with pytest.raises(LMTimeoutError):
        patient.ask_one(lm, call)
    patient.accept_failures()
    assert ledger.given_up(call.key) is not None


def test_a_retry_that_would_come_too_late_is_not_waited_for(ledger: Ledger, server: ChatServer) -> None:
    server.inject(Faults(kinds=("rate_limit_after",), retry_after=110))
    lm, start = server.lm(), time.monotonic()
    with pytest.raises(BudgetExhausted, match="pass the budget's seconds"):
        meter(ledger, Budget(seconds=100)).ask_one(lm, Call(request(lm, "one")))
    assert time.monotonic() - start < 90
    assert server.count == 1


def test_a_provider_that_wants_too_much_time_holds_nobody_back(ledger: Ledger, server: ChatServer) -> None:
    server.inject(Faults(kinds=("rate_limit_after",), retry_after=300))
    lm, start = server.lm(), time.monotonic()
    hasty = Meter(ledger, Account(Budget()), patience=Patience(timeout=200, retries=1))
    with pytest.raises(LMRateLimitError):
        hasty.ask_one(lm, Call(request(lm, "one")))
    server.inject(None)
    assert text(hasty.ask_one(lm, Call(request(lm, "two")))) == "TWO"
    assert time.monotonic() - start < 100


class Halves:
    """A batching engine that takes .15 seconds for each request, by a clock of its own."""

    supports_choices = False
    now = 0.0

    def clock(self) -> float:
        return self.now

    def __deepcopy__(self, memo: dict[int, Any]) -> Halves:
        return self

    def count_tokens(self, request: Request) -> int:
        return 1

    def complete(self, request: Request) -> Response:
        raise AssertionError("asked one by one")

    def batches(self, requests: list[Request]) -> Iterator[list[tuple[int, Response | Exception]]]:
        for at in range(len(requests)):
            self.now += 0.15
            message = Message.assistant([TextPart("yes")])
            usage = Usage(input_tokens=1, output_tokens=1)
            yield [(at, Response(id=None, model="test/m", message=message, finish_reason="stop", usage=usage))]


class Counting(Halves):
    """A batching engine each of whose answers differs from all others, and that runs batches in several places."""

    places = 3

    def __init__(self) -> None:
        self.batched: list[int] = []
        self.count = itertools.count()
        self.fails = 0

    def batches(self, requests: list[Request]) -> Iterator[list[tuple[int, Response | Exception]]]:
        self.batched.append(len(requests))
        time.sleep(0.05)
        results: list[tuple[int, Response | Exception]] = []
        for at in range(len(requests)):
            number = next(self.count)
            usage = Usage(input_tokens=1, output_tokens=1)
            message = Message.assistant([TextPart(f"answer {number}")])
            done = Response(id=None, model="test/m", message=message, finish_reason="stop", usage=usage)
            results.append((at, dspy.LMServerError("down") if number < self.fails else done))
        yield results


def test_equal_calls_of_waves_at_once_are_billed_once_and_replayed_alike(ledger: Ledger) -> None:
    engine = Counting()
    lm = dspy.LM("test/m", engine=engine, cache=False, max_tokens=8)
    program = Generate("text -> out", "Go.")
    rows = [f"text {number % 64}" for number in range(192)]
    fresh, resumed = meter(ledger), meter(ledger)

    def answers(metered: Meter) -> list[str]:
        wrapped = metered.wrap(lm)
        with dspy.context(lm=wrapped, disable_history=True):
            return list(in_order(wrapped, rows, lambda row: str(program(text=row).out), 8))

    first = answers(fresh)

    assert first == first[:64] * 3
    assert len(set(first)) == 64 == len(ledger)
    assert (engine.batched, fresh.account.billed.calls, fresh.account.spent.calls) == ([64], 64, 192)
    assert answers(resumed) == first
    assert (engine.batched, resumed.account.billed.calls, resumed.account.spent.calls) == ([64], 0, 192)


def test_a_call_that_failed_elsewhere_is_asked_again_by_who_waited_for_it(ledger: Ledger) -> None:
    engine = Counting()
    engine.fails = 2
    lm = dspy.LM("test/m", engine=engine, cache=False)
    calls, metered = [Call(request(lm, name)) for name in "ab"], meter(ledger)

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: metered.ask(lm, calls), range(2)))

    failed, answered = sorted(both, key=lambda results: isinstance(results[0], Response))
    assert all(isinstance(result, dspy.LMServerError) for result in failed)
    assert {text(result) for result in answered} == {"answer 2", "answer 3"}
    assert len(ledger) == 2


def test_no_batch_is_run_once_the_time_is_over_and_those_run_are_kept(ledger: Ledger) -> None:
    engine = Halves()
    lm = dspy.LM("test/m", engine=engine, cache=False)
    calls = [Call(request(lm, str(number))) for number in range(20)]
    metered = Meter(ledger, Account(Budget(seconds=0.4), clock=engine.clock))
    with pytest.raises(BudgetExhausted, match="pass the budget's seconds"):
        metered.ask(lm, calls)
    assert len(ledger) == metered.account.spent.calls == 3
    assert metered.account.calls_left is None

    few = calls[: len(ledger) + 1]
    in_time = Meter(ledger, Account(Budget(seconds=0.1), clock=engine.clock))
    assert len(in_time.ask(lm, few)) == len(few), "the last batch is no reason to throw it away"


def test_failures_that_were_accepted_come_back_as_they_were_and_others_are_mended(tmp_path: Path) -> None:
    is_up = threading.Event()

    def moody(request: Request) -> str:
        if not is_up.is_set():
            raise LMInvalidRequestError("It is too long.")
        return "yes"

    lm = simulated(moody)
    calls = [Call(request(lm, text)) for text in ("one", "two")]
    first = Ledger(tmp_path / "ledger.sqlite")
    failing = meter(first)
    other = failing.within(Account(Budget()))
    told = [str(failing.ask(lm, calls[:1])[0]), str(other.ask(lm, calls[1:])[0])]
    failing.accept_failures()
    first.close()

    is_up.set()
    second = Ledger(tmp_path / "ledger.sqlite")
    again = meter(second)
    given_up, answered = again.ask(lm, calls)
    assert isinstance(given_up, LMInvalidRequestError)
    assert (str(given_up), text(answered)) == (told[0], "yes")
    assert (again.account.spent.calls, again.account.lost.calls) == (1, 0)
    second.close()


def test_no_more_calls_than_threads_are_unrecorded_however_many_meters_share_them(tmp_path: Path) -> None:
    open_calls, most, lock = set[str](), list[int](), threading.Lock()

    class Slow(Ledger):
        def write(self, answers: Sequence[tuple[Call, Answer]]) -> None:
            time.sleep(0.02)
            super().write(answers)
            with lock:
                open_calls.difference_update(call.key for call, _ in answers)

    def answer(request: Request) -> str:
        with lock:
            open_calls.add(Call(request).key)
            most.append(len(open_calls))
        return "yes"

    lm, slow = simulated(answer), Slow(tmp_path / "ledger.sqlite")
    first = meter(slow, threads=2)
    meters = [first, *(first.within(Account(Budget())) for _ in range(3))]
    with ThreadPoolExecutor(4) as pool:
        told = list(
            pool.map(lambda at: meters[at].ask(lm, [Call(request(lm, f"{at} {n}")) for n in range(6)]), range(4))
        )
    slow.close()

    assert [text(result) for results in told for result in results] == ["yes"] * 24
    assert max(most) == 2


def test_a_failure_in_a_batch_is_kept_like_any_other(tmp_path: Path) -> None:
    class Failing(Halves):
        def batches(self, requests: list[Request]) -> Iterator[list[tuple[int, Response | Exception]]]:
            self.asked = len(requests)
            yield [(at, LMServerError("out of memory")) for at in range(len(requests))]

    engine = Failing()
    ledger = Ledger(tmp_path / "ledger.sqlite")
    lm = dspy.LM("test/m", engine=engine, cache=False)
    metered = meter(ledger)
    metered.ask(lm, [Call(request(lm, "one"))])
    metered.accept_failures()
    one, two = metered.ask(lm, [Call(request(lm, "one")), Call(request(lm, "two"))])
    assert (type(one), str(one), type(two)) == (LMServerError, "out of memory", LMServerError)
    assert engine.asked == 1
    ledger.close()


def test_what_can_not_be_sent_is_a_failure_of_its_own_call_and_costs_nothing(
    ledger: Ledger, server: ChatServer
) -> None:
    lm = server.lm(max_tokens=5)
    metered = meter(ledger, Budget(tokens=10_000))
    half, whole = metered.ask(lm, [Call(request(lm, said, max_tokens=5)) for said in ("half a \ud83d", "whole")])
    assert isinstance(half, LMInvalidRequestError)
    assert "It can't be sent: " in str(half)
    assert text(whole) == "WHOLE"
    assert (server.count, metered.account.lost.tokens) == (1, 0)


def test_ctrl_c_while_many_are_asked_ends_their_waits(
    ledger: Ledger, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.inject(Faults(kinds=("rate_limit_after",), retry_after=60))
    metered, lm, start = meter(ledger, threads=2), server.lm(), time.monotonic()
    ask_safely = metered._ask_safely

    def interrupted(lm: dspy.LM, call: Call) -> Response | Exception:
        if call.sample == 0:
            while not server.count:
                time.sleep(0.01)
            raise KeyboardInterrupt
        return ask_safely(lm, call)

    monkeypatch.setattr(metered, "_ask_safely", interrupted)
    with pytest.raises(KeyboardInterrupt):
        metered.ask(lm, [Call(request(lm, "one"), sample) for sample in (0, 1, 2, 3)])
    assert time.monotonic() - start < 30
