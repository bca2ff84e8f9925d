"""Metering: every call of a wrapped `dspy.LM` is reserved, looked up in the ledger, recorded and counted.

It works inside the engine, where threads can't lose it and a budget can stop a run: DSPy's usage
tracker is empty once evaluation uses threads, and exceptions in its callbacks are swallowed.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias, cast

import dspy
from dspy.lm15 import Request, Response
from dspy.utils.exceptions import LMTimeoutError

from preceptor.errors import BudgetExhausted, ConfigError, InputTooLong, LMFailed, PreceptorError
from preceptor.lm import prices, usage
from preceptor.lm.budget import Account, Budget, Cost
from preceptor.lm.claims import Claims
from preceptor.lm.cohort import current
from preceptor.lm.dispatch import (
    BROKEN_RETRIES,
    CUT_SHORT,
    FATAL,
    TOO_LATE,
    BrokenAnswer,
    Door,
    Limiter,
    NotSent,
    Patience,
    as_it_failed,
    failure_of,
    hide_secrets,
    may_be_billed,
    reason,
)
from preceptor.lm.ended import noting
from preceptor.lm.ledger import Answer, Call, Ledger, drawn, one_of_several
from preceptor.lm.redaction import CONNECTION, refuse_secrets
from preceptor.lm.rollout import RolloutLM
from preceptor.lm.seam import Around, InThread, given_settings
from preceptor.lm.soft import EmbeddingSpace

Result: TypeAlias = Response | Exception


class BatchingEngine(Protocol):
    """An engine that answers many requests at once."""

    supports_choices: bool

    def batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Result]]]:
        """Yield (index, answer or error) pairs after each executed batch."""
        ...

    def count_tokens(self, request: Request) -> int:
        """Return the length of a request's prompt in tokens."""
        ...


