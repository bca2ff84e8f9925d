from __future__ import annotations

import copy
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Request, Response

from preceptor import load
from preceptor.errors import (
    BudgetExhausted,
    ConfigError,
    DataError,
    InputTooLong,
    LMFailed,
    MetricError,
    RunError,
    Unaffordable,
)
from preceptor.evidence import Evidence
from preceptor.lm.adapter import declare
from preceptor.lm.budget import Account, Budget
from preceptor.lm.ledger import Ledger
from preceptor.modules import Classify
from preceptor.program import candidate_of, read
from preceptor.scoring import racing
from preceptor.scoring.metrics import wrap
from preceptor.scoring.statistics import compare, smallest_gain
from preceptor.scoring.trial import Outcome, Trial
from preceptor.task import Sampling, Task
from preceptor.teleprompter import Estimate, Teleprompter
from preceptor.testing import asked, prompt, scripted, simulated, system

SEED, RIGHT, USELESS = "Sort.", "Answer with the last word.", "Think hard."
TRAIN, CONFIRM = 16, 20
THREADS = [1, 8, 64]


@dataclass(frozen=True, kw_only=True)
class Tries(Teleprompter):
    """Asks the proposer for texts and races them with the seed, predictor by predictor."""

    asks: int = 2

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        count = len(signatures)
        each = self.asks + count * racing.cost(1 + self.asks, rows)
        return Estimate(least=count * rows, expected=count * each)

    def search(self, task: Task) -> Sequence[Trial]:
        best, trials = task.seed, list[Trial]()
        for name in task.signatures:
            prompts = [f"Write an instruction for {name}, number {n}." for n in range(self.asks)]
            texts = task.propose(prompts, Sampling(1.0))
            fresh = [best.with_instruction(name, text) for text in texts]
            trials = racing.race([best, *fresh], task.score, task.order, task.metric.aggregate)
            best = trials[0].candidate
        return trials


@dataclass(frozen=True, kw_only=True)
class Idle(Teleprompter):
    """Finds nothing."""

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        return Estimate(least=0, expected=0)

    def search(self, task: Task) -> Sequence[Trial]:
        return []


@dataclass(frozen=True, kw_only=True)
class Given(Idle):
    """Finds a text; a run that finds another one is the same run, as with a larger budget."""

    text: str = RIGHT

    @property
    def knobs(self) -> dict[str, Any]:
        return {}

    def search(self, task: Task) -> Sequence[Trial]:
        return task.score([task.seed.with_instruction("predict", self.text)], task.order)


def student() -> dspy.Module:
    return Classify("text -> label: Literal['yes', 'no']", SEED)


def rows(count: int, start: int = 0) -> list[dspy.Example]:
    words = [["yes", "no"][n % 2] for n in range(start, start + count)]
    return [
        dspy.Example(text=f"row {start + n} {word}", label=word).with_inputs("text") for n, word in enumerate(words)
    ]


def answer(request: Request) -> str:
    """Right under one instruction only; otherwise "no", which half the rows are."""
    return prompt(request).split()[-1] if RIGHT in system(request) else "no"


def writer(*texts: str) -> dspy.LM:
    """Writes the texts, by the number at the end of the prompt."""
    return simulated(lambda request: texts[int(prompt(request).rstrip(".").split()[-1])], name="writer")


def tries(tmp_path: Path, lm: dspy.LM, *texts: str, **settings: Any) -> Tries:
    settings = {"metric": "accuracy", "run_dir": tmp_path / "run", **settings}
    return Tries(lm=lm, proposer=writer(*texts), asks=len(texts), **settings)


def compiled_by(method: Teleprompter, program: dspy.Module | None = None, **settings: Any) -> Any:
    data: dict[str, Any] = {"trainset": rows(TRAIN), "valset": rows(CONFIRM, start=TRAIN), **settings}
    return method.compile(program or student(), **data)


def artifact(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "program").iterdir()}


def test_a_better_instruction_replaces_the_users_with_evidence(tmp_path: Path) -> None:
    compiled = compiled_by(tries(tmp_path, simulated(answer), USELESS, RIGHT))
    evidence = compiled.evidence

    assert compiled.predict.signature.instructions == RIGHT
    assert evidence.replaced
    assert (evidence.baseline, evidence.compiled, evidence.gain, evidence.search_score) == (0.5, 1.0, 0.5, 1.0)
    assert evidence.comparison.p_value == pytest.approx(2 / 2**10)  # ten rows got better, none worse
    assert (evidence.comparison.rows, evidence.train_rows) == (CONFIRM, TRAIN)
    assert (evidence.instructions, evidence.seed_instructions) == ({"predict": RIGHT}, {"predict": SEED})
    assert (evidence.method, evidence.metric, evidence.lm) == ("Tries", "accuracy", "simulated/model")
    assert (evidence.proposer, evidence.seed, evidence.stopped) == ("simulated/writer", 0, "")
    assert evidence.verdict.startswith("Replaced: accuracy 0.500 -> 1.000 on 20 rows no search step has seen")


def test_the_compiled_program_runs_and_is_saved_with_its_evidence_and_probes(tmp_path: Path) -> None:
    lm = simulated(answer)
    compiled = compiled_by(tries(tmp_path, lm, RIGHT))

    with dspy.context(lm=lm):
        assert compiled(text="row 99 yes").label == "yes"
        assert load(compiled.evidence.program)(text="row 99 yes").label == "yes"
    saved = read(tmp_path / "run" / "program")
    assert saved.instructions == {"predict": RIGHT}
    assert saved.evidence["verdict"] == compiled.evidence.verdict
    assert saved.evidence["probes"] == [
        {"inputs": {"text": "row 16 yes"}, "output": "label", "answer": "yes"},
        {"inputs": {"text": "row 17 no"}, "output": "label", "answer": "no"},
        {"inputs": {"text": "row 18 yes"}, "output": "label", "answer": "yes"},
    ]
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result == compiled.evidence.as_dict()


def test_a_useless_search_keeps_the_users_instruction(tmp_path: Path) -> None:
    evidence = compiled_by(tries(tmp_path, simulated(answer), USELESS, "Think harder.")).evidence

    assert not evidence.replaced
    assert evidence.instructions == {"predict": SEED}
    assert (evidence.gain, evidence.compiled) == (0.0, 0.5)
    assert evidence.verdict == "Kept: the search found nothing better than your instructions (accuracy 0.500)."


def test_a_winner_that_isnt_confirmed_is_not_adopted(tmp_path: Path) -> None:
    def lucky(request: Request) -> str:
        number, word = prompt(request).split()[-2:]
        return word if USELESS in system(request) and int(number) < TRAIN else "no"

    compiled = compiled_by(tries(tmp_path, simulated(lucky), USELESS))

    assert compiled.predict.signature.instructions == SEED
    assert compiled.evidence.has_candidate
    assert (compiled.evidence.search_score, compiled.evidence.gain) == (1.0, 0.0)
    assert compiled.evidence.verdict.startswith("Kept: no significant improvement on 20 untouched rows. The best")


def test_a_method_that_returns_nothing_keeps_the_users_instruction(tmp_path: Path) -> None:
    compiled = compiled_by(Idle(metric="accuracy", lm=simulated(answer), run_dir=tmp_path / "run"))

    assert compiled.predict.signature.instructions == SEED
    assert (compiled.evidence.search_score, compiled.evidence.has_candidate) == (None, False)


