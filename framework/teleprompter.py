"""The contract: the life of a compile, the same for every method.

A method is a frozen dataclass with a `search(task)` that returns trials, best first. Checking,
splitting, metering, resuming, confirming and saving happen here, once.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import dspy
from dspy.clients.backend_selection import CLIENT_KEYS

from preceptor import program as artifact
from preceptor.checks import check_metric, label_field, needed_inputs
from preceptor.data import check_examples, split, stratified
from preceptor.errors import BudgetExhausted, ConfigError, LMFailed, Unaffordable
from preceptor.evidence import Evidence
from preceptor.leaks import Guard
from preceptor.lm.budget import Account, Budget, Cost
from preceptor.lm.catalogue import cache_folder
from preceptor.lm.dispatch import Patience
from preceptor.lm.meter import Meter
from preceptor.lm.seam import predictors
from preceptor.run import fingerprint, open_run
from preceptor.scoring.evaluate import Job
from preceptor.scoring.metrics import Metric, Scorer, wrap
from preceptor.scoring.racing import best_so_far
from preceptor.scoring.statistics import compare, interval, smallest_gain
from preceptor.scoring.trial import Candidate, Outcome, Trial
from preceptor.task import Report, Task, evaluator

logger = logging.getLogger(__name__)


def _quiet(what: str, done: int, total: int) -> None:
    del what, done, total


@dataclass(frozen=True, slots=True)
class Estimate:
    """Calls a search is expected to take, confirmation excluded.

    Attributes:
        least: Below this the method can't do anything useful.
        expected: With this budget.
    """

    least: int
    expected: int


@dataclass(frozen=True, kw_only=True)
class Teleprompter(dspy.teleprompt.Teleprompter):
    """What every method is given.

    Args:
        metric: A DSPy metric of 2, 3 or 5 arguments, or the name of a built-in one.
        lm: Answers the task; by default the configured one.
        proposer: Writes instructions; by default `lm`.
        budget: Bounds on what both may spend together.
        run_dir: Where the run is kept; by default a folder of the cache named after the inputs, so
            that the same compile started again resumes.
        threads: Calls in flight, where the model answers one request a call.
        patience: Deadline and retries of each call to a provider.
        seed: Equal seeds give equal programs.
        report: Told of progress.
    """

    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    needs: ClassVar[str] = "a chat model"

    metric: Scorer | Metric | str
    lm: dspy.LM | None = None
    proposer: dspy.LM | None = None
    budget: Budget = field(default_factory=Budget)
    run_dir: Path | str | None = None
    threads: int = 8
    patience: Patience = field(default_factory=Patience)
    seed: int = 0
    report: Report = _quiet

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"{type(self).__name__} needs threads >= 1, got {self.threads}.")

    def search(self, task: Task) -> Sequence[Trial]:
        """Return trials, best first; the method's own work.

        Raises:
            BudgetExhausted: Stops the search; the best candidate so far is confirmed.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no search.")

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        """Return the calls a search takes on so many train rows, with so many calls to spend."""
        raise NotImplementedError(f"{type(self).__name__} defines no estimate.")

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: dspy.Module | None = None,
        valset: list[dspy.Example] | None = None,
        **kwargs: Any,
    ) -> dspy.Module:
        """Return a copy of `student` with better instructions, or with its own if none is confirmed.

        Args:
            student: Any program; left as it is.
            trainset: Errors are read and candidates race here.
            teacher: Not used by these methods; accepted so that DSPy's combinators work.
            valset: Opened once, to confirm; by default half of `trainset` is set aside.
            kwargs: None is known; a misspelt one is refused.

        Returns:
            A `dspy.Module` with an `evidence` attribute.

        Raises:
            ConfigError: If an input can't work; no call was made then.
            BudgetExhausted: If the budget ended before anything was confirmed; compile again to resume.
            LMFailed: If the model failed on too many rows; compile again to resume.
        """
        if kwargs:
            raise ConfigError(f"{type(self).__name__}.compile doesn't know {sorted(kwargs)[0]!r}.")
        compiling = _Compile.prepare(self, student, trainset, valset)
        with compiling.open() as task:
            try:
                return compiling.run(task)
            except LMFailed as error:
                raise LMFailed(f"{error} {_so_far(task)}") from error