class Meter:
    """Counts and records the calls of any number of language models.

    Args:
        ledger: Where answers are recorded and replayed from.
        account: What may be spent.
        threads: Calls in flight at a time, for models that answer one request a call.
        patience: Deadline and retries of those calls.
    """

    def __init__(self, ledger: Ledger, account: Account, *, threads: int = 8, patience: Patience | None = None) -> None:
        self.ledger = ledger
        self.account = account
        self.threads = threads
        self.patience = patience or Patience()
        self._claims = Claims()
        self._doors: dict[dspy.LM, Door] = {}
        self._limiters: dict[tuple[str, str], Limiter] = {}
        self._lock = threading.Lock()
        self._failed: dict[str, tuple[str, str]] = {}

    def within(self, account: Account) -> Meter:
        """Return a meter that counts on another account; recorded answers and calls in flight are shared."""
        other = copy.copy(self)
        other.account = account
        other._failed = {}
        return other

    def accept_failures(self) -> None:
        """Let the calls that failed for good so far fail alike whenever the run is made again; none is asked anew.

        For a round whose few failures are tolerated: were they mended in a later process, it would go another way.
        A round that fails as a whole isn't accepted, so that its calls can succeed once the model is back.
        """
        with self._lock:
            failed = dict(self._failed)
            self._failed.clear()
        if failed:
            self.ledger.give_up(failed)

    def wrap(self, lm: dspy.LM) -> dspy.LM:
        """Return a `dspy.LM` of the same name and settings whose calls are metered."""
        if isinstance(lm.engine, MeteredEngine):
            if lm.engine.meter is self:
                return lm
            lm = lm.engine.lm
        engine = MeteredEngine(lm, self)
        return RolloutLM(
            lm.model,
            model_type=cast("Any", lm.model_type),
            engine=engine,
            async_engine=InThread(engine),
            cache=False,
            num_retries=0,
            **given_settings(lm),
        )

    def check(self, lm: dspy.LM) -> None:
        """Raise unless calls can be recorded, and what one may cost be bounded; see `check`."""
        check(lm, self.account.budget)

    def give_up(self) -> None:
        """Send no more to providers: calls that wait for a place or a retry fail at once."""
        with self._lock:
            for limiter in self._limiters.values():
                limiter.close()

    def ask(self, lm: dspy.LM, calls: Sequence[Call]) -> list[Result]:
        """Answer calls, from the ledger where it has them; failed calls come back as errors.

        Raises:
            BudgetExhausted: If the budget can't pay for all of them. Batching models are then asked none of
                the missing ones; with others, what was answered is recorded.
        """
        lm = _unwrapped(lm)
        engine = batching_engine(lm)
        if engine is not None:
            return self._ask_together(lm, engine, calls)
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                return list(pool.map(lambda call: self._ask_safely(lm, call), calls))
            except BaseException as error:
                if not isinstance(error, BudgetExhausted):  # the confirmation is still to come
                    self.give_up()
                raise

    def ask_one(self, lm: dspy.LM, call: Call) -> Response:
        """Answer one call; equal calls in other threads wait and share its answer.

        Attempts that fail in a way that may pass are made again, as `patience` says.

        Raises:
            BudgetExhausted: If the budget can't pay for it, or its seconds end before there is an answer.
            LMFailed: If no call to this model can succeed, because of its key, name or price plan.
            dspy.LMError: If this call failed for good.
        """
        with self._claims.of([call.key]):
            answer = self.ledger.find(call.key)
            if answer is not None:
                self._replay(lm, call, answer)
                return answer.response
            failure = self.ledger.given_up(call.key)
            if failure is not None:
                raise as_it_failed(*failure)
            return self._send(lm, call)

    def _send(self, lm: dspy.LM, call: Call) -> Response:
        door, broken = self._door(lm), 0
        for attempt in itertools.count():
            try:
                return self._attempt(lm, door, call, takes_broken=broken == BROKEN_RETRIES)
            except FATAL as error:
                raise LMFailed(f"{lm.model} can't be asked: {reason(hide_secrets(error, lm))}.") from None
            except BrokenAnswer:
                broken += 1
            except dspy.LMError as error:
                if isinstance(error.__cause__, PreceptorError):  # an engine of ours says what is wrong with the input
                    raise error.__cause__ from None
                if not door.patience.allows(attempt, error):
                    raise self._noted(call, hide_secrets(error, lm)) from None
                door.pause(attempt, error, self.account.seconds_to_go)
        raise AssertionError("unreachable: the loop above ends by returning or raising")

    def _noted(self, call: Call, error: dspy.LMError) -> dspy.LMError | BudgetExhausted:
        """Return what a failed call fails with, noted as for good unless it wasn't sent or the time was over."""
        if isinstance(error, LMTimeoutError) and self.account.seconds_to_go == 0:
            return BudgetExhausted(CUT_SHORT)
        if not isinstance(error, NotSent):
            with self._lock:
                self._failed[call.key] = failure_of(error)
        return error

    def _attempt(self, lm: dspy.LM, door: Door, call: Call, *, takes_broken: bool) -> Response:
        """Send a call once; record its answer, broken or not where `takes_broken`, or what its failure may cost."""
        most = self._bound(lm, call.request)
        self.account.reserve(most)
        start = time.perf_counter()

        def recorded(response: Response) -> Answer:
            answer = self._answer(lm, call, response, time.perf_counter() - start)
            self.ledger.write([(call, answer)])
            return answer

        try:
            answer = door.attempt(call.request, recorded, self.account.seconds_to_go, takes_broken=takes_broken)
        except BaseException as error:
            self._lose(lm, call, most, error)
            raise
        self.account.settle(most, Cost(1, answer.tokens, answer.dollars), billed=True)
        return answer.response

    def _lose(self, lm: dspy.LM, call: Call, most: Cost, error: BaseException) -> None:
        if isinstance(error, (NotSent, BudgetExhausted)):
            self.account.settle(most, Cost(), billed=True)
            return
        cost = Cost(1)
        if isinstance(error, BrokenAnswer):
            answer = self._answer(lm, call, error.response, 0.0)
            cost = Cost(1, answer.tokens, answer.dollars)
        elif may_be_billed(error):
            cost = most
        self.account.lose(most, cost)
        if isinstance(error, dspy.LMError):
            self.ledger.write_failure(call, reason(hide_secrets(error, lm)), cost.tokens, cost.dollars)

    def _door(self, lm: dspy.LM) -> Door:
        with self._lock:
            if lm not in self._doors:
                place = (lm.model, str(lm.kwargs.get("api_base") or lm.kwargs.get("base_url")))
                limiter = self._limiters.setdefault(place, Limiter(self.threads, longest=self.patience.timeout))
                self._doors[lm] = Door.to(lm, limiter, self.patience)
            return self._doors[lm]

    def _ask_safely(self, lm: dspy.LM, call: Call) -> Result:
        try:
            return self.ask_one(lm, call)
        except (dspy.LMError, InputTooLong) as error:
            return error

    def _ask_together(self, lm: dspy.LM, engine: BatchingEngine, calls: Sequence[Call]) -> list[Result]:
        """Answer calls; those that others are asking now are waited for, once ours are answered."""
        found: dict[str, Result] = {}
        left = list(calls)
        while left:
            with self._claims.of([call.key for call in left]) as keys:
                self._ask_claimed(lm, engine, [call for call in left if call.key in keys], found)
            left = [call for call in left if call.key not in keys]
        return [found[call.key] for call in calls]

    def _ask_claimed(
        self, lm: dspy.LM, engine: BatchingEngine, calls: Sequence[Call], found: dict[str, Result]
    ) -> None:
        missing: dict[str, Call] = {}
        repeated: list[Call] = []
        for call in calls:
            if call.key in missing:
                repeated.append(call)
                continue
            answer = self.ledger.find(call.key)
            if answer is not None:
                self._replay(lm, call, answer)
                found[call.key] = answer.response
            elif (failure := self.ledger.given_up(call.key)) is not None:
                found[call.key] = as_it_failed(*failure)
            else:
                missing[call.key] = call
        if missing:
            self._run(lm, engine, list(missing.values()), found)
        for call in repeated:  # counts as it will when the run is resumed
            answer = self.ledger.find(call.key)
            if answer is not None:
                self._replay(lm, call, answer)

    def _run(self, lm: dspy.LM, engine: BatchingEngine, calls: list[Call], found: dict[str, Result]) -> None:
        bounds = [self._bound(lm, call.request) for call in calls]
        reserved = sum(bounds, Cost())
        self.account.reserve(reserved)
        start = time.perf_counter()
        try:
            for batch in engine.batches([call.request for call in calls]):
                share = (time.perf_counter() - start) / len(batch)
                most = sum((bounds[index] for index, _ in batch), Cost())
                answers = [
                    (calls[index], self._answer(lm, calls[index], result, share))
                    for index, result in batch
                    if isinstance(result, Response)
                ]
                self.ledger.write(answers)
                found.update({calls[index].key: result for index, result in batch})
                for call, error in [(calls[at], error) for at, error in batch if isinstance(error, dspy.LMError)]:
                    self._noted(call, error)
                spent = sum((Cost(1, answer.tokens, answer.dollars) for _, answer in answers), Cost())
                self.account.settle(most, spent, billed=True)
                reserved -= most
                if reserved.calls and self.account.seconds_left == 0:
                    raise BudgetExhausted(TOO_LATE)
                start = time.perf_counter()
        finally:
            self.account.settle(reserved, Cost(), billed=True)

    def _bound(self, lm: dspy.LM, request: Request) -> Cost:
        """Return the most one call can cost in the budget's units."""
        budget = self.account.budget
        if budget.tokens is None and budget.dollars is None:
            return Cost(1)
        return usage.bound(lm, request, batching_engine(lm), budget.prices)

    def _answer(self, lm: dspy.LM, call: Call, response: Response, seconds: float) -> Answer:
        took = usage.cost(lm, call.request, response, self.account.budget.prices)
        return Answer(response, took.tokens, took.dollars, seconds)

    def _replay(self, lm: dspy.LM, call: Call, answer: Answer) -> None:
        self.account.replay(self._bound(lm, call.request), Cost(1, answer.tokens, answer.dollars))


