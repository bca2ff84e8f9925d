from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dspy.lm15 import Config, Message, Request

from preceptor.benchmarks import principles
from preceptor.benchmarks.principles import Compile, checked, models, reached
from preceptor.cli.tools import as_command
from preceptor.testing import asked

KETTLE = "If the parcel holds a kettle, the answer is kitchen."
CASE = "Input: text: Parcel 0-1 holds a kettle.\nAnswer: books\nRight answer: kitchen"


def ask(text: str, told: str | None = None, *, seed: int = 0, forgets: float = 0.0) -> str:
    lm = models(Compile("protegi", 100, forgets, 0))
    request = Request(model=lm.model, system=told, messages=(Message.user(text),), config=Config(seed=seed))
    return str(lm(request).message.text)


def test_rules_are_told_apart_by_whether_the_policy_has_them() -> None:
    wrong, nowhere = KETTLE.replace("kitchen", "games"), KETTLE.replace("kettle", "violin")
    assert checked(KETTLE) == {"found": 1, "wrong": 0, "superfluous": 0, "accuracy": 0.39}  # (.95 + 4 * .25) / 5
    assert checked(f"{wrong} {KETTLE} {nowhere}") == {"found": 0, "wrong": 1, "superfluous": 2, "accuracy": 0.2}
    assert checked("Be kind.") == {"found": 0, "wrong": 0, "superfluous": 0, "accuracy": 0.25}


@pytest.mark.parametrize(
    ("told", "share"), [("Sort.", 0.25), (KETTLE, 0.95), (KETTLE.replace("kitchen", "games"), 0.0)]
)
def test_the_model_is_right_as_often_as_the_instruction_allows(told: str, share: float) -> None:
    answers = [ask(f"text: Parcel 0-{at} holds a kettle.", told) for at in range(200)]
    assert answers.count("kitchen") / 200 == pytest.approx(share, abs=0.07)


def test_a_principle_is_mostly_the_rule_of_the_wrong_answer() -> None:
    texts = [ask(f"It got this case wrong:\n\n{CASE}\n\nA principle is a sentence.", seed=seed) for seed in range(200)]
    assert texts.count(f"<START>{KETTLE}<END>") / 200 == pytest.approx(0.6 + 0.2 / 5, abs=0.1)


@pytest.mark.parametrize(("forgets", "kept"), [(0.0, 4), (1.0, 0)])
def test_a_rewritten_prompt_loses_rules_by_chance(forgets: float, kept: int) -> None:
    text = ask(
        f"Say these instructions in other words, with the same meaning:\n\n{KETTLE}\n\nWrite one.", forgets=forgets
    )
    assert text.count(KETTLE) == kept  # of the four texts it writes


def test_the_principle_about_the_wrong_answer_is_revised_and_else_one_is_added() -> None:
    menu = "1. Revise this principle: If the parcel holds a {}, the answer is books.\n2. Add a new principle."
    question = f"It got this case wrong:\n\n{CASE}\n\nOne of these:\n{menu}\n\nAnswer with its number only."
    assert [ask(question.format(thing)) for thing in ("kettle", "drill")] == ["1", "2"]


def test_the_smallest_budget_that_is_good_enough_is_told() -> None:
    rows: list[dict[str, Any]] = [
        {"forgets": 0.1, "method": name, "budget": budget, "accuracy": accuracy}
        for name, budget, accuracy in [("protegi", 100, 0.5), ("protegi", 200, 0.9), ("protegi", 300, 0.85)]
    ]
    assert reached(rows) == [{"forgets": 0.1, "constitutional_experts": None, "protegi": 200}]


def test_both_methods_find_rules_and_are_held_to_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "principles.json"
    shape = ["--seeds", "2", "--calls", "700", "--forgets", "0", "--rows", "100", "--jobs", "1"]
    as_command("principles", principles.run, [*shape, "--out", str(out), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    assert [row["method"] for row in printed["measured"]] == list(principles.METHODS)
    for row in printed["measured"]:
        assert row["found"] >= 1
        assert row["calls"] <= 700
        assert row["low"] <= row["accuracy"] <= row["high"]


def test_rows_of_one_seed_are_the_same_and_name_one_thing_each() -> None:
    rows = principles._rows(3, 20)
    assert rows == principles._rows(3, 20)
    assert all(row.shelf == principles.POLICY[row.text.split()[-1].rstrip(".")] for row in rows)
    assert len({row.shelf for row in rows}) > 1
    assert asked(models(Compile("protegi", 1, 0.0, 3))) == []
