"""Evaluation: programs over rows, in parallel and in linear time, with three outcomes per row.

`dspy.Evaluate` isn't used: it takes quadratic time, runs slow rows again and turns failures into zeros.
"""

from __future__ import annotations

import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import dspy
from dspy.utils.exceptions import AdapterParseError

from preceptor.errors import (
    BudgetExhausted,
    ConfigError,
    InputTooLong,
    LMFailed,
    MetricError,
    ParseError,
    PreceptorError,
    again,
)
from preceptor.lm.bypass import is_metered, refusing_bypasses
from preceptor.lm.dispatch import reason
from preceptor.lm.ended import ending
from preceptor.lm.flow import in_order, submit
from preceptor.lm.meter import give_up
from preceptor.lm.seam import every_predictor, predictors
from preceptor.scoring.metrics import Metric, OtherFields
from preceptor.scoring.texts import text_of
from preceptor.scoring.trial import Outcome, Step
from preceptor.splits import inputs_key

TOLERATED: Final = 0.05
"""Share of failed rows up to which a comparison is still made."""

_STANDARD: Final = sysconfig.get_path("stdlib")
_INSTALLED: Final = (sysconfig.get_path("purelib"), Path(dspy.__file__).parents[1], Path(__file__).parents[1])
_TOO_LONG: Final = f"{InputTooLong.__name__}: "
_ODD: Final = (f"{ConfigError.__name__}: ", f"{OtherFields.__name__}: ")
_UNJUDGED: Final = (dspy.LMError, AdapterParseError, ParseError, InputTooLong)
"""What a model fails at on one row, where a metric asks it for a verdict."""


@dataclass(frozen=True, slots=True)
class Job:
    """One program on one row; an input that is too long for one that isn't the seed is the program's own fault."""

    program: dspy.Module
    example: dspy.Example
    is_seed: bool = True


@dataclass(slots=True)
class Losses:
    """The different rows that failed in a search so far: one evaluation sees few of them, or all, by chance.

    Attributes:
        rows: That the search has in all.
        failed: Those that failed.
        is_answered: Whether any was answered.
    """

    rows: int
    failed: set[int] = field(default_factory=set[int])
    is_answered: bool = False

    def are_few(self, failed: Iterable[int], *, is_answered: bool) -> bool:
        """Count rows as failed; return True if one in twenty of all at most has, and others were answered."""
        self.failed.update(failed)
        self.is_answered = self.is_answered or is_answered
        return self.is_answered and len(self.failed) <= TOLERATED * self.rows