def test_the_seed_is_scored_first(tmp_path: Path) -> None:
    compiled_by(tries(tmp_path, simulated(answer), USELESS, RIGHT))

    lines = (tmp_path / "run" / "trials.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["instructions"]["predict"] for line in lines] == [SEED, USELESS, RIGHT]


def test_no_search_step_sees_a_confirmation_row(tmp_path: Path) -> None:
    lm = simulated(answer)
    compiled_by(tries(tmp_path, lm, USELESS, RIGHT))

    seen = Counter((int(prompt(request).split()[-2]) >= TRAIN, RIGHT in system(request)) for request in asked(lm))
    useless = sum(int(prompt(request).split()[-2]) >= TRAIN and USELESS in system(request) for request in asked(lm))
    assert seen[True, True] == CONFIRM  # the winner, once
    assert seen[True, False] == CONFIRM  # the seed, once
    assert useless == 0


def test_student_and_rows_are_left_alone(tmp_path: Path) -> None:
    program, train, valset = student(), rows(TRAIN), rows(CONFIRM, start=TRAIN)
    state, before = program.dump_state(), copy.deepcopy([*train, *valset])

    compiled = compiled_by(tries(tmp_path, simulated(answer), RIGHT), program, trainset=train, valset=valset)

    assert compiled is not program
    assert program.dump_state() == state
    assert [*train, *valset] == before
    assert not hasattr(program, "evidence")


def test_without_a_valset_half_of_the_rows_is_set_aside(tmp_path: Path) -> None:
    evidence = compiled_by(tries(tmp_path, simulated(answer), RIGHT), trainset=rows(40), valset=None).evidence

    assert (evidence.train_rows, evidence.comparison.rows) == (20, 20)
    assert evidence.baseline == 0.5  # stratified: half the rows set aside are "no"
    assert evidence.replaced


def test_no_confirmation_row_has_the_inputs_of_a_train_row(tmp_path: Path) -> None:
    lm = simulated(answer)
    evidence = compiled_by(tries(tmp_path, lm, RIGHT), valset=rows(CONFIRM + 4, start=TRAIN - 4)).evidence
    assert evidence.comparison.rows == CONFIRM

    with pytest.raises(DataError, match=r"^valset: all 16 rows have the inputs of rows of the trainset;"):
        compiled_by(tries(tmp_path / "other", lm, RIGHT), valset=rows(TRAIN))


def test_half_of_repeated_rows_is_no_fresh_half(tmp_path: Path) -> None:
    lm = simulated(answer)
    compiled_by(tries(tmp_path, lm, RIGHT), trainset=[*rows(20), *rows(20)], valset=None)

    searched = {prompt(request) for request in asked(lm)[:20]}
    confirmed = {prompt(request) for request in asked(lm)[20:]}
    assert (len(searched), len(confirmed), searched & confirmed) == (10, 10, set())


def test_six_rows_are_enough_to_confirm_a_gain_and_fewer_never(tmp_path: Path) -> None:
    def answer(request: Request) -> str:
        return prompt(request).split()[-1] if RIGHT in system(request) else "none"

    evidence = compiled_by(tries(tmp_path, simulated(answer), RIGHT), valset=rows(6, TRAIN)).evidence
    assert (evidence.replaced, evidence.comparison.rows, evidence.comparison.p_value) == (True, 6, 2 / 2**6)
    five, none = [Outcome("scored", 1.0)] * 5, [Outcome("scored", 0.0)] * 5
    assert not compare(none, five, wrap("accuracy", "label")).is_confirmed
    assert not compare(none, five, wrap("macro_f1", "label")).is_confirmed


def test_six_inputs_are_needed_however_often_they_come(tmp_path: Path) -> None:
    message = r"^Too few rows: 16 to search on, 5 of different inputs to confirm on; at least 2 and 6: "
    with pytest.raises(ConfigError, match=message):
        compiled_by(tries(tmp_path, simulated(answer), RIGHT), valset=rows(5, TRAIN) * 10)


def test_repeated_rows_are_no_evidence(tmp_path: Path) -> None:
    """Five of ten inputs get better: 25 of 50 rows, which would be p = 6e-08 if they were independent."""
    told: list[str] = []
    method = tries(tmp_path, simulated(answer), RIGHT, report=lambda what, done, total: told.append(what))

    evidence = compiled_by(method, valset=rows(10, TRAIN) * 5).evidence

    assert (evidence.comparison.gain, evidence.comparison.p_value, evidence.replaced) == (0.5, 2 / 2**5, False)
    assert evidence.smallest_gain == pytest.approx(smallest_gain(10))
    assert (evidence.stable()["rows"], evidence.stable()["repeated_rows"]) == (50, 40)
    assert "Kept: no significant improvement on 50 untouched rows of 10 different inputs. " in evidence.verdict
    assert read(tmp_path / "run" / "program").evidence["repeated_rows"] == 40
    assert any(each.startswith("10 rows confirm ") for each in told)


def numbered(examples: Sequence[dspy.Example]) -> list[dspy.Example]:
    """The same rows, each with an id of its own among its inputs."""
    return [dspy.Example(**row.toDict(), id=at).with_inputs("id", "text") for at, row in enumerate(examples)]


def test_an_id_among_the_inputs_makes_no_two_rows_of_one(tmp_path: Path) -> None:
    method = tries(tmp_path, simulated(answer), RIGHT)

    evidence = compiled_by(method, trainset=numbered(rows(TRAIN)), valset=numbered(rows(10, TRAIN) * 5)).evidence

    assert (evidence.comparison.repeated, evidence.comparison.p_value, evidence.replaced) == (40, 2 / 2**5, False)
    with pytest.raises(DataError, match=r"^valset: all 16 rows have the inputs of rows of the trainset"):
        compiled_by(method, trainset=numbered(rows(TRAIN)), valset=numbered(rows(TRAIN)[::-1]))


class Noted(dspy.Module):
    """A program whose own code, not its predictor, looks at a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = student()

    def forward(self, **inputs: Any) -> dspy.Prediction:
        return self.sort(text=f"{inputs['id']} {inputs['text']}")


def test_an_input_that_the_users_own_code_may_look_at_tells_rows_apart(tmp_path: Path) -> None:
    method = tries(tmp_path, simulated(answer), RIGHT)

    evidence = compiled_by(
        method, Noted(), trainset=numbered(rows(TRAIN)), valset=numbered(rows(10, TRAIN) * 5)
    ).evidence

    assert (evidence.comparison.repeated, evidence.replaced) == (0, True)


@pytest.mark.parametrize("threads", THREADS)
def test_the_estimate_is_what_a_compile_takes(tmp_path: Path, threads: int) -> None:
    lm = simulated(answer)
    told: list[str] = []
    method = tries(tmp_path, lm, USELESS, RIGHT, threads=threads, report=lambda what, done, total: told.append(what))
    evidence = compiled_by(method).evidence

    expected = 2 + 3 * TRAIN + 2 * CONFIRM
    assert told[:2] == [
        f"about {expected} calls",
        "20 rows confirm a gain of 53 points or more in a score of 0 or 1, four times in five",
    ]
    assert evidence.spent.calls == evidence.billed.calls == expected
    assert len(asked(lm)) == expected - 2


@pytest.mark.parametrize("threads", THREADS)
def test_the_budget_is_never_passed_and_the_best_so_far_is_confirmed(tmp_path: Path, threads: int) -> None:
    lm = simulated(answer)
    budget = 2 * CONFIRM + 2 + 2 * TRAIN + 5  # one score of both, then the next one ends it
    method = tries(tmp_path, lm, RIGHT, USELESS, threads=threads, budget=Budget(calls=budget))

    evidence = compiled_by(method).evidence

    assert len(asked(lm)) + 2 <= budget
    assert evidence.spent.calls <= budget
    assert evidence.stopped.startswith("The next call could take calls to ")
    assert not evidence.replaced  # three candidates were begun, none was through


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("calls", [57, 80, 91, 120])
def test_no_engine_is_asked_more_often_than_budgeted(tmp_path: Path, threads: int, calls: int) -> None:
    lm = simulated(answer)
    method = tries(tmp_path, lm, RIGHT, USELESS, threads=threads, budget=Budget(calls=calls))

    evidence = compiled_by(method).evidence

    proposals = asked(method.proposer) if method.proposer else []
    assert len(asked(lm)) + len(proposals) == evidence.spent.calls <= calls


def test_a_finished_race_is_used_when_a_later_one_ends_the_budget(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Endless(Idle):
        def search(self, task: Task) -> Sequence[Trial]:
            better = task.seed.with_instruction("predict", RIGHT)
            while True:
                task.score([task.seed, better], task.order[:8])

    budget = Budget(calls=100)
    method = Endless(metric="accuracy", lm=simulated(answer), run_dir=tmp_path / "run", budget=budget)
    evidence = compiled_by(method).evidence

    assert evidence.replaced
    assert evidence.stopped.startswith("The next call could take calls to 101, past the budget of 100;")
    assert evidence.spent.calls == 100


@pytest.mark.parametrize("threads", THREADS)
def test_a_program_that_catches_everything_does_not_hide_the_end_of_the_budget(tmp_path: Path, threads: int) -> None:
    class Careful(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sort = student()

        def forward(self, text: str) -> Any:
            try:
                return self.sort(text=text)
            except Exception:  # noqa: BLE001  as programs do
                return dspy.Prediction(label="no")

    method = tries(tmp_path, simulated(answer), RIGHT, USELESS, threads=threads, budget=Budget(calls=79))
    evidence = compiled_by(method, Careful()).evidence

    assert evidence.stopped.startswith("The next call could take calls to ")
    assert not evidence.has_candidate


def test_a_program_is_not_confirmed_by_leaving_out_the_rows_that_only_it_fails_with(tmp_path: Path) -> None:
    """Of 100 rows it mends 10, and fails with 7 that the user's instructions answer: 10 to 7 is luck, 10 to 0 isn't."""

    def answering(request: Request) -> str:
        row, is_new = int(prompt(request).split()[-2]), RIGHT in system(request)
        if is_new and TRAIN < row <= TRAIN + 14 and answer(request) == "no":
            raise InputTooLong("too long")
        return answer(request) if row < TRAIN + 20 else prompt(request).split()[-1]

    compiled = compiled_by(tries(tmp_path, simulated(answering), RIGHT), valset=rows(100, start=TRAIN))

    comparison = compiled.evidence.comparison
    assert (comparison.rows, comparison.before, comparison.after) == (100, 0.9, 0.93)
    assert (compiled.evidence.replaced, compiled.predict.signature.instructions) == (False, SEED)
    told = json.loads((tmp_path / "run" / "confirmation.json").read_text())["rows"]
    assert [row["after"]["kind"] for row in told].count("failed") == 7


def test_a_second_candidate_on_the_same_rows_has_half_the_level_to_pass(tmp_path: Path) -> None:
    """6 of 12 rows change for the better: p = 2 / 2^6."""

    @dataclass(frozen=True, kw_only=True)
    class Thrifty(Idle):
        def search(self, task: Task) -> Sequence[Trial]:
            text = USELESS if (task.meter.account.budget.calls or 0) < 100 else RIGHT
            return task.score([task.seed.with_instruction("predict", text)], task.order)

    def found(folder: str, calls: int) -> Evidence:
        method = Thrifty(metric="accuracy", lm=simulated(answer), run_dir=tmp_path / folder, budget=Budget(calls=calls))
        evidence: Evidence = compiled_by(method, valset=rows(12, start=TRAIN)).evidence
        return evidence

    first, second, again, alone = found("a", 99), found("a", 100), found("a", 200), found("b", 100)

    assert second.comparison.p_value == alone.comparison.p_value == 2 / 2**6
    assert [each.comparison.look for each in (first, second, again, alone)] == [1, 2, 2, 1]
    assert [each.replaced for each in (first, second, again, alone)] == [False, False, False, True]
    assert second.verdict.endswith(" This is look 2 at these rows: p has to be below 0.025.")
    assert [each.stable().get("look") for each in (first, second, alone)] == [None, 2, None]
    assert read(tmp_path / "a" / "program").evidence["look"] == 2


@pytest.mark.parametrize("text", [USELESS, SEED])
def test_what_was_confirmed_stays_when_a_search_with_a_larger_budget_confirms_nothing(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Lavish(Idle):
        def search(self, task: Task) -> Sequence[Trial]:
            found = RIGHT if (task.meter.account.budget.calls or 0) < 100 else text
            return task.score([task.seed.with_instruction("predict", found)], task.order)

    def compiled(calls: int) -> Any:
        method = Lavish(metric="accuracy", lm=simulated(answer), run_dir=tmp_path / "run", budget=Budget(calls=calls))
        return compiled_by(method, valset=rows(12, start=TRAIN))

    def kept(name: str) -> str:
        return (tmp_path / "run" / name).read_text(encoding="utf-8")

    first = compiled(99).evidence
    files = ("confirmation.json", "program/program.json", "program/evidence.json", "program/manifest.json")
    before = {name: kept(name) for name in files}
    second, third = compiled(200), compiled(200)

    assert (first.replaced, second.evidence.replaced) == (True, True)
    assert second.predict.signature.instructions == first.instructions["predict"] == RIGHT
    assert {name: kept(name) for name in files} == before
    assert second.evidence.comparison == first.comparison
    told = f"{first.verdict} A search that went on from there confirmed nothing else: Kept: "
    assert second.evidence.verdict.startswith(told)
    assert json.loads(kept("result.json")) == third.evidence.as_dict()
    assert third.evidence.verdict == second.evidence.verdict
    assert compiled(99).evidence.stable() == first.stable()
    assert not [told for told in caplog.messages if "can't be read" in told]
    (tmp_path / "run" / "result.json").write_text('{"replaced": true}', encoding="utf-8")
    assert not compiled(200).evidence.replaced
    assert [told for told in caplog.messages if "has confirmed before can't be read, and is overwritten" in told]


def test_what_another_metric_of_the_same_name_confirmed_doesnt_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def judged(gold: Any, predicted: Any, least: int) -> bool:
        return predicted.label == gold.label and int(gold.text.split()[1]) >= least

    def compiled(least: int, text: str) -> Any:
        metric = partial(judged, least=least)
        return compiled_by(Given(text=text, metric=metric, lm=simulated(answer), run_dir=tmp_path / "run")).evidence

    assert compiled(0, RIGHT).replaced
    assert compiled(0, USELESS).replaced, "the same metric's stays"
    assert not compiled(30, USELESS).replaced
    told = "was scored by another metric of the name partial, and is overwritten."
    assert [message for message in caplog.messages if message.endswith(told)]


def test_what_a_metric_confirmed_doesnt_stay_once_it_scores_the_candidates_answers_otherwise(tmp_path: Path) -> None:
    """It took each "yes" for right; mended, it scores the prompt's answers, which are "no", as before."""

    def compiled(metric: Any, text: str = RIGHT) -> Any:
        return compiled_by(Given(text=text, metric=metric, lm=simulated(answers), run_dir=tmp_path / "run")).evidence

    def answers(request: Request) -> str:
        return "yes" if RIGHT in system(request) else "no"

    def lax(gold: Any, predicted: Any) -> float:
        return float(predicted.label == "yes")

    def strict(gold: Any, predicted: Any) -> float:
        return float(predicted.label == gold.label.upper())

    lax.__name__ = strict.__name__ = "judged"
    assert compiled(lax).replaced
    assert not compiled(strict).replaced
    assert compiled(lax).replaced
    assert not compiled(strict, USELESS).replaced, "its answers were never scored by this metric"


def test_what_a_metric_confirmed_stays_where_its_other_code_scores_all_of_its_answers_alike(tmp_path: Path) -> None:
    """Each answer of the confirmed program is the prompt's or the later candidate's, which always says yes."""

    def compiled(metric: Any, text: str) -> Any:
        return compiled_by(Given(text=text, metric=metric, lm=simulated(answers), run_dir=tmp_path / "run")).evidence

    def answers(request: Request) -> str:
        return "yes" if USELESS in system(request) else answer(request)

    def short(gold: Any, predicted: Any) -> float:
        return float(predicted.label == gold.label)

    def long(gold: Any, predicted: Any) -> float:
        return 1.0 if predicted.label == gold.label else 0.0

    short.__name__ = long.__name__ = "judged"
    assert compiled(short, RIGHT).replaced
    assert compiled(long, USELESS).replaced, "the program that was confirmed"


def test_another_verdict_on_the_same_answers_is_another_look_at_the_rows(tmp_path: Path) -> None:
    """A judge that tosses coins confirms something in the end, if it is asked often enough at the same level."""
    tosses = random.Random(1)

    def judged(gold: Any, predicted: Any) -> bool:
        return tosses.random() < 0.5

    def look(folder: str, metric: Any) -> int:
        method = Given(metric=metric, lm=simulated(answer), run_dir=tmp_path / folder)
        return int(compiled_by(method).evidence.comparison.look)

    assert [look("a", judged) for _ in range(4)] == [1, 2, 3, 4]
    assert [look("b", "accuracy") for _ in range(2)] == [1, 1]


def test_scores_intervals_and_gain_are_of_the_same_rows(tmp_path: Path) -> None:
    """The prompt fails with one row, so what the candidate answers there counts in none of them."""

    def answering(request: Request) -> str:
        row = int(prompt(request).split()[-2])
        if row == TRAIN and RIGHT not in system(request):
            raise InputTooLong("too long")
        return "no" if row == TRAIN else answer(request)

    evidence = compiled_by(tries(tmp_path, simulated(answering), RIGHT), valset=rows(30, start=TRAIN)).evidence
    assert (evidence.comparison.rows, evidence.compiled) == (29, 1.0)
    assert evidence.compiled_ci[1] == 1.0


def test_macro_f1_warns_of_labels_without_a_row_to_confirm_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = "No row to confirm on has the label 'no'. What a program loses there doesn't count in macro F1"
    only = [row for row in rows(60, start=TRAIN) if row.label == "yes"]

    compiled_by(tries(tmp_path / "a", simulated(answer), RIGHT, metric="macro_f1"), valset=only)
    assert [message for message in caplog.messages if message.startswith(told)]
    caplog.clear()
    compiled_by(tries(tmp_path / "b", simulated(answer), RIGHT), valset=only)
    compiled_by(tries(tmp_path / "c", simulated(answer), RIGHT, metric="macro_f1"), valset=rows(60, start=TRAIN))
    assert not [message for message in caplog.messages if message.startswith("No row")]


def test_what_a_judge_that_isnt_sure_has_confirmed_stays(tmp_path: Path) -> None:
    seen = Counter[str]()

    def judged(gold: Any, predicted: Any) -> float:
        seen[gold.text] += 1  # it is a little more severe each time
        return 1 - 0.01 * seen[gold.text] if predicted.label == gold.label else 0.0

    def compiled(text: str) -> Any:
        return compiled_by(Given(text=text, metric=judged, lm=simulated(answer), run_dir=tmp_path / "run")).evidence

    assert (compiled(RIGHT).replaced, compiled(USELESS).replaced) == (True, True)


def test_what_cant_be_afforded_is_refused_before_the_first_call(tmp_path: Path) -> None:
    lm = simulated(answer)
    method = tries(tmp_path, lm, RIGHT, budget=Budget(calls=2 * CONFIRM + TRAIN - 1))

    expected = (
        r"^Tries needs at least 56 calls here: 40 to confirm on 20 rows and 16 to search\. The budget has 55\. "
        r"No call was made\. Raise the budget or give fewer rows: 15 to search on and 19 to confirm on can be paid\.$"
    )
    with pytest.raises(Unaffordable, match=expected):
        compiled_by(method)

    assert asked(lm) == []


def test_a_budget_of_tokens_needs_a_bound_per_call_of_every_model(tmp_path: Path) -> None:
    unbounded = dspy.LM("simulated/own", engine=simulated(answer).engine, cache=False)
    program = student()
    program.set_lm(unbounded)
    lm = simulated(answer)

    with pytest.raises(ConfigError, match=r"needs a bound per call: dspy\.LM\('simulated/own', max_tokens=512\)"):
        compiled_by(tries(tmp_path, lm, RIGHT, budget=Budget(tokens=10_000)), program)

    assert asked(lm) == asked(unbounded) == []


def test_predictors_with_models_of_their_own_are_metered_too(tmp_path: Path) -> None:
    own, lm = simulated(answer, name="own"), simulated(answer)
    program = student()
    program.set_lm(own)

    evidence = compiled_by(tries(tmp_path, lm, RIGHT), program).evidence

    assert evidence.replaced
    assert asked(lm) == []
    assert evidence.spent.calls == 1 + len(asked(own)) == 1 + 2 * TRAIN + 2 * CONFIRM
    assert program.get_lm() is own
    assert evidence.lm == read(Path(evidence.program)).program["lm"] == own.model


class Guessing(dspy.Module):
    """A frozen part with a model of its own, and one to be improved."""

    def __init__(self, own: dspy.LM) -> None:
        self.guess = Classify("text -> guess: Literal['yes', 'no']", "Guess.")
        self.guess.predict.lm = own
        self.guess._compiled = True
        self.answer = student()

    def forward(self, text: str) -> Any:
        self.guess(text=text)
        return self.answer(text=text)


def test_the_model_of_a_frozen_part_is_metered_and_replayed(tmp_path: Path) -> None:
    own, lm = simulated(lambda request: "no", name="own"), simulated(answer)
    program = Guessing(own)

    evidence = compiled_by(tries(tmp_path, lm, RIGHT), program).evidence
    calls = len(asked(own))
    again = compiled_by(tries(tmp_path, lm, RIGHT), program).evidence

    assert evidence.billed.calls == 1 + len(asked(lm)) + calls
    assert calls == TRAIN + CONFIRM  # the same input under either candidate is one call
    assert again.spent == evidence.spent
    assert (len(asked(own)), again.billed.calls) == (calls, 0)
    assert list(read(tmp_path / "run" / "program").instructions) == ["answer.predict"]
    assert program.guess.predict.lm is own


def test_a_budget_of_tokens_needs_a_bound_per_call_of_a_frozen_parts_model_too(tmp_path: Path) -> None:
    unbounded = dspy.LM("simulated/own", engine=simulated(answer).engine, cache=False)

    with pytest.raises(ConfigError, match=r"needs a bound per call: dspy\.LM\('simulated/own', max_tokens=512\)"):
        compiled_by(tries(tmp_path, simulated(answer), RIGHT, budget=Budget(tokens=10_000)), Guessing(unbounded))

    assert not (tmp_path / "run").exists()


def test_rows_to_confirm_on_of_one_label_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = "All {} rows to confirm on have the label {}. A program that always answers it is right on all of them, so"
    mixed, one = rows(40, TRAIN), [row for row in rows(40, TRAIN) if row.label == "no"]

    compiled_by(tries(tmp_path, simulated(answer), RIGHT), valset=mixed)
    assert not [text for text in caplog.messages if "always answers" in text]
    compiled_by(tries(tmp_path / "one", simulated(answer), RIGHT), valset=one)
    assert [text.startswith(told.format(20, "'no'")) for text in caplog.messages if "always answers" in text] == [True]


def test_a_compile_beside_another_on_the_same_rows_says_so_and_comes_out_as_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    polite = f"{RIGHT} Please."
    alone = compiled_by(tries(tmp_path, simulated(answer), polite, run_dir=tmp_path / "alone" / "run"))
    compiled_by(tries(tmp_path, simulated(answer), RIGHT, run_dir=tmp_path / "first"))
    second = compiled_by(tries(tmp_path, simulated(answer), polite, run_dir=tmp_path / "second"))

    assert [told for told in caplog.messages if "looked at" in told] == [
        "Other runs have looked at these same rows: first. "
        "Whoever ships the best of all 2 candidates has to hold p to 0.025."
    ]
    assert second.evidence.stable() == alone.evidence.stable()
    assert second.evidence.replaced


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"trainset": []}, DataError, r"^trainset is empty\.$"),
        ({"valset": []}, DataError, r"^valset is empty\.$"),
        (
            {"trainset": rows(1)},
            ConfigError,
            r"^Too few rows: 1 to search on, 20 to confirm on; at least 2 and 6: fewer can't tell",
        ),
        ({"trainset": rows(3), "valset": None}, ConfigError, r"^Too few rows: 2 to search on, 1 to confirm on;"),
        (
            {"valset": rows(5, TRAIN)},
            ConfigError,
            r"^Too few rows: 16 to search on, 5 to confirm on; at least 2 and 6:",
        ),
        (
            {"trainset": [dspy.Example(body="hi", label="yes").with_inputs("body")]},
            DataError,
            r"^trainset, row 1: the input 'text' is missing; it has \['body'\]\.$",
        ),
        (
            {"trainset": [*rows(TRAIN), dspy.Example(text="row", label="maybe").with_inputs("text")]},
            DataError,
            r"^trainset, row 17, label: 'maybe' is no label; expected one of yes, no\.$",
        ),
        (
            {"valset": [*rows(CONFIRM, TRAIN), dspy.Example(text="row", label=["yes", 1]).with_inputs("text")]},
            DataError,
            r"^valset, row 21, label: '\[\"yes\", 1\]' is no label; expected one of yes, no\.$",
        ),
        (
            {"trainset": [*rows(TRAIN), dspy.Example(text="row").with_inputs("text")]},
            DataError,
            r"^trainset, row 17: the label 'label' is missing; its labels are \[\]\.$",
        ),
        (
            {"trainset": [dspy.Example(text="row").with_inputs("text"), *rows(TRAIN)]},
            DataError,
            r"^trainset, row 1: its label is missing; its labels are \[\]\.$",
        ),
        (
            {"trainset": [*rows(TRAIN), dspy.Example(text="cut \ud83d", label="yes").with_inputs("text")]},
            DataError,
            r"^trainset, row 17, text: no valid Unicode \(lone surrogate U\+D83D\); no model can be sent it\.$",
        ),
        ({"trainsett": rows(3)}, ConfigError, r"^Tries\.compile doesn't know 'trainsett'\.$"),
        ({"num_threads": 3}, ConfigError, r"^Tries\.compile doesn't know 'num_threads'\.$"),
    ],
)
def test_what_cant_work_is_refused_before_the_first_call(
    tmp_path: Path, settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    lm = simulated(answer)
    with pytest.raises(kind, match=message):
        compiled_by(tries(tmp_path, lm, RIGHT), **settings)

    assert asked(lm) == []
    assert not (tmp_path / "run").exists()


class Mapped(Classify):
    """Answers something else than its predictor."""

    def forward(self, **inputs: Any) -> Any:
        return dspy.Prediction(label=super().forward(**inputs).label.upper() + "!")


def judge(example: Any, prediction: Any) -> bool:
    return str(prediction.label) in str(example.label)


@pytest.mark.parametrize(
    ("metric", "kind", "labels"),
    [
        ("accuracy", Classify, ["YES ", "No", None]),
        ("accuracy", Mapped, ["YES!", "perhaps", "NO!"]),
        ("exact_match", Classify, [["no", "other"], "yes.", "The yes"]),
        (judge, Classify, ["yes or no", 1, ["no"]]),
    ],
)
def test_labels_are_let_through_that_an_answer_may_be_right_for(
    tmp_path: Path, metric: Any, kind: type[Classify], labels: list[Any]
) -> None:
    examples = [dspy.Example(text=str(label), label=label).with_inputs("text") for label in labels]
    program = kind("text -> label: Literal['yes', 'no']", SEED)

    method = tries(tmp_path, simulated(answer), RIGHT, metric=metric)
    compiled = compiled_by(method, program, trainset=[*rows(TRAIN), *examples])

    assert compiled.evidence.train_rows == TRAIN + 3
    assert compiled.evidence.stable().get("own_metric", False) is callable(metric)


def none(example: Any, prediction: Any) -> Any:
    return None


def raising(example: Any, prediction: Any) -> float:
    return float(prediction.lable == example.label)


def too_high(example: Any, prediction: Any) -> float:
    return 100.0


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (none, "The metric none returned None on"),
        (raising, "The metric raising raised AttributeError: "),
        (too_high, r"The metric too_high returned 100\.0 on"),
    ],
)
def test_a_metric_is_tried_before_the_first_call(tmp_path: Path, metric: Any, message: str) -> None:
    lm = simulated(answer)
    expected = rf"^Tried on the first row of trainset, with its own label as the answer: {message}"
    with pytest.raises(MetricError, match=expected):
        compiled_by(tries(tmp_path, lm, RIGHT, metric=metric))

    assert asked(lm) == []


