from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import dspy
import pytest

from preceptor.demonstrated import ROWS, settled
from preceptor.errors import ConfigError, Unaffordable
from preceptor.lm.budget import Budget
from preceptor.scoring.trial import Trial
from preceptor.task import Task
from preceptor.teleprompters import APE, COPRO, GEPA, ConstitutionalExperts, MIPROv2, MixtureOfExperts, ProTeGi
from preceptor.testing import toy
from preceptor.testing.toy import Models

TRAIN, CONFIRM = 12, 24


def models() -> Models:
    return Models(toy.answer, lambda request: toy.reply(request, toy.right(request)))


def compiled_by(method: Any, program: dspy.Module | None = None) -> Any:
    return method.compile(program or toy.Sorter(), trainset=toy.rows(TRAIN), valset=toy.rows(CONFIRM, TRAIN))


def lines_of(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "trials.jsonl").read_text(encoding="utf-8").splitlines()]


class Document(dspy.Module):
    """Is given what its predictor isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = toy.Sorter()

    def forward(self, letter: str) -> Any:
        return self.sort(text=letter)


def made(method: Any, of: Models, place: Path, **settings: Any) -> Any:
    return method(**{"metric": "accuracy", "lm": of.lm, "proposer": of.proposer, "run_dir": place, **settings})


@pytest.mark.parametrize("method", [APE, ConstitutionalExperts, ProTeGi, MIPROv2, MixtureOfExperts])
@pytest.mark.parametrize(
    ("few_shot", "program", "message"),
    [
        (
            TRAIN - 1,
            toy.Sorter(),
            rf"needs {TRAIN + 1} train rows or more: {TRAIN - 1} to show \(few_shot\), 2 to search on\. "
            rf"There are {TRAIN}\.",
        ),
        (1, toy.Chain(), r"shows demonstrations \(few_shot\) to programs of one predictor only\."),
        (
            1,
            Document(),
            r"can't show train row 1 as a demonstration \(few_shot\): it has nothing for 'text' of the predictor\.",
        ),
    ],
)
def test_demonstrations_that_cant_be_are_refused_before_the_first_call(
    tmp_path: Path, method: Any, few_shot: int, program: dspy.Module, message: str
) -> None:
    of, train, confirm = models(), toy.rows(TRAIN), toy.rows(CONFIRM, TRAIN)
    if isinstance(program, Document):
        train, confirm = (
            [dspy.Example(letter=row.text, label=row.label).with_inputs("letter") for row in rows]
            for rows in (train, confirm)
        )
    settings = {"settings": {"few_shot": few_shot}} if method is MixtureOfExperts else {"few_shot": few_shot}
    with pytest.raises(ConfigError, match=f"^{method.__name__} {message}$"):
        made(method, of, tmp_path, **settings).compile(program, trainset=train, valset=confirm)
    assert of.calls == 0


@pytest.mark.parametrize("method", [APE, ConstitutionalExperts, GEPA, COPRO, MIPROv2])
def test_two_rows_are_enough_to_search_on(tmp_path: Path, method: Any) -> None:
    compiled = compiled_by(made(method, models(), tmp_path, few_shot=TRAIN - 2))

    assert (compiled.evidence.stopped, compiled.evidence.baseline) == ("", 0.5)
    trials = (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["demos"] for line in trials} == {TRAIN - 2}


def test_of_several_accepted_labels_the_first_is_shown(tmp_path: Path) -> None:
    program = toy.Sorter("text -> label")
    train = [row.copy(label=[row.label, "maybe"]) for row in toy.rows(TRAIN)]

    compiled = made(APE, models(), tmp_path, metric="exact_match", candidates=1, few_shot=2).compile(
        program, trainset=train, valset=toy.rows(CONFIRM, TRAIN)
    )

    assert sorted(demo["label"] for demo in compiled.predict.demos) == ["no", "yes"]


def test_an_input_of_several_texts_is_shown_whole(tmp_path: Path) -> None:
    train = [row.copy(text=["first page", row.text]) for row in toy.rows(TRAIN)]

    shown: list[Any] = []

    class Watched(APE):
        def search(self, task: Task) -> Sequence[Trial]:
            shown.extend(task.seed.demos["predict"])
            return super().search(task)

    made(Watched, models(), tmp_path, candidates=1, few_shot=2).compile(
        toy.Sorter(), trainset=train, valset=toy.rows(CONFIRM, TRAIN)
    )

    assert [(demo["text"][0], len(demo["text"])) for demo in shown] == [("first page", 2)] * 2


def test_of_rows_with_equal_inputs_one_is_shown_and_none_is_scored(tmp_path: Path) -> None:
    train = [row for row in toy.rows(TRAIN) for _ in range(3)]

    compiled = made(APE, models(), tmp_path, candidates=1, few_shot=4).compile(
        toy.Sorter(), trainset=train, valset=toy.rows(CONFIRM, TRAIN)
    )

    shown = {demo["text"] for demo in compiled.predict.demos}
    scored = {row for line in lines_of(tmp_path) for row in line["rows"]}
    assert len(shown) == 4
    assert scored == {number for number, row in enumerate(train) if row.text not in shown}


def test_rows_with_equal_inputs_count_once_among_those_that_have_to_be_left(tmp_path: Path) -> None:
    train = [row for row in toy.rows(5) for _ in range(3)]
    with pytest.raises(ConfigError, match=r"needs 6 train rows or more: .* There are 5 of different inputs\.$"):
        made(APE, models(), tmp_path, few_shot=4).compile(toy.Sorter(), trainset=train, valset=toy.rows(CONFIRM, TRAIN))


@pytest.mark.parametrize(("method", "size"), [(APE, 5_000_000), (MixtureOfExperts, 2_000_000)])
def test_demonstrations_too_long_to_be_saved_are_refused_before_the_first_call(
    tmp_path: Path, method: Any, size: int
) -> None:
    of, train = models(), toy.rows(TRAIN)
    long = [row.copy(text=size * "x" + row.text) if at >= TRAIN - 4 else row for at, row in enumerate(train)]
    settings = {"regions": 2} if method is MixtureOfExperts else {}
    with pytest.raises(
        ConfigError, match=r"^The compiled program couldn't be saved: with its demonstrations .* Show fewer"
    ):
        made(method, of, tmp_path, few_shot=4, **settings).compile(
            toy.Sorter(), trainset=long, valset=toy.rows(CONFIRM, TRAIN)
        )
    assert of.calls == 0


def test_what_can_be_paid_counts_the_rows_that_are_shown(tmp_path: Path) -> None:
    of = models()
    with pytest.raises(Unaffordable, match=r"The budget has 40\. .*: \d+ to search on and \d+ to confirm on") as told:
        compiled_by(made(APE, of, tmp_path, few_shot=6, budget=Budget(calls=40)))
    rows, confirm = map(int, re.findall(r"(\d+) to search on and (\d+) to confirm", str(told.value))[-1])

    assert rows >= 6 + 2
    fewer = made(APE, of, tmp_path, few_shot=6, budget=Budget(calls=40))
    paid = fewer.compile(toy.Sorter(), trainset=toy.rows(rows), valset=toy.rows(confirm, TRAIN))
    assert paid.evidence.spent.calls <= 40
    with pytest.raises(Unaffordable, match=r"Raise the budget or give fewer rows\.$"):
        compiled_by(made(MIPROv2, of, tmp_path, few_shot=6, budget=Budget(calls=10)))


def test_proposals_are_drawn_as_without_demonstrations(tmp_path: Path) -> None:
    """What a proposer writes is tied to the seed and the rows, whichever of them are shown."""
    drawn: list[str] = []

    class Watched(APE):
        def search(self, task: Task) -> Sequence[Trial]:
            drawn.append(task.rng_seed)
            return super().search(task)

    for few_shot in (0, 3, 9):
        compiled_by(made(Watched, models(), tmp_path / str(few_shot), candidates=1, few_shot=few_shot))
    assert (len(drawn), len({*drawn}), len(drawn[0].split(","))) == (3, 1, 8)


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
    own = MixtureOfExperts(metric="accuracy", method=partial(APE, few_shot=4))
    assert (own.knobs["settings"]["few_shot"], own.demonstration_rows) == (4, 4)
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
    experts = ConstitutionalExperts(metric="accuracy", few_shot=few_shot, regions=2)
    same = MixtureOfExperts(metric="accuracy", method=ConstitutionalExperts, few_shot=few_shot, regions=2)
    assert experts.estimated(signatures, 40, 300) == same.estimated(signatures, 40, 300)
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


@dataclass(frozen=True, kw_only=True)
class Showing(APE):
    """Shows three rows where it isn't told how many."""

    shows: ClassVar[int] = 3


