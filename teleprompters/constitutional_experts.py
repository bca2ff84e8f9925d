"""ConstitutionalExperts: a prompt is a set of principles; each step edits one of them against one wrong answer.

Paper:   Petridis et al., "ConstitutionalExperts: Training a Mixture of Principle-based Prompts", ACL 2024.
         arXiv:2403.04894
Notes:   seeds/constitutional_experts.md
Departs: most numbers are ours or those of the authors' later library, for little of the paper could be read;
         principles stand below the user's own words, which no edit touches; two principles can be merged; the
         parents race with their children on the same rows, and win ties; eight train rows are shown below the prompt
         where they can be (`few_shot=0`: none); edits of a step that help alone are tried
         together; a beam goes on; at the end, principles that earn nothing on train rows set aside are dropped; the
         winner is confirmed on rows no search step has seen; several predictors are improved one after the other, each
         with its own inputs, outputs and errors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import zip_longest
from typing import Any, ClassVar, Final

import dspy

from preceptor.constitution import Constitution, Edit
from preceptor.life import Compile
from preceptor.lm.embedding import DEFAULT, Embedder, embedder_of
from preceptor.scoring import racing
from preceptor.scoring.known import Known
from preceptor.scoring.trial import Candidate, Trial
from preceptor.task import Sampling, Task
from preceptor.teleprompter import Estimate, Teleprompter, check_least, check_sampling
from preceptor.teleprompters.amendments import Bounds, Workshop
from preceptor.teleprompters.mixture import MixtureOfExperts
from preceptor.teleprompters.reading import END, errors_among

logger = logging.getLogger(__name__)

DEPTH: Final = 5
"""Steps a small budget is planned for if it can pay for them: rules are found one by one, so steps are worth more than
rows (`preceptor bench principles`); 3 in the authors' notebook."""

HELD_OUT: Final = 50
"""Most train rows set aside to choose among the last beam, and to measure what its principles are worth."""

LEAST_HELD_OUT: Final = 8
"""With fewer, nothing is set aside, and the rows of the races measure."""

_EQUAL: Final = 1e-9
"""Scores that differ by less are equal."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of all steps of a search.

    Attributes:
        errors: Wrong answers read in a step.
        edits: Made against each.
        rows: Train rows of a race, the same in all steps.
        held_out: Train rows that no race sees.
    """

    errors: int
    edits: int
    rows: int
    held_out: int

    def step(self, beam: int, calls_a_row: float, *, is_choosing: bool) -> int:
        """Return the calls of a step at most; what the parents score is known.

        Example:
            >>> [Plan(3, 2, 64, 32).step(beam, 1, is_choosing=True) - (3 + 2 * 6) for beam in (1, 2, 4)]
            [240, 240, 256]
        """
        children = self.errors * self.edits
        proposals = self.errors + children * (2 if is_choosing else 1)
        return proposals + math.ceil(racing.cost(beam + children, self.rows, known=beam) * calls_a_row)

    def search(self, steps: int, beam: int, calls_a_row: float, *, has_principles: bool) -> int:
        """Return the calls up to the ablation, in which the beam meets the rows set aside.

        Without principles, the first step has but additions to choose from.
        """
        first = self.step(beam, calls_a_row, is_choosing=has_principles)
        others = (steps - 1) * self.step(beam, calls_a_row, is_choosing=True)
        return first + others + math.ceil((self.rows + beam * self.held_out) * calls_a_row)

    def ablation(self, principles: int, calls_a_row: float) -> int:
        """Return the calls of leaving out so many principles in turn."""
        return math.ceil(principles * (self.held_out or self.rows) * calls_a_row)