def test_a_metric_that_breaks_on_the_valset_is_found_before_the_first_call(tmp_path: Path) -> None:
    def weighted(example: Any, prediction: Any) -> float:
        return float(example.weight)

    lm, train = simulated(answer), [row.copy(weight=1.0) for row in rows(4)]
    with pytest.raises(MetricError, match=r"^Tried on the first row of valset"):
        compiled_by(tries(tmp_path, lm, RIGHT, metric=weighted), trainset=train)

    assert asked(lm) == []


def brief(example: Any, prediction: Any) -> bool:
    """Need no label."""
    return len(prediction.label) < 4


def other_name(example: Any, prediction: Any) -> bool:
    return bool(example.gold == prediction["label"])


@pytest.mark.parametrize(("metric", "label"), [(brief, None), (other_name, "gold")])
def test_a_metric_that_reads_what_no_row_has_a_label_for_is_let_through(
    tmp_path: Path, metric: Any, label: str | None
) -> None:
    def renamed(row: dspy.Example) -> dspy.Example:
        return dspy.Example(text=row.text, **({label: row.label} if label else {})).with_inputs("text")

    train, confirm = [renamed(row) for row in rows(16)], [renamed(row) for row in rows(20, 16)]
    method = tries(tmp_path, simulated(answer), RIGHT, metric=metric)

    evidence = compiled_by(method, trainset=train, valset=confirm).evidence

    assert evidence.baseline == (1.0 if metric is brief else 0.5)