class MeteredEngine(Around):
    """The engine of a wrapped LM: passes each request through the meter to the caller's own LM."""

    def __init__(self, lm: dspy.LM, meter: Meter) -> None:
        super().__init__(lm)
        self.meter = meter

    @property
    def embedding_space(self) -> EmbeddingSpace | None:
        """As the wrapped LM's engine says; None if it takes no soft tokens."""
        return getattr(self.lm.engine, "embedding_space", None)

    def seeded(self, request: Request) -> Request:
        """Return the request with a seed by its draw, where a model in this process would answer every draw alike."""
        config, engine = request.config, self.lm.engine
        is_free = config.seed is None and bool(config.temperature) and drawn() > 0
        if not is_free or isinstance(engine, str) or "seed" not in getattr(engine, "supported_params", ()):
            return request
        return dataclasses.replace(request, config=dataclasses.replace(config, seed=drawn()))

    def complete(self, request: Request) -> Response:
        """Answer one request, together with the rest of its cohort where there is one."""
        with noting(), one_of_several():
            call, seat = Call(self.seeded(request), drawn()), current()
            if seat is None or batching_engine(self.lm) is None:
                return self.meter.ask_one(self.lm, call)
            cohort, row = seat
            return cast("Response", cohort.ask(row, (self, call)))


