"""Rollouts are draws: asked anew once, and replayed as they were."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Config, Message, Request

from preceptor.lm.adapter import DirectAdapter
from preceptor.lm.budget import Account, Budget
from preceptor.lm.ledger import Ledger, drawing, drawn, rollout
from preceptor.lm.meter import Meter
from preceptor.testing import asked, simulated


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite")
    yield opened
    opened.close()


def metered(ledger: Ledger, lm: dspy.LM) -> dspy.LM:
    return Meter(ledger, Account(Budget())).wrap(lm)


def best(lm: dspy.LM, adapter: Any, wanted: str) -> str:
    """Return the best of five answers to a question."""

    def reward(inputs: Any, prediction: Any) -> float:
        return float(wanted in prediction.answer)

    several = dspy.BestOfN(dspy.Predict("question -> answer"), N=5, reward_fn=reward, threshold=1.0)
    with dspy.context(lm=lm, adapter=adapter):
        return str(several(question="Which?").answer)


@pytest.mark.parametrize("adapter", [DirectAdapter(), dspy.ChatAdapter()])
def test_rollouts_of_dspys_modules_are_asked_apart_and_replayed(ledger: Ledger, adapter: Any) -> None:
    told = (f"[[ ## answer ## ]]\nanswer {number}" for number in range(9))
    lm = simulated(lambda request: next(told))
    assert best(metered(ledger, lm), adapter, "answer 3").endswith("answer 3")
    assert len(asked(lm)) == 4
    assert best(metered(ledger, lm), adapter, "answer 3").endswith("answer 3")
    assert len(asked(lm)) == 4
    assert best(metered(ledger, lm), adapter, "answer 0").endswith("answer 0")


def test_a_rollout_can_be_asked_for_by_a_call_and_without_blocking(ledger: Ledger) -> None:
    told = iter("abcdef")
    lm = metered(ledger, simulated(lambda request: next(told)))
    asks = dspy.Predict("question -> answer")
    with dspy.context(lm=lm, adapter=DirectAdapter()):
        said = [asks(question="?", config={"rollout_id": number, "temperature": 1.0}).answer for number in (0, 1, 0, 1)]
        awaited = asks.acall(question="?", config={"rollout_id": 1, "temperature": 1.0})
        assert [*said, asyncio.run(awaited).answer] == ["a", "b", "a", "b", "b"]


def test_draws_of_rollouts_keep_apart_and_plain_ones_keep_their_numbers() -> None:
    numbers = {drawn()}
    with drawing(2):
        numbers.add(drawn())
        with rollout(1):
            numbers.add(drawn())
            with rollout(1), rollout(None):
                numbers.add(drawn())
    with rollout(2):
        numbers.add(drawn())
    assert numbers == {0, 2, 1_000_002, 2_000_000}
    assert drawn() == 0


def test_a_model_in_this_process_answers_each_draw_in_its_own_way(ledger: Ledger, smollm: dspy.LM) -> None:
    lm = metered(ledger, smollm)
    free = Config(temperature=1.5, max_tokens=12)
    asking = Request(model=lm.model, messages=(Message.user("Tell me of a colour."),), config=free)

    def told(request: Request) -> list[Any]:
        said: list[Any] = []
        for number in (0, 1, 2):
            with drawing(number):
                response: Any = lm(request)
            said.append(response.message.text)
        return said

    assert len(set(told(asking))) == 3
    seeded = Request(model=lm.model, messages=asking.messages, config=Config(temperature=1.5, max_tokens=12, seed=7))
    assert len(set(told(seeded))) == 1, "a seed of the caller's own is kept"


def answers_of(prediction: Any) -> list[str]:
    return list(prediction.completions.answer)


@pytest.mark.parametrize("adapter", [DirectAdapter(), dspy.ChatAdapter()])
def test_several_answers_asked_for_at_once_are_several_draws_and_replayed(ledger: Ledger, adapter: Any) -> None:
    told = (f"[[ ## answer ## ]]\nanswer {number}" for number in range(9))
    inner = simulated(lambda request: next(told))
    asks = dspy.Predict("question -> answer", n=3)
    lm = metered(ledger, inner)
    for asking in (lm, lm, lm.copy(n=3)):
        with dspy.context(lm=asking, adapter=adapter):
            answers = answers_of(asks(question="Which?"))
            awaited = answers_of(asyncio.run(asks.acall(question="Which?")))
        assert [answer[-8:] for answer in answers] == ["answer 0", "answer 1", "answer 2"]
        assert awaited == answers
    assert len(asked(inner)) == 3
