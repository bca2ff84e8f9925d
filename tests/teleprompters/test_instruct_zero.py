"""InstructZero: the calls of its formula, the rows it looks at, and what it refuses."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import optuna
import pytest
from dspy.lm15 import Request
from hypothesis import given
from hypothesis import strategies as some
from optuna.samplers import GPSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from preceptor.errors import ConfigError
from preceptor.lm.budget import Budget
from preceptor.lm.dispatch import Patience
from preceptor.lm.soft import EmbeddingSpace, soft_tokens
from preceptor.study import FILE
from preceptor.teleprompters import InstructZero
from preceptor.teleprompters.coupled import SCORES, CoupledSampler
from preceptor.teleprompters.induction import FORWARD
from preceptor.teleprompters.instruct_zero import Plan, Projection
from preceptor.testing import ChatServer, asked, prompt, scripted, simulated, system, toy
from preceptor.testing.draws import draw

CONFIRM = 24
FEW: dict[str, Any] = {"start": 3, "batch": 2, "iterations": 2, "exemplars": 2}


def method(tmp_path: Path, proposer: dspy.LM, **settings: Any) -> InstructZero:
    given: dict[str, Any] = {"metric": "accuracy", "lm": simulated(toy.answer), "run_dir": tmp_path, "threads": 1}
    return InstructZero(proposer=proposer, **{**given, **settings})


def compiled(made: InstructZero, train: int = 20, program: dspy.Module | None = None) -> Any:
    return made.compile(program or toy.Sorter(), trainset=toy.rows(train), valset=toy.rows(CONFIRM, train))


def numbered(request: Request) -> str:
    """Write an instruction of its own for each soft prompt."""
    return f"Decide by rule {draw(soft_tokens(request)).hex()[:8]}."


def search(tmp_path: Path, name: str = "InstructZero predict") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(tmp_path / FILE))))


def trials(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("finalists", [0, 4])
def test_the_papers_search_takes_exactly_the_calls_of_its_formula(tmp_path: Path, finalists: int) -> None:
    proposer, lm = simulated(numbered), simulated(toy.answer)
    made = method(tmp_path, proposer, lm=lm, finalists=finalists, sampler=RandomSampler)

    evidence = compiled(made, train=30).evidence

    points = 25 + 5 * 25
    again = 10 * (finalists + 1) if finalists else 0  # of the best few and the seed, on the rows left
    assert len(asked(proposer)) == points
    # the seed's rows too; nothing beat it, so it alone is confirmed
    assert len(asked(lm)) == 20 * (points + 1) + again + CONFIRM
    assert made.estimate(toy.signatures(toy.Sorter()), 30, None).expected == evidence.spent.calls - CONFIRM
    assert len({tuple(trial["rows"]) for trial in trials(tmp_path)}) == (2 if finalists else 1)
    assert search(tmp_path).user_attrs == {"points": 150, "distinct instructions": 150, "left out": 0}


def test_what_repeated_instructions_save_pays_for_further_points(tmp_path: Path) -> None:
    def seldom(request: Request) -> str:
        return f"Decide by rule {draw(soft_tokens(request))[0] % 4}."

    proposer = simulated(seldom)
    made = method(tmp_path, proposer, rows=10, finalists=0, sampler=RandomSampler, budget=Budget(calls=200))

    evidence = compiled(made, train=20).evidence

    plan = Plan.of(made, 20, 1, 200 - 2 * CONFIRM)
    found = search(tmp_path).user_attrs
    assert sum(plan.batches) == 12  # (200 - 2 * 24 - the seed's 10) // (1 + 10)
    assert found["distinct instructions"] == 4
    assert found["points"] == len(asked(proposer)) == 12 * 11 - 4 * 10 - 10  # a new one would cost 11
    assert evidence.spent.calls <= 200


def test_an_instruction_met_again_is_scored_once_and_enters_the_model_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["Guess.", "Think.", '"Guess."', toy.SEED, "Wait.", "Think.", toy.RIGHT]
    lm = simulated(toy.answer)
    with caplog.at_level(logging.INFO):
        result = compiled(method(tmp_path, scripted(texts), lm=lm, **FEW))

    assert [one["instructions"]["predict"] for one in trials(tmp_path)] == [
        toy.SEED, "Guess.", "Think.", "Wait.", toy.RIGHT,
    ]  # fmt: skip
    assert len(asked(lm)) == 5 * 20 + 2 * CONFIRM
    assert [(one.state.name, one.value) for one in search(tmp_path).trials] == [
        ("COMPLETE", 0.5), ("COMPLETE", 0.5), ("FAIL", None), ("COMPLETE", 0.5), ("COMPLETE", 0.5), ("FAIL", None),
        ("COMPLETE", 1.0),
    ]  # fmt: skip
    repeat = search(tmp_path).trials[2].user_attrs
    assert (repeat["repeats trial"], repeat[SCORES]) == (0, search(tmp_path).trials[0].user_attrs[SCORES])
    assert "5 distinct instructions from 7 points for predict" in caplog.text
    assert result.predict.signature.instructions == toy.RIGHT


def test_the_prompt_shows_the_exemplars_below_soft_tokens_of_the_models_length(tmp_path: Path) -> None:
    proposer = simulated(numbered)
    compiled(method(tmp_path, proposer, exemplars=3, start=2, iterations=0, max_tokens=77, soft_tokens=4))

    first, second = asked(proposer)
    assert prompt(first) == prompt(second)
    head, shown, tail = prompt(first).partition("Input: ")[0], prompt(first).count("\nOutput: "), prompt(first)[-60:]
    assert head == FORWARD.template.partition("$demos")[0]
    assert shown == 3
    assert tail.endswith("\n\nWhat was the instruction? Write the instruction only.")
    assert not system(first)
    assert soft_tokens(first) != soft_tokens(second)
    assert [len(token) for token in soft_tokens(first)] == [8] * 4
    assert (first.config.temperature, first.config.max_tokens) == (0.0, 77)


def test_exemplars_are_no_rows_that_are_scored_where_there_are_enough(tmp_path: Path) -> None:
    proposer = simulated(numbered)
    compiled(method(tmp_path, proposer, **FEW, finalists=0), train=25)

    scored = {f"Input: text: {row.text}\n" for row in (toy.rows(25)[at] for at in trials(tmp_path)[0]["rows"])}
    assert len(scored) == 20
    assert not [text for text in scored if text in prompt(asked(proposer)[0])]


def test_redrawn_exemplars_are_each_points_own_and_none_that_is_scored(tmp_path: Path) -> None:
    def shown(place: Path) -> list[str]:
        proposer = simulated(numbered)
        compiled(method(place, proposer, **FEW, redraw=True, finalists=0), train=30)
        return [prompt(request) for request in asked(proposer)]

    texts = shown(tmp_path / "one")
    scored = {f"Input: text: {toy.rows(30)[at].text}\n" for at in trials(tmp_path / "one")[0]["rows"]}

    assert len(texts) == 7
    assert [text.count("\nOutput: ") for text in texts] == [2] * 7
    assert len(set(texts)) > 4  # of 90 ordered pairs that 10 rows give
    assert len(scored) == 20
    assert not [row for row in scored for text in texts if row in text]
    assert shown(tmp_path / "again") == texts


def test_of_few_rows_all_may_be_redrawn(tmp_path: Path) -> None:
    proposer = simulated(numbered)
    compiled(method(tmp_path, proposer, start=9, iterations=0, exemplars=2, redraw=True, finalists=0), train=4)

    rows = {f"Input: text: {row.text}\n" for row in toy.rows(4)}
    assert {row for row in rows for request in asked(proposer) if row in prompt(request)} == rows


def test_the_projection_makes_tokens_as_long_as_the_models_own() -> None:
    space = EmbeddingSpace(width=576, norm=3.0)
    projection = Projection.drawn(5, 10, space, seed=0)
    points = np.random.default_rng(1).uniform(-1, 1, (200, 10))
    lengths = np.linalg.norm(np.array([projection.of(point.tolist()) for point in points]), axis=2)
    assert lengths.shape == (200, 5)
    assert float(np.sqrt((lengths**2).mean())) == pytest.approx(3.0, rel=0.05)
    assert np.abs(projection.matrix).max() == pytest.approx(3 * 3.0 / 5760**0.5, rel=0.001)


def test_the_best_few_and_the_seed_are_scored_on_all_train_rows_before_one_is_chosen(tmp_path: Path) -> None:
    def lucky_start(request: Request) -> str:
        if "Lucky." in system(request):  # right on the rows searched on, wrong on all others
            return prompt(request).split()[-1] if prompt(request) in easy else "neither"
        return toy.answer(request)

    easy: set[str] = set()
    texts = ["Lucky.", f"{toy.RIGHT} Now.", "Guess."]
    knobs: dict[str, Any] = {"start": 3, "iterations": 0, "rows": 6, "exemplars": 2}

    def found(finalists: int) -> Any:
        place, lm = tmp_path / str(finalists), simulated(lucky_start)
        order = method(place / "order", simulated(numbered), **knobs)
        compiled(order)
        easy.update(f"text: {toy.rows(20)[at].text}" for at in trials(place / "order")[0]["rows"])
        result = compiled(method(place, scripted(texts), lm=lm, finalists=finalists, **knobs))
        return result, [(one["instructions"]["predict"], len(one["rows"])) for one in trials(place)]

    _, once = found(0)
    assert once == [(toy.SEED, 6), ("Lucky.", 6), (texts[1], 6), ("Guess.", 6)]
    result, twice = found(2)
    assert twice[4:] == [(toy.SEED, 14), ("Lucky.", 14), (texts[1], 14)]
    assert result.predict.signature.instructions == texts[1]


def test_fewer_rows_than_asked_for_are_all_taken(tmp_path: Path) -> None:
    result = compiled(method(tmp_path, scripted(["A.", "B.", toy.RIGHT, "C.", "D.", "E.", "F."]), **FEW), train=4)
    assert {len(trial["rows"]) for trial in trials(tmp_path)} == {4}
    assert result.predict.signature.instructions == toy.RIGHT


def test_copies_of_training_text_and_empty_texts_are_no_candidates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = toy.letters(20)[3].text
    made = method(tmp_path, scripted([f"As in: {copy}", '""', "Guess."]), start=3, iterations=0)
    with caplog.at_level(logging.INFO):
        made.compile(toy.Sorter(), trainset=toy.letters(20), valset=toy.letters(CONFIRM, 20))

    assert [one["instructions"]["predict"] for one in trials(tmp_path)] == [toy.SEED, "Guess."]
    assert [(one.state.name, one.user_attrs.get("left out")) for one in search(tmp_path).trials] == [
        ("FAIL", "it copies a training input"),
        ("FAIL", "it is empty"),
        ("COMPLETE", None),
    ]
    assert search(tmp_path).user_attrs["left out"] == 2
    assert "1 distinct instructions from 3 points (2 were empty or copied training text) for predict" in caplog.text


def test_a_proposal_that_fails_costs_its_point_and_shifts_no_other(tmp_path: Path) -> None:
    seen: list[Any] = []

    def fails_once(request: Request) -> str:
        seen.append(soft_tokens(request))
        if soft_tokens(request) == seen[0]:
            raise ConnectionError("no route")
        return numbered(request)

    patience = Patience(retries=0)
    compiled(method(tmp_path, simulated(fails_once), start=25, iterations=0, patience=patience))

    told = [one.user_attrs["instruction"] for one in search(tmp_path).trials]
    assert told == ["", *(f"Decide by rule {draw(soft).hex()[:8]}." for soft in seen[1:])]
    assert search(tmp_path).trials[0].state.name == "FAIL"


def test_a_proposer_behind_http_is_refused_before_the_first_call(tmp_path: Path) -> None:
    with ChatServer(lambda body: "yes") as server:
        lm = server.lm("remote", max_tokens=16)
        message = r"^Soft tokens need a proposer in this process; openai/remote only reads text\. Pass proposer="
        with pytest.raises(ConfigError, match=message):
            compiled(method(tmp_path, lm, lm=lm))
        assert server.count == 0


def test_task_model_and_proposer_may_differ(tmp_path: Path) -> None:
    with ChatServer(lambda body: "no") as server:
        evidence = compiled(
            method(tmp_path, simulated(numbered), lm=server.lm("remote", max_tokens=16), **FEW)
        ).evidence
        assert server.count == 8 * 20 + CONFIRM
    assert (evidence.lm, evidence.proposer) == ("openai/remote", "simulated/model")


@pytest.mark.parametrize("sampler", [GPSampler, TPESampler, functools.partial(CoupledSampler, explores=False)])
def test_any_sampler_of_optuna_can_search(tmp_path: Path, sampler: Any) -> None:
    compiled(method(tmp_path, simulated(numbered), sampler=sampler, **FEW))
    assert len(search(tmp_path).trials) == 7
    again = simulated(numbered)
    compiled(method(tmp_path, again, sampler=sampler, **FEW))  # a resumed run is the same method
    assert asked(again) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimensions": 0}, r"^InstructZero needs dimensions >= 1, got 0\.$"),
        ({"start": 0}, r"^InstructZero needs start >= 1, got 0\.$"),
        ({"iterations": -1}, r"^InstructZero needs iterations >= 0, got -1\.$"),
        ({"finalists": -1}, r"^InstructZero needs finalists >= 0, got -1\.$"),
        (
            {"sampler": RandomSampler(seed=0)},
            r"^InstructZero makes its sampler anew for each search: pass the class Ran",
        ),
        (
            {"sampler": functools.partial(TPESampler, gamma=lambda count: count)},
            r"^InstructZero couldn't tell a run with the sampler functools\.partial.* from others when it is resumed: ",
        ),
    ],
)
def test_a_knob_out_of_range_is_refused_when_it_is_set(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InstructZero(metric="accuracy", **settings)


def test_the_papers_numbers_are_the_defaults() -> None:
    one = InstructZero(metric="accuracy")
    assert (one.dimensions, one.soft_tokens, one.exemplars, one.rows) == (10, 5, 5, 20)
    assert (one.start, one.batch, one.iterations, one.max_tokens) == (25, 25, 5, 128)


def test_six_hundred_calls_on_a_hundred_rows_make_twenty_points_and_leave_a_third_for_choosing() -> None:
    plan = Plan.of(InstructZero(metric="accuracy"), 100, 1, 600)
    # 20 for the seed, 20 points of 1 + 20 calls, then the seed and the best one on 80 further rows
    assert (plan.batches, plan.finalists, plan.cost) == ((6, 3, 3, 3, 3, 2), 1, 20 + 20 * 21 + 2 * 80)


@given(
    train=some.integers(2, 300),
    predictors=some.integers(1, 3),
    calls=some.integers(0, 5000),
    finalists=some.integers(0, 5),
)
def test_a_plan_costs_no_more_than_it_may_unless_it_may_less_than_one_point(
    train: int, predictors: int, calls: int, finalists: int
) -> None:
    one = InstructZero(metric="accuracy", finalists=finalists)
    plan = Plan.of(one, train, predictors, calls)
    least = min(20, train) * 2 * predictors + 1
    assert plan.cost <= max(calls, least)
    assert 1 <= sum(plan.batches) <= 150
    assert min(plan.batches) > 0
    assert plan.finalists <= min(finalists, sum(plan.batches))


def test_what_repeats_save_is_spent_in_batches_no_larger_than_the_first() -> None:
    plan = Plan(batches=(5, 3), finalists=1, cost=88, scoring=10, most=30)
    tried = [0]
    sizes: list[int] = []
    for size in plan.sizes(lambda: (tried[0], 1)):  # every point comes to the same instruction
        sizes.append(size)
        tried[0] += size

    assert sizes == [5, 3, 5, 5, 5, 5, 2]


def test_a_budget_of_the_plan_is_kept_to_the_call(tmp_path: Path) -> None:
    made = method(tmp_path, simulated(numbered), budget=Budget(calls=300 + 2 * CONFIRM))
    estimate = made.estimate(toy.signatures(toy.Sorter()), 40, 300)
    evidence = compiled(made, train=40).evidence
    assert evidence.spent.calls - CONFIRM == estimate.expected <= 300
    assert not evidence.stopped


class Asked(toy.Sorter):
    """Asks its predictor twice for each row."""

    def forward(self, **inputs: Any) -> Any:
        super().forward(text=f"Once: {inputs['text']}")
        return super().forward(**inputs)


def test_finalists_of_a_predictor_that_is_asked_twice_a_row_are_paid_for(tmp_path: Path) -> None:
    budget = Budget(calls=1000 + 4 * CONFIRM)
    made = method(tmp_path, simulated(numbered), budget=budget, sampler=RandomSampler)
    evidence = compiled(made, train=40, program=Asked()).evidence

    seen: dict[str, set[int]] = {}
    for one in trials(tmp_path):
        seen.setdefault(one["instructions"]["predict"], set()).update(one["rows"])
    assert [len(rows) for rows in seen.values()].count(40) == 1 + 4  # the seed and the finalists
    assert (evidence.stopped, evidence.spent.calls <= 1000 + 4 * CONFIRM) == ("", True)


def test_predictors_are_improved_one_after_the_other_and_the_seed_is_scored_once(tmp_path: Path) -> None:
    proposer = simulated(lambda request: toy.RIGHT if "Input: text:" in prompt(request) else "Guess.")
    result = compiled(method(tmp_path, proposer, start=2, iterations=0), program=toy.Chain())

    assert result.first.predict.signature.instructions == toy.RIGHT
    names = ["InstructZero first.predict", "InstructZero second.predict"]
    assert [len(search(tmp_path, name).trials) for name in names] == [2, 2]
    seen = [json.dumps(one["instructions"], sort_keys=True) for one in trials(tmp_path)]
    assert len(seen) == len(set(seen))


def test_a_later_search_pays_for_the_seed_on_rows_where_it_isnt_known() -> None:
    one = InstructZero(metric="accuracy", rows=10, start=5, iterations=0, finalists=2)
    plans = [Plan.of(one, 30, 1, 300, known) for known in (0, 10, 30)]

    assert [plan.cost for plan in plans] == [10 + 5 * 11 + 3 * 20, 5 * 11 + 3 * 20, 5 * 11 + 2 * 20]


@pytest.mark.parametrize("calls", [1000, 1096, 1200])
def test_two_searches_keep_to_a_budget_whose_first_half_pays_for_no_finalist(tmp_path: Path, calls: int) -> None:
    made = method(tmp_path, simulated(numbered), budget=Budget(calls=calls), **FEW)
    evidence = compiled(made, train=100, program=toy.Chain()).evidence

    assert evidence.stopped == ""
    assert evidence.spent.calls <= calls


def test_redrawing_for_two_predictors_watches_the_rows_it_draws_from_and_the_estimate_says_so(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"start": 2, "iterations": 0, "exemplars": 2, "finalists": 0, "sampler": RandomSampler}
    plain, redrawn = (method(tmp_path / name, simulated(numbered), **knobs) for name in ("plain", "redrawn"))
    redrawn = replace(redrawn, redraw=True)
    signatures = toy.signatures(toy.Chain())

    assert redrawn.estimate(signatures, 30, None).expected - plain.estimate(signatures, 30, None).expected == 2 * 8
    spent = compiled(redrawn, train=30, program=toy.Chain()).evidence.spent.calls
    assert spent - 2 * CONFIRM <= redrawn.estimate(signatures, 30, None).expected


def test_a_model_in_this_process_proposes_to_one_behind_http(tmp_path: Path, smollm: dspy.LM) -> None:
    with ChatServer(lambda body: "no") as server:
        lm = server.lm("remote", max_tokens=16)
        made = method(tmp_path, smollm, lm=lm, start=3, iterations=0, exemplars=2, max_tokens=48, finalists=0)
        evidence = compiled(made, train=6).evidence
        told = [one.user_attrs["instruction"] for one in search(tmp_path).trials]
        systems = [body["messages"][0]["content"] for body in (request.body for request in server.requests)]
    assert (evidence.lm, evidence.proposer) == ("openai/remote", smollm.model)
    distinct = {text for text in told if text}
    assert distinct
    for text in (toy.SEED, *distinct):
        assert len([one for one in systems if text in one]) >= 6
    assert server.count == 6 * (len(distinct) + 1) + CONFIRM


def test_fewer_than_two_rows_are_refused_with_the_number_needed_before_any_call(tmp_path: Path) -> None:
    proposer, lm = simulated(numbered), simulated(toy.answer)
    message = r"^Too few rows: 1 to search on, 24 to confirm on; at least 2 and 6: "
    with pytest.raises(ConfigError, match=message):
        compiled(method(tmp_path, proposer, lm=lm, **FEW), train=1)
    assert (asked(proposer), asked(lm)) == ([], [])


@pytest.mark.parametrize("train", [2, 5, 19])
def test_a_task_with_fewer_rows_than_the_papers_twenty_is_searched_on_all_of_them(tmp_path: Path, train: int) -> None:
    lm = simulated(toy.answer)
    texts = ["A.", "B.", toy.RIGHT, "C.", "D.", "E.", "F."]
    result = compiled(method(tmp_path, scripted(texts), lm=lm, **FEW), train=train)
    assert len(asked(lm)) == train * 8 + 2 * CONFIRM  # nothing is left to score the best few on
    assert result.evidence.replaced


def test_a_model_in_this_process_writes_the_instructions(tmp_path: Path, smollm: dspy.LM) -> None:
    made = method(tmp_path, smollm, start=3, iterations=0, exemplars=2, max_tokens=48)
    compiled(made, train=6)
    made_points = search(tmp_path).trials
    texts = [one.user_attrs["instruction"] for one in made_points]
    assert len(texts) == 3
    assert any(texts)
    for one, text in zip(made_points, texts, strict=True):  # what was cut in mid-sentence is no instruction
        assert (one.state == optuna.trial.TrialState.COMPLETE) == (bool(text) and texts.index(text) == one.number)
