from __future__ import annotations

import dspy
import pytest
from dspy.lm15 import Message, Request

from preceptor.leaks import copied
from preceptor.lm.seam import predictors
from preceptor.testing import toy


def answers(models: toy.Models, program: dspy.Module, rows: list[dspy.Example]) -> list[str]:
    with dspy.context(lm=models.lm):
        return [str(program(**row.inputs()).label) for row in rows]


@pytest.mark.parametrize("kind", [toy.Sorter, toy.Chain, toy.Twice])
def test_under_the_right_instruction_alone_every_program_is_right(kind: type[dspy.Module]) -> None:
    program, rows = kind(), toy.rows(4, start=7)
    models = toy.Models(toy.answer, toy.right)

    assert [row.label for row in rows] == ["no", "yes", "no", "yes"]
    assert answers(models, program, rows) == ["no"] * 4
    for _, predictor in predictors(program):
        predictor.signature = predictor.signature.with_instructions(f"Mind: {toy.RIGHT}")
    assert answers(models, program, rows) == ["no", "yes", "no", "yes"]


def test_typed_rows_are_answered_by_records() -> None:
    models, rows = toy.Models(toy.typed_answer, toy.right), toy.typed(toy.rows(2))

    with dspy.context(lm=models.lm):
        found = [toy.Sorter(toy.Sorting, toy.RIGHT)(**row.inputs()) for row in rows]

    assert [row.hint for row in rows] == ["Look closely.", None]
    assert [prediction.record.label for prediction in found] == ["yes", "no"]
    assert [toy.is_right(row, prediction) for row in rows for prediction in found] == [True, False, False, True]


def test_what_models_took_is_added_up_by_hand_made_prices() -> None:
    begun: list[int] = []
    models = toy.Models(lambda request: "one two", lambda request: "three", on_call=begun.append)

    models.lm("a b c")
    models.proposer("d")
    models.lm("e")

    assert begun == [1, 2, 3]
    assert models.spent == {"calls": 3, "tokens": 10, "dollars": pytest.approx((4 * 1 + 4 * 4 + 0.2 + 0.8) / 1e6)}
    assert [request.messages[0].text for request in models.tasks] == ["a b c", "e"]


def test_a_call_that_fails_took_nothing() -> None:
    def refuse(call: int) -> None:
        raise ConnectionError("no route")

    models = toy.Models(toy.answer, toy.right, on_call=refuse)
    with pytest.raises(dspy.LMError, match="no route"):
        models.lm("a")
    assert models.spent["calls"] == 0


def request(prompt: str, system: str | None = None) -> Request:
    return Request(model="simulated/writer", messages=(Message.user(prompt),), system=system)


def test_proposers_write_what_they_are_for() -> None:
    prompts = [request(f"Write {n}.") for n in range(60)]

    assert len({toy.unheard(one) for one in prompts}) == 60
    assert 10 < sum(toy.lucky(one) == toy.RIGHT for one in prompts) < 30
    assert toy.obedient(request(f"Text: {toy.orders(1)[0].text}")) == toy.ORDER
    assert toy.obedient(request("Text: row 1 no")).startswith("Decide by rule ")


def test_rows_of_orders_and_letters_hold_what_a_guard_looks_for() -> None:
    assert copied(toy.ORDER, [row.text for row in toy.orders(3)]) == toy.ORDER.rstrip(".")
    assert all(len(row.text.split()) > 12 for row in toy.letters(3))


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()])
def test_a_reply_fills_dspys_output_fields(adapter: dspy.Adapter) -> None:
    models = toy.Models(toy.answer, lambda one: toy.reply(one, "Sort well."))
    with dspy.context(lm=models.proposer, adapter=adapter):
        prediction = dspy.Predict("instruction -> better, prefix")(instruction="Sort.")

    assert (prediction.better, prediction.prefix) == ("Sort well.", "Sort well.")


def test_a_reply_to_a_plain_question_is_bare() -> None:
    assert toy.reply(request("Write."), "Sort well.") == "Sort well."
    assert toy.reply(request("Write.", "Be brief."), "Sort.") == "Sort."