def test_a_metric_that_reads_a_second_output_is_let_through(tmp_path: Path) -> None:
    def reasoned(example: Any, prediction: Any) -> bool:
        return bool(prediction.reasoning and prediction.label == example.label)

    def chatting(request: Request) -> str:
        if not system(request):
            return answer(request)
        label = prompt(request).partition("[[ ## text ## ]]\n")[2].split("\n")[0].split()[-1]
        return f"[[ ## reasoning ## ]]\nSo.\n\n[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]"

    program = dspy.ChainOfThought(declare("text -> label", SEED))
    assert compiled_by(tries(tmp_path, simulated(chatting), RIGHT, metric=reasoned), program).evidence.baseline == 1.0


def test_a_metric_that_asks_a_model_is_let_through(tmp_path: Path) -> None:
    judge = dspy.Predict(declare("question -> verdict", "Judge."))

    def judged(example: Any, prediction: Any) -> bool:
        verdict = judge(question=f"Is {prediction.label} the same as {example.label}?").verdict
        return bool(verdict == "same")

    def judging(request: Request) -> str:
        if "[[ ## question ## ]]" not in prompt(request):
            return answer(request)
        words = prompt(request).split("Is ")[1].split("?")[0].split(" the same as ")
        return f"[[ ## verdict ## ]]\n{'same' if words[0] == words[1] else 'other'}\n\n[[ ## completed ## ]]"

    evidence = compiled_by(tries(tmp_path, simulated(judging), RIGHT, metric=judged)).evidence

    assert evidence.replaced
    assert (evidence.baseline, evidence.compiled, evidence.metric) == (0.5, 1.0, "judged")


