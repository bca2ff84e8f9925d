"""Watching an optimizer that isn't ours: what became of every row, and when it must stop.

DSPy's optimizers take any exception for a wrong answer and go on, so none reaches them: a row without an
answer is an empty prediction with a note on it, and what ends a search is no `Exception`.
"""

from __future__ import annotations

import dataclasses
import threading
import traceback
import types
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import dspy
from dspy.utils.exceptions import AdapterParseError

from preceptor.copies import candidate_of, copy_of, with_own_models
from preceptor.errors import BudgetExhausted, ConfigError, InputTooLong, LMFailed, MetricError, PreceptorError
from preceptor.leaks import Guard
from preceptor.lm.meter import give_up
from preceptor.modules import Classify, Generate
from preceptor.scoring.evaluate import blameless, charged, no_prediction, odd, refuse_failures, unjudged
from preceptor.scoring.metrics import OtherFields, mean
from preceptor.scoring.texts import text_of
from preceptor.scoring.trial import Candidate, Outcome, Trial
from preceptor.task import Task
from preceptor.teleprompters.asking import (
    Chat,
    Drawing,
    Memory,
    Remembering,
    answered_by,
    heard,
    in_waves,
    muted,
    with_room,
)

_NOTE: Final = "_preceptor_note"


class _Stopped(BaseException):
    """Ends a search from inside a call or a row."""


@dataclass(slots=True)
class _Tally:
    """What is known of a candidate.

    Attributes:
        candidate: What was scored.
        seen: Row -> outcome.
        calls: Row -> calls of the run, by the time it was first scored.
    """

    candidate: Candidate
    seen: dict[int, Outcome] = field(default_factory=dict[int, Outcome])
    calls: dict[int, int] = field(default_factory=dict[int, int])


@dataclass(slots=True)
class _Note:
    """What the metric must know of a prediction.

    Attributes:
        candidate: The instructions it was made with.
        outcome: What came of it; None while it is still to be scored.
    """

    candidate: Candidate
    outcome: Outcome | None = None