def ask_cohort(questions: list[tuple[MeteredEngine, Call]]) -> list[Result]:
    """Answer the questions of a cohort, engine by engine, in the order of its rows."""
    answers: list[Result | None] = [None] * len(questions)
    engines = list(dict.fromkeys(engine for engine, _ in questions))
    for engine in engines:
        places = [place for place, (asked, _) in enumerate(questions) if asked is engine]
        results = engine.meter.ask(engine.lm, [questions[place][1] for place in places])
        for place, result in zip(places, results, strict=True):
            answers[place] = result
    return cast("list[Result]", answers)


def check(lm: dspy.LM, budget: Budget) -> None:
    """Raise unless a model's calls can be recorded, and what one may cost be bounded in the budget's units.

    Raises:
        ConfigError: If tokens or dollars are budgeted and the model lacks `max_tokens` or a known price, or
            if a secret is among the settings that are recorded with each call.
    """
    lm = _unwrapped(lm)
    refuse_secrets(f"The model {lm.model}", lm.kwargs, CONNECTION)
    if budget.tokens is None and budget.dollars is None:
        return
    if not (lm.kwargs.get("max_tokens") or lm.kwargs.get("max_completion_tokens")):
        raise ConfigError(
            f"A budget of tokens or dollars needs a bound per call: dspy.LM({lm.model!r}, max_tokens=512)."
        )
    if budget.dollars is not None:
        prices.check(lm, budget.prices)


def give_up(lm: dspy.LM) -> None:
    """Stop the calls of a metered LM that wait for a place or a retry."""
    if isinstance(lm.engine, MeteredEngine):
        lm.engine.meter.give_up()


def _unwrapped(lm: dspy.LM) -> dspy.LM:
    """Return the caller's own LM, so that no call passes the meter twice."""
    return lm.engine.lm if isinstance(lm.engine, MeteredEngine) else lm


def batching_engine(lm: dspy.LM) -> BatchingEngine | None:
    """Return the engine of an LM that answers many requests at once, else None."""
    engine = lm.engine
    if isinstance(engine, MeteredEngine):
        return batching_engine(engine.lm)
    return cast("BatchingEngine", engine) if callable(getattr(engine, "batches", None)) else None