@dataclass(frozen=True, slots=True)
class _Compile:
    """One compile's checked inputs."""

    method: Teleprompter
    student: dspy.Module
    train: list[dspy.Example]
    confirm: list[dspy.Example]
    output: str
    metric: Metric
    lm: dspy.LM
    proposer: dspy.LM

    @classmethod
    def prepare(
        cls,
        method: Teleprompter,
        student: dspy.Module,
        trainset: Sequence[dspy.Example],
        valset: Sequence[dspy.Example] | None,
    ) -> _Compile:
        """Check everything that can be checked for nothing.

        Raises:
            ConfigError: If something can't work.
        """
        parts = predictors(student)
        if not parts:
            raise ConfigError(f"{type(student).__name__} has no predictor to improve.")
        lm = method.lm or dspy.settings.lm
        if not isinstance(lm, dspy.LM):
            raise ConfigError("No language model: pass lm=, or call dspy.configure(lm=...).")
        inputs = needed_inputs(student)
        train = check_examples(trainset, inputs, name="trainset")
        output = label_field(student, train[0])
        if valset is None:
            train, confirm = split(train, output, seed=method.seed)
        else:
            confirm = check_examples(valset, inputs, name="valset")
        if len(train) < 2 or len(confirm) < 2:
            raise ConfigError(
                f"Too few rows: {len(train)} to search on, {len(confirm)} to confirm on; 2 each at least."
            )
        metric = wrap(method.metric, output)
        for name, rows in (("trainset", train), ("valset", confirm)):
            check_metric(metric, rows[0], name)
        return cls(method, student, train, confirm, output, metric, lm, method.proposer or lm)

    @contextmanager
    def open(self) -> Generator[Task]:
        """Open the run folder and check that the budget can pay."""
        method, parts = self.method, self._parts()
        folder = Path(method.run_dir) if method.run_dir else cache_folder() / "runs" / fingerprint(parts)
        with open_run(folder, parts) as run:
            account = Account(method.budget, lost=Cost(*run.ledger.failures))
            meter = Meter(run.ledger, account, threads=method.threads, patience=method.patience)
            own = [
                predictor.lm for _, predictor in self.student.named_predictors() if isinstance(predictor.lm, dspy.LM)
            ]
            for lm in (self.lm, self.proposer, *own):
                meter.check(lm)
            rng = random.Random(method.seed)
            task = Task(
                student=_with_models(self.student, meter),
                seed=artifact.candidate_of(self.student),
                train=self.train,
                order=stratified(self.train, self.output, rng),
                output=self.output,
                metric=self.metric,
                lm=meter.wrap(self.lm),
                proposer=meter.wrap(self.proposer),
                meter=meter,
                run=run,
                rng=rng,
                threads=method.threads,
                report=method.report,
                confirm_rows=len(self.confirm),
            )
            self._refuse_unaffordable(task)
            yield task

    def run(self, task: Task) -> dspy.Module:
        """Search, confirm, save; return the program."""
        account, stopped = task.meter.account, ""
        account.hold(self._confirmation(task))
        try:
            trials = list(self.method.search(task))
        except BudgetExhausted as error:
            stopped = str(error)
            trials = best_so_far(task.scored, self.metric.aggregate)
        winner, copied = _first_original(task, trials)
        account.hold(0)
        evidence, answers = self._confirmed(task, winner, stopped, copied)
        adopted = winner.candidate if winner is not None and evidence.replaced else task.seed
        compiled = artifact.apply(self.student, adopted)
        compiled._compiled = True
        setattr(compiled, "evidence", evidence)  # noqa: B010  a DSPy module has no such field
        probes = [
            {"inputs": row.inputs().toDict(), "output": self.output, "answer": outcome.answer}
            for row, outcome in zip(self.confirm[:3], answers, strict=False)
            if outcome.kind == "scored" and self.output
        ]
        artifact.save(
            compiled, task.run.program, evidence={**evidence.stable(), "probes": probes}, lm=self.lm.model, replace=True
        )
        task.run.write_result(evidence.as_dict())
        logger.info("%s", evidence.verdict)
        return compiled

    def _confirmed(self, task: Task, winner: Trial | None, stopped: str, copied: str) -> tuple[Evidence, list[Outcome]]:
        """Open the confirmation rows, once: the seed and the winner, paired."""
        account, rows = task.meter.account, len(self.confirm)
        candidate = winner.candidate if winner is not None and winner.candidate.key != task.seed.key else None
        asked: list[Candidate] = [task.seed] + ([candidate] if candidate else [])
        programs = [artifact.apply(task.student, one) for one in asked]
        jobs = [Job(program, row) for program in programs for row in self.confirm]
        outcomes = evaluator(task, len(jobs), f"confirming on {rows} untouched rows").run(jobs)
        before, after = outcomes[:rows], outcomes[-rows:]
        verdict = compare(before, after, self.metric, seed=self.method.seed)
        replaced = candidate is not None and verdict.is_confirmed
        evidence = Evidence(
            method=type(self.method).__name__,
            metric=self.metric.name,
            comparison=verdict,
            baseline_ci=interval(before, self.metric),
            compiled_ci=interval(after if replaced else before, self.metric),
            replaced=replaced,
            has_candidate=candidate is not None,
            train_rows=len(self.train),
            smallest_gain=verdict.smallest_gain,
            search_score=winner.score if winner is not None else None,
            seed_search_score=self._seed_search_score(task),
            instructions=dict((candidate if candidate and replaced else task.seed).instructions),
            seed_instructions=dict(task.seed.instructions),
            spent=account.spent,
            billed=account.billed,
            lost=account.lost,
            seconds=account.seconds,
            seed=self.method.seed,
            lm=self.lm.model,
            proposer=self.proposer.model,
            stopped=stopped,
            copied=copied,
            run=str(task.run.folder),
            program=str(task.run.program),
            demos=sum(map(len, candidate.demos.values())) if candidate and replaced else 0,
        )
        return evidence, after if replaced else before

    def _seed_search_score(self, task: Task) -> float | None:
        """Return the seed's score over all train rows the search scored it on, None if there are none."""
        trials = best_so_far(
            [trial for trial in task.scored if trial.candidate.key == task.seed.key], self.metric.aggregate
        )
        return trials[0].score if trials else None

    def _confirmation(self, task: Task) -> int:
        """Return the calls set aside for confirming: two programs, every row, every predictor."""
        return 2 * len(self.confirm) * len(task.signatures)

    def _refuse_unaffordable(self, task: Task) -> None:
        confirm, calls = self._confirmation(task), self.method.budget.calls
        for_search = None if calls is None else calls - confirm
        estimate = self.method.estimate(task.signatures, len(self.train), for_search)
        if calls is not None and calls < confirm + estimate.least:
            raise Unaffordable(
                f"{type(self.method).__name__} needs at least {confirm + estimate.least} calls here: {confirm} to "
                f"confirm on {len(self.confirm)} rows and {estimate.least} to search. The budget has {calls}. "
                "No call was made. Raise the budget or give fewer rows."
            )
        logger.info(
            "%s: about %d calls (%d to search, %d to confirm); %d rows can confirm a gain of %.0f points or more in a "
            "score of 0 or 1",
            type(self.method).__name__,
            confirm + estimate.expected,
            estimate.expected,
            confirm,
            len(self.confirm),
            100 * smallest_gain(len(self.confirm)),
        )
        self.method.report(f"about {confirm + estimate.expected} calls", 0, 0)

    def _parts(self) -> dict[str, Any]:
        """Return what the run depends on: the same parts take the same path."""
        method = self.method
        excluded = {field.name for field in dataclasses.fields(Teleprompter)} - {"seed"}
        knobs = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
        return {
            "method": [type(method).__name__, {name: knobs[name] for name in sorted(set(knobs) - excluded)}],
            "student": _student_state(self.student),
            "trainset": [row.toDict() for row in self.train],
            "valset": [row.toDict() for row in self.confirm],
            "metric": self.metric.name,
            "lm": _lm_state(self.lm),
            "proposer": _lm_state(self.proposer),
        }


