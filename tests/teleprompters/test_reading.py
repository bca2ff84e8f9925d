from __future__ import annotations

import enum
import random
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Request

from preceptor.lm.adapter import declare
from preceptor.lm.budget import Account, Budget
from preceptor.lm.meter import Meter
from preceptor.modules import Classify, Generate
from preceptor.program import candidate_of
from preceptor.run import open_run
from preceptor.scoring.metrics import wrap
from preceptor.task import Task
from preceptor.teleprompters import reading
from preceptor.teleprompters.induction import demonstrations
from preceptor.teleprompters.reading import errors, errors_among, parse
from preceptor.testing import prompt, simulated, system

Open = Callable[..., AbstractContextManager[Task]]


@pytest.fixture
def make(tmp_path: Path) -> Open:
    @contextmanager
    def open_task(
        program: dspy.Module, rows: list[dspy.Example], answer: Callable[[Request], str], metric: Any = "accuracy"
    ) -> Generator[Task]:
        lm = simulated(answer)
        with open_run(tmp_path, {}) as run:
            meter = Meter(run.ledger, Account(Budget()))
            yield Task(
                student=program,
                seed=candidate_of(program),
                train=rows,
                order=range(len(rows)),
                output="label",
                metric=wrap(metric, "label"),
                lm=meter.wrap(lm),
                proposer=meter.wrap(lm),
                meter=meter,
                run=run,
                rng=random.Random(0),
                threads=1,
                report=lambda what, done, total: None,
            )

    return open_task


def rows(*pairs: tuple[str, str]) -> list[dspy.Example]:
    return [dspy.Example(text=text, label=label).with_inputs("text") for text, label in pairs]


def sorter() -> dspy.Module:
    return Classify("text -> label: Literal['yes', 'no']", "Sort.")


def test_only_wrong_rows_are_shown_with_input_answer_and_label(make: Open) -> None:
    with make(sorter(), rows(("Good.", "no"), ("Bad.", "yes"), ("So so.", "yes")), lambda request: "no") as task:
        assert errors(task, "predict", task.seed, [2, 0, 1]) == [
            "Input: text: So so.\nAnswer: label: no\nRight answer: yes",
            "Input: text: Bad.\nAnswer: label: no\nRight answer: yes",
        ]
        assert task.meter.account.spent.calls == 3


def test_errors_are_the_candidates_own(make: Open) -> None:
    def answer(request: Request) -> str:
        return "yes" if "Agree." in system(request) else "no"

    with make(sorter(), rows(("Good.", "no"), ("Bad.", "yes")), answer) as task:
        agreeable = task.seed.with_instruction("predict", "Agree.")
        assert errors(task, "predict", agreeable, [0, 1]) == [
            "Input: text: Good.\nAnswer: label: yes\nRight answer: no"
        ]


def test_an_answer_that_cant_be_read_is_an_error(make: Open) -> None:
    program = dspy.Predict(declare("text -> label, score: int", "Judge."))
    with make(program, rows(("Good.", "no")), lambda request: "no idea") as task:
        assert errors(task, "self", task.seed, [0]) == [
            "Input: text: Good.\nAnswer: something that can't be read\nRight answer: no"
        ]


def test_a_broken_call_is_no_error(make: Open) -> None:
    def answer(request: Request) -> str:
        if "row 3 " in prompt(request):
            raise ConnectionError("no route")
        return "no"

    many = rows(*((f"row {number} .", "no") for number in range(20)))
    with make(sorter(), many, answer) as task:
        assert errors(task, "predict", task.seed, range(20)) == []


def test_a_free_text_that_is_partly_right_is_an_error(make: Open) -> None:
    program = Generate("text -> label", "Answer.")
    with make(program, rows(("Where?", "right now"), ("When?", "now")), lambda request: "now", "token_f1") as task:
        assert errors(task, "predict", task.seed, [0, 1]) == [
            "Input: text: Where?\nAnswer: label: now\nRight answer: right now"
        ]


