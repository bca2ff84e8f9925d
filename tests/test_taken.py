"""What a program takes, as the rows' reader and the server have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest

from preceptor.cli.inputs import fields_of, rows_of
from preceptor.lm.adapter import declare
from preceptor.modules import Classify
from preceptor.serving.fields import inputs_of
from preceptor.taken import taken


def search(query: str) -> str:
    """Return the query."""
    return query


def _always(given: Any, told: Any) -> float:
    del given, told
    return 1.0


def best_of(program: dspy.Module) -> dspy.Module:
    return dspy.BestOfN(program, N=2, reward_fn=_always, threshold=1.0)


class Named(dspy.Module):
    """A class of the user's, which says what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict("text, hint -> label")

    def forward(self, text: str, ticket: int, shown: int = 3) -> Any:
        return self.predict(text=text, hint=str(ticket)[:shown])


class Piped(dspy.Module):
    """Takes anything: what its predictors read and none writes."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = dspy.Predict("text, note: Optional[str] -> gist")
        self.sorts = dspy.Predict("gist -> label")

    def forward(self, **given: Any) -> Any:
        return self.sorts(gist=self.sums(**given).gist)


SIGNATURE = declare("text, size: int -> label", "Sort.")
MAKES: dict[str, Callable[[], dspy.Module]] = {
    "ReAct": lambda: dspy.ReAct(SIGNATURE, tools=[search]),
    "CodeAct": lambda: dspy.CodeAct(SIGNATURE, tools=[search]),
    "ProgramOfThought": lambda: dspy.ProgramOfThought(SIGNATURE),
    "ChainOfThought": lambda: dspy.ChainOfThought(SIGNATURE),
    "Classify": lambda: Classify("text, size: int -> label: Literal['a', 'b']"),
    "BestOfN": lambda: best_of(dspy.ReAct(SIGNATURE, tools=[search])),
    "Refine": lambda: dspy.Refine(best_of(dspy.Predict(SIGNATURE)), N=2, reward_fn=_always, threshold=1.0),
}


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:DeprecationWarning")
@pytest.mark.parametrize("name", MAKES)
def test_a_program_of_dspys_takes_the_inputs_of_its_own_signature(name: str, tmp_path: Path) -> None:
    program = MAKES[name]()
    path = tmp_path / "rows.csv"
    path.write_text("text,size,label\nhi,3,a\n", encoding="utf-8")

    [row] = rows_of(program, str(path))

    assert row.toDict() == {"text": "hi", "size": 3, "label": "a"}
    assert row.inputs().toDict() == {"text": "hi", "size": 3}
    assert inputs_of(program).model_json_schema()["required"] == ["text", "size"]


def test_what_forward_names_is_taken_by_name_and_so_inside_of_others() -> None:
    for program in (Named(), best_of(Named())):
        told = {name: (one.kind, one.is_needed) for name, one in taken(program).items()}
        assert told == {"text": (str, True), "ticket": (Any, True), "shown": (Any, False)}
        assert fields_of(program, {"text": "", "ticket": "", "answer": ""}) == (
            {"text": str, "ticket": Any},
            {"answer": Any},
        )


def test_what_one_predictor_writes_isnt_taken_where_forward_takes_anything() -> None:
    told = {name: (one.kind, one.is_needed) for name, one in taken(Piped()).items()}
    assert told == {"text": (str, True), "note": (str | None, False)}