def test_a_missing_model_is_named_before_anything_else(tmp_path: Path) -> None:
    method = Tries(metric="accuracy", run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^No language model: pass lm=, or call dspy\.configure\(lm=\.\.\.\)\.$"):
        compiled_by(method)
    assert not (tmp_path / "run").exists()


def test_the_configured_model_is_used_where_none_is_passed(tmp_path: Path) -> None:
    lm = simulated(lambda request: RIGHT if not system(request) else answer(request))
    with dspy.context(lm=lm):
        evidence = compiled_by(Tries(metric="accuracy", asks=1, run_dir=tmp_path / "run")).evidence

    assert (evidence.lm, evidence.proposer, evidence.replaced) == ("simulated/model", "simulated/model", True)


def test_a_program_without_predictors_is_refused(tmp_path: Path) -> None:
    class Constant(dspy.Module):
        def forward(self, text: str) -> dspy.Prediction:
            return dspy.Prediction(label="yes")

    with pytest.raises(ConfigError, match=r"^Constant has no predictor to improve\.$"):
        compiled_by(tries(tmp_path, simulated(answer), RIGHT), Constant())


@pytest.mark.parametrize(
    ("program", "kind"), [(Classify, "the class Classify"), ("text -> label", "a str"), (len, "a builtin_function")]
)
def test_what_is_no_module_is_refused(tmp_path: Path, program: Any, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"^A compile needs a dspy.Module, an instance of it; got {kind}"):
        compiled_by(tries(tmp_path, simulated(answer), RIGHT), program)


class AwaitedOnly(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict("text -> label")

    async def aforward(self, text: str) -> Any:
        return await self.predict.acall(text=text)


class Legacy(dspy.BaseLM):
    """A model of DSPy's older kind."""


def with_legacy_model(*, is_frozen: bool) -> dspy.Module:
    program = Guessing(simulated(answer))
    program.guess.predict.lm = Legacy("legacy")
    program.guess._compiled = is_frozen
    return program


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (AwaitedOnly(), r"^AwaitedOnly has no `forward`: it can only be awaited\. Define one\.$"),
        (with_legacy_model(is_frozen=False), r"^The model of the predictor guess\.predict is a Legacy, whose calls"),
        (with_legacy_model(is_frozen=True), r"^The model of the predictor guess\.predict is a Legacy, whose calls"),
    ],
)
def test_a_program_that_cant_be_called_or_counted_is_refused(
    tmp_path: Path, program: dspy.Module, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compiled_by(tries(tmp_path, simulated(answer), RIGHT), program)

    assert not (tmp_path / "run").exists()


def test_threads_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^Tries needs threads >= 1, got 0\.$"):
        Tries(metric="accuracy", threads=0)


@pytest.mark.parametrize("seed", [2**32, 2**32 + 1, 2**64])
def test_a_seed_that_numpy_doesnt_take_is_refused(seed: int) -> None:
    assert Tries(metric="accuracy", seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(ConfigError, match=rf"^Tries needs seed < 4294967296, got {seed}\.$"):
        Tries(metric="accuracy", seed=seed)


def test_a_method_without_search_or_estimate_says_so(tmp_path: Path) -> None:
    bare = Teleprompter(metric="accuracy", lm=simulated(answer), run_dir=tmp_path / "run")
    with pytest.raises(NotImplementedError, match=r"^Teleprompter defines no estimate\.$"):
        compiled_by(bare)
    with pytest.raises(NotImplementedError, match=r"^Teleprompter defines no search\.$"):
        bare.search(None)  # type: ignore[arg-type]  # not reached


def test_a_run_folder_of_other_inputs_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    lm = simulated(answer)
    compiled_by(tries(tmp_path, lm, RIGHT))
    before, calls = artifact(tmp_path / "run"), len(asked(lm))

    changes: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("trainset", {}, {"trainset": rows(TRAIN - 2)}),
        ("valset", {}, {"valset": rows(CONFIRM + 2, start=TRAIN)}),
        ("metric", {"metric": "exact_match"}, {}),
        ("method", {"seed": 1}, {}),
    ]
    for part, knobs, data in changes:
        with pytest.raises(RunError, match=rf"belongs to another {part}; nothing was overwritten\."):
            compiled_by(tries(tmp_path, lm, RIGHT, **knobs), **data)
    with pytest.raises(RunError, match=r"belongs to another student; nothing was overwritten\."):
        compiled_by(tries(tmp_path, lm, RIGHT), Classify("text -> label: Literal['yes', 'no']", "Other."))

    assert artifact(tmp_path / "run") == before
    assert len(asked(lm)) == calls


def test_the_same_compile_again_asks_nothing_and_ends_in_the_same_program(tmp_path: Path) -> None:
    lm = simulated(answer)
    first = compiled_by(tries(tmp_path, lm, USELESS, RIGHT))
    before, calls = artifact(tmp_path / "run"), len(asked(lm))

    again = compiled_by(tries(tmp_path, lm, USELESS, RIGHT, threads=3))

    assert len(asked(lm)) == calls
    assert artifact(tmp_path / "run") == before
    assert again.evidence.stable() == first.evidence.stable()
    assert (again.evidence.spent, again.evidence.billed.calls) == (first.evidence.spent, 0)


def test_without_a_run_folder_the_inputs_name_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path))
    lm = simulated(answer)

    first = compiled_by(tries(tmp_path, lm, RIGHT, run_dir=None)).evidence
    again = compiled_by(tries(tmp_path, lm, RIGHT, run_dir=None)).evidence
    other = compiled_by(tries(tmp_path, lm, RIGHT, run_dir=None, seed=1)).evidence

    assert first.run == again.run != other.run
    assert Path(first.run).parent == tmp_path / "runs"
    assert again.billed.calls == 0