def _first_original(task: Task, trials: Sequence[Trial]) -> tuple[Trial | None, str]:
    """Return the best trial whose instructions copy no training text, and what a better one copies, if one does."""
    guard, copied = Guard.of(task.train, task.signatures), ""
    for trial in trials:
        passage = max(map(guard.copied, trial.candidate.instructions.values()), key=len)
        if not passage:
            return trial, copied
        copied = copied or passage
    return None, copied


def _so_far(task: Task) -> str:
    """Return what a compile that can't go on has spent, and how to resume it."""
    account = task.meter.account
    failed = f", {account.lost.calls} failed attempts" if account.lost.calls else ""
    return (
        f"Spent so far: {account.spent.calls} calls, {account.spent.tokens} tokens, ${account.spent.dollars:.2f}"
        f"{failed}. Every answer is kept; go on with: preceptor resume {task.run.folder}"
    )


def _student_state(student: dspy.Module) -> Any:
    return [
        [name, str(predictor.signature), predictor.config, [dict(demo) for demo in predictor.demos]]
        for name, predictor in predictors(student)
    ]


def _lm_state(lm: dspy.LM) -> Any:
    return [lm.model, {name: value for name, value in lm.kwargs.items() if name not in CLIENT_KEYS}]


def _with_models(student: dspy.Module, meter: Meter) -> dspy.Module:
    """Return a copy whose predictors' own models, if they have any, are metered too."""
    copied = artifact.copy_of(student)
    for _, predictor in predictors(copied):
        if predictor.lm is not None:
            predictor.lm = meter.wrap(predictor.lm)
    return copied
