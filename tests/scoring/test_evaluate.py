from __future__ import annotations

import copy
import dataclasses
import json
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from preceptor.errors import BudgetExhausted, ConfigError, InputTooLong, LMFailed, MetricError
from preceptor.lm.budget import Account, Budget, Cost
from preceptor.lm.bypass import refusing_bypasses
from preceptor.lm.dispatch import Patience
from preceptor.lm.ledger import Ledger
from preceptor.lm.meter import Meter, Result
from preceptor.modules import Classify
from preceptor.scoring.evaluate import Counter, Evaluator, Job, Losses, held_against, refuse_failures
from preceptor.scoring.metrics import Metric, wrap
from preceptor.scoring.statistics import compare
from preceptor.scoring.trial import Outcome
from preceptor.testing import asked, prompt, simulated, system

THREADS = [1, 8, 64]
ACCURACY = wrap("accuracy", "label")


def rows(count: int) -> list[dspy.Example]:
    return [dspy.Example(text=f"item {n}", label="ab"[n % 2]).with_inputs("text") for n in range(count)]


def number(request: Request) -> int:
    return int(prompt(request).split()[-1])


def program() -> dspy.Module:
    return Classify("text -> label: Literal['a', 'b']", "Pick.")


def jobs(student: dspy.Module, examples: Sequence[dspy.Example]) -> list[Job]:
    return [Job(student, example) for example in examples]


def evaluator(lm: dspy.LM, *, threads: int = 8, metric: Metric = ACCURACY, **settings: Any) -> Evaluator:
    return Evaluator(lm, metric, "label", together=False, threads=threads, **settings)


@pytest.mark.parametrize("threads", THREADS)
def test_outcomes_come_in_the_order_of_the_jobs_whichever_ends_first(threads: int) -> None:
    held = threading.Barrier(2) if threads > 1 else None

    def answer(request: Request) -> str:
        if held and number(request) in (0, 5):  # row 0 ends after row 5 has begun
            held.wait(300)
        return "ab"[number(request) % 3 == 0]

    outcomes = evaluator(simulated(answer), threads=threads).run(jobs(program(), rows(40)))

    assert [outcome.answer for outcome in outcomes] == ["ab"[n % 3 == 0] for n in range(40)]
    assert [outcome.gold for outcome in outcomes] == ["ab"[n % 2] for n in range(40)]
    assert [outcome.score for outcome in outcomes] == [float((n % 3 == 0) == (n % 2 == 1)) for n in range(40)]


@pytest.mark.parametrize("threads", THREADS)
def test_every_row_is_asked_once(threads: int) -> None:
    lm = simulated(lambda request: "a")

    evaluator(lm, threads=threads).run(jobs(program(), rows(60)))

    assert sorted(number(request) for request in asked(lm)) == list(range(60))


@pytest.mark.parametrize("threads", THREADS)
def test_a_broken_call_a_bad_form_and_an_answer_are_three_different_things(threads: int) -> None:
    def answer(request: Request) -> str:
        if number(request) == 1:
            raise ConnectionError("no route")
        return {0: "a", 2: "neither"}.get(number(request), "b")

    outcomes = evaluator(simulated(answer), threads=threads).run(jobs(program(), rows(20)))

    assert outcomes[:4] == [
        Outcome("scored", 1.0, "a", "a"),
        Outcome("failed", None, "", "b", "LMUnexpectedError: [simulated/model] no route"),
        Outcome("unparsable", 0.0, "", "a", "The reply is none of a, b."),
        Outcome("scored", 1.0, "b", "b"),
    ]


class Bare(dspy.Module):
    """Returns its answer, and no prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = program()

    def forward(self, text: str) -> Any:
        return self.pick(text=text).label


def test_a_program_that_returns_no_prediction_is_refused_as_soon_as_too_many_rows_have_failed() -> None:
    lm = simulated(lambda request: "a")
    with pytest.raises(
        ConfigError,
        match=r"^The program returned a str, not a dspy\.Prediction; return dspy\.Prediction\(label=\.\.\.\)\.$",
    ):
        evaluator(lm, threads=1).run(jobs(Bare(), rows(9)))
    assert len(asked(lm)) == 2


class Odd(dspy.Module):
    """Returns on some rows what it can't be scored by."""

    def __init__(self, **odd: Any) -> None:
        super().__init__()
        self.pick, self.odd = program(), odd

    def forward(self, text: str) -> Any:
        told = self.pick(text=text)
        return self.odd.get(text.replace(" ", "_"), told)