@dataclass(frozen=True, slots=True)
class _End:
    """The end of the budget, as the rows met it; behind so many of them no row was answered in an earlier process."""

    most: int
    met: list[BudgetExhausted] = field(default_factory=list[BudgetExhausted])

    @property
    def is_past(self) -> bool:
        return len(self.met) > self.most

    def check(self) -> None:
        if self.met:
            raise self.met[0]


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Runs jobs with one language model.

    Attributes:
        lm: Answers for every predictor that has no model of its own.
        metric: Scores the answers.
        output: The field that holds the label, for confusion tables; "" if there is none.
        together: True if the model answers many requests at once; rows then wait for each other.
        threads: Rows in flight otherwise.
        has_steps: Keep the predictors' inputs and outputs.
        on_row: Called after each row.
        losses: Of the search that the jobs belong to, if they belong to one.
    """

    lm: dspy.LM
    metric: Metric
    output: str
    together: bool
    threads: int = 8
    has_steps: bool = False
    on_row: Callable[[], None] = lambda: None
    losses: Losses | None = None
    _is_heard: threading.Event = field(init=False, repr=False, default_factory=threading.Event)
    """Set once a row was answered on which it was listened to whether the program asks models by itself."""

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Return one outcome per job, in order.

        Raises:
            BudgetExhausted: If the budget ends; answers so far are in the ledger.
            LMFailed: As soon as too many have failed; see `refuse_failures`.
            ConfigError: If the program asks a model past the meter. Or instead of LMFailed, where all that failed are
                rows on which it returns no `dspy.Prediction`, or one without the label's field.
            MetricError: If the metric raises or returns no score, but for what a model that it asks fails at.
        """
        if not self.together:
            return self._in_threads(jobs)
        outcomes: list[Outcome] = []
        with closing(in_order(self.lm, jobs, self._outcome, self.threads)) as answered:
            for outcome in answered:
                outcomes.append(outcome)
                if outcome.kind == "failed":
                    self._refuse(outcomes, jobs)
        return outcomes

    def _in_threads(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Let each thread take rows until none is left: waking one that waits for them would cost as much as a row.

        Where the budget ends, other rows are tried until some more have met its end: those that other threads had
        answered when it ended in an earlier process are replayed, and count as they did then.
        """
        outcomes: list[Outcome | None] = [None] * len(jobs)
        left, is_over = iter(range(len(jobs))), threading.Event()
        end = _End(2 * self.threads)

        def work() -> None:
            while not (is_over.is_set() or end.is_past) and (at := next(left, None)) is not None:
                try:
                    outcome = outcomes[at] = self._outcome(jobs[at])
                    if outcome.kind == "failed":
                        self._refuse(outcomes, jobs)
                except BudgetExhausted as error:
                    end.met.append(error)
                except BaseException:
                    is_over.set()
                    raise

        if self.threads == 1:
            work()
        else:
            self._together(work, min(self.threads, len(jobs)), is_over)
        end.check()
        return [outcome for outcome in outcomes if outcome is not None]

    def _together(self, work: Callable[[], None], threads: int, is_over: threading.Event) -> None:
        with ThreadPoolExecutor(max(1, threads)) as pool:
            futures = [submit(pool, work) for _ in range(threads)]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                is_over.set()
                give_up(self.lm)
                raise

    def _refuse(self, outcomes: Sequence[Outcome | None], jobs: Sequence[Job]) -> None:
        of = [id(job.example) for job in jobs]
        refuse_failures(blameless(outcomes, [job.is_seed for job in jobs]), len(jobs), of, self.losses)

    def _outcome(self, job: Job) -> Outcome:
        gold = text_of(job.example, self.output) if self.output else ""
        with dspy.context(lm=self.lm, trace=[], disable_history=True), ending():
            outcome = self._answered(job, gold)
        self.on_row()
        return replace(outcome, of=inputs_key(job.example))

    def _predicted(self, job: Job) -> Any:
        """Answer a row; those begun before one was answered are all listened to, so that none asks twice unheard."""
        if not is_metered(self.lm) or self._is_heard.is_set():
            return job.program(**job.example.inputs())
        with refusing_bypasses():
            prediction = job.program(**job.example.inputs())
        self._is_heard.set()
        return prediction

    def _answered(self, job: Job, gold: str) -> Outcome:
        try:
            prediction = self._predicted(job)
        except AdapterParseError as error:
            return Outcome("unparsable", 0.0, "", gold, str(error).splitlines()[0], self._steps(job.program))
        except Exception as error:  # noqa: BLE001  ends the evaluation, or its row
            known = ours(error)
            if known is not None and not isinstance(known, InputTooLong):  # which is this row's own
                raise again(known) from known.__cause__
            line = "" if known or isinstance(error, dspy.LMError) else _line(error)
            error = known or error
            return Outcome("failed", None, "", gold, f"{type(error).__name__}: {error}{line}")
        if not isinstance(prediction, dspy.Prediction):
            return odd(no_prediction(prediction, self.output), gold)
        return self._scored(job, prediction, gold)

    def _scored(self, job: Job, prediction: dspy.Prediction, gold: str) -> Outcome:
        try:
            score = self.metric(job.example, prediction)
        except OtherFields as error:
            return odd(error, gold)
        except MetricError as error:  # a metric that asks a model can end the budget too
            unanswered = unjudged(error)
            if unanswered:
                return Outcome("failed", None, "", gold, unanswered)
            raise again(ours(error.__cause__) or error) from error.__cause__
        answer = text_of(prediction, self.output) if self.output else ""
        return Outcome("scored", score, answer, gold, "", self._steps(job.program))

    def _steps(self, program: dspy.Module) -> tuple[Step, ...]:
        if not self.has_steps:
            return ()
        parts = predictors(program)
        names = {id(frozen): "" for _, frozen in every_predictor(program)} | {id(part): name for name, part in parts}
        trace: list[Any] = dspy.settings.trace or []
        named = [(names[id(one)] if id(one) in names else _name_of_copy(one, parts), *step) for one, *step in trace]
        return tuple(Step(name, dict(inputs), dict(outputs)) for name, inputs, outputs in named if name)


def _line(error: BaseException) -> str:
    """Return where a line of the user's own raised an error, "" if it was raised elsewhere."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if any(path.is_relative_to(folder) for folder in _INSTALLED):
            return ""
        if not path.is_relative_to(_STANDARD):
            return f" ({path.name}, line {frame.lineno})"
    return ""


def _name_of_copy(predictor: Any, parts: Sequence[tuple[str, Any]]) -> str:
    """Return whose copy a predictor is, as `dspy.BestOfN` makes one for each attempt; "" if that isn't certain."""
    alike = [name for name, part in parts if part.signature.equals(predictor.signature)]
    return alike[0] if len(alike) == 1 else ""


def refuse_failures(
    outcomes: Sequence[Outcome | None],
    rows: int | None = None,
    of: Sequence[int] = (),
    losses: Losses | None = None,
) -> None:
    """Raise if so many rows failed that comparing programs on the rest wouldn't be honest.

    One in twenty may, or one; a row that several programs fail with is one. If nothing was answered, none may.
    In a search, one in twenty of all its rows may, whichever of them an evaluation draws, or of its answers: they are
    one candidate's perhaps.

    Args:
        outcomes: Those so far, None where one is still to come.
        rows: How many there will be; by default no more.
        of: Which row each is of, those to come included; by default each is of its own.
        losses: Of the search, if it is one; counted on.

    Raises:
        LMFailed: With how many failed, and the first error.
        ConfigError: The same where no answer could be scored because of the program, and no attempt would mend that.
    """
    failed = {at: outcome for at, outcome in enumerate(outcomes) if outcome is not None and outcome.kind == "failed"}
    rows = len(outcomes) if rows is None else rows
    of = of or range(rows)
    is_answered = any(outcome is not None and outcome.kind != "failed" for outcome in outcomes)
    may_go_on = losses is not None and losses.are_few({of[at] for at in failed}, is_answered=is_answered)
    if not failed or may_go_on:
        return
    is_few = len({of[at] for at in failed}) <= max(1, TOLERATED * len(set(of)))
    is_few = is_few or (losses is not None and len(failed) <= TOLERATED * rows)  # of one candidate, which is charged
    if len(failed) == rows or not is_few:
        done = sum(outcome is not None for outcome in outcomes)
        raise _too_many([outcome.error for outcome in failed.values()], done, rows, is_answered=is_answered)


def _too_many(errors: Sequence[str], done: int, rows: int, *, is_answered: bool) -> PreceptorError:
    first = errors[0].removesuffix(".")
    told = f"{len(errors)} of {done} rows failed ({rows} to be scored); the first with: {first}."
    if not all(error.startswith(_ODD) for error in errors):
        return LMFailed(told)
    return ConfigError(told if is_answered else errors[0].partition(": ")[2])


def blameless(outcomes: Sequence[Outcome | None], are_seeds: Sequence[bool]) -> list[Outcome | None]:
    """Return outcomes without those of inputs that a candidate made too long: its own fault, not the provider's."""
    return [
        None if one is not None and not is_seed and one.error.startswith(_TOO_LONG) else one
        for one, is_seed in zip(outcomes, are_seeds, strict=False)
    ]


def charged(outcomes: tuple[Outcome, ...], worst: float = 0.0) -> tuple[Outcome, ...]:
    """Return a candidate's outcomes, its failures as wrong answers if they are two, and more than one in twenty.

    Else a candidate that most rows fail with could win by the few others, where all candidates together fail seldom.

    Args:
        outcomes: Of one candidate.
        worst: The score of a wrong answer.
    """
    failed = [outcome for outcome in outcomes if outcome.kind == "failed"]
    if len(failed) <= max(1, TOLERATED * len(outcomes)):
        return outcomes
    return tuple(_wrong(outcome, worst) if outcome.kind == "failed" else outcome for outcome in outcomes)


def held_against(before: Sequence[Outcome], after: Sequence[Outcome]) -> list[Outcome]:
    """Return the second program's outcomes, its failures as wrong answers on rows that the first has answered.

    Left out of a comparison, they would let a program win by the rows that it can answer. Where the first is wrong,
    the second is taken to be wrong in the same way: with no answer it would be ahead in the F1 of the label that the
    first took.

    Args:
        before: Of the program that is in use.
        after: Of the one that may replace it, on the same rows.
    """
    return [
        _held(old, new) if new.kind == "failed" != old.kind else new for old, new in zip(before, after, strict=True)
    ]


def _held(old: Outcome, failed: Outcome) -> Outcome:
    is_right = (old.score or 0.0) >= 1
    return _wrong(failed) if is_right else replace(_wrong(failed), answer=old.answer, is_charged=False)


def odd(error: ConfigError, gold: str = "") -> Outcome:
    """Return the failure of a row whose answer can't be scored because of the program."""
    return Outcome("failed", None, "", gold, f"{type(error).__name__}: {error}")


def no_prediction(answer: Any, output: str) -> ConfigError:
    """Return the error of a program that returns something else than a `dspy.Prediction`."""
    kind = type(answer).__name__
    return ConfigError(
        f"The program returned a {kind}, not a dspy.Prediction; return dspy.Prediction({output or 'answer'}=...)."
    )


def _wrong(failed: Outcome, worst: float = 0.0) -> Outcome:
    return replace(failed, kind="unparsable", score=worst, is_charged=True)


def ours(error: BaseException | None) -> PreceptorError | None:
    """Return the error of ours that DSPy wrapped, if there is one."""
    while error is not None:
        if isinstance(error, PreceptorError):
            return error
        error = error.__cause__
    return None


def unjudged(error: MetricError) -> str:
    """Return why the model that a metric asks gave no verdict on one row, "" if the error is the metric's own."""
    cause = ours(error.__cause__) or error.__cause__
    while cause is not None and not isinstance(cause, _UNJUDGED):
        cause = None if isinstance(cause, PreceptorError) else cause.__cause__
    return f"{str(error).partition(' raised ')[0]} gave no verdict: {reason(cause)}" if cause else ""


class Counter:
    """Counts rows from many threads and reports each count."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report
        self._count = 0
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """Count one more row."""
        with self._lock:
            self._count += 1
            self._report(self._count)
