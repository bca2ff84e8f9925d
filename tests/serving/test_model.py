"""The model behind a served program: counted, bounded, and asked in batches where it can be."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import dspy
import pytest
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from preceptor.errors import InputTooLong
from preceptor.modules import Classify
from preceptor.serving.model import Tally, Together, counting, served
from preceptor.testing import simulated


class Batching:
    """An engine that answers batches, once it is let go; it notes which requests came together."""

    supports_choices = False

    def __init__(self) -> None:
        self.together = list[list[str]]()
        self.free = threading.Event()
        self.began = threading.Event()

    def complete(self, request: Request) -> Response:
        raise AssertionError("it is asked in batches only")

    def count_tokens(self, request: Request) -> int:
        return 1

    def batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Response | Exception]]]:
        self.together.append([request.messages[-1].text or "" for request in requests])
        self.began.set()
        assert self.free.wait(60)
        for at, request in enumerate(requests):
            text = request.messages[-1].text or ""
            yield [(at, InputTooLong("too long") if text == "long" else answer(text.upper()))]


def answer(text: str) -> Response:
    """Return an answer."""
    message = Message.assistant([TextPart(text)])
    return Response(
        id=None, model="m", message=message, finish_reason="stop", usage=Usage(input_tokens=1, output_tokens=1)
    )


def request(text: str) -> Request:
    """Return a request."""
    return Request(model="m", messages=(Message.user(text),))


def engine_of(lm: dspy.LM) -> Any:
    """Return a model's engine; DSPy says it may be a name, too."""
    return lm.engine


def test_requests_that_come_while_an_engine_is_busy_are_its_next_batch() -> None:
    engine = Batching()

    async def ask() -> list[Any]:
        door = Together(engine)
        first = asyncio.create_task(door.complete(request("a")))
        await asyncio.to_thread(engine.began.wait, 60)
        others = [asyncio.create_task(door.complete(request(text))) for text in ("b", "long", "c")]
        await asyncio.sleep(0)
        engine.free.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    one, two, refused, three = asyncio.run(ask())

    assert engine.together == [["a"], ["b", "long", "c"]]
    assert [each.message.text for each in (one, two, three)] == ["A", "B", "C"]
    assert isinstance(refused, InputTooLong)


def test_who_gave_up_is_asked_for_no_more_and_an_engine_that_breaks_answers_the_next() -> None:
    engine = Batching()

    async def ask() -> tuple[Any, Any]:
        door = Together(engine)
        first = asyncio.create_task(door.complete(request("a")))
        await asyncio.to_thread(engine.began.wait, 60)
        given_up = asyncio.create_task(door.complete(request("b")))
        await asyncio.sleep(0)
        given_up.cancel()
        engine.batches, whole = broken, engine.batches  # type: ignore[method-assign]
        engine.free.set()
        await first
        with pytest.raises(ZeroDivisionError):
            await door.complete(request("c"))
        engine.batches = whole  # type: ignore[method-assign]
        return await door.complete(request("d")), given_up.cancelled()

    def broken(requests: Sequence[Request]) -> Iterator[list[tuple[int, Response | Exception]]]:
        raise ZeroDivisionError

    last, was_cancelled = asyncio.run(ask())

    assert last.message.text == "D"
    assert was_cancelled
    assert engine.together == [["a"], ["d"]]


def test_a_program_that_blocks_shares_batches_with_the_others() -> None:
    engine = Batching()
    lm = served(dspy.LM("batching/model", engine=engine, cache=False), 10)

    async def ask() -> list[Any]:
        tally = Tally()
        with counting(tally):
            tasks = [asyncio.create_task(asyncio.to_thread(engine_of(lm).complete, request(text))) for text in "abc"]
            await asyncio.to_thread(engine.began.wait, 60)
            engine.free.set()
            found = await asyncio.gather(*tasks)
        assert (tally.calls, tally.input_tokens, tally.output_tokens, tally.dollars) == (3, 3, 3, 0.0)
        return found

    assert [each.message.text for each in asyncio.run(ask())] == ["A", "B", "C"]
    assert sorted(text for batch in engine.together for text in batch) == ["a", "b", "c"]


def test_a_model_is_told_apart_by_nothing_but_its_bound() -> None:
    lm = simulated(lambda request: "x")
    made = served(lm, 10)
    assert (made.model, made.kwargs["max_tokens"], made.kwargs["temperature"]) == (lm.model, 64, 0.0)
    assert engine_of(made).lm is lm


def test_an_unknown_price_is_none_and_a_known_one_is_summed() -> None:
    async def priced(*dollars: float | None) -> float | None:
        tally = Tally()
        for each in dollars:
            tally.add(answer("x"), 1, 1, each)
        return tally.dollars

    assert asyncio.run(priced(0.25, 0.5)) == 0.75
    assert asyncio.run(priced(0.25, None, 0.5)) is None


def test_the_small_model_answers_clients_together_with_log_probabilities(smollm: dspy.LM) -> None:
    program = Classify("text -> label: Literal['good', 'bad']", "Judge the review.")
    texts = ["Lovely.", "Awful.", "Good fun.", "I slept."]

    async def ask() -> list[Any]:
        lm = served(smollm, 10)
        with dspy.context(lm=lm, disable_history=True, trace=None):
            return await asyncio.gather(*(program.acall(text=text) for text in texts))

    found = asyncio.run(ask())
    with dspy.context(lm=smollm):
        alone = [program(text=text) for text in texts]
    assert [each.label for each in found] == [each.label for each in alone]
    assert all(set(each.logprobs) == {"good", "bad"} for each in found)


def test_what_a_model_thought_is_counted_where_its_provider_counts_it_apart() -> None:
    thought = dataclasses.replace(answer("yes"), usage=Usage(input_tokens=7, output_tokens=1, reasoning_tokens=90))

    async def counted(name: str) -> tuple[int, int]:
        tally = Tally()
        engine_of(served(dspy.LM(name, api_key="none", cache=False), 10))._counted(thought, tally)
        return tally.input_tokens, tally.output_tokens

    assert asyncio.run(counted("gemini/gemini-2.5-flash")) == (7, 91)
    assert asyncio.run(counted("openai/gpt-4o-mini")) == (7, 1)  # whose output tokens hold the thoughts


def test_the_weights_of_a_served_model_are_read_before_a_request() -> None:
    class Late(Batching):
        loaded = False

        def load(self) -> None:
            self.loaded = True

    engine = Late()
    served(dspy.LM("late", engine=engine), 9)
    assert engine.loaded