@pytest.mark.parametrize("threads", [1, 4])
def test_an_odd_answer_among_others_fails_its_row(threads: int) -> None:
    odd = Odd(item_0=None, item_51=dspy.Prediction(error="no route"))
    outcomes = evaluator(simulated(lambda request: "a"), threads=threads).run(jobs(odd, rows(60)))
    assert [at for at, outcome in enumerate(outcomes) if outcome.kind == "failed"] == [0, 51]
    assert outcomes[0].error.startswith("ConfigError: The program returned a NoneType, not a dspy.Prediction;")
    assert outcomes[51].error.startswith("OtherFields: The rows' labels are in 'label', and the program answers")


def test_too_many_odd_answers_are_the_programs_fault_and_no_attempt_would_mend_them() -> None:
    odd = Odd(**{f"item_{at}": None for at in range(40, 44)})
    told = r"^4 of 44 rows failed \(60 to be scored\); the first with: ConfigError: The program returned a NoneType"
    with pytest.raises(ConfigError, match=told):
        evaluator(simulated(lambda request: "a"), threads=1).run(jobs(odd, rows(60)))


def test_odd_answers_and_calls_that_fail_together_may_be_tried_again() -> None:
    def answer(request: Request) -> str:
        if number(request) < 2:
            raise dspy.LMUnexpectedError("no route")
        return "a"

    odd = Odd(item_2=None, item_3=None)
    with pytest.raises(LMFailed, match=r"^4 of 4 rows failed \(60 to be scored\); the first with: LMUnexpected"):
        evaluator(simulated(answer), threads=1).run(jobs(odd, rows(60)))


def test_an_exception_of_the_users_program_fails_its_row_with_its_text() -> None:
    class Picky(dspy.Module):
        def forward(self, text: str) -> dspy.Prediction:
            if text == "item 1":
                raise ValueError("I don't like item 1")
            if text == "item 2":
                json.loads(text)
            if text == "item 3":
                dspy.ensure_signature("no arrow")
            return dspy.Prediction(label="a")

    outcomes = evaluator(simulated(lambda request: "a")).run(jobs(Picky(), rows(60)))

    first = Picky.forward.__code__.co_firstlineno
    assert [outcome.kind for outcome in outcomes] == ["scored", *["failed"] * 3, *["scored"] * 56]
    assert outcomes[1].error == f"ValueError: I don't like item 1 (test_evaluate.py, line {first + 2})"
    assert outcomes[2].error.endswith(f" (test_evaluate.py, line {first + 4})")
    assert "test_evaluate.py" not in outcomes[3].error


@pytest.mark.timeout(60)  # rows that never began were once waited for
@pytest.mark.parametrize("threads", THREADS)
def test_a_metric_that_raises_stops_the_evaluation(threads: int) -> None:
    def strict(example: Any, prediction: Any) -> float:
        if example.text == "item 2":
            raise KeyError("weight")
        return 1.0

    lm = simulated(lambda request: "a")
    with pytest.raises(MetricError, match=r"The metric strict raised KeyError: 'weight', on \{'text': 'item 2'"):
        evaluator(lm, threads=threads, metric=wrap(strict, "label")).run(jobs(program(), rows(300)))

    assert threads > 1 or len(asked(lm)) == 3


class Judge(dspy.Signature):
    """Judge."""

    question: str = dspy.InputField()
    verdict: bool = dspy.OutputField()


def judged(example: Any, prediction: Any) -> bool:
    """Ask the model whether an answer is right."""
    return bool(dspy.Predict(Judge)(question=f"Is {prediction.label} right?\n{example.text}").verdict)


VERDICT = "[[ ## verdict ## ]]\n{}\n\n[[ ## completed ## ]]"


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(
    ("met", "told"),
    [
        ("hard to say", "The metric judged gave no verdict: AdapterParseError: "),
        (dspy.lm15.InvalidRequestError("no such luck"), "The metric judged gave no verdict: LMInvalidRequestError: "),
        (InputTooLong("at most 8"), "The metric judged gave no verdict: InputTooLong: at most 8"),
    ],
)
def test_a_row_that_a_metric_gets_no_verdict_on_fails_alone(
    ledger: Ledger, met: str | Exception, told: str, threads: int
) -> None:
    def answer(request: Request) -> str:
        if "right?" not in prompt(request):
            return "a"
        if "item 7\n" in prompt(request) + "\n" and isinstance(met, Exception):
            raise met
        return str(met) if "item 7\n" in prompt(request) + "\n" else VERDICT.format("item 3" in prompt(request))

    lm = metered(ledger, simulated(answer), 99)
    outcomes = evaluator(lm, threads=threads, metric=wrap(judged, "label")).run(jobs(program(), rows(20)))

    assert [at for at, outcome in enumerate(outcomes) if outcome.kind == "failed"] == [7]
    assert [at for at, outcome in enumerate(outcomes) if outcome.score] == [3]
    assert outcomes[7].error.startswith(told)