class Watch:
    """What an optimizer is given instead of the task's own parts, and what became of every row.

    A question that was answered in this search is answered from memory and costs nothing. One that two rows of a wave
    ask together, of a model that batches, is asked once and counts twice.

    Attributes:
        seed: The seed's trial, the first.
        student: Behaves like the task's, and has a class of the same name and source.
        judged: The rows candidates are judged by, each an object of its own.
        shown: The other train rows.
        lm: The task's model.
        proposer: With room for a proposal; where it samples, a repeated question is a new draw, the same in every run.
        error: What ended the search early, if something did.
    """

    def __init__(self, task: Task, seed: Trial, memory: Memory, on_row: Callable[[int], None]) -> None:
        self._task = task
        self._memory = memory
        self._on_row = on_row
        self._adapter = dspy.settings.adapter
        self._neutral = mean(seed.outcomes)
        self._guard = Guard.of(task.train, task.signatures)
        self._originals: dict[str, bool] = {}
        self._tally: dict[str, _Tally] = {}
        self._scored = self._calls = 0
        self._is_closed = False
        self._turn = threading.Condition()
        self._drawing = Drawing(task.proposer, memory, self._call, task.rng_seed)
        rows = [example.copy() for example in task.train]
        self._places = {id(example): place for place, example in enumerate(rows)}
        judged = set(seed.rows)
        self.seed = seed
        self.judged = [rows[place] for place in seed.rows]
        self.shown = [rows[place] for place in task.order if place not in judged]
        self.error: PreceptorError | None = None
        self.lm = self._guarded(task.lm)
        self.proposer = answered_by(with_room(task.proposer), self._drawing)
        self.student = self._watched(task.student)

    @classmethod
    def begin(cls, task: Task, judged: int, on_row: Callable[[int], None]) -> Watch:
        """Score the seed on the first rows of the task's order, which candidates will be judged by.

        Args:
            task: The compile.
            judged: How many rows.
            on_row: Told how many rows the optimizer has scored, after each.

        Raises:
            BudgetExhausted: If the budget ends.
            LMFailed: If more than one row in twenty failed, and more than one.
        """
        memory = Memory()

        def remembering(lm: dspy.LM) -> dspy.LM:
            return answered_by(lm, Remembering(lm, memory))

        first = dataclasses.replace(task, lm=remembering(task.lm), student=with_own_models(task.student, remembering))
        [seed] = first.score([task.seed], task.order[:judged])
        return cls(task, seed, memory, on_row)

    def run(self, optimize: Callable[[], dspy.Module]) -> dspy.Module | None:
        """Run an optimizer to its end; return its program, or None if the budget ended first.

        When this returns, no call is on its way and none will be made.

        Raises:
            LMFailed: If too many rows failed, or the proposer did.
            MetricError: If the metric raised or returned no score.
        """
        try:
            program = self._run(optimize)
            if self._drawing.failure is not None and not self._drawing.answered:
                raise self._drawing.failure
            self._task.meter.accept_failures()
            return program
        except dspy.LMError as error:  # a row's own was noted
            give_up(self.lm)
            raise LMFailed(f"The proposer {self.proposer.model} failed: {error}") from error
        except BaseException:
            give_up(self.lm)
            raise
        finally:
            self._close()

    def score(self, example: Any, prediction: Any, trace: Any = None) -> float:
        """Score a row, as the optimizer's metric; a row that failed gets the seed's mean, which favours nobody.

        With a trace it is asked for a demonstration, which a row that failed is not.
        """
        note: _Note = getattr(prediction, _NOTE)
        output = self._task.output
        gold = text_of(example, output) if output else ""
        if note.outcome is None:
            answer = text_of(prediction, output) if output else ""
            note.outcome = self._measured(example, prediction, answer)
        note.outcome = dataclasses.replace(note.outcome, gold=gold)
        if self._is_original(note.candidate):
            self._count(note.candidate, self._places[id(example)], note.outcome)
        if note.outcome.score is None:
            return self._neutral if trace is None else 0.0
        return note.outcome.score

    def criticize(
        self, example: Any, prediction: Any, trace: Any = None, predictor: Any = None, steps: Any = None
    ) -> float | dspy.Prediction:
        """Score a row, as GEPA's metric; asked about a predictor, say what was wrong with the answer."""
        outcome = cast("_Note", getattr(prediction, _NOTE)).outcome
        if predictor is None or outcome is None:
            return self.score(example, prediction)
        told = f"The score of this answer is {outcome.score or 0:g}. {outcome.error}"
        if outcome.gold:
            told += f"The right {self._task.output} is: {outcome.gold}"
        metric = self._task.metric
        if metric.arguments == 5 and outcome.kind == "scored":
            try:
                with self._as_the_user():
                    own = metric.scorer(example, prediction, trace, predictor, steps)
            except Exception as error:
                raise self._stop(MetricError(f"The metric {metric.name} raised {error!r}.")) from error
            told = getattr(own, "feedback", None) or told
        return dspy.Prediction(score=outcome.score, feedback=told)

    def trials(self) -> list[Trial]:
        """Write down every candidate but the seed, with the judged rows it was scored on, or the others.

        In the order in which the last of these rows were scored, with the calls by then. Of the others there are
        fewer than judged rows: by them alone no candidate is the best so far. Failures count as in `charged`.
        """
        found: list[tuple[int, Candidate, list[int], list[Outcome]]] = []
        for one in self._tally.values():
            rows = [row for row in self._task.order if row in one.seen]
            rows = [row for row in rows if row in self.seed.rows] or rows[: max(1, len(self.seed.rows) - 1)]
            found.append((max(map(one.calls.__getitem__, rows)), one.candidate, rows, [one.seen[row] for row in rows]))
        return [
            self._task.record(candidate, rows, charged(tuple(outcomes)), calls)
            for calls, candidate, rows, outcomes in sorted(found, key=lambda each: each[0])
            if candidate.key != self._task.seed.key
        ]

    def candidate(self, program: dspy.Module) -> Candidate:
        """Return what tells one of the optimizer's programs from the others; they keep the seed's demonstrations."""
        return dataclasses.replace(self._task.seed, instructions=candidate_of(program).instructions, constitutions={})

    @property
    def calls_left(self) -> int | None:
        """What the budget leaves to the search; None if calls aren't bounded."""
        return self._task.meter.account.calls_left

    @contextmanager
    def _call(self) -> Generator[None]:
        """Let one call through, unless the search has ended; an error of ours ends it, but for a row's own."""
        with self._turn:
            if self._is_closed or self.error is not None:
                raise _Stopped
            self._calls += 1
        try:
            yield
        except InputTooLong:
            raise
        except PreceptorError as error:
            raise self._stop(error) from error
        finally:
            with self._turn:
                self._calls -= 1
                self._turn.notify_all()

    def _run(self, optimize: Callable[[], dspy.Module]) -> dspy.Module | None:
        with muted(), in_waves(self.lm), dspy.context(lm=self.lm, adapter=Chat(), trace=None, disable_history=True):
            try:
                return optimize()
            except (_Stopped, KeyboardInterrupt, dspy.LMError) as error:
                traceback.clear_frames(error.__traceback__)  # DSPy's progress bars write when they are let go of
                if not isinstance(error, _Stopped):
                    raise
        if self.error is not None and not isinstance(self.error, BudgetExhausted):
            raise self.error
        return None

    def _stop(self, error: PreceptorError) -> _Stopped:
        """End the search; return what to raise."""
        with self._turn:
            self.error = self.error or error
        return _Stopped()

    def _close(self) -> None:
        """Refuse the threads that DSPy left running, and wait for the calls on their way."""
        with self._turn:
            self._is_closed = True
            self._turn.wait_for(lambda: self._calls == 0)

    def _watched(self, student: dspy.Module) -> dspy.Module:
        """Return a copy whose every run is noted.

        It is no module around the student: MIPROv2 shows the proposer the source of the program's class. That of
        DSPy's own `Predict` it leaves out, by the name, and so that of ours, whose docstrings have examples.
        """
        copied = with_own_models(student, self._guarded)
        copied._compiled = False  # BootstrapFewShot refuses programs compiled before
        for part in {id(part): part for _, part in copied.named_sub_modules()}.values():
            if type(part) in (Classify, Generate):
                part.__class__ = types.new_class(dspy.Predict.__name__, (type(part),))
        kind: Any = type(copied)

        def forward(program: dspy.Module, **inputs: Any) -> dspy.Prediction:
            return self._answer(program, kind.forward, inputs)

        names = {"forward": forward, "deepcopy": copy_of}  # DSPy's own copies may share predictors
        names |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        copied.__class__ = types.new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(names))
        return copied

    def _guarded(self, lm: dspy.LM) -> dspy.LM:
        return answered_by(lm, Remembering(lm, self._memory, self._call))

    def _is_original(self, candidate: Candidate) -> bool:
        """Return False if an instruction copies a training input; such a candidate is worth nothing."""
        if candidate.key not in self._originals:
            texts = list(candidate.instructions.values())
            self._originals[candidate.key] = len(self._guard.originals(texts)) == len(texts)
        return self._originals[candidate.key]

    def _answer(self, program: dspy.Module, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> dspy.Prediction:
        """Run the program on one row; where no answer came, return an empty prediction."""
        note, trace = _Note(self.candidate(program)), dspy.settings.trace
        trace = [] if trace is None else trace
        begun, prediction = len(trace), cast("Any", dspy.Prediction())
        if not self._is_original(note.candidate):
            note.outcome = Outcome("unparsable", 0.0, error="The instruction copies a training input.")
            return _noted(prediction, note)
        with self._as_the_user(), dspy.context(trace=trace):
            try:
                prediction = forward(program, **inputs)
            except AdapterParseError as error:
                note.outcome = Outcome("unparsable", 0.0, error=str(error).splitlines()[0])
            except Exception as error:
                if isinstance(error, PreceptorError) and not isinstance(error, InputTooLong):
                    raise self._stop(error) from error
                note.outcome = Outcome("failed", None, error=f"{type(error).__name__}: {error}")
        if not isinstance(prediction, dspy.Prediction):
            note.outcome, prediction = odd(no_prediction(prediction, self._task.output)), dspy.Prediction()
        trace[begun:] = [(asked, given, _fields(asked, answer)) for asked, given, answer in trace[begun:]]
        return _noted(prediction, note)

    def _measured(self, example: Any, prediction: Any, answer: str) -> Outcome:
        try:
            with self._as_the_user():
                return Outcome("scored", self._task.metric(example, prediction), answer)
        except OtherFields as error:
            return odd(error)
        except MetricError as error:
            unanswered = unjudged(error)
            if unanswered:
                return Outcome("failed", None, error=unanswered)
            raise self._stop(error) from error

    def _count(self, candidate: Candidate, row: int, outcome: Outcome) -> None:
        with self._turn:
            if self._is_closed:
                raise _Stopped
            one = self._tally.setdefault(candidate.key, _Tally(candidate))
            one.calls.setdefault(row, self._task.meter.account.spent.calls)  # scored again, it costs nothing
            one.seen[row] = outcome
            outcomes = list(one.seen.values()) if outcome.kind == "failed" else []
            self._scored += 1
            with heard():
                self._on_row(self._scored)
        try:
            are_seeds = [candidate.key == self._task.seed.key] * len(outcomes)
            refuse_failures(blameless(outcomes, are_seeds), max(len(outcomes), len(self.judged)))
        except (LMFailed, ConfigError) as error:
            raise self._stop(error) from error

    @contextmanager
    def _as_the_user(self) -> Generator[None]:
        with heard(), dspy.context(adapter=self._adapter):
            yield


def _fields(predictor: Any, answer: dspy.Prediction) -> dspy.Prediction:
    """Return an answer without what isn't in the signature, such as the log-probabilities of its choices."""
    return dspy.Prediction(**{name: answer[name] for name in predictor.signature.output_fields if name in answer})


def _noted(prediction: dspy.Prediction, note: _Note) -> dspy.Prediction:
    setattr(prediction, _NOTE, note)
    return prediction
