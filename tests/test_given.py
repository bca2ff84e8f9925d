"""What tells one compile from another; the checks are tested where they refuse, in `test_teleprompter`."""

from __future__ import annotations

from typing import Any

import dspy
import pytest

from preceptor.given import checked, parts_of
from preceptor.modules import Classify
from preceptor.teleprompters import APE

ROWS = [dspy.Example(text=f"row {n}", label=["spam", "mail"][n % 2]).with_inputs("text") for n in range(20)]


def parts(
    *, rows: list[dspy.Example] = ROWS, instructions: str = "Spam?", metric: str = "accuracy", **knobs: Any
) -> Any:
    method = APE(metric=metric, **knobs)
    program = Classify("text -> label: Literal['spam', 'mail']", instructions)
    train, confirm, _, wrapped = checked(method, program, rows, None)
    return parts_of(method, program, train, confirm, wrapped)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, set()),
        ({"threads": 3}, set()),
        ({"candidates": 3}, {"method"}),
        ({"metric": "macro_f1"}, {"metric"}),
        ({"instructions": "Mail?"}, {"student"}),
        ({"rows": ROWS[:18]}, {"trainset", "valset"}),
    ],
)
def test_a_compile_is_told_apart_by_what_it_is_given_and_not_by_how_it_is_run(
    change: dict[str, Any], names: set[str]
) -> None:
    known, other = parts(), parts(**change)
    assert {name for name in known if known[name] != other[name]} == names