@pytest.mark.parametrize("threads", THREADS)
def test_a_metric_that_asks_a_model_can_end_the_budget(ledger: Ledger, threads: int) -> None:
    lm = metered(ledger, simulated(lambda request: VERDICT.format("True") if "?" in prompt(request) else "a"), 7)
    with pytest.raises(BudgetExhausted, match=r"could take calls to 8, past the budget of 7; nothing"):
        evaluator(lm, threads=threads, metric=wrap(judged, "label")).run(jobs(program(), rows(20)))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield ledger
    ledger.close()


def metered(ledger: Ledger, lm: dspy.LM, calls: int) -> dspy.LM:
    return Meter(ledger, Account(Budget(calls=calls))).wrap(lm)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("student", [program(), dspy.Predict("text -> label"), dspy.ChainOfThought("text -> label")])
def test_the_end_of_the_budget_comes_through_dspys_own_errors(
    ledger: Ledger, student: dspy.Module, threads: int
) -> None:
    lm = simulated(
        lambda request: "[[ ## reasoning ## ]]\nso\n\n[[ ## label ## ]]\na" if "[[" in system(request) else "a"
    )

    with pytest.raises(BudgetExhausted, match=r"The next call could take calls to 8, past the budget of 7; nothing"):
        evaluator(metered(ledger, lm, 7), threads=threads).run(jobs(student, rows(100)))

    assert len(asked(lm)) == 7


