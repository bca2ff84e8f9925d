"""The life of a compile, the same for every method: check, open, search, confirm, save."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy

from preceptor import program as artifact
from preceptor.affordable import affordable, confirming, power
from preceptor.checks import check_module, warn
from preceptor.confirmation import answers, look, scored_otherwise
from preceptor.demonstrated import demonstrated
from preceptor.errors import ArtifactError, BudgetExhausted
from preceptor.evidence import Evidence
from preceptor.given import checked, counted, parts_of
from preceptor.leaks import Guard
from preceptor.lm.budget import Account, Cost
from preceptor.lm.catalogue import cache_folder
from preceptor.lm.credentials import check_key
from preceptor.lm.embedding import embedder_of
from preceptor.lm.meter import Meter, check
from preceptor.lm.prices import unpriced
from preceptor.lm.seam import answering, own_models, predictors, state_of
from preceptor.report import reported
from preceptor.run import CONFIRMATION, fingerprint, open_run, read_run
from preceptor.scoring.evaluate import Job, Losses, held_against
from preceptor.scoring.metrics import Aggregate, Metric, mean
from preceptor.scoring.racing import best_so_far
from preceptor.scoring.statistics import answered_by_both, compare, interval
from preceptor.scoring.trial import Candidate, Outcome, Trial
from preceptor.splits import different, stratified
from preceptor.task import Task, evaluator, with_models

if TYPE_CHECKING:
    from preceptor.teleprompter import Teleprompter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    Attributes:
        winner: The best trial that copies no training text, None if there is none.
        stopped: Why it ended early, "" if it didn't.
        copied: What a better trial copies from a training input, "" if none does.
        look: How many candidates have been confirmed on these rows, the winner included.
    """

    winner: Trial | None
    stopped: str = ""
    copied: str = ""
    look: int = 1

    def candidate(self, seed: Candidate) -> Candidate | None:
        """Return the winner's candidate, None if it is the seed."""
        is_new = self.winner is not None and self.winner.candidate.key != seed.key
        return self.winner.candidate if self.winner is not None and is_new else None


