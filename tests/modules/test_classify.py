from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest

from preceptor.errors import ConfigError
from preceptor.lm.budget import Account, Budget
from preceptor.lm.ledger import Ledger
from preceptor.lm.meter import Meter
from preceptor.modules import Classify
from preceptor.program import candidate_of
from preceptor.testing import asked, prompt, simulated, system


class Review(dspy.Signature):
    """Judge the review."""

    text: str = dspy.InputField()
    stars: Literal[1, 2, 3] = dspy.OutputField()


def test_one_call_shows_instructions_labels_and_fields() -> None:
    lm = simulated(lambda request: "spam")
    program = Classify("subject, text -> label: Literal['spam', 'mail']", "Is this spam?")

    with dspy.context(lm=lm):
        prediction = program(subject="Win", text="Click here")

    [request] = asked(lm)
    assert system(request) == "Is this spam?\n\nAnswer with exactly one of: spam, mail."
    assert prompt(request) == "subject: Win\ntext: Click here"
    assert prediction.label == "spam"


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("mail", "mail"),
        (" Spam.\n", "spam"),
        ('"SPAM"', "spam"),
        ("label: mail", "mail"),
        ("**mail**\nbecause it is personal", "mail"),
    ],
)
def test_a_label_is_recognized_in_a_reply_with_small_additions(reply: str, label: str) -> None:
    with dspy.context(lm=simulated(lambda request: reply)):
        assert Classify("text -> label: Literal['spam', 'mail']")(text="hi").label == label


@pytest.mark.parametrize("reply", ["perhaps", "spam or mail", "not spam"])
def test_another_reply_is_no_label(reply: str) -> None:
    lm = simulated(lambda request: reply)
    with dspy.context(lm=lm), pytest.raises(dspy.AdapterParseError, match="The reply is none of spam, mail"):
        Classify("text -> label: Literal['spam', 'mail']")(text="hi")
    assert len(asked(lm)) == 1


def test_labels_keep_their_type() -> None:
    with dspy.context(lm=simulated(lambda request: "2")):
        assert Classify(Review)(text="hm").stars == 2
    with dspy.context(lm=simulated(lambda request: "false")):
        assert Classify("text -> ok: bool")(text="hm").ok is False


def test_instructions_replace_those_of_the_signature_without_touching_its_class() -> None:
    assert dict(candidate_of(Classify(Review, "Count the stars.")).instructions) == {"predict": "Count the stars."}
    assert dict(candidate_of(Classify(Review)).instructions) == {"predict": "Judge the review."}
    assert Review.instructions == "Judge the review."


def test_the_asynchronous_call_gives_the_same(tmp_path: Path) -> None:
    async def run(program: Classify) -> Any:
        return await program.acall(text="hi")

    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        lm = Meter(ledger, Account(Budget())).wrap(simulated(lambda request: "mail"))
        with dspy.context(lm=lm):
            assert asyncio.run(run(Classify("text -> label: Literal['spam', 'mail']"))).label == "mail"


def test_the_callers_adapter_is_as_before_after_a_call() -> None:
    adapter = dspy.JSONAdapter()
    with dspy.context(lm=simulated(lambda request: "a"), adapter=adapter):
        Classify("text -> label: Literal['a', 'b']")(text="hi")
        assert dspy.settings.adapter is adapter


@pytest.mark.parametrize("signature", ["text -> label", "text -> n: int", "text -> a: bool, b: bool"])
def test_a_signature_without_labels_is_refused(signature: str) -> None:
    outputs = [part.split(":")[0].strip() for part in signature.split("->")[1].split(",")]
    with pytest.raises(
        ConfigError, match=r"^Classify needs one output that is a Literal .*or use Generate\.$"
    ) as error:
        Classify(signature)
    assert f"got {outputs}" in str(error.value)


def test_a_model_in_this_process_answers_asynchronously_too(smollm: dspy.LM) -> None:
    program = Classify("text -> label: Literal['spam', 'mail']", instructions="Is it spam?")

    async def ask() -> tuple[str, str]:
        with dspy.context(lm=smollm):
            return (await program.acall(text="Win a prize")).label, program(text="Win a prize").label

    later, now = asyncio.run(ask())
    assert later == now