@pytest.mark.parametrize("threads", THREADS)
def test_where_the_budget_ends_the_rows_that_other_threads_had_answered_still_count(
    ledger: Ledger, threads: int
) -> None:
    class Counted(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pick = program()
            self.tried: list[str] = []
            self.first_is_refused = threading.Event()

        def forward(self, text: str) -> Any:
            self.tried.append(text)
            if text == "item 0":
                try:
                    return self.pick(text=text)
                finally:
                    self.first_is_refused.set()
            if int(text.split()[-1]) > 50:
                self.first_is_refused.wait(60)
            return self.pick(text=text)

    lm, student = simulated(lambda request: "a"), Counted()
    evaluator(metered(ledger, lm, 50), threads=threads).run(jobs(student, rows(51)[1:]))  # the first row was slow
    student.tried.clear()

    account = Account(Budget(calls=50), paid=Cost(*ledger.paid))
    with pytest.raises(BudgetExhausted, match=r"paid by all processes of this run to 51, past the budget of 50"):
        evaluator(Meter(ledger, account).wrap(lm), threads=threads).run(jobs(student, rows(400)))

    assert account.spent.calls == len(asked(lm)) == 50
    assert {f"item {n}" for n in range(51)} <= set(student.tried)
    assert len(student.tried) <= 51 + 3 * threads


class Careful(dspy.Module):
    """Answers something else where it can't ask."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = program()

    def forward(self, text: str) -> Any:
        try:
            return self.pick(text=text)
        except Exception:  # noqa: BLE001  as programs do
            return dspy.Prediction(label="b")


class Parallel(Careful):
    """Asks in threads of DSPy's, which count exceptions and pass over them."""

    def forward(self, text: str) -> Any:
        each = dspy.Parallel(num_threads=2, max_errors=9, disable_progress_bar=True, provide_traceback=False)
        found = [one for one in each([(self.pick, {"text": text})] * 2) if one is not None]
        return found[0] if found else dspy.Prediction(label="b")


class Rephrasing(Careful):
    """Says in words of its own that it can't ask."""

    def forward(self, text: str) -> Any:
        try:
            return self.pick(text=text)
        except Exception:  # noqa: BLE001  as programs do
            raise ValueError("no answer") from None


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("student", [Careful, Parallel, Rephrasing])
def test_the_end_of_the_budget_comes_through_a_program_that_catches_everything(
    ledger: Ledger, student: type[dspy.Module], threads: int
) -> None:
    lm = simulated(lambda request: "a")

    with pytest.raises(BudgetExhausted, match=r"The next call could take calls to \d+, past the budget of 7; nothing"):
        evaluator(metered(ledger, lm, 7), threads=threads).run(jobs(student(), rows(100)))


def test_a_model_that_cannot_be_asked_ends_a_program_that_catches_everything(ledger: Ledger) -> None:
    def refused(request: Request) -> str:
        raise dspy.LMAuthError("no such key")

    with pytest.raises(LMFailed, match=r"^simulated/model can't be asked: .*no such key"):
        evaluator(metered(ledger, simulated(refused), 99)).run(jobs(Careful(), rows(100)))


@pytest.mark.parametrize("error", [dspy.LMServerError("down"), InputTooLong("the model reads at most 8 tokens")])
def test_what_a_program_answers_after_a_failed_call_is_its_answer(ledger: Ledger, error: Exception) -> None:
    def broken(request: Request) -> str:
        raise error

    meter = Meter(ledger, Account(Budget()), patience=Patience(retries=0))
    outcomes = evaluator(meter.wrap(simulated(broken))).run(jobs(Careful(), rows(20)))

    assert [outcome.answer for outcome in outcomes] == ["b"] * 20


@pytest.mark.parametrize("threads", THREADS)
def test_the_error_that_ends_an_evaluation_is_not_among_its_own_causes(ledger: Ledger, threads: int) -> None:
    with pytest.raises(BudgetExhausted) as raised:
        evaluator(metered(ledger, simulated(lambda request: "a"), 7), threads=threads).run(
            jobs(dspy.ChainOfThought("text -> label"), rows(100))
        )

    error: BaseException | None = raised.value
    met: list[BaseException] = []
    while error is not None and error not in met:
        met.append(error)
        error = error.__cause__
    assert error is None


def test_the_callers_adapter_reaches_every_thread() -> None:
    lm = simulated(lambda request: '{"label": "a"}' if "JSON" in prompt(request) + system(request) else "lost")

    with dspy.context(adapter=dspy.JSONAdapter()):
        outcomes = evaluator(lm).run(jobs(dspy.Predict("text -> label"), [row for row in rows(30) if row.label == "a"]))

    assert [(outcome.kind, outcome.score) for outcome in outcomes] == [("scored", 1.0)] * 15
    assert len(asked(lm)) == 15


def test_a_predictors_own_model_answers_for_it() -> None:
    student, lm = program(), simulated(lambda request: "a")
    student.set_lm(simulated(lambda request: "b", name="own"))

    outcomes = evaluator(lm).run(jobs(student, rows(2)))

    assert [outcome.answer for outcome in outcomes] == ["b", "b"]
    assert asked(lm) == []


class Straying(dspy.Module):
    """Asks a model of its own, in one of the ways there are."""

    def __init__(self, lm: dspy.LM, way: str) -> None:
        super().__init__()
        self.pick, self.own, self.way = program(), Own(lm), way

    def forward(self, text: str) -> Any:
        if self.way == "context":
            with dspy.context(lm=self.own.lm):
                return self.pick(text=text)
        if self.way == "call":
            self.own.lm("hello")
        return self.pick(text=text, **({"lm": self.own.lm} if self.way == "argument" else {}))


@dataclasses.dataclass(frozen=True)
class Own:
    lm: dspy.LM


@pytest.mark.parametrize("way", ["context", "argument", "call"])
@pytest.mark.parametrize("threads", [1, 8])
def test_a_program_that_asks_a_model_past_the_meter_is_refused(ledger: Ledger, threads: int, way: str) -> None:
    own, lm = simulated(lambda request: "a", name="own"), metered(ledger, simulated(lambda request: "a"), 99)

    with pytest.raises(ConfigError, match=r"^The program asks simulated/own by itself: no budget bounds such calls"):
        evaluator(lm, threads=threads).run(jobs(Straying(own, way), rows(40)))

    assert len(asked(own)) <= threads


def test_no_thread_asks_a_model_past_the_meter_twice_while_the_first_row_waits(ledger: Ledger) -> None:
    is_ninth = threading.Event()

    def answer(request: Request) -> str:
        if len(asked(own)) > 8:
            is_ninth.set()
        if number(request) == 0:
            is_ninth.wait(1)
        return "a"

    own, lm = simulated(answer, name="own"), metered(ledger, simulated(lambda request: "a"), 99)

    with pytest.raises(ConfigError, match=r"^The program asks simulated/own by itself"):
        evaluator(lm, threads=8).run(jobs(Straying(own, "argument"), rows(40)))

    assert len(asked(own)) <= 8


def test_a_program_is_listened_to_until_a_row_is_answered(ledger: Ledger) -> None:
    lm, own = metered(ledger, simulated(refuse_the_first), 99), simulated(lambda request: "a", name="own")

    with pytest.raises(ConfigError, match=r"^The program asks simulated/own by itself"):
        evaluator(lm, threads=1, losses=Losses(40)).run(jobs(AskingAnother(own), rows(40)))

    assert len(asked(own)) == 1


def test_rows_after_an_answered_one_are_not_listened_to(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    listened: list[int] = []

    @contextmanager
    def counted() -> Generator[None]:
        listened.append(1)
        with refusing_bypasses():
            yield

    monkeypatch.setattr("preceptor.scoring.evaluate.refusing_bypasses", counted)
    evaluator(metered(ledger, simulated(lambda request: "a"), 99), threads=1).run(jobs(program(), rows(40)))

    assert len(listened) == 1


class AskingAnother(dspy.Module):
    """Asks a model of its own once it has been answered."""

    def __init__(self, lm: dspy.LM) -> None:
        super().__init__()
        self.pick, self.own = program(), Own(lm)

    def forward(self, text: str) -> Any:
        answered = self.pick(text=text)
        self.own.lm(text)
        return answered


def refuse_the_first(request: Request) -> str:
    if number(request) == 0:
        raise ConnectionError("no route")
    return "a"


def test_a_program_that_asks_the_model_it_is_given_is_let_through(ledger: Ledger) -> None:
    lm = metered(ledger, simulated(lambda request: "a"), 99)

    outcomes = evaluator(lm).run(jobs(Straying(lm, "none"), rows(4)))

    assert [outcome.kind for outcome in outcomes] == ["scored"] * 4


def test_inputs_program_and_callers_settings_are_left_alone() -> None:
    student, examples = program(), rows(20)
    before, state = copy.deepcopy(examples), student.dump_state()
    lm = simulated(lambda request: "a")

    with dspy.context(lm=simulated(lambda request: "b", name="other"), trace=None):
        evaluator(lm, has_steps=True).run(jobs(student, examples))
        assert dspy.settings.lm.model == "simulated/other"
        assert dspy.settings.trace is None

    assert examples == before
    assert student.dump_state() == state
    assert lm.history == []


def test_steps_hold_what_each_predictor_was_given_and_answered() -> None:
    class Twice(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Classify("text -> guess: Literal['x', 'y']", "Guess.")
            self.second = Classify("guess -> label: Literal['a', 'b']", "Decide.")

        def forward(self, text: str) -> Any:
            return self.second(guess=self.first(text=text).guess)

    lm = simulated(lambda request: "y" if "Guess" in system(request) else "b")
    [outcome] = evaluator(lm, has_steps=True).run(jobs(Twice(), rows(1)))

    assert [(step.predictor, dict(step.inputs), dict(step.outputs)) for step in outcome.steps] == [
        ("first.predict", {"text": "item 0"}, {"guess": "y"}),
        ("second.predict", {"guess": "y"}, {"label": "b"}),
    ]


class Best(dspy.Module):
    """A part that is copied for each attempt, beside others."""

    def __init__(self, *others: Classify) -> None:
        super().__init__()
        self.guess = Classify("text -> guess: Literal['x', 'y']", "Guess.")
        self.best = dspy.BestOfN(module=self.decide("Decide."), N=2, reward_fn=lambda given, told: 1.0, threshold=0.5)
        self.others = list(others)

    @staticmethod
    def decide(instructions: str) -> Classify:
        return Classify("guess -> label: Literal['a', 'b']", instructions)

    def forward(self, text: str) -> Any:
        return self.best(guess=self.guess(text=text).guess)


def frozen() -> Classify:
    part = Best.decide("Decide.")
    part._compiled = True
    return part


@pytest.mark.parametrize(
    ("others", "names"),
    [
        ([], ["guess.predict", "best.module.predict"]),
        ([Best.decide("Decide at last.")], ["guess.predict", "best.module.predict"]),
        ([frozen()], ["guess.predict", "best.module.predict"]),
        ([Best.decide("Decide.")], ["guess.predict"]),  # it may be the copy of either
    ],
)
def test_a_predictor_that_is_copied_when_it_is_asked_has_its_steps(others: list[Classify], names: list[str]) -> None:
    lm = simulated(lambda request: "y" if "Guess" in system(request) else "b")
    [outcome] = evaluator(lm, has_steps=True).run(jobs(Best(*others), rows(1)))

    assert [step.predictor for step in outcome.steps] == names


def test_a_frozen_part_has_no_steps() -> None:
    class Sealed(Best):
        def forward(self, text: str) -> Any:
            return self.others[0](guess=self.guess(text=text).guess)

    lm = simulated(lambda request: "y" if "Guess" in system(request) else "b")
    [outcome] = evaluator(lm, has_steps=True).run(jobs(Sealed(frozen()), rows(1)))

    assert [step.predictor for step in outcome.steps] == ["guess.predict"]


def test_every_row_is_reported_once_failed_ones_included() -> None:
    def answer(request: Request) -> str:
        if number(request) in (7, 30):
            raise ConnectionError("no route")
        return "a"

    seen: list[int] = []
    evaluator(simulated(answer), on_row=Counter(seen.append)).run(jobs(program(), rows(50)))

    assert seen == list(range(1, 51))


class Batching:
    """An engine that answers many requests at once, by a function of the row's number."""

    supports_choices = False

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Batching:
        return self

    def complete(self, request: Request) -> Response:
        raise AssertionError("asked one by one")

    def count_tokens(self, request: Request) -> int:
        return len(prompt(request).split())

    def batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Result]]]:
        self.sizes.append(len(requests))
        yield [(at, self._answer(request)) for at, request in enumerate(requests)]

    def _answer(self, request: Request) -> Result:
        if number(request) == 3:
            return dspy.LMServerError("out of memory")
        text = "ab"[number(request) % 3 == 0]
        return Response(
            id=None,
            model="batching/one",
            message=Message.assistant([TextPart(text)]),
            finish_reason="stop",
            usage=Usage(input_tokens=2, output_tokens=1),
        )


