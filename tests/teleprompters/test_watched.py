from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Message, Request, Response, TextPart, Usage
from dspy.utils.exceptions import AdapterParseError

from preceptor.errors import InputTooLong, MetricError
from preceptor.lm.adapter import declare
from preceptor.lm.budget import Budget
from preceptor.lm.ledger import Call
from preceptor.lm.seam import InThread, predictors
from preceptor.scoring.trial import Trial
from preceptor.task import Task
from preceptor.teleprompter import Estimate, Teleprompter
from preceptor.teleprompters import COPRO, GEPA, MIPROv2
from preceptor.teleprompters.asking import Chat, Json, Memory, in_waves
from preceptor.teleprompters.watched import Watch
from preceptor.testing import asked, prompt, simulated, system, toy
from preceptor.testing.models import Simulated

ROWS = 40


@dataclass(frozen=True, kw_only=True)
class Trying(Teleprompter):
    """Runs `steps` as if they were an optimizer's code; half of the rows are judged."""

    steps: Callable[[Watch], None]

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        return Estimate(1, 1)

    def search(self, task: Task) -> Sequence[Trial]:
        watch = Watch.begin(task, ROWS // 2, lambda done: None)

        def optimize() -> dspy.Module:
            self.steps(watch)
            return watch.student

        watch.run(optimize)
        return [watch.seed, *watch.trials()]


def tried(
    steps: Callable[[Watch], None],
    lm: dspy.LM,
    place: Path,
    student: dspy.Module | None = None,
    metric: Any = "accuracy",
) -> None:
    method = Trying(steps=steps, metric=metric, lm=lm, run_dir=place, threads=1)
    method.compile(student or toy.Sorter(), trainset=toy.rows(ROWS), valset=toy.rows(8, ROWS))


def told(watch: Watch, instructions: str) -> dspy.Module:
    """Return the student with other instructions."""
    program = watch.student.deepcopy()
    for _, predictor in predictors(program):
        predictor.signature = predictor.signature.with_instructions(instructions)
    return program


def test_a_row_that_failed_gets_the_seeds_mean_in_the_optimizers_eyes(tmp_path: Path) -> None:
    given: list[float] = []
    asked_for_a_demonstration: list[float] = []
    seen: list[Trial] = []

    def broken(request: Request) -> str:
        if "Guess." in system(request) and failing in prompt(request):
            raise ConnectionError("no route")
        return "no"

    failing = "to be set"

    def steps(watch: Watch) -> None:
        nonlocal failing
        failing = next(row.text for row in watch.judged if row.label == "no")
        program = told(watch, "Guess.")
        given.extend(watch.score(row, program(**row.inputs())) for row in watch.judged)
        row = next(row for row in watch.judged if row.text == failing)
        asked_for_a_demonstration.append(watch.score(row, program(**row.inputs()), trace=[]))
        seen.extend(watch.trials())

    tried(steps, simulated(broken), tmp_path)

    assert sorted(given) == [0.0] * 10 + [0.5] + [1.0] * 9
    assert asked_for_a_demonstration == [0.0]
    [trial] = seen
    assert [outcome.kind for outcome in trial.outcomes].count("failed") == 1
    assert trial.score == pytest.approx(9 / 19)


def test_a_row_too_long_for_the_model_fails_and_the_search_goes_on(tmp_path: Path) -> None:
    seen: list[Trial] = []
    too_long = "to be set"

    def answer(request: Request) -> str:
        if "Guess." in system(request) and too_long in prompt(request):
            raise InputTooLong("at most 8 tokens")
        return "no"

    def steps(watch: Watch) -> None:
        nonlocal too_long
        too_long, program = watch.judged[0].text, told(watch, "Guess.")
        for row in watch.judged:
            watch.score(row, program(**row.inputs()))
        seen.extend(watch.trials())

    tried(steps, simulated(answer), tmp_path)

    [trial] = seen
    [failed] = [outcome for outcome in trial.outcomes if outcome.kind == "failed"]
    assert "at most 8 tokens" in failed.error


def test_a_candidate_that_makes_many_rows_too_long_is_charged_and_the_search_goes_on(tmp_path: Path) -> None:
    seen: list[Trial] = []

    def answer(request: Request) -> str:
        if "Guess." in system(request) and prompt(request).split()[-1] != "no":
            raise InputTooLong("at most 8 tokens")
        return "no"

    def steps(watch: Watch) -> None:
        program = told(watch, "Guess.")
        for row in watch.judged:
            watch.score(row, program(**row.inputs()))
        seen.extend(watch.trials())

    tried(steps, simulated(answer), tmp_path)

    [trial] = seen
    kinds = [outcome.kind for outcome in trial.outcomes]
    assert kinds.count("failed") == 0
    assert kinds.count("unparsable") > 2
    assert trial.score == sum(outcome.score or 0 for outcome in trial.outcomes) / len(kinds)


def test_a_row_that_a_metric_gets_no_verdict_on_fails_and_the_search_goes_on(tmp_path: Path) -> None:
    seen: list[Trial] = []

    def judged(example: Any, prediction: Any) -> bool:
        asked: Any = declare("question -> verdict")
        if example.text == doubtful:
            raise AdapterParseError("Chat", asked, "hard to say")
        return bool(example.label == prediction.label)

    doubtful = "to be set"

    def steps(watch: Watch) -> None:
        nonlocal doubtful
        doubtful, program = watch.judged[0].text, told(watch, "Guess.")
        for row in watch.judged:
            watch.score(row, program(**row.inputs()))
        seen.extend(watch.trials())

    tried(steps, simulated(lambda request: "no"), tmp_path, metric=judged)

    [trial] = seen
    [failed] = [outcome for outcome in trial.outcomes if outcome.kind == "failed"]
    assert failed.error.startswith("The metric judged gave no verdict: AdapterParseError: ")


def test_an_answer_that_cant_be_read_is_a_wrong_one(tmp_path: Path) -> None:
    seen: list[Any] = []

    def steps(watch: Watch) -> None:
        row, program = watch.shown[0], told(watch, "Mumble.")
        prediction = program(**row.inputs())
        seen.append(watch.criticize(row, prediction))
        criticism: Any = watch.criticize(row, prediction, None, "predict", [])
        seen.append(criticism.feedback)
        seen.extend(watch.trials())

    tried(steps, simulated(lambda request: "mmh" if "Mumble." in system(request) else "no"), tmp_path)

    score, feedback, trial = seen
    assert score == 0.0
    assert "The reply is none of yes, no" in feedback
    assert "The right label is: " in feedback
    assert (len(trial.rows), trial.outcomes[0].kind, trial.score) == (1, "unparsable", 0.0)


def test_a_candidate_counts_as_scored_when_its_last_judged_row_is_whatever_is_shown_of_it_later(tmp_path: Path) -> None:
    def steps(watch: Watch) -> None:
        first, second = told(watch, "Guess."), told(watch, "Mumble.")
        for program, rows in (
            (first, watch.shown[:3]),
            (first, watch.judged),
            (second, watch.judged),
            (first, watch.shown[:9]),
        ):
            for row in rows:
                watch.score(row, program(**row.inputs()))
        watch.trials()

    tried(steps, simulated(toy.answer), tmp_path)

    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
    judged = ROWS // 2
    told_of = [(line["instructions"]["predict"], line["calls"]) for line in lines[:3]]
    assert told_of == [(toy.SEED, judged), ("Guess.", 2 * judged + 3), ("Mumble.", 3 * judged + 3)]


def test_rows_that_a_proposal_is_made_from_never_make_a_candidate_the_best_so_far(tmp_path: Path) -> None:
    seen: list[Trial] = []

    def steps(watch: Watch) -> None:
        program = told(watch, "Guess.")
        for row in (*watch.shown, *watch.shown):
            watch.score(row, program(**row.inputs()))
        seen.extend(watch.trials())

    tried(steps, simulated(toy.answer), tmp_path)

    assert [len(trial.rows) for trial in seen] == [ROWS // 2 - 1]


def test_an_optimizer_sees_a_models_answers_without_their_log_probabilities(tmp_path: Path) -> None:
    steps_of: list[Any] = []
    scored: list[Any] = []

    class Telling(toy.Sorter):
        def forward(self, **inputs: Any) -> dspy.Prediction:
            answered = super().forward(**inputs)
            answered["logprobs"] = {"yes": -0.1}
            return answered

    def steps(watch: Watch) -> None:
        row, program = watch.judged[0], told(watch, "Guess.")
        with dspy.context(trace=[]):
            scored.append(program(**row.inputs()))
            steps_of.extend(dspy.settings.trace)

    tried(steps, simulated(toy.answer), tmp_path, Telling())

    [(predictor, given, answer)] = steps_of
    assert (set(predictor.signature.output_fields), set(given), set(answer.keys())) == ({"label"}, {"text"}, {"label"})
    assert set(scored[0].keys()) == {"label", "logprobs"}


def test_the_program_is_run_with_the_users_adapter(tmp_path: Path) -> None:
    given: list[float] = []

    def steps(watch: Watch) -> None:
        row, program = watch.shown[0], told(watch, "Guess.")
        given.append(watch.score(row, program(**row.inputs())))

    def bare(request: Request) -> str:
        [label] = re.findall(r"row \d+ (\w+)", prompt(request))
        return str(label)  # without field markers, and no JSON

    tried(steps, simulated(bare), tmp_path, dspy.Predict("text -> label"))

    assert given == [0.0]


def test_judged_and_shown_rows_are_all_of_them(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    tried(
        lambda watch: seen.extend([[row.text for row in rows] for rows in (watch.judged, watch.shown)]),
        simulated(toy.answer),
        tmp_path,
    )

    judged, shown = seen
    assert len(judged) == len(shown) == ROWS // 2
    assert sorted([*judged, *shown]) == sorted(row.text for row in toy.rows(ROWS))


def test_the_watched_student_passes_for_the_users(tmp_path: Path) -> None:
    seen: list[Any] = []

    def steps(watch: Watch) -> None:
        kind = type(watch.student)
        seen.extend([kind is toy.Sorter, kind.__name__, kind.__qualname__, kind.__module__])
        seen.append([name for name, _ in predictors(watch.student)])

    tried(steps, simulated(toy.answer), tmp_path)

    assert seen == [False, "Sorter", "Sorter", "preceptor.testing.toy", ["predict"]]


class Listed(dspy.Module):
    """Its predictor is in a list, beside what can't be copied."""

    def __init__(self) -> None:
        self.parts: list[Any] = [toy.Sorter(), threading.Lock()]

    def forward(self, text: str) -> Any:
        return self.parts[0](text=text)


def test_an_optimizers_copies_share_no_predictor_with_the_student(tmp_path: Path) -> None:
    seen: list[str] = []

    def steps(watch: Watch) -> None:
        for program in (told(watch, "Guess."), watch.student):
            seen.extend(predictor.signature.instructions for _, predictor in predictors(program))

    tried(steps, simulated(toy.answer), tmp_path, Listed())

    assert seen == ["Guess.", toy.SEED]


class Both(dspy.Module):
    """Two predictors."""

    def __init__(self) -> None:
        self.first, self.second = toy.Sorter(), toy.Sorter()

    def forward(self, text: str) -> Any:
        self.first(text=text)
        return self.second(text=text)


def test_predictors_that_share_a_model_share_one_in_the_optimizers_eyes(tmp_path: Path) -> None:
    seen: list[Any] = []
    student, lm = dspy.BestOfN(Both(), N=1, reward_fn=lambda given, answer: 1.0, threshold=1.0), simulated(toy.answer)
    student.set_lm(lm)

    def steps(watch: Watch) -> None:
        seen.append(watch.seed.score)
        seen.append(len({id(predictor.lm) for _, predictor in predictors(watch.student)}))

    tried(steps, lm, tmp_path, student)

    assert seen == [0.5, 1]


class Batching(Simulated):
    """Answers many requests at once; keeps how many, and the threads that came with one alone."""

    supports_choices = False

    def __init__(self, answer: toy.Answer) -> None:
        super().__init__(answer, "simulated/batching")
        self.sizes: list[int] = []
        self.came_alone: set[threading.Thread] = set()

    def __deepcopy__(self, memo: dict[int, object]) -> Batching:
        return self

    def batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Response]]]:
        self.sizes.append(len(requests))
        yield [(index, super(Batching, self).complete(request)) for index, request in enumerate(requests)]

    def complete(self, request: Request) -> Response:
        self.came_alone.add(threading.current_thread())
        return super().complete(request)

    def count_tokens(self, request: Request) -> int:
        return len(prompt(request))


