from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest
from dspy.lm15 import Message, Request

from preceptor.modules import Classify
from preceptor.testing import asked, coin_flip, prompt, scripted, simulated, system

LABELS = ["yes", "no"]


def flips(lm: dspy.LM, instructions: str, rows: int) -> list[str]:
    program = Classify("text -> label: Literal['yes', 'no']", instructions)
    with dspy.context(lm=lm):
        return [str(program(text=f"row {row}").label) for row in range(rows)]


def test_a_scripted_model_answers_in_order_and_fails_when_asked_once_too_often() -> None:
    lm = scripted(["one", "two"])

    assert [lm("a"), lm("b")] == [["one"], ["two"]]
    with pytest.raises(dspy.LMError, match=r"2 answers scripted, asked once more: 'c'"):
        lm("c")
    assert [prompt(request) for request in asked(lm)] == ["a", "b", "c"]


def test_a_simulated_model_sees_the_whole_request() -> None:
    lm = simulated(lambda request: f"{system(request)}/{prompt(request)}/{request.config.temperature}")
    request = Request(model=lm.model, messages=(Message.user("hi"),), system="Be brief.")

    assert lm(request).message.text == "Be brief./hi/None"
    assert lm("ho", temperature=0.5) == ["/ho/0.5"]


def test_tokens_are_counted_as_words() -> None:
    lm = simulated(lambda request: "three words now")

    usage = lm(Request(model=lm.model, messages=(Message.user("c d e"),), system="a b")).usage

    assert (usage.input_tokens, usage.output_tokens) == (5, 3)


def test_a_copy_of_a_simulated_model_shares_its_requests() -> None:
    lm = simulated(lambda request: "ok")
    copy.deepcopy(lm)("hi")

    assert [prompt(request) for request in asked(lm)] == ["hi"]


def test_no_request_is_lost_between_threads() -> None:
    lm = simulated(lambda request: prompt(request))

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: lm(f"row {n}")[0], range(200)))

    assert answers == [f"row {n}" for n in range(200)]
    assert sorted(prompt(request) for request in asked(lm)) == sorted(answers)


def test_a_coin_has_both_sides_under_every_instruction() -> None:
    for instructions in ("Guess.", "Say yes.", "Answer with the text's mood."):
        share = flips(coin_flip(LABELS), instructions, 200).count("yes") / 200
        assert 0.4 < share < 0.6, instructions


def test_a_coin_falls_the_same_way_for_the_same_request_and_seed() -> None:
    first = flips(coin_flip(LABELS, seed=1), "Guess.", 40)

    assert flips(coin_flip(LABELS, seed=1), "Guess.", 40) == first
    assert flips(coin_flip(LABELS, seed=2), "Guess.", 40) != first
    assert flips(coin_flip(LABELS, seed=1), "Guess well.", 40) != first


def test_a_coin_asked_for_instructions_never_writes_the_same_twice() -> None:
    lm = coin_flip(LABELS)
    texts = [lm("Write an instruction.")[0] for _ in range(50)]

    assert len(set(texts)) == 50
    assert all(text.startswith("Decide by rule ") for text in texts)


def test_requests_of_another_kind_of_model_cant_be_listed() -> None:
    with pytest.raises(AssertionError, match=r"asked\(\) is for the models of preceptor\.testing"):
        asked(dspy.LM("openai/gpt", api_key="none"))