def batching(ledger: Ledger, engine: Batching, calls: int) -> Evaluator:
    lm = metered(ledger, dspy.LM("batching/one", engine=engine, cache=False, num_retries=0), calls)
    return Evaluator(lm, ACCURACY, "label", together=True)


def test_rows_of_a_batching_engine_are_asked_together_and_keep_their_order(ledger: Ledger) -> None:
    engine = Batching()

    outcomes = batching(ledger, engine, 100).run(jobs(program(), rows(70)))

    assert engine.sizes == [64, 6]
    assert [outcome.answer for outcome in outcomes] == ["" if n == 3 else "ab"[n % 3 == 0] for n in range(70)]
    assert [n for n, outcome in enumerate(outcomes) if outcome.kind == "failed"] == [3]
    assert outcomes[3].error == "LMServerError: out of memory"


def test_a_batch_beyond_the_budget_is_not_asked(ledger: Ledger) -> None:
    engine = Batching()

    with pytest.raises(BudgetExhausted, match=r"could take calls to 64, past the budget of 63"):
        batching(ledger, engine, 63).run(jobs(program(), rows(70)))

    assert engine.sizes == []


def too_long_for(broken: Callable[[int], bool]) -> Callable[[Request], str]:
    def answer(request: Request) -> str:
        if broken(number(request)):
            raise InputTooLong("the model reads at most 8 tokens")
        return "a"

    return answer


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("is_metered", [True, False])
def test_an_input_too_long_is_a_failure_of_its_own_row(ledger: Ledger, threads: int, is_metered: bool) -> None:
    lm = simulated(too_long_for(lambda row: row == 3))
    outcomes = evaluator(metered(ledger, lm, 100) if is_metered else lm, threads=threads).run(jobs(program(), rows(40)))
    assert [at for at, outcome in enumerate(outcomes) if outcome.kind == "failed"] == [3]
    assert outcomes[3].error == "InputTooLong: the model reads at most 8 tokens"