def test_predictors_with_models_of_their_own_name_another_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path))
    lm, models = simulated(answer), [simulated(answer, name=name) for name in ("a", "b")]
    method = tries(tmp_path, lm, RIGHT, run_dir=None)

    runs = [compiled_by(method).evidence.run]
    for own in (*models, models[0]):
        program = student()
        program.set_lm(own)
        runs.append(compiled_by(method, program).evidence.run)

    assert (len(set(runs)), runs[1]) == (3, runs[3])
    assert [len(asked(own)) for own in models] == [2 * TRAIN + 2 * CONFIRM] * 2


@pytest.mark.parametrize("change", ["instruction", "model"])
def test_a_run_folder_of_other_frozen_parts_is_refused(tmp_path: Path, change: str) -> None:
    lm, own = simulated(answer), simulated(lambda request: "no", name="own")
    compiled_by(tries(tmp_path, lm, RIGHT), Guessing(own))
    other = Guessing(own if change == "instruction" else simulated(lambda request: "no", name="other"))
    if change == "instruction":
        frozen: Any = other.guess.predict
        frozen.signature = frozen.signature.with_instructions("Guess well.")

    with pytest.raises(RunError, match=r"belongs to another student; nothing was overwritten\."):
        compiled_by(tries(tmp_path, lm, RIGHT), other)


class Interrupted:
    """Answers like `answer`, but presses Ctrl-C once, at a given call."""

    def __init__(self, at: int) -> None:
        self._left = at
        self._lock = threading.Lock()
        self.answered: list[str] = []

    def __call__(self, request: Request) -> str:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
            self.answered.append(f"{system(request)}\n{prompt(request)}")
        return answer(request)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The program of a compile that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    compiled_by(tries(folder, simulated(answer), USELESS, RIGHT))
    return artifact(folder / "run")


@pytest.mark.parametrize(("at", "threads"), [(1, 1), (30, 1), (85, 1), (1, 8), (47, 8), (60, 8), (20, 64), (70, 64)])
def test_an_interrupted_compile_ends_in_the_same_program_and_asks_nothing_twice(
    tmp_path: Path, whole: dict[str, bytes], at: int, threads: int
) -> None:
    model = Interrupted(at)

    with pytest.raises(KeyboardInterrupt):
        compiled_by(tries(tmp_path, simulated(model), USELESS, RIGHT, threads=threads))
    before = len(model.answered)
    resumed = compiled_by(tries(tmp_path, simulated(model), USELESS, RIGHT, threads=threads))

    assert artifact(tmp_path / "run") == whole
    assert max(Counter(model.answered).values()) == 1
    assert len(model.answered) == 3 * TRAIN + 2 * CONFIRM
    assert resumed.evidence.billed.calls >= len(model.answered) - before


@dataclass(frozen=True, kw_only=True)
class Thorough(Tries):
    """Scores a better candidate on all rows, again and again, until the budget ends."""

    def search(self, task: Task) -> Sequence[Trial]:
        for number in range(100):
            task.score([task.seed.with_instruction("predict", f"{RIGHT} {number}")], task.order)
        raise AssertionError("the budget has not ended")


