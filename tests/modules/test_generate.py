from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

import dspy
import pytest

from preceptor.lm.adapter import declare
from preceptor.lm.budget import Account, Budget
from preceptor.lm.ledger import Ledger
from preceptor.lm.meter import Meter
from preceptor.modules import Generate
from preceptor.program import candidate_of
from preceptor.testing import asked, prompt, simulated, system


def test_the_bare_reply_is_the_answer() -> None:
    lm = simulated(lambda request: " A short text.\nOf two lines. ")

    with dspy.context(lm=lm):
        prediction = Generate("text, length: int -> summary", "Sum it up.")(text="Long.", length=2)

    [request] = asked(lm)
    assert (system(request), prompt(request)) == ("Sum it up.", "text: Long.\nlength: 2")
    assert prediction.summary == "A short text.\nOf two lines."


@pytest.mark.parametrize(("kind", "reply", "value"), [("int", "1,200.", 1200), ("float", "2.5", 2.5)])
def test_a_number_is_read_as_one(kind: str, reply: str, value: float) -> None:
    with dspy.context(lm=simulated(lambda request: reply)):
        assert Generate(f"text -> n: {kind}")(text="hi").n == value


@pytest.mark.parametrize(("kind", "reply"), [("int", "a dozen"), ("str", "  "), ("float", "")])
def test_a_reply_of_another_form_is_unparsable(kind: str, reply: str) -> None:
    lm = simulated(lambda request: reply)
    with dspy.context(lm=lm), pytest.raises(dspy.AdapterParseError, match=r"DirectAdapter|reply"):
        Generate(f"text -> n: {kind}")(text="hi")
    assert len(asked(lm)) == 1


def test_several_outputs_are_answered_in_json() -> None:
    lm = simulated(lambda request: '{"title": "A", "tags": ["x", "y"]}')

    with dspy.context(lm=lm):
        prediction = Generate("text -> title, tags: list[str]", "Describe.")(text="hi")

    assert (prediction.title, prediction.tags) == ("A", ["x", "y"])
    assert len(asked(lm)) == 1
    assert "Describe." in system(asked(lm)[0])


def test_the_asynchronous_call_gives_the_same(tmp_path: Path) -> None:
    async def run(program: Generate) -> Any:
        return await program.acall(text="hi")

    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        lm = Meter(ledger, Account(Budget())).wrap(simulated(lambda request: "Short."))
        with dspy.context(lm=lm):
            assert asyncio.run(run(Generate("text -> summary"))).summary == "Short."


def test_the_signatures_own_instructions_stay_without_others() -> None:
    signature = declare("text -> summary", "Be brief.")

    assert dict(candidate_of(Generate(signature)).instructions) == {"predict": "Be brief."}
    assert dict(candidate_of(Generate(signature, "Be long.")).instructions) == {"predict": "Be long."}