def test_inputs_that_are_all_too_long_end_the_evaluation_saying_so(ledger: Ledger) -> None:
    lm = metered(ledger, simulated(too_long_for(lambda row: True)), 100)
    with pytest.raises(LMFailed, match=r"rows failed .*; the first with: InputTooLong: the model reads at most 8"):
        evaluator(lm).run(jobs(program(), rows(40)))


def test_one_row_too_long_for_the_local_model_fails_alone(ledger: Ledger, smollm: dspy.LM) -> None:
    examples = rows(21)
    examples[20] = dspy.Example(text="word " * 9000, label="a").with_inputs("text")
    lm = Meter(ledger, Account(Budget())).wrap(smollm)
    outcomes = Evaluator(lm, ACCURACY, "label", together=True).run(jobs(program(), examples))
    assert [outcome.kind for outcome in outcomes] == ["scored"] * 20 + ["failed"]
    assert "InputTooLong: local/smollm2-135m" in outcomes[20].error


def test_a_few_failed_rows_are_tolerated_and_more_are_not() -> None:
    failed, scored = Outcome("failed", None, error="Timeout: 30 s"), Outcome("scored", 1.0)

    refuse_failures([failed] + [scored] * 19)
    with pytest.raises(LMFailed, match=r"^2 of 20 rows failed \(20 to be scored\); the first with: Timeout: 30 s\.$"):
        refuse_failures([failed] * 2 + [scored] * 18)
    refuse_failures([failed] * 2, 40)
    with pytest.raises(LMFailed, match=r"^2 of 40 rows failed"):  # of 20 rows by two programs
        refuse_failures([failed] * 2 + [scored] * 38, of=[*range(20), *range(20)])
    with pytest.raises(LMFailed, match=r"^3 of 3 rows failed \(40 to be scored\)"):
        refuse_failures([failed] * 3, 40)