def with_demos() -> dspy.Module:
    program = toy.Sorter()
    program.predict.demos = [dspy.Example(text="row 90 yes", label="yes")]
    return program


@pytest.mark.parametrize(
    ("program", "rows", "settings", "count"),
    [
        (toy.Sorter(), toy.rows(ROWS), {}, 3),
        (toy.Sorter(), toy.rows(ROWS), {"few_shot": 0}, 0),
        (toy.Sorter(), toy.rows(ROWS), {"few_shot": 5}, 5),
        (toy.Sorter(), toy.rows(ROWS - 1), {}, 0),
        (toy.Sorter(), [*toy.rows(ROWS - 1), toy.rows(1)[0]], {}, 0),
        (toy.Sorter(), toy.rows(ROWS - 3) + toy.rows(3, 100, "row {} {}" + 2_653 * "x"), {}, 3),
        (toy.Sorter(), toy.rows(ROWS - 3) + toy.rows(3, 100, "row {} {}" + 2_654 * "x"), {}, 0),
        (toy.Sorter("text, note -> label: Literal['yes', 'no']"), toy.rows(ROWS), {}, 0),
        (toy.Sorter("text -> label"), toy.rows(ROWS), {}, 0),
        (toy.Chain(), toy.rows(ROWS), {}, 0),
        (with_demos(), toy.rows(ROWS), {}, 0),
    ],
)
def test_a_methods_own_demonstrations_are_shown_where_they_can_be(
    program: dspy.Module, rows: list[dspy.Example], settings: dict[str, Any], count: int
) -> None:
    method = settled(Showing(metric="accuracy", **settings), program, rows)
    assert (method.few_shot, method.demonstration_rows) == (count, count)
    mixture = settled(MixtureOfExperts(metric="accuracy", method=Showing, settings=settings), program, rows)
    assert (mixture.settings, mixture.demonstration_rows) == ({"few_shot": count}, count)
    for of in (MixtureOfExperts(metric="accuracy", method=partial(Showing, **settings)), None):
        other: Any = of or MixtureOfExperts
        whole = settled(of or other(metric="accuracy", method=Showing, **settings), program, rows)
        assert (whole.demonstration_rows, whole.knobs["settings"]["few_shot"]) == (count, count)
    assert settled(APE(metric="accuracy"), program, rows).few_shot == 0


