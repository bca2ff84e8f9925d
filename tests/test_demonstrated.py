from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest

from preceptor.errors import ConfigError
from preceptor.lm.budget import Budget
from preceptor.teleprompters import APE, ConstitutionalExperts, MixtureOfExperts, ProTeGi
from preceptor.testing import toy
from preceptor.testing.toy import Models

TRAIN, CONFIRM = 12, 24


def models() -> Models:
    return Models(toy.answer, lambda request: toy.reply(request, toy.right(request)))


def compiled_by(method: Any, program: dspy.Module | None = None) -> Any:
    return method.compile(program or toy.Sorter(), trainset=toy.rows(TRAIN), valset=toy.rows(CONFIRM, TRAIN))


@pytest.mark.parametrize("method", [APE, ConstitutionalExperts, ProTeGi, MixtureOfExperts])
@pytest.mark.parametrize(
    ("few_shot", "program", "message"),
    [
        (TRAIN, toy.Sorter(), rf"needs more train rows than few_shot={TRAIN}, got {TRAIN}\."),
        (TRAIN + 1, toy.Sorter(), rf"needs more train rows than few_shot={TRAIN + 1}, got {TRAIN}\."),
        (1, toy.Chain(), r"shows demonstrations \(few_shot\) to programs of one predictor only\."),
    ],
)
def test_demonstrations_that_cant_be_are_refused_before_the_first_call(
    tmp_path: Path, method: Any, few_shot: int, program: dspy.Module, message: str
) -> None:
    of = models()
    with pytest.raises(ConfigError, match=f"^{method.__name__} {message}$"):
        compiled_by(
            method(metric="accuracy", lm=of.lm, proposer=of.proposer, run_dir=tmp_path, few_shot=few_shot), program
        )
    assert of.calls == 0


@pytest.mark.parametrize("method", [APE, MixtureOfExperts])
def test_fewer_demonstrations_than_none_are_refused(method: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{method.__name__} needs few_shot >= 0, got -1\.$"):
        method(metric="accuracy", few_shot=-1)


def test_the_students_own_demonstrations_are_replaced(tmp_path: Path) -> None:
    program, of = toy.Sorter(), models()
    program.predict.demos = [dspy.Example(text="row 90 yes", label="yes")]

    compiled = compiled_by(
        APE(metric="accuracy", lm=of.lm, proposer=of.proposer, run_dir=tmp_path, candidates=1, few_shot=2), program
    )

    shown = [dict(demo) for demo in compiled.predict.demos]
    assert sorted(demo["label"] for demo in shown) == ["no", "yes"]
    assert shown == [
        {"text": row.text, "label": row.label} for demo in shown for row in toy.rows(TRAIN) if row.text == demo["text"]
    ]
    assert compiled.evidence.as_dict()["demos"] == 2
    before = [request for request in of.tasks if request.messages[0].text == "text: row 90 yes"]
    assert len(before) == CONFIRM, "the student is confirmed with its own"


def test_a_mixture_hands_its_demonstrations_to_the_method_and_a_setting_wins() -> None:
    mixture = MixtureOfExperts(metric="accuracy", method=APE, few_shot=3)
    assert mixture.knobs["settings"]["few_shot"] == 3
    told = MixtureOfExperts(metric="accuracy", method=APE, few_shot=3, settings={"few_shot": 5})
    assert told.knobs["settings"]["few_shot"] == 5
    experts = ConstitutionalExperts(metric="accuracy", regions=4, few_shot=2)
    assert experts.knobs["few_shot"] == 2


@pytest.mark.parametrize("few_shot", [0, 4])
def test_an_estimate_is_of_the_rows_that_are_left(few_shot: int) -> None:
    signatures = toy.signatures(toy.Sorter())
    for method in (APE, ProTeGi, ConstitutionalExperts):
        made: Any = method(metric="accuracy", few_shot=few_shot)
        assert made.estimated(signatures, 40, 300) == made.estimate(signatures, 40 - few_shot, 300)
    mixture = MixtureOfExperts(metric="accuracy", method=ProTeGi, few_shot=few_shot, regions=2)
    alone = ProTeGi(metric="accuracy", few_shot=few_shot)
    assert mixture.estimated(signatures, 40, 300).least == alone.estimated(signatures, 40, 1).least


def test_the_least_budget_is_that_of_the_rows_that_are_left(tmp_path: Path) -> None:
    of, few_shot = models(), 4
    least = APE(metric="accuracy").estimate(toy.signatures(toy.Sorter()), TRAIN - few_shot, 1).least + 2 * CONFIRM
    evidence = compiled_by(
        APE(
            metric="accuracy",
            lm=of.lm,
            proposer=of.proposer,
            run_dir=tmp_path,
            budget=Budget(calls=least),
            few_shot=few_shot,
        )
    ).evidence
    assert (evidence.spent.calls, evidence.replaced) == (least, True)