@dataclass(frozen=True, kw_only=True)
class ConstitutionalExperts(Teleprompter):
    """Principles below the user's instruction, edited one at a time; with several regions, a constitution for each.

    An instruction that ends in a numbered list below the line `Principles:` is a constitution already.

    Each step draws wrong answers of the beam's constitutions on the rows of the races, asks `proposer` to explain
    each, to choose an edit from a menu (add a principle; revise or remove one; merge the two that are most alike),
    and to write the text. A removal takes no request for a text. The edited constitutions race with their parents
    on the same rows; where several beat theirs, all their edits together are scored too. At the end, the beam is
    scored on train rows set aside, a third of all up to 50 (none of fewer than 24), and each principle is left out of
    the best in turn, the last first: one without which the score is as good is dropped; one that the user wrote,
    edited since or not, only if it is better.

    A step costs `errors * (1 + 2 * edits)` proposer calls and a race of `errors * edits` children, and `rows` more a
    parent for edits that are tried together; where no rows are set aside, the ablation costs `principles * rows`. With
    a budget of calls, all steps take the first of these settings of which the rest pays for 5 steps, else for 4, 3 or
    2: the settings; at most 64 rows in a race and 32 set aside; 2 errors, 48 rows and 24 set aside; 32 rows; one edit
    and 16 set aside. Else the first that it pays for one step of: these; 1 error, 16 rows and 8 set aside. A budget of
    tokens, dollars or seconds alone is not planned for: the search takes the settings, and ends where it is spent.

    With several regions it is the mixture of itself (`preceptor.teleprompters.mixture`): one search on all rows, one
    on each region's, and a router.

    Args:
        regions: 1 for one constitution; more for an expert in each region where rows confirm it; 0 for as many
            regions as the inputs fall into.
        least_rows: Train rows of a region, beside those it shows, below which it isn't searched.
        embedder: Of the regions: a model of the catalogue, a hub id, a folder, or one of the user's.
        steps: Of reading errors and editing (3 in the authors' notebook).
        beam: Constitutions kept after a step (the library computes 3 and keeps 1).
        errors: Wrong answers read in a step (3 in the library).
        edits: Made against each error, never the same removal or revision twice (2 in the library).
        rows: Most train rows of a race (100 in the library).
        principles: Most in a constitution; beyond, none is added.
        words: Most of a principle.
        join: Score the edits of a step that beat their parent together too, one constitution a parent (ours).
        temperature: Of the proposer (0.9 in the library).
        max_tokens: Of an answer of the proposer.

    Raises:
        ConfigError: If a number is out of range, or there is no such embedder.
    """

    paper: ClassVar[str] = "arXiv:2403.04894"
    formula: ClassVar[str] = (
        "rows + steps * (errors * (1 + 2 * edits) + race(beam + errors * edits, rows, known=beam)) "
        "+ (beam + principles) * held_out; up to steps * beam * rows more for edits tried together"
    )
    shows: ClassVar[int] = 8

    regions: int = 1
    least_rows: int = 10
    embedder: str | Embedder = DEFAULT
    steps: int = 6
    beam: int = 2
    errors: int = 3
    edits: int = 2
    rows: int = 100
    principles: int = 8
    words: int = 40
    join: bool = True
    temperature: float = 0.9
    max_tokens: int = 256

    def __post_init__(self) -> None:
        Teleprompter.__post_init__(self)
        positive = ("steps", "beam", "errors", "edits", "rows", "principles", "words", "max_tokens")
        check_least(self, dict.fromkeys(positive, 1))
        check_sampling(self)
        if self.regions != 1:
            self._mixture()  # it refuses what it can't be

    @property
    def confirmed(self) -> int:
        """Programs that are asked each confirmation row, at most."""
        return self.confirms if self.regions == 1 else MixtureOfExperts.confirms

    @property
    def experts(self) -> int:
        """Experts of its programs, 0 if the rows decide how many."""
        return self.regions

    @property
    def routed_by(self) -> str | Embedder | None:
        """What embeds the inputs of its programs; None if there is one constitution for all."""
        return None if self.regions == 1 else self.embedder

    @property
    def knobs(self) -> dict[str, Any]:
        """The settings that decide which path the search takes."""
        return {**super().knobs, "embedder": str(embedder_of(self.embedder))}

    def check_program(self, student: dspy.Module, output: str) -> None:
        """Raise if a program can't be compiled with these settings."""
        if self.regions != 1:
            self._mixture().check_program(student, output)

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        """Return the calls of all predictors' searches without joins, and if no principle is left to be measured.

        Edits that are tried together and the ablation come on top where the budget has room; they may take more than
        races save. So a search may take more than this, but never more than there is.
        """
        predictors = len(signatures)
        own = max(len(Constitution.parsed(str(one.instructions)).principles) for one in signatures.values())
        least = self._cost(self._plans(rows)[-1], 1, own, predictors)
        each = None if calls is None else max(least, calls // predictors)
        plan, steps = self._affordable(rows, each, own, predictors) or (self._plans(rows)[-1], 1)
        return Estimate(predictors * least, predictors * self._cost(plan, steps, own, predictors))

    def estimated(self, signatures: Mapping[str, Any], train: int, calls: int | None) -> Estimate:
        """Return the estimate of one search, or of those on all rows and on each region's."""
        if self.regions == 1:
            return Teleprompter.estimated(self, signatures, train, calls)
        return self._mixture().estimated(signatures, train, calls)

    def carry_out(self, compiling: Compile, task: Task) -> dspy.Module:
        """Search, confirm and save, once for all rows, or with the experts of the regions."""
        if self.regions == 1:
            return super().carry_out(compiling, task)
        mixture = self._mixture()
        return mixture.carry_out(replace(compiling, method=mixture), task)

    def search(self, task: Task) -> Sequence[Trial]:
        """Improve the predictors' instructions one after the other; return the trials, best first."""
        trials: Sequence[Trial] = []
        best, names = task.seed, list(task.signatures)
        known = Known(task.score_each, task.metric.aggregate)
        for at, name in enumerate(names):
            left = task.meter.account.calls_left
            others = 0 if left is None else left - left // (len(names) - at)
            trials = self._improve(task, name, best, known, others) or trials
            best = trials[0].candidate if trials else best
        if trials:
            _compare(task, known, trials[0])
        return trials

    def _improve(self, task: Task, name: str, seed: Candidate, known: Known, others: int) -> list[Trial]:
        """Read errors, edit and race, leaving so many calls to the other predictors; return trials, best first."""
        inherited = seed.constitutions.get(name)
        first = seed.with_constitution(name, inherited or Constitution.parsed(seed.instructions[name]))
        own = len(first.constitutions[name].principles)
        found = self._affordable(len(task.order), _left(task, others), own, task.calls_a_row)
        if found is None:
            return []
        plan, _ = found
        held_out, rows = task.order[: plan.held_out], task.order[plan.held_out :][: plan.rows]
        workshop = Workshop(task, name, first, self._sampling, Bounds(self.principles, self.words))
        beam = known.score([first], rows)
        for number in range(self.steps):
            if number and not self._can_pay(plan, name, beam, _left(task, others), task.calls_a_row):
                break
            wrong = _wrong(task, name, beam, plan.errors)
            if not wrong:
                break
            children = workshop.children(wrong, plan.edits)
            parents = [trial.candidate for trial in beam]
            ranked = racing.race([*parents, *children], known.score, rows, task.metric.aggregate)
            finished = [trial for trial in ranked if len(trial.rows) == len(rows)]
            there = {trial.candidate.key for trial in finished}
            dropped = known.score([one for one in parents if one.key not in there], rows)  # which are known
            beam = sorted([*dropped, *finished], key=lambda trial: -trial.score)
            if self.join and self._can_pay(plan, name, beam, _left(task, others), task.calls_a_row):
                beam += known.score(workshop.joined(beam), rows)
                beam.sort(key=lambda trial: -trial.score)
            beam = beam[: self.beam]
            logger.info("Step %d: %d new constitutions, the best scores %.3f", number + 1, len(children), beam[0].score)
        finalists = known.score([trial.candidate for trial in beam], [*rows, *held_out])
        finalists.sort(key=lambda trial: -trial.score)
        return [_ablated(task, name, finalists[0].candidate, known, held_out or rows, others), *finalists]

    def _plans(self, rows: int) -> list[Plan]:
        """Return the settings of a search on so many train rows, the dearest first."""
        held_out = min(HELD_OUT, rows // 3)
        held_out = held_out if held_out >= LEAST_HELD_OUT else 0
        full = Plan(self.errors, self.edits, min(self.rows, rows - held_out), held_out)
        bounds = [
            full,
            Plan(3, 2, 64, 32),
            Plan(2, 2, 48, 24),
            Plan(2, 2, 32, 24),
            Plan(2, 1, 32, 16),
            Plan(1, 1, 16, 8),
        ]
        return [Plan(*map(min, astuple(full), astuple(bound))) for bound in bounds]

    def _affordable(self, rows: int, calls: int | None, own: int, calls_a_row: float) -> tuple[Plan, int] | None:
        """Return the settings, and how many steps can be paid for; None if there can't be one.

        Args:
            rows: Train rows.
            calls: To be spent; None if they have no bound.
            own: Principles there are already.
            calls_a_row: Calls of a program on a row.
        """
        plans = self._plans(rows)
        if calls is None:
            return plans[0], self.steps
        depths = [depth for depth in range(DEPTH, 1, -1) if depth <= self.steps]
        for plan, depth in [(plan, depth) for depth in depths for plan in plans[:5]] + [(plan, 1) for plan in plans]:
            paid = [
                steps for steps in range(depth, self.steps + 1) if self._whole(plan, steps, own, calls_a_row) <= calls
            ]
            if paid:
                return plan, paid[-1]
        return (plans[-1], 1) if self._cost(plans[-1], 1, own, calls_a_row) <= calls else None

    def _cost(self, plan: Plan, steps: int, own: int, calls_a_row: float) -> int:
        return plan.search(steps, self.beam, calls_a_row, has_principles=own > 0)

    def _whole(self, plan: Plan, steps: int, own: int, calls_a_row: float) -> int:
        """Return the calls of a search that finds one or two principles, the ablation included."""
        return self._cost(plan, steps, own, calls_a_row) + plan.ablation(self._most(own, min(steps, 2)), calls_a_row)

    def _can_pay(self, plan: Plan, name: str, beam: Sequence[Trial], calls: int | None, calls_a_row: float) -> bool:
        """Return True if so many calls pay for one more step, and for the end of the search."""
        most = max(len(trial.candidate.constitutions[name].principles) for trial in beam)
        seed = math.ceil(plan.rows * calls_a_row)
        return calls is None or self._whole(plan, 1, most, calls_a_row) - seed <= calls

    def _mixture(self) -> MixtureOfExperts:
        """Return the mixture of one-constitution searches with these settings."""
        shared = {each.name for each in fields(Teleprompter)}
        routing = {"regions", "least_rows", "embedder"}
        own = {each.name for each in fields(self)} - shared - routing
        given = {name: getattr(self, name) for name in shared | routing}
        return MixtureOfExperts(
            **given, method=ConstitutionalExperts, settings={name: getattr(self, name) for name in sorted(own)}
        )

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.temperature, max_tokens=self.max_tokens, stop=END)

    def _most(self, principles: int, steps: int) -> int:
        """Return the most principles there can be after so many steps."""
        return max(principles, min(principles + steps, self.principles))


def _ablated(task: Task, name: str, best: Candidate, known: Known, rows: Sequence[int], others: int) -> Trial:
    """Return the best without the principles that earn nothing on these rows, and what each of the others earns.

    What one earned before another was dropped isn't told: it may earn more without that one. It ends where only the
    other predictors' calls are left.
    """
    [full], worths = known.score([best], rows), dict[int, float]()
    for one in reversed(best.constitutions[name].principles):
        left = _left(task, others)
        if left is not None and left < len(rows) * task.calls_a_row:
            break
        shorter = full.candidate.constitutions[name].edited(Edit("remove", (one.identity,)))
        without = full.candidate.with_constitution(name, shorter)
        task.made(without, full.candidate, name, "ablation", f"without: {one.text}")
        [trial] = known.score([without], rows)
        worth = full.score - trial.score
        if worth < -_EQUAL or (worth < _EQUAL and not one.is_users):
            full, worths = trial, {}
        else:
            worths[one.identity] = worth
    measured = full.candidate.constitutions[name].measured(worths, len(rows))
    return known.whole(full.candidate.with_constitution(name, measured))


def _compare(task: Task, known: Known, winner: Trial) -> None:
    """Keep of the seed's trials what compares with the winner's: its score on the same rows, else none; no call.

    A winner that the ablation made was scored on the rows set aside only; the seed on those of the races, and on the
    others if it was in the last beam.
    """
    seen = {row for trial in task.scored if trial.candidate.key == task.seed.key for row in trial.rows}
    others = [trial for trial in task.scored if trial.candidate.key != task.seed.key]
    task.scored[:] = [*others, *(known.score([task.seed], winner.rows) if seen.issuperset(winner.rows) else [])]


def _wrong(task: Task, name: str, beam: Sequence[Trial], most: int) -> list[tuple[Candidate, str]]:
    """Draw at most so many wrong answers, in turn from each of the beam's constitutions."""
    shown = [(trial.candidate, errors_among(task, name, trial.rows, trial.outcomes)) for trial in beam]
    drawn = [[(candidate, text) for text in task.rng.sample(texts, len(texts))] for candidate, texts in shown]
    return [pair for turn in zip_longest(*drawn) for pair in turn if pair is not None][:most]


def _left(task: Task, others: int) -> int | None:
    left = task.meter.account.calls_left
    return None if left is None else left - others