@dataclass(frozen=True, kw_only=True)
class Twice(Tries):
    """Scores the seed on all rows, then a better candidate."""

    def search(self, task: Task) -> Sequence[Trial]:
        [seed] = task.score([task.seed], task.order)
        return [*task.score([task.seed.with_instruction("predict", RIGHT)], task.order), seed]


def test_a_row_that_failed_as_the_model_went_down_is_asked_again(tmp_path: Path) -> None:
    def compiled(place: str, model: Callable[[Request], str]) -> dict[str, bytes]:
        method = Twice(metric="accuracy", lm=simulated(model), run_dir=tmp_path / place, threads=1)
        compiled_by(method, trainset=rows(24), valset=rows(CONFIRM, start=24))
        return artifact(tmp_path / place)

    made: list[str] = []

    def failing(request: Request) -> str:
        made.append(prompt(request))
        if len(made) >= 24:  # the last row of the first round, which may fail, and all others
            raise dspy.LMInvalidRequestError("no route")
        return answer(request)

    whole = compiled("whole", answer)
    with pytest.raises(LMFailed, match="no route"):
        compiled("broken", failing)

    assert compiled("broken", answer) == whole


def test_a_search_that_ends_on_its_seconds_leaves_the_confirmation_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, lock = [0.0], threading.Lock()
    monkeypatch.setattr("preceptor.life.Account", partial(Account, clock=lambda: now[0]))

    def slow(request: Request) -> str:
        with lock:
            now[0] += 0.01
        return answer(request)

    budget = Budget(seconds=4)
    method = Thorough(metric="accuracy", lm=simulated(slow), run_dir=tmp_path / "run", budget=budget, threads=2)
    evidence = compiled_by(method, trainset=rows(TRAIN)).evidence

    assert "seconds" in evidence.stopped
    assert evidence.comparison.rows == CONFIRM
    assert evidence.replaced


@pytest.mark.parametrize("budget", [Budget(calls=101), Budget(tokens=3000)], ids=["calls", "tokens"])
@pytest.mark.parametrize(
    "stops", [(), (20, 30), (75, 90)], ids=["whole", "stopped in the search", "stopped at its end"]
)
def test_all_processes_of_a_run_together_pay_no_more_than_the_budget(
    tmp_path: Path, budget: Budget, stops: tuple[int, ...]
) -> None:
    waits, lock = random.Random(0), threading.Lock()
    paid: list[str] = []

    def moody(request: Request) -> str:
        with lock:
            wait = waits.choice([0.0, 0.0, 0.004])
        time.sleep(wait)  # so that rows end in another order each time
        with lock:
            if len(paid) + 1 in left:
                left.remove(len(paid) + 1)
                raise KeyboardInterrupt
            paid.append(f"{system(request)} {prompt(request)}")
        return answer(request)

    left, programs = list(stops), list[dict[str, bytes]]()
    for _ in range(6 + len(stops)):
        method = Thorough(metric="accuracy", lm=simulated(moody), run_dir=tmp_path / "run", budget=budget, threads=8)
        with suppress(KeyboardInterrupt):
            compiled_by(method, trainset=rows(TRAIN))
            programs.append(artifact(tmp_path / "run"))
    ledger = Ledger(tmp_path / "run" / "ledger.sqlite")
    calls, tokens, _ = ledger.paid
    ledger.close()

    assert calls == len(paid) == len(set(paid))
    assert calls <= (budget.calls or calls)
    assert tokens <= (budget.tokens or tokens)
    assert left == []
    assert len(programs) == 6
    assert all(program == programs[0] for program in programs)


class Batched:
    """An engine that answers many requests at once, and counts their tokens as words."""

    supports_choices = False

    def __init__(self) -> None:
        self._engine: Any = simulated(answer).engine
        self.complete = self._engine.complete

    def __deepcopy__(self, memo: dict[int, object]) -> Batched:
        return self

    def count_tokens(self, request: Request) -> int:
        return len(f"{system(request)} {prompt(request)}".split())

    def batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Response | Exception]]]:
        for at in range(0, len(requests), 8):
            yield [(at + n, self.complete(request)) for n, request in enumerate(requests[at : at + 8])]


@pytest.mark.parametrize("bound", ["tokens", "dollars"])
@pytest.mark.parametrize("is_batched", [True, False], ids=["batched", "one a call"])
def test_a_search_that_ends_on_its_budget_leaves_what_the_confirmation_may_take(
    tmp_path: Path, bound: str, is_batched: bool
) -> None:
    engine: Any = Batched() if is_batched else simulated(answer).engine
    for number, size in enumerate((7000, 7700, 8400)):
        lm = dspy.LM("test/model", engine=engine, cache=False, max_tokens=100)
        prices = {"test/model": (1e6, 1e6)}  # a dollar a token
        budget = Budget(tokens=size) if bound == "tokens" else Budget(dollars=size, prices=prices)
        method = Thorough(metric="accuracy", lm=lm, run_dir=tmp_path / f"run {number}", budget=budget)
        evidence = compiled_by(method).evidence
        assert evidence.replaced
        assert f"could take {bound} to" in evidence.stopped
        assert evidence.spent.calls >= 2 * CONFIRM + TRAIN


def test_too_many_broken_calls_end_the_compile_and_are_mended_by_another(tmp_path: Path) -> None:
    is_up = threading.Event()

    def moody(request: Request) -> str:
        if not is_up.is_set() and any(row in prompt(request) for row in ("row 3 ", "row 4 ")):
            raise ConnectionError("no route")
        return answer(request)

    with pytest.raises(
        LMFailed,
        match=r"3 of \d+ rows failed \(48 to be scored\); .*no route\. Spent .*compile again, with run_dir='.*run'$",
    ):
        compiled_by(tries(tmp_path, simulated(moody), USELESS, RIGHT, threads=1))
    is_up.set()
    assert compiled_by(tries(tmp_path, simulated(moody), USELESS, RIGHT)).evidence.replaced


@pytest.mark.parametrize("at", ["search", "confirmation", "proposals"])
def test_a_finished_run_made_again_asks_no_failed_call_anew(tmp_path: Path, at: str) -> None:
    """Its answer could lead another way, and would be paid beyond the budget."""
    is_up = threading.Event()
    broken = {"search": "row 3 ", "confirmation": "row 45 ", "proposals": "number 7."}[at]

    def moody(request: Request) -> str:
        if not is_up.is_set() and broken in prompt(request) and (at != "search" or SEED in system(request)):
            raise ConnectionError("no route")
        return answer(request) if system(request) else RIGHT

    def compiled() -> Any:
        lm = simulated(moody)
        method = Tries(metric="accuracy", lm=lm, proposer=lm, asks=20, run_dir=tmp_path / "run", threads=8)
        evidence = compiled_by(method, trainset=rows(40), valset=rows(40, start=40)).evidence
        return evidence, artifact(tmp_path / "run"), len(asked(lm))

    first, program, _ = compiled()
    is_up.set()
    second, again, sent = compiled()

    assert (sent, second.billed.calls) == (0, 0)
    assert again == program
    assert (second.spent, second.lost, second.comparison) == (first.spent, first.lost, first.comparison)


@pytest.mark.parametrize("budget", [Budget(calls=41), Budget(tokens=10**6)], ids=["too few calls", "no bound per call"])
def test_a_budget_that_is_refused_leaves_the_records_of_a_finished_run(tmp_path: Path, budget: Budget) -> None:
    lm = simulated(answer)
    lm.kwargs.pop("max_tokens", None)
    compiled_by(tries(tmp_path, lm, RIGHT))
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in ("trials.jsonl", "result.json")}
    assert all(kept.values())

    with pytest.raises(ConfigError):
        compiled_by(tries(tmp_path, lm, RIGHT, budget=budget))

    assert {name: (tmp_path / "run" / name).read_bytes() for name in kept} == kept