def test_a_model_in_this_process_answers_each_candidates_rows_together_and_none_of_the_seeds_again(
    tmp_path: Path,
) -> None:
    engine = Batching(toy.answer)
    lm = dspy.LM("simulated/batching", engine=engine, async_engine=InThread(engine), cache=False, num_retries=0)
    proposer = simulated(lambda request: toy.reply(request, toy.RIGHT))
    method = COPRO(metric="accuracy", lm=lm, proposer=proposer, run_dir=tmp_path, breadth=2, depth=1)

    compiled: Any = method.compile(toy.Sorter(), trainset=toy.rows(10), valset=toy.rows(12, 10))

    evidence = compiled.evidence
    assert evidence.instructions == {"predict": toy.RIGHT}
    assert engine.sizes == [10, 10, 24]
    assert not engine.came_alone
    assert len(engine.requests) == 10 + 10 + 24 == evidence.spent.calls - len(asked(proposer))


def batching(answer: toy.Answer = toy.answer) -> tuple[Batching, dspy.LM]:
    engine = Batching(answer)
    return engine, dspy.LM(
        "simulated/batching", engine=engine, async_engine=InThread(engine), cache=False, num_retries=0
    )


def compiled_by(kind: Any, lm: dspy.LM, place: Path, **settings: Any) -> Any:
    proposer = simulated(lambda request: toy.reply(request, toy.lucky(request)))
    smallest = {"breadth": 3, "depth": 2} if kind is COPRO else {}
    method = kind(metric="accuracy", lm=lm, proposer=proposer, run_dir=place, **smallest, **settings)
    return method.compile(toy.Sorter(), trainset=toy.rows(20), valset=toy.rows(12, 20)).evidence


