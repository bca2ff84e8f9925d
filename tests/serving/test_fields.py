"""Which fields a served program answers with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dspy
import pytest

from preceptor.lm.adapter import declare
from preceptor.modules import Classify
from preceptor.serving.fields import answered, is_open


class Own(dspy.Module):
    def __init__(self) -> None:
        self.ask = dspy.Predict("text -> label")


def best_of(module: dspy.Module) -> dspy.Module:
    return dspy.BestOfN(module, N=2, reward_fn=lambda given, answer: 1.0, threshold=1.0)


def last_word(text: str) -> str:
    """Return the last word."""
    return text.split()[-1]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (Own(), True),
        (best_of(best_of(Own())), True),
        (best_of(dspy.Predict("text -> label")), False),
        (dspy.ReAct(declare("text -> label"), tools=[last_word]), False),
        (Classify("text -> label: Literal['a', 'b']"), False),
    ],
)
def test_a_program_of_the_users_class_is_open(program: dspy.Module, expected: bool) -> None:
    assert is_open(program) is expected


@pytest.mark.parametrize(
    ("names", "open_one", "expected"),
    [
        (["label"], False, {"label": "a"}),
        (["other"], False, {"label": "a", "sources": ["x"]}),
        (["label"], True, {"label": "a", "sources": ["x"]}),
        (["label", "route"], True, {"label": "a", "sources": ["x"], "route": "north"}),
    ],
)
def test_an_open_program_answers_with_all_but_how_it_came_about(
    names: list[str], open_one: bool, expected: Mapping[str, Any]
) -> None:
    found = {"label": "a", "sources": ["x"], "route": "north", "logprobs": {"a": -1.0}}

    assert answered(names, found, is_open=open_one) == expected
