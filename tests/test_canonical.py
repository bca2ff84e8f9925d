"""What a fingerprint is made of: equal for equal values in every process, and of anything that a row may hold."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pydantic
import pytest

from preceptor.canonical import keyed, lasting

PRINTED = """
from typing import Annotated, Any, Literal
import dspy, pydantic
from preceptor.given import parts_of
from preceptor.lm.seam import state_of
from preceptor.run import fingerprint
from preceptor.scoring.metrics import wrap
from preceptor.teleprompters import APE

class Plain:
    def __init__(self, size):
        self.size = size

class Held(pydantic.BaseModel):
    inner: Any

def check(value):
    return value

class Sorted(dspy.Signature):
    text: Annotated[str, pydantic.AfterValidator(check)] = dspy.InputField()
    label: Annotated[Literal["a", "b"], pydantic.AfterValidator(check)] = dspy.OutputField()

unused = [object() for _ in range(SHIFT)]
program = dspy.Predict(Sorted, tools=[check])
program.lm = dspy.LM("openai/x", tools=[check])
rows = [dspy.Example(text=Plain(1), held=Held(inner=Plain(2)), kinds={Plain(3)}).with_inputs("text")]
print(fingerprint(parts_of(APE(metric="accuracy"), program, rows, rows, wrap("accuracy", "label"))))
print(fingerprint(state_of(program.lm)))
"""


def test_what_a_run_depends_on_is_the_same_in_every_process() -> None:
    def told(shift: int) -> str:
        script = PRINTED.replace("SHIFT", str(shift))
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout

    first = told(0)
    assert len(first.split()) == 2
    assert told(100_000) == first


class Plain:
    """A value that only its address tells from another."""

    def __init__(self, size: int) -> None:
        self.size = size


class Held(pydantic.BaseModel):
    inner: Any


def test_objects_are_told_apart_by_their_attributes_and_texts_stay_as_they_are() -> None:
    assert lasting(Plain(1)) == lasting(Plain(1))
    assert lasting(Plain(1)) != lasting(Plain(2))
    assert lasting(Held(inner=Plain(1))) == lasting(Held(inner=Plain(1)))
    assert lasting({"text": "a fault at 0x7f", "held": Held(inner="at 0x7f")}) == {
        "text": "a fault at 0x7f",
        "held": {"inner": "at 0x7f"},
    }


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({1: "a", "b": "c"}, {"1": "a", "b": "c"}),
        ({(1, "x"): "a"}, {'[1, "x"]': "a"}),
        ([{None: 1, True: 2}], [{"null": 1, "true": 2}]),
        ({"in": ({frozenset({2, 1}): 0},)}, {"in": [{"[1, 2]": 0}]}),
    ],
)
def test_mappings_have_keys_that_can_be_sorted(value: Any, told: Any) -> None:
    assert keyed(value) == told
    assert json.loads(json.dumps(lasting(value), sort_keys=True)) == told


@pytest.mark.parametrize("value", [{"b": 1, "a": (2, None)}, {10: "x", 9: "y"}, {1.5: {"a": {}}, True: []}])
def test_what_can_be_written_as_json_is_written_as_it_ever_was(value: Any) -> None:
    assert json.dumps(lasting(value), sort_keys=True) == json.dumps(value, sort_keys=True)