@pytest.mark.parametrize(
    ("regions", "rows", "count"), [(0, ROWS, 8), (1, ROWS, 8), (2, 2 * ROWS - 1, 0), (2, 2 * ROWS, 8)]
)
def test_each_of_a_given_number_of_regions_has_enough_rows(regions: int, rows: int, count: int) -> None:
    method = ConstitutionalExperts(metric="accuracy", regions=regions)
    assert settled(method, toy.Sorter(), toy.rows(rows)).demonstration_rows == count
    if regions != 1:
        mixture = MixtureOfExperts(metric="accuracy", method=ConstitutionalExperts, regions=regions)
        assert settled(mixture, toy.Sorter(), toy.rows(rows)).demonstration_rows == count


def test_a_mixture_of_a_method_that_shows_none_is_left_as_it_is() -> None:
    def plain(**shared: Any) -> APE:
        return APE(few_shot=4, **shared)

    for method in (APE, plain):
        mixture = MixtureOfExperts(metric="accuracy", method=method)
        assert settled(mixture, toy.Sorter(), toy.rows(ROWS)) is mixture


def test_an_odd_answer_to_a_row_to_confirm_on_doesnt_end_a_compile(tmp_path: Path) -> None:
    of, confirm = models(), toy.rows(CONFIRM, TRAIN)

    class Picky(toy.Sorter):
        def forward(self, **inputs: Any) -> Any:
            return None if inputs["text"] == confirm[0].text else super().forward(**inputs)

    compiled = made(APE, of, tmp_path, candidates=1).compile(Picky(), trainset=toy.rows(TRAIN), valset=confirm)
    assert compiled.evidence.replaced


def test_a_run_is_the_same_whether_the_number_was_told_or_is_the_methods_own(tmp_path: Path) -> None:
    of, train, confirm = models(), toy.rows(ROWS), toy.rows(CONFIRM, ROWS)
    first, again = (
        made(Showing, of, tmp_path, candidates=1, **settings).compile(toy.Sorter(), trainset=train, valset=confirm)
        for settings in ({}, {"few_shot": 3})
    )
    assert [len(one.predict.demos) for one in (first, again)] == [3, 3]
    assert again.evidence.spent == first.evidence.spent