@dataclass(frozen=True, kw_only=True)
class Likely(Teleprompter):
    """Scores candidates by likelihood until the budget ends."""

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        return Estimate(least=0, expected=0)

    def search(self, task: Task) -> Sequence[Trial]:
        for number in range(100):
            others = [task.seed.with_instruction("predict", f"{RIGHT} {number}")]
            for rows in (task.order[:4], task.order[4:8]):
                task.likelihood(others if number else [task.seed], rows)
        raise AssertionError("the budget has not ended")


def test_a_likelihood_search_that_ends_on_its_budget_is_ranked_by_the_mean(tmp_path: Path, smollm: dspy.LM) -> None:
    method = Likely(metric="macro_f1", lm=smollm, run_dir=tmp_path / "run", budget=Budget(calls=2 * 6 + 20))
    evidence = compiled_by(method, valset=rows(6, start=TRAIN)).evidence
    lines = [json.loads(line) for line in (tmp_path / "run" / "trials.jsonl").read_text().splitlines()]
    assert evidence.stopped
    assert evidence.search_score == max(line["so_far"] for line in lines if line["seen"] == 8) < 0
    assert evidence.seed_search_score == pytest.approx((lines[0]["score"] + lines[1]["score"]) / 2)


@pytest.mark.parametrize(("seen", "expected"), [(range(12), 2 / 3), (range(4), None)])
def test_the_seeds_search_score_is_on_the_rows_of_the_winners(
    tmp_path: Path, seen: Sequence[int], expected: float | None
) -> None:
    """The seed is right on rows of odd numbers."""
    chosen = [1, 3, 5, 7, 0, 2]

    @dataclass(frozen=True, kw_only=True)
    class Apart(Idle):
        def search(self, task: Task) -> Sequence[Trial]:
            task.score([task.seed], seen)
            return task.score([task.seed.with_instruction("predict", RIGHT)], chosen)

    method = Apart(metric="accuracy", lm=simulated(answer), run_dir=tmp_path / "run", budget=Budget(calls=200))
    evidence = compiled_by(method).evidence
    assert (evidence.seed_search_score, evidence.search_score) == (
        None if expected is None else pytest.approx(expected),
        1.0,
    )


def test_a_verdict_says_how_many_answers_could_not_be_read(tmp_path: Path) -> None:
    evidence = compiled_by(tries(tmp_path, simulated(lambda request: "Hard to say."), RIGHT)).evidence
    assert evidence.verdict.startswith("Kept: the search found nothing better than your instructions (accuracy 0.000).")
    assert evidence.verdict.endswith(f" {CONFIRM} of its answers on these rows couldn't be read.")
    assert evidence.stable()["unparsable"] == CONFIRM
    assert "unparsable" not in compiled_by(tries(tmp_path / "b", simulated(answer), RIGHT)).evidence.stable()


def test_a_metric_of_a_label_that_no_row_has_is_refused(tmp_path: Path) -> None:
    lm = simulated(answer)
    with pytest.raises(ConfigError, match=r"^The metric f1:smap counts a label that no row has; they have: no, yes\.$"):
        compiled_by(tries(tmp_path, lm, RIGHT, metric="f1:smap"))
    assert asked(lm) == []
    assert compiled_by(tries(tmp_path, lm, RIGHT, metric="f1:Yes")).evidence.metric == "f1:Yes"


def test_an_exhausted_confirmation_is_no_result(tmp_path: Path) -> None:
    def judged(example: Any, prediction: Any) -> bool:
        for judge in "abc":  # calls that nobody reckoned with
            dspy.settings.lm(f"{judge}: {example.text}: {prediction.label}?")
        return bool(example.label == prediction.label)

    lm = simulated(lambda request: answer(request) if system(request) else "ok")
    method = tries(tmp_path, lm, RIGHT, metric=judged, budget=Budget(calls=2 * CONFIRM + TRAIN))

    told = r"past the budget of 56; nothing was sent\. Resume with a larger .* compile again, with run_dir='.*run'$"
    with pytest.raises(BudgetExhausted, match=told):
        compiled_by(method)

    assert not (tmp_path / "run" / "program").exists()
    assert len(asked(lm)) + 1 <= 56


def test_better_together_can_call_it(tmp_path: Path) -> None:
    program, lm = student(), simulated(answer)
    program.set_lm(lm)

    compiled: Any = tries(tmp_path, lm, RIGHT).compile(
        program, trainset=rows(TRAIN), teacher=None, valset=rows(CONFIRM, start=TRAIN)
    )
    assert compiled.evidence.replaced

    together = dspy.BetterTogether(
        metric=lambda example, prediction, trace=None: example.label == prediction.label,
        p=tries(tmp_path / "together", lm, RIGHT),
    )
    best: Any = together.compile(
        program, trainset=rows(TRAIN), valset=rows(CONFIRM, start=TRAIN), strategy="p", num_threads=2
    )
    assert best.flag_compilation_error_occurred is False
    assert [(one["strategy"], one["score"]) for one in best.candidate_programs] == [("p", 100.0), ("", 50.0)]
    assert best.predict.signature.instructions == RIGHT


SHORTEN, DECIDE = "Keep the last word.", "Trust the gist."


class Pipeline(dspy.Module):
    """A user's own program of DSPy's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.shorten = dspy.Predict(declare("text -> gist", "Shorten."))
        self.decide = dspy.ChainOfThought(declare("gist -> label", "Decide."))

    def forward(self, text: str) -> Any:
        return self.decide(gist=self.shorten(text=text).gist)


def fields(**values: str) -> str:
    return "\n\n".join([*(f"[[ ## {name} ## ]]\n{value}" for name, value in values.items()), "[[ ## completed ## ]]"])


def piped(request: Request) -> str:
    """Odd rows need the better first instruction, even rows the better second one."""
    shown = prompt(request).split("## ]]\n")[1].split("\n")[0]
    number, word = shown.split()[-2:]
    if "[[ ## text ## ]]" in prompt(request):
        is_kept = int(number) % 2 == 0 or SHORTEN in system(request)
        return fields(gist=f"row {number} {word if is_kept else 'lost'}")
    is_trusted = int(number) % 2 == 1 or DECIDE in system(request)
    return fields(reasoning="So it is.", label=word if is_trusted else "unsure")


def test_both_instructions_of_a_pipeline_of_dspys_own_parts_are_improved(tmp_path: Path) -> None:
    texts = {"shorten": SHORTEN, "decide.predict": DECIDE}
    proposer = simulated(lambda request: texts[prompt(request).split(",")[0].split()[-1]], name="writer")
    lm = simulated(piped)
    method = Tries(metric="accuracy", lm=lm, proposer=proposer, asks=1, run_dir=tmp_path / "run")

    compiled = compiled_by(method, Pipeline())

    assert dict(candidate_of(compiled).instructions) == texts
    assert (compiled.evidence.baseline, compiled.evidence.compiled) == (0.0, 1.0)
    assert compiled.evidence.spent.calls == 2 * (1 + 2 * 2 * TRAIN) + 2 * 2 * CONFIRM
    rebuilt = load(tmp_path / "run" / "program", student=Pipeline())
    with dspy.context(lm=lm):
        assert rebuilt(text="row 7 yes").label == "yes"


def test_a_scripted_proposer_that_runs_dry_is_an_error_of_its_own(tmp_path: Path) -> None:
    lm = simulated(answer)
    method = Tries(metric="accuracy", lm=lm, proposer=scripted([]), asks=1, run_dir=tmp_path / "run")
    with pytest.raises(
        LMFailed, match=r"^The proposer simulated/script failed 1 of 1 requests; the first with: .*0 answers scrip"
    ):
        compiled_by(method)


def test_equal_seeds_split_equally_and_other_seeds_dont(tmp_path: Path) -> None:
    def first_rows(seed: int, place: str) -> Any:
        method = tries(tmp_path / place, simulated(answer), RIGHT, seed=seed)
        compiled_by(method, trainset=rows(40), valset=None)
        return read(tmp_path / place / "run" / "program").evidence["probes"]

    assert first_rows(1, "a") == first_rows(1, "b")
    assert first_rows(1, "c") != first_rows(2, "d")