def test_in_a_search_one_in_twenty_of_all_its_rows_may_fail_whichever_an_evaluation_draws() -> None:
    failed, scored = Outcome("failed", None, error="refused"), Outcome("scored", 1.0)
    losses = Losses(100)

    refuse_failures([scored] * 4, of=range(4), losses=losses)
    refuse_failures([failed, failed, scored], of=[10, 11, 12], losses=losses)
    refuse_failures([failed, failed], of=[10, 11], losses=losses)  # the same again, and nothing else
    refuse_failures([failed, failed, failed, scored], of=[13, 14, 15, 12], losses=losses)
    assert losses.failed == {10, 11, 13, 14, 15}
    with pytest.raises(LMFailed, match=r"^2 of 3 rows failed \(3 to be scored\); the first with: refused\.$"):
        refuse_failures([failed, failed, scored], of=[10, 16, 12], losses=losses)


def test_a_search_in_which_no_row_was_answered_ends_at_once() -> None:
    failed = Outcome("failed", None, error="refused")
    with pytest.raises(LMFailed, match=r"^2 of 2 rows failed"):
        refuse_failures([failed, failed], of=[0, 1], losses=Losses(100))


def test_an_evaluation_of_a_search_goes_on_where_few_of_all_rows_fail() -> None:
    def answer(request: Request) -> str:
        if number(request) < 3:
            raise InputTooLong("refused")
        return "a"

    few, examples = jobs(program(), rows(8)), rows(8)
    with pytest.raises(LMFailed, match=r"rows failed \(8 to be scored\)"):
        evaluator(simulated(answer), threads=1).run(few)
    losses = Losses(60)
    outcomes = evaluator(simulated(answer), threads=1, losses=Losses(60)).run(jobs(program(), examples[::-1]))
    assert [outcome.kind for outcome in outcomes] == ["scored"] * 5 + ["failed"] * 3
    assert losses.failed == set()


@pytest.mark.parametrize("is_seed", [True, False])
def test_an_input_that_is_too_long_is_the_fault_of_a_program_that_is_not_the_seed(*, is_seed: bool) -> None:
    def answer(request: Request) -> str:
        if number(request) < 3:
            raise InputTooLong("the model reads at most 8 tokens")
        return "a"

    own = [Job(program(), example, is_seed) for example in rows(8)]
    of_one = evaluator(simulated(answer), threads=1)
    if is_seed:
        with pytest.raises(LMFailed, match=r"^2 of 2 rows failed \(8 to be scored\); .* at most 8 tokens\.$"):
            of_one.run(own)
    else:
        assert [outcome.kind for outcome in of_one.run(own)] == ["failed"] * 3 + ["scored"] * 5