@dataclass(frozen=True, slots=True)
class Compile:
    """One compile's checked inputs, and the steps of its life."""

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
    ) -> Compile:
        """Check everything that can be checked for nothing.

        Raises:
            ConfigError: If something can't work.
        """
        check_module(student)
        lm = counted("lm", method.lm or dspy.settings.lm)
        proposer = counted("proposer", method.proposer or lm)
        method, train, confirm, output, metric = checked(method, student, trainset, valset)
        warn(metric, student, train, confirm, output)
        return cls(method, student, train, confirm, output, metric, lm, proposer)

    @contextmanager
    def open(self) -> Generator[Task]:
        """Check that the budget can pay, then open the run folder, whose records begin anew."""
        method, parts = self.method, self._parts()
        for lm in self._models:
            check(lm, method.budget)
        self._announce()
        folder = Path(method.run_dir) if method.run_dir else cache_folder() / "runs" / fingerprint(parts)
        with open_run(folder, parts) as run:
            for lm in self._models if not len(run.ledger) else ():  # a run made again may need no call
                check_key(lm)
            account = Account(method.budget, Cost(*run.ledger.failures), paid=Cost(*run.ledger.paid))
            meter = Meter(run.ledger, account, threads=method.threads, patience=method.patience)
            rng = random.Random(method.seed)
            task = Task(
                student=with_models(self.student, meter),
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
                confirms=method.confirmed,
                losses=Losses(len(self.train)),
            )
            with reported(run.folder):
                yield task

    @property
    def _models(self) -> list[dspy.LM]:
        return [self.lm, self.proposer, *(own for _, own in own_models(self.student))]

    def search(self, task: Task, method: Teleprompter) -> Found:
        """Search to the end, or to that of the budget."""
        stopped, begun = "", demonstrated(task, method)
        try:
            trials = list(method.search(begun))
        except BudgetExhausted as error:
            stopped = str(error)
            trials = task.ranked or best_so_far(task.scored, self._aggregate(task.scored))
        winner, copied = self._first_original(trials)
        return Found(winner, stopped, copied)

    def conclude(self, task: Task, found: Found) -> dspy.Module:
        """Open the confirmation rows, once: the seed and the winner, paired; save and return the better program."""
        candidate = found.candidate(task.seed)
        programs = [artifact.apply(task.student, one) for one in (task.seed, candidate) if one is not None]
        outcomes = self.asked(task, [Job(one, row, at == 0) for at, one in enumerate(programs) for row in self.confirm])
        before, after = outcomes[: len(self.confirm)], outcomes[-len(self.confirm) :]
        if candidate is not None:
            found = dataclasses.replace(found, look=look(task.run, candidate.key, outcomes))
        written = answers(self.confirm, {} if candidate is None else {"": candidate}, before, after, self.metric)
        return self.decide(task, found, before, after, written)

    def asked(self, task: Task, jobs: Sequence[Job]) -> list[Outcome]:
        """Run jobs on confirmation rows; what was kept back for them is free to be spent."""
        task.meter.account.hold(0)
        outcomes = evaluator(task, len(jobs), f"confirming on {len(self.confirm)} untouched rows").run(jobs)
        task.meter.accept_failures()
        return outcomes

    def decide(
        self,
        task: Task,
        found: Found,
        before: Sequence[Outcome],
        after: Sequence[Outcome],
        answered: Mapping[str, Any],
        **told: Any,
    ) -> dspy.Module:
        """Save and return the winner if it is better than the seed on all confirmation rows, else the seed.

        Args:
            task: The compile.
            found: With the winner.
            before: The seed's outcomes.
            after: The winner's.
            answered: What is written down of them.
            told: Further fields of the evidence.
        """
        candidate, evidence = found.candidate(task.seed), self.judged(task, found, before, after)
        is_new = candidate is not None and evidence.replaced
        adopted = candidate if candidate is not None and is_new else task.seed
        demos = sum(map(len, adopted.demos.values())) if is_new else 0
        told |= {"instructions": dict(adopted.instructions), "demos": demos, "principles": tuple(adopted.principles)}
        evidence = dataclasses.replace(evidence, **told)
        probed = zip(self.confirm, after if is_new else before, strict=True)
        return self.finished(task, artifact.apply(self.student, adopted), evidence, probed, answered)

    def finished(
        self,
        task: Task,
        compiled: dspy.Module,
        evidence: Evidence,
        probed: Iterable[tuple[dspy.Example, Outcome]],
        answered: Mapping[str, Any],
    ) -> dspy.Module:
        """Save a program with what was measured, and its first answers; return it, or the one confirmed before."""
        if not evidence.replaced and (kept := self._confirmed_before(task, evidence, answered)) is not None:
            return kept
        task.run.keep(CONFIRMATION, answered)
        compiled._compiled = True
        setattr(compiled, "evidence", evidence)  # noqa: B010  a DSPy module has no such field
        probes = [
            {"inputs": row.inputs().toDict(), "output": self.output, "answer": outcome.answer}
            for row, outcome in islice(probed, 3)
            if outcome.kind == "scored" and self.output
        ]
        artifact.save(
            compiled,
            task.run.program,
            evidence={**evidence.stable(), "probes": probes},
            lm=answering(self.student, self.lm),
            replace=True,
        )
        task.run.write_result(evidence.as_dict())
        logger.info("%s", evidence.verdict)
        return compiled

    def _confirmed_before(self, task: Task, later: Evidence, answered: Mapping[str, Any]) -> dspy.Module | None:
        """Return the program that this run has confirmed with a smaller budget, None if it has confirmed none.

        It stays as it is in the run folder, and so does what confirmed it; unless another metric of the same name did.
        """
        told, embedder = task.run.result(), self.method.routed_by
        if not told.get("replaced"):
            return None
        try:
            own, before = None if embedder is None else embedder_of(embedder), Evidence.told(told)
            program = artifact.load(task.run.program, student=self.student, embedder=own)
            kept = task.run.kept(CONFIRMATION)
            is_anothers = scored_otherwise(kept, answered, is_own=not self.metric.is_built_in)
        except (ArtifactError, LookupError, TypeError) as error:
            logger.warning("What %s has confirmed before can't be read, and is overwritten: %r", task.run.folder, error)
            return None
        if is_anothers:
            told_of = "What %s has confirmed before was scored by another metric of the name %s, and is overwritten."
            logger.warning(told_of, task.run.folder, self.metric.name)
            return None
        now = {name: getattr(later, name) for name in ("spent", "billed", "lost", "seconds", "run", "program")}
        evidence = dataclasses.replace(before, later=later.verdict, **now)
        setattr(program, "evidence", evidence)  # noqa: B010  a DSPy module has no such field
        task.run.write_result(evidence.as_dict())
        logger.info("%s", evidence.verdict)
        return program

    def judged(
        self, task: Task, found: Found, before: Sequence[Outcome], after: Sequence[Outcome], *, is_mixture: bool = False
    ) -> Evidence:
        """Return what the outcomes of the seed and of another program on the same rows say, in figures.

        Rows that only the other program failed with count against it. The other program is what was found, or a
        mixture of experts.
        """
        before, after = answered_by_both(before, held_against(before, after))
        account, verdict = task.meter.account, compare(before, after, self.metric, seed=self.method.seed)
        verdict = dataclasses.replace(verdict, look=found.look)
        has_candidate = is_mixture or found.candidate(task.seed) is not None
        replaced = has_candidate and verdict.is_confirmed
        return Evidence(
            method=type(self.method).__name__,
            metric=self.metric.name,
            comparison=verdict,
            baseline_ci=interval(before, self.metric),
            compiled_ci=interval(after if replaced else before, self.metric),
            replaced=replaced,
            has_candidate=has_candidate,
            train_rows=len(self.train),
            smallest_gain=verdict.smallest_gain,
            search_score=found.winner.score if found.winner is not None else None,
            seed_search_score=self._seed_search_score(task, found.winner),
            instructions=dict(task.seed.instructions),
            seed_instructions=dict(task.seed.instructions),
            spent=account.spent,
            billed=account.billed,
            lost=account.lost,
            seconds=account.seconds,
            seed=self.method.seed,
            lm=answering(self.student, self.lm).model,
            proposer=self.proposer.model,
            stopped=found.stopped,
            copied=found.copied,
            own_metric=not self.metric.is_built_in,
            unpriced=unpriced(self._models, self.method.budget.prices),
            unparsable=sum(outcome.kind == "unparsable" for outcome in (after if replaced else before)),
            run=str(task.run.folder),
            program=str(task.run.program),
        )

    def _first_original(self, trials: Sequence[Trial]) -> tuple[Trial | None, str]:
        """Return the best trial that copies no training text, and what a better one copies, if one does."""
        signatures = {name: predictor.signature for name, predictor in predictors(self.student)}
        guard, copied = Guard.of(self.train, signatures), ""
        for trial in trials:
            passage = max(map(guard.copied, trial.candidate.instructions.values()), key=len)
            if not passage:
                return trial, copied
            copied = copied or passage
        return None, copied

    def _seed_search_score(self, task: Task, winner: Trial | None) -> float | None:
        """Return the seed's score on the train rows that the winner's is of, None if it wasn't scored on all of them.

        Without a winner, on all rows it was scored on.
        """
        own = [trial for trial in task.scored if trial.candidate.key == task.seed.key]
        aggregate, known = self._aggregate(own), dict[int, Outcome]()
        for trial in best_so_far(own, aggregate):
            known |= zip(trial.rows, trial.outcomes, strict=True)
        rows = known if winner is None else winner.rows
        return aggregate([known[row] for row in rows]) if known and all(row in known for row in rows) else None

    def _aggregate(self, trials: Sequence[Trial]) -> Aggregate:
        """Return what makes one score of many rows: the metric, but the mean of likelihoods, which are no answers."""
        is_likelihood = any((outcome.score or 0) < 0 for trial in trials for outcome in trial.outcomes)
        return mean if is_likelihood else self.metric.aggregate

    def so_far(self, task: Task) -> str:
        """Return what a compile that can't go on has spent, and how to resume it."""
        account = task.meter.account
        failed = f", {account.lost.calls} failed attempts" if account.lost.calls else ""
        folder = task.run.folder
        is_command = "command" in read_run(folder)
        again = f"preceptor resume {folder}" if is_command else f"compile again, with run_dir={str(folder)!r}"
        return (
            f"Spent so far: {account.spent.calls} calls, {account.spent.tokens} tokens, ${account.spent.dollars:.2f}"
            f"{failed}. Every answer is kept; go on with: {again}"
        )

    @property
    def confirmation(self) -> int:
        """Calls set aside for confirming: for as many programs as are confirmed, every row, every predictor."""
        return confirming(self.method, len(self.confirm), len(predictors(self.student)))

    def _announce(self) -> None:
        """Say what the compile will take.

        Raises:
            Unaffordable: If that is more than the budget has.
        """
        signatures = {name: predictor.signature for name, predictor in predictors(self.student)}
        estimate = affordable(self.method, signatures, len(self.train), len(self.confirm))
        confirm = self.confirmation
        logger.info("%s: %d calls to search, %d to confirm", type(self.method).__name__, estimate.expected, confirm)
        rows = power(different(self.confirm), self.method.confirmed)
        for told in (f"about {confirm + estimate.expected} calls", rows):
            self.method.report(told, 0, 0)

    def _parts(self) -> dict[str, Any]:
        """Return what the run depends on: the same parts take the same path."""
        given = parts_of(self.method, self.student, self.train, self.confirm, self.metric)
        return {**given, "lm": state_of(self.lm), "proposer": state_of(self.proposer)}