@pytest.mark.parametrize("kind", [COPRO, GEPA, MIPROv2])
def test_rows_that_are_answered_together_lead_where_rows_that_are_answered_one_by_one_do(
    kind: Any, tmp_path: Path
) -> None:
    engine, lm = batching()
    together = compiled_by(kind, lm, tmp_path / "together", budget=Budget(calls=150))
    alone = compiled_by(
        kind, simulated(toy.answer, name="batching"), tmp_path / "alone", threads=1, budget=Budget(calls=150)
    )

    told = [
        json.loads((tmp_path / name / "trials.jsonl").read_text().splitlines()[-1]) for name in ("together", "alone")
    ]
    assert told[0] == told[1]
    assert together.instructions == alone.instructions != together.seed_instructions
    assert together.spent == alone.spent
    assert max(engine.sizes[1:-1]) >= 5, "of what the optimizer asked, between the seed and the confirmation"


@pytest.mark.parametrize("kind", [COPRO, GEPA, MIPROv2])
def test_the_end_of_the_budget_meets_the_same_rows_however_often_it_is_made(kind: Any, tmp_path: Path) -> None:
    least = kind(metric="accuracy").estimate({"predict": toy.Sorter().predict.signature}, 20, None).least
    found: list[Any] = []
    for name in ("first", "second", "second"):
        _, lm = batching()
        found.append(compiled_by(kind, lm, tmp_path / name, budget=Budget(calls=least + 24 + 7)))

    assert "past the budget" in found[0].stopped
    assert found[0].stable() == found[1].stable() == found[2].stable()
    assert found[2].billed.calls == 0