def test_a_row_that_every_program_fails_with_is_one_and_one_may_fail() -> None:
    failed, scored = Outcome("failed", None, error="too long"), Outcome("scored", 1.0)
    message = r"^4 of 48 rows failed \(48 to be scored\); the first with: too long\.$"

    refuse_failures(3 * [failed, *15 * [scored]], of=3 * [*range(16)])
    with pytest.raises(LMFailed, match=message):
        refuse_failures(2 * [failed, *15 * [scored]] + [failed, failed, *14 * [scored]], of=3 * [*range(16)])
    refuse_failures([failed, None, scored, None], 4, of=[0, 1, 2, 3])
    with pytest.raises(LMFailed, match=r"^1 of 1 rows failed"):
        refuse_failures([failed])
    with pytest.raises(LMFailed, match=r"^2 of 2 rows failed"):
        refuse_failures([failed, failed], of=[0, 0])


@pytest.mark.parametrize("threads", THREADS)
def test_a_row_that_no_program_can_answer_is_left_out(threads: int) -> None:
    lm, examples = simulated(too_long_for(lambda row: row == 3)), rows(16)

    outcomes = evaluator(lm, threads=threads).run([job for _ in range(11) for job in jobs(program(), examples)])

    assert [at % 16 for at, outcome in enumerate(outcomes) if outcome.kind == "failed"] == 11 * [3]


def test_a_row_that_only_the_second_program_fails_with_counts_as_its_wrong_answer() -> None:
    failed, scored = Outcome("failed", None, "", "a", "Timeout: 30 s"), Outcome("scored", 1.0, "a", "a")
    wrong = Outcome("unparsable", 0.0, "", "a", "Timeout: 30 s", is_charged=True)
    unparsable = Outcome("unparsable", 0.0)

    assert held_against([scored, unparsable, failed, failed, scored], [failed, failed, failed, scored, scored]) == [
        *[wrong, dataclasses.replace(wrong, is_charged=False), failed, scored, scored]
    ]


@pytest.mark.parametrize(
    ("metric", "left"), [("f1:yes", 80 / (80 + 20 + 20)), ("macro_f1", (80 / (80 + 30) + 240 / (240 + 40)) / 2)]
)
def test_no_f1_is_gained_by_calls_that_broke(metric: str, left: float) -> None:
    """Of 60 yes the seed finds 40, and takes 10 of 140 no for yes; the candidate fails with ten rows, else is equal."""
    rows = [("yes", "yes")] * 40 + [("yes", "no")] * 20 + [("no", "yes")] * 10 + [("no", "no")] * 130
    seed = [Outcome("scored", float(gold == answer), answer, gold) for gold, answer in rows]
    failing = Outcome("failed", None, "", "no", "ContentFilter")
    scorer = wrap(metric, "label")

    on_its_errors = compare(seed, held_against(seed, [*seed[:60], *[failing] * 10, *seed[70:]]), scorer)
    assert (on_its_errors.gain, on_its_errors.is_confirmed) == (0.0, False)

    where_right = compare(seed, held_against(seed, [*seed[:70], *[failing] * 10, *seed[80:]]), scorer)
    assert where_right.after == pytest.approx(left), "for f1:yes as if they were taken for yes"
    assert where_right.gain < 0
    assert where_right.rows == 200


@pytest.mark.parametrize("seeds", [Outcome("unparsable", 0.0, "", "no"), Outcome("scored", 0.0, "maybe", "no")])
def test_a_call_that_broke_where_the_seed_is_wrong_is_wrong_as_the_seed_is(seeds: Outcome) -> None:
    right = [Outcome("scored", 1.0, "yes", "yes")] * 20
    failing = Outcome("failed", None, "", "no", "Timeout")

    found = compare([*right, seeds], held_against([*right, seeds], [*right, failing]), wrap("f1:yes", "label"))

    assert (found.before, found.after, found.rows) == (1.0, 1.0, 21)


@pytest.mark.parametrize("threads", THREADS)
def test_a_failing_model_is_not_asked_to_the_end(threads: int) -> None:
    def down(request: Request) -> str:
        raise ConnectionError("no route")

    lm = simulated(down)
    with pytest.raises(LMFailed, match=r"rows failed \(400 to be scored\); the first with: .*no route"):
        evaluator(lm, threads=threads).run(jobs(program(), rows(400)))

    assert len(asked(lm)) < 400
    assert threads > 1 or len(asked(lm)) == 21


def test_no_jobs_have_no_outcomes() -> None:
    lm = simulated(lambda request: "a")
    assert evaluator(lm).run([]) == []
    assert Evaluator(lm, ACCURACY, "label", together=True).run([]) == []
