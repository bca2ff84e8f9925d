"""What is demonstrated, and how a proposed instruction is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Request

from preceptor.errors import LMFailed
from preceptor.lm.adapter import declare
from preceptor.scoring.trial import Trial
from preceptor.task import Task
from preceptor.teleprompter import Estimate, Teleprompter
from preceptor.teleprompters import APE, InstructZero
from preceptor.teleprompters.induction import clean, demonstrations
from preceptor.testing import asked, prompt, simulated


@dataclass(frozen=True, kw_only=True)
class Demonstrating(Teleprompter):
    """Only looks at what it would demonstrate, `shown` at once."""

    shown: int
    found: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        return Estimate(1, 1)

    def search(self, task: Task) -> Sequence[Trial]:
        self.found.update(demonstrations(task, sorted(task.order), self.shown))
        return task.score([task.seed], [0])


class Piped(dspy.Module):
    """The second predictor copies what the first has found."""

    def __init__(self) -> None:
        super().__init__()
        self.find = dspy.Predict(declare("text -> found", "Find."))
        self.say = dspy.Predict(declare("found -> label", "Say."))

    def forward(self, text: str) -> Any:
        return self.say(found=self.find(text=text).found)


class Branched(dspy.Module):
    """Texts that begin with "long" go to a predictor of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.short = dspy.Predict(declare("text -> label", "Judge the short text."))
        self.long = dspy.Predict(declare("text -> label", "Judge the long text."))

    def forward(self, text: str) -> Any:
        return (self.long if text.startswith("long") else self.short)(text=text)


def copying(request: Request) -> str:
    """Answer with the text, in whichever field is asked for."""
    name = "found" if "[[ ## text ## ]]" in prompt(request) else "label"
    return f"[[ ## {name} ## ]]\n{prompt(request).split('## ]]')[1].split('[[')[0].split('Respond')[0].strip()}"


def refusing(request: Request) -> str:
    return "[[ ## label ## ]]\nno"


def rows(*pairs: tuple[str, str]) -> list[dspy.Example]:
    return [dspy.Example(text=text, label=label).with_inputs("text") for text, label in pairs]


def demonstrated(tmp_path: Path, program: dspy.Module, train: list[dspy.Example], **settings: Any) -> Demonstrating:
    given: dict[str, Any] = {"metric": "accuracy", "lm": simulated(copying), "run_dir": tmp_path, "threads": 1}
    made = Demonstrating(**{**given, **settings})
    made.compile(program, trainset=train, valset=rows(*((f"kept {n}", "yes") for n in range(8))))
    return made


def said(made: Demonstrating, name: str) -> list[str]:
    return [pair.split("Output: ")[1] for pair in made.found[name]]


def test_of_a_metric_of_degrees_the_rows_that_are_right_are_shown(tmp_path: Path) -> None:
    train = rows(("red car", "red car"), ("red car", "red bus"), ("blue", "blue"), ("x", "y"))

    made = demonstrated(tmp_path, Piped(), train, metric="token_f1", shown=2)

    assert said(made, "find") == said(made, "say") == ["red car", "blue"]


@pytest.mark.parametrize(("shown", "expected"), [(2, ["r s", "r s t"]), (3, ["r s", "r", "r s t"]), (9, None)])
def test_where_too_few_are_right_the_better_half_is_shown_and_enough_for_a_request(
    tmp_path: Path, shown: int, expected: list[str] | None
) -> None:
    train = rows(("r s", "r z"), ("r", "r z z z"), ("r s t", "r s u"), ("q", "y"))

    made = demonstrated(tmp_path, Piped(), train, metric="token_f1", shown=shown)

    assert said(made, "say") == (expected or ["r s", "r", "r s t"])  # a row scored 0 shows what not to do


def test_where_none_is_right_all_rows_are_shown(tmp_path: Path) -> None:
    made = demonstrated(tmp_path, Piped(), rows(("a", "b"), ("c", "d")), shown=1)

    assert said(made, "say") == ["a", "c"]


def test_a_branch_that_is_never_right_shows_all_its_rows_and_the_other_its_right_ones(tmp_path: Path) -> None:
    train = rows(("long a", "yes"), ("b", "no"), ("c", "yes"), ("long d", "yes"))

    made = demonstrated(tmp_path, Branched(), train, lm=simulated(refusing), shown=1)

    assert made.found == {
        "short": ["Input: text: b\nOutput: no"],
        "long": ["Input: text: long a\nOutput: no", "Input: text: long d\nOutput: no"],
    }


@pytest.mark.parametrize("method", [APE, InstructZero])
def test_a_branch_that_no_row_takes_keeps_its_instruction_and_that_is_said(tmp_path: Path, method: Any) -> None:
    told: list[str] = []
    proposer = simulated(lambda request: "Judge well.")
    few = {"candidates": 2} if method is APE else {"start": 2, "batch": 1, "iterations": 1}
    made = method(
        metric="accuracy",
        lm=simulated(refusing),
        proposer=proposer,
        run_dir=tmp_path,
        threads=1,
        report=lambda what, done, total: told.append(what),
        **few,
    )
    train = rows(*((f"row {n}", ("yes", "no")[n % 2]) for n in range(8)))

    made.compile(Branched(), trainset=train, valset=rows(*((f"kept {n}", "yes") for n in range(8))))

    assert next(what for what in told if "long" in what).startswith("long never answered on ")
    tried = {line.split('"long": ')[1].split("}")[0] for line in (tmp_path / "trials.jsonl").read_text().splitlines()}
    assert tried == {'"Judge the long text."'}
    assert asked(proposer)


def test_where_no_predictor_answers_there_is_nothing_to_infer_from(tmp_path: Path) -> None:
    with pytest.raises(LMFailed, match=r"^The predictor find never answered on 2 rows; nothing to infer from\."):
        demonstrated(tmp_path, Piped(), rows(("a", "b"), ("c", "d")), lm=simulated(lambda request: "{"), shown=1)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ('The instruction was: "Name the capital."\n\nInput: France\nOutput: Paris', "Name the capital."),
        ('The instruction was "Name the capital."', "Name the capital."),
        ("Instruction: Name the capital.", "Name the capital."),
        ("Output:\nName the capital.", "Name the capital."),
        ("“Name the capital.”", "Name the capital."),
        ("```\nName the capital.\n```", "Name the capital."),
        ("Output the capital of the country.", "Output the capital of the country."),
        ('Output "yes" or "no".', 'Output "yes" or "no".'),
        ("Answer 'yes' or 'no'", "Answer 'yes' or 'no'"),
        ("'yes' if it is, else 'no'", "'yes' if it is, else 'no'"),
        ("Name it.\nIn one word.", "Name it.\nIn one word."),
        ("", ""),
        ('""', ""),
        ("\n\nInput: France", ""),
    ],
)
def test_proposals_are_cleaned_of_what_is_no_instruction(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