def test_what_ends_a_search_ends_it_for_all_rows_that_wait_together(tmp_path: Path) -> None:
    def raising(example: dspy.Example, prediction: dspy.Prediction) -> float:
        if toy.RIGHT in str(seen):
            raise ZeroDivisionError
        return float(example.label == prediction.label)

    seen: list[str] = []

    def answer(request: Request) -> str:
        seen.append(system(request))
        return toy.answer(request)

    _, lm = batching(answer)
    proposer = simulated(lambda request: toy.reply(request, toy.RIGHT))
    method = COPRO(metric=raising, lm=lm, proposer=proposer, run_dir=tmp_path, breadth=2, depth=1)
    with pytest.raises(MetricError, match=r"raised ZeroDivisionError"):
        method.compile(toy.Sorter(), trainset=toy.rows(20), valset=toy.rows(12, 20))


def test_a_question_that_two_rows_ask_together_is_asked_once_and_counts_twice(tmp_path: Path) -> None:
    _, lm = batching()
    engine, twice = batching()
    once = compiled_with(lm, tmp_path / "once", toy.rows(10))
    both = compiled_with(twice, tmp_path / "twice", [*toy.rows(10), *toy.rows(10)])

    assert [evidence.billed.calls for evidence in (once, both)] == [10 + 10 + 24 + 1] * 2
    assert both.spent.calls == 20 + 20 + 24 + 1
    assert compiled_with(twice, tmp_path / "twice", [*toy.rows(10), *toy.rows(10)]).spent == both.spent
    assert engine.sizes == [10, 10, 24]