class Twice(dspy.Module):
    """The second predictor is asked only where the first one found something."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Generate("text -> gist", "Shorten.")
        self.second = Classify("gist -> label: Literal['yes', 'no']", "Decide.")

    def forward(self, text: str) -> Any:
        gist = self.first(text=text).gist
        return self.second(gist=gist) if gist != "nothing" else dspy.Prediction(label="no")


def test_a_predictor_of_several_is_shown_its_own_inputs_and_outputs_and_what_became_of_them(make: Open) -> None:
    def answer(request: Request) -> str:
        if "Decide." in system(request):
            return "no"
        return "nothing" if "Bad." in prompt(request) else "gist of it"

    with make(Twice(), rows(("Good.", "yes"), ("Bad.", "yes")), answer) as task:
        assert errors(task, "first.predict", task.seed, [0, 1]) == [
            "Input: text: Good.\nAnswer: gist: gist of it\nAnswer of the whole program: no\nRight answer: yes",
            "Input: text: Bad.\nAnswer: gist: nothing\nAnswer of the whole program: no\nRight answer: yes",
        ]
        assert errors(task, "second.predict", task.seed, [0, 1]) == [
            "Input: gist: gist of it\nAnswer: label: no\nAnswer of the whole program: no\nRight answer: yes"
        ]


def test_what_was_scored_is_shown_with_the_predictors_own_outputs_whatever_the_label_is(make: Open) -> None:
    def same(example: Any, prediction: Any) -> bool:
        return bool(prediction.summary == example.label)

    with make(Generate("text -> summary", "Shorten."), rows(("Long.", "short")), lambda request: "brief", same) as task:
        [trial] = task.score([task.seed], [0])
        told = errors_among(task, "predict", [0], trial.outcomes)
        assert told == ["Input: text: Long.\nAnswer: summary: brief\nRight answer: short"]

    row = dspy.Example(text="A mug, 5.", name="mug", label="5").with_inputs("text")
    answer = "[[ ## name ## ]]\ncup\n\n[[ ## label ## ]]\n5"
    both = dspy.Predict(declare("text -> name, label", "Read."))
    with make(both, [row], lambda request: answer, lambda example, prediction: prediction.name == example.name) as task:
        [trial] = task.score([task.seed], [0])
        told = errors_among(task, "self", [0], trial.outcomes)
        assert told == ["Input: text: A mug, 5.\nAnswer: name: cup\nlabel: 5\nRight answer: name: mug\nlabel: 5"]


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


def test_an_enumeration_and_a_list_are_shown_as_the_model_has_to_write_them(make: Open) -> None:
    fields: dict[str, Any] = {"text": (list[str], dspy.InputField()), "label": (Mood, dspy.OutputField())}
    make_signature: Any = dspy.Signature
    program = dspy.Predict(make_signature(fields, "Judge."))
    row = dspy.Example(text=["Hm", "Ah"], label=Mood.GOOD).with_inputs("text")
    with make(program, [row], lambda request: "[[ ## label ## ]]\nbad") as task:
        told = 'Input: text: ["Hm", "Ah"]\nAnswer: label: bad\nRight answer: good'
        assert errors(task, "self", task.seed, [0]) == [told]
        assert demonstrations(task, [0], 1) == {"self": ['Input: text: ["Hm", "Ah"]\nOutput: good']}


def test_of_several_labels_all_are_shown_and_no_other_column(make: Open) -> None:
    row = dspy.Example(text="A mug, 5.", name="mug", label="5", source="web").with_inputs("text")
    answer = "[[ ## name ## ]]\ncup\n\n[[ ## label ## ]]\n4"
    with make(dspy.Predict(declare("text -> name, label", "Read.")), [row], lambda request: answer) as task:
        assert errors(task, "self", task.seed, [0]) == [
            "Input: text: A mug, 5.\nAnswer: name: cup\nlabel: 4\nRight answer: name: mug\nlabel: 5"
        ]


def test_a_long_field_is_cut(make: Open) -> None:
    cut = reading.FIELD_CHARACTERS
    with make(sorter(), rows(("a" * 5000, "yes")), lambda request: "no") as task:
        [shown] = errors(task, "predict", task.seed, [0])
        assert shown == f"Input: text: {'a' * cut} ...\nAnswer: label: no\nRight answer: yes"
    with make(sorter(), rows(("a", "b" * 5000)), lambda request: "no") as task:
        [shown] = errors(task, "predict", task.seed, [0])
        assert shown == f"Input: text: a\nAnswer: label: no\nRight answer: {'b' * cut} ..."


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("<START>Name the capital.<END>", ["Name the capital."]),
        ("One:\n<START>\nName it.\n<END>\nTwo:\n<START>Say it.<END>", ["Name it.", "Say it."]),
        ("<start>Name it.</start>", ["Name it."]),
        ("<START>Name it.</END>", ["Name it."]),
        ("< START >Name it.", ["Name it."]),
        ("<START>Name it.<START>Say it.", ["Name it.", "Say it."]),
        ("Here is the sentence between <START> and <END>:\n<START>Name it.<END>", ["Name it."]),
        ("Here is the sentence between <START> and ", []),  # a model in this process is stopped at the tag
        ("I wrote it between `<START>` and `<END>`: <START>Name it.<END>", ["Name it."]),
        ("<START>and so on<END>", ["and so on"]),
        ("<START><END>", []),
        ("", []),
        ("Name it.<END>", ["Name it."]),
        ("Name it.", ["Name it."]),
        ("Sure! Here is the new prompt:\n\nName it.", ["Name it."]),
        ("Here are two variations:\nName it.", ["Name it."]),
        ("Improved prompt:\nName it.", ["Name it."]),
        ("Choose one of these:\n- yes\n- no", ["Choose one of these:\n- yes\n- no"]),
        ('"Name it."', ["Name it."]),
        ("“Name it.”", ["Name it."]),
        ('"yes" or "no"', ['"yes" or "no"']),
        ("```\nName it.\nNow.\n```", ["Name it.\nNow."]),
        ("```text\nName it.\n```", ["Name it."]),
        ("<START>Is 1 < 2? Say so.<END>", ["Is 1 < 2? Say so."]),
    ],
)
def test_proposals_are_read_between_tags_or_whole(text: str, read: list[str]) -> None:
    assert parse(text) == read