def compiled_with(lm: dspy.LM, place: Path, trainset: list[dspy.Example]) -> Any:
    proposer = simulated(lambda request: toy.reply(request, toy.RIGHT))
    method = COPRO(metric="accuracy", lm=lm, proposer=proposer, run_dir=place, breadth=2, depth=1)
    return method.compile(toy.Sorter(), trainset=trainset, valset=toy.rows(12, 10)).evidence


def test_dspys_own_evaluation_is_left_alone_where_no_search_is_under_way() -> None:
    engine, lm = batching()
    with in_waves(lm):
        pass
    with dspy.context(lm=lm):
        dspy.Evaluate(devset=toy.rows(4), metric=lambda *_: 1.0, num_threads=1)(toy.Sorter())
    assert engine.sizes == []
    assert engine.came_alone == {threading.current_thread()}


def response(text: str) -> Response:
    return Response(None, "model", Message.assistant([TextPart(text)]), "stop", Usage(1, 1, 2))


def call(text: str) -> Call:
    return Call(Request(model="model", messages=(Message.user(text),)))


def test_equal_questions_at_the_same_time_are_asked_once() -> None:
    memory, count, is_asking = Memory(), 0, threading.Event()

    def ask() -> Response:
        nonlocal count
        count += 1
        is_asking.wait(0.05)  # long enough for the others to come
        return response(str(count))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: memory.answer(call("same"), ask).message.text, range(8)))

    assert answers == ["1"] * 8
    assert memory.answer(call("other"), ask).message.text == "2"


def test_a_question_that_failed_is_asked_again() -> None:
    memory = Memory()

    def fail() -> Response:
        raise ConnectionError("down")

    with pytest.raises(ConnectionError, match="down"):
        memory.answer(call("same"), fail)
    assert memory.answer(call("same"), lambda: response("up")).message.text == "up"


TWO = declare("old -> new, prefix", "Improve it.")


@pytest.mark.parametrize(
    ("reply", "fields"),
    [
        ("[[ ## new ## ]]\nSort well.\n\n[[ ## prefix ## ]]\nAnswer:", {"new": "Sort well.", "prefix": "Answer:"}),
        ("[[ ## new ## ]]\nSort well.\n", {"new": "Sort well.", "prefix": ""}),
        (" Sort well. \n", {"new": "Sort well.", "prefix": ""}),
        ("", {"new": "", "prefix": ""}),
    ],
)
@pytest.mark.parametrize("adapter", [Chat(), Json()])
def test_a_proposers_answer_is_read_as_far_as_it_goes(adapter: Any, reply: str, fields: dict[str, str]) -> None:
    assert adapter.parse(TWO, reply) == fields


ECHO = "[[ ## summary ## ]]\nSorts mail.\n\n[[ ## code ## ]]\nclass Sorter"


def test_an_answer_of_other_fields_is_no_proposal() -> None:
    for adapter, reply in ((Chat(), ECHO), (Json(), ECHO), (Json(), '{"summary": "Sorts mail."}')):
        with pytest.raises(AdapterParseError):
            adapter.parse(TWO, reply)


@pytest.mark.parametrize(
    ("second", "new"),
    [('{"new": "Sort well."}', "Sort well."), (ECHO, "Sorts mail.\n\n\nclass Sorter"), ('{"a": 1}', '{"a": 1}')],
)
def test_an_answer_of_other_fields_is_asked_for_again_as_json(second: str, new: str) -> None:
    replies = iter([ECHO, second])
    lm = simulated(lambda request: next(replies))

    [found] = Chat()(lm, {}, TWO, [], {"old": "Sort."})

    assert found == {"new": new, "prefix": ""}


def test_a_proposers_json_is_read() -> None:
    assert Json().parse(TWO, '{"new": "Sort well.", "prefix": "x"}') == {"new": "Sort well.", "prefix": "x"}
    assert Json().parse(TWO, '{"new": "Sort well."}') == {"new": "Sort well.", "prefix": ""}
