"""The confirmation of a mixture: each expert on half of its region's rows, the whole on the other halves.

An expert is tested against the default, on rows of its region that no search has seen, and Holm's correction
is made over the regions tested. What the mixture gains is measured on rows that chose nothing: chosen and
measured on the same ones, it would gain by luck wherever it was chosen by luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import dspy

from preceptor import confirmation, routed
from preceptor.evidence import Evidence
from preceptor.life import Compile, Found
from preceptor.lm.seam import predictors
from preceptor.modules.experts import Experts
from preceptor.program import apply
from preceptor.scoring.evaluate import Job, held_against
from preceptor.scoring.multiplicity import holm
from preceptor.scoring.statistics import CONFIDENCE, Comparison, compare
from preceptor.scoring.trial import Candidate, Outcome
from preceptor.task import Task
from preceptor.teleprompters.layout import Layout

OWN: Final = "its own"
UNCONFIRMED: Final = "default: the mixture wasn't confirmed"


@dataclass(frozen=True, slots=True)
class Expert:
    """What came of a region's search.

    Attributes:
        region: Its name.
        candidate: What the region's search holds for best, None if that is the default; demonstrations of the region's
            make it another.
        stopped: Why the search ended early, "" if it didn't.
        why: Why there was no search, "" if there was one.
    """

    region: str
    candidate: Candidate | None = None
    stopped: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Answers:
    """Outcomes of confirmation rows, by row: the seed's, the default's, and each expert's in its region."""

    seed: Sequence[Outcome]
    default: Sequence[Outcome]
    experts: Mapping[str, Mapping[int, Outcome]]

    @property
    def all(self) -> list[Outcome]:
        """Every outcome, always in the same order."""
        return [*self.seed, *self.default, *(one for region in self.experts.values() for one in region.values())]


def concluded(compiling: Compile, task: Task, found: Found, experts: Sequence[Expert], layout: Layout) -> dspy.Module:
    """Confirm the experts, then the mixture of those that were; save and return the best program confirmed.

    Costs a call for each confirmation row and predictor of the seed, of the default and, in its region, of
    the expert, where they differ.
    """
    candidates = {each.region: each.candidate for each in experts if each.candidate is not None}
    default = found.candidate(task.seed)
    answers = _asked(compiling, task, default, candidates, layout)
    if candidates or default is not None:
        keys = {region: candidate.key for region, candidate in candidates.items()}
        found = replace(found, look=confirmation.look(task.run, [default.key if default else "", keys], answers.all))
    tests = {region: _tested(compiling, answers, layout.gate(region), region) for region in candidates}
    adjusted = holm({region: test.p_value for region, test in tests.items()})
    chosen = {
        region: candidates[region]
        for region, test in tests.items()
        if test.is_confirmed and adjusted[region] < (1 - CONFIDENCE) / found.look
    }
    mixture = Mixture(compiling, task, replace(found, stopped=_stopped(found, experts)), layout, answers, chosen)
    table = [_row(mixture, each, tests.get(each.region), adjusted.get(each.region)) for each in experts]
    evidence = mixture.measured() if chosen else None
    if evidence is not None and evidence.replaced:
        return mixture.adopted(evidence, table)
    alone = replace(mixture, chosen={})
    table = [_row(alone, each, tests.get(each.region), adjusted.get(each.region)) for each in experts]
    table = [{**row, "expert": UNCONFIRMED} if row["region"] in chosen else row for row in table]
    return alone.left(table) if evidence is None or default is not None else mixture.kept(evidence, table)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts that were chosen, and all that is known of them.

    Attributes:
        compiling: The compile.
        task: As all rows' search was given it.
        found: What that search came to; its winner is the default.
        layout: The regions.
        answers: On the confirmation rows.
        chosen: Region -> the candidate that is its expert.
    """

    compiling: Compile
    task: Task
    found: Found
    layout: Layout
    answers: Answers
    chosen: Mapping[str, Candidate]

    def outcomes(self, rows: Sequence[int]) -> list[Outcome]:
        """Return what the mixture answered on confirmation rows, each routed as it will be when it is served."""
        places, answers = self.layout.places, self.answers
        return [
            answers.experts[places[row]][row] if places[row] in self.chosen else answers.default[row] for row in rows
        ]

    def measured(self) -> Evidence:
        """Compare the mixture with the seed on the rows that chose nothing."""
        rows, seed = self._measuring, self.answers.seed
        return self.compiling.judged(
            self.task, self.found, [seed[row] for row in rows], self.outcomes(rows), is_mixture=True
        )

    def adopted(self, evidence: Evidence, table: Sequence[Mapping[str, Any]]) -> dspy.Module:
        """Save and return the mixture."""
        compiling, rows = self.compiling, self._measuring
        after = held_against([self.answers.seed[row] for row in rows], self.outcomes(rows))
        program = self._program()
        parts = routed.parts_of(program, is_routed=True)
        evidence = replace(
            evidence,
            method=self._method,
            search_score=None,
            instructions=_texts(parts),
            seed_instructions=_texts(dict.fromkeys(parts, compiling.student)),
            demos=sum(sum(map(len, each.demos.values())) for each in self._candidates),
            regions=tuple(table),
            principles=tuple(self._principles),
        )
        answers = [(compiling.confirm[row], outcome) for row, outcome in zip(rows, after, strict=True)]
        return compiling.finished(self.task, program, evidence, answers, self._answered(self.outcomes(self._every)))

    def kept(self, evidence: Evidence, table: Sequence[Mapping[str, Any]]) -> dspy.Module:
        """Save and return the seed, with what was measured of the mixture that isn't better."""
        compiling = self.compiling
        evidence = replace(evidence, method=self._method, search_score=None, regions=tuple(table))
        program = apply(compiling.student, self.task.seed)
        answers = zip(compiling.confirm, self.answers.seed, strict=True)
        return compiling.finished(self.task, program, evidence, answers, self._answered(self.outcomes(self._every)))

    def left(self, table: Sequence[Mapping[str, Any]]) -> dspy.Module:
        """Save and return the default, if it is better than the seed on all confirmation rows, else the seed."""
        answers, told = self.answers, {"method": self._method, "regions": tuple(table)}
        answered = self._answered(answers.default)
        return self.compiling.decide(self.task, self.found, answers.seed, answers.default, answered, **told)

    def _answered(self, after: Sequence[Outcome]) -> dict[str, Any]:
        """Return what is written down of what the seed and the mixture, or the default alone, answered to each row."""
        layout = self.layout
        places = [
            {"region": region, "measures": not self.chosen or row not in layout.gates}
            for row, region in enumerate(layout.places)
        ]
        found = self.found.candidate(self.task.seed)
        default = {} if found is None else {routed.DEFAULT: found}
        own, rows = {**default, **self.chosen}, self.compiling.confirm
        return confirmation.answers(rows, own, self.answers.seed, after, self.compiling.metric, places)

    @property
    def _every(self) -> range:
        return range(len(self.compiling.confirm))

    @property
    def _measuring(self) -> list[int]:
        return [row for row in self._every if row not in self.layout.gates]

    @property
    def _default(self) -> Candidate:
        return self.found.candidate(self.task.seed) or self.task.seed

    @property
    def _principles(self) -> list[dict[str, Any]]:
        experts = {routed.DEFAULT: self._default, **self.chosen}
        return [{"expert": expert, **row} for expert, candidate in experts.items() for row in candidate.principles]

    @property
    def _candidates(self) -> list[Candidate]:
        return [self._default, *self.chosen.values()]

    def _program(self) -> Experts:
        default = apply(self.compiling.student, self._default)
        experts = {region: apply(default, candidate) for region, candidate in self.chosen.items()}
        for part in (default, *experts.values()):  # of a student that was compiled before, it would be frozen
            part._compiled = False
        return Experts(default, experts, self.layout.router)

    @property
    def _method(self) -> str:
        method = self.compiling.method
        return f"{type(method).__name__} of {method.knobs['method']}"


def _asked(
    compiling: Compile, task: Task, default: Candidate | None, candidates: Mapping[str, Candidate], layout: Layout
) -> Answers:
    """Open the confirmation rows, once."""
    every = range(len(compiling.confirm))
    based = apply(task.student, default or task.seed)
    programs: list[tuple[dspy.Module, Sequence[int]]] = [(apply(task.student, task.seed), every)]
    programs += [(based, every)] if default is not None else []
    programs += [(apply(based, candidate), layout.confirm[region]) for region, candidate in candidates.items()]
    jobs = [Job(one, compiling.confirm[row], at == 0) for at, (one, rows) in enumerate(programs) for row in rows]
    outcomes = iter(compiling.asked(task, jobs))
    seed = [next(outcomes) for _ in every]
    after = [next(outcomes) for _ in every] if default is not None else seed
    own = {region: {row: next(outcomes) for row in layout.confirm[region]} for region in candidates}
    return Answers(seed, after, own)


def _tested(compiling: Compile, answers: Answers, rows: Sequence[int], region: str) -> Comparison:
    """Compare a region's expert with the default on the rows that choose."""
    before, after = [answers.default[row] for row in rows], [answers.experts[region][row] for row in rows]
    return compare(before, held_against(before, after), compiling.metric, seed=compiling.method.seed)


def _row(mixture: Mixture, expert: Expert, test: Comparison | None, p_value: float | None) -> dict[str, Any]:
    """Return what is told of a region: rows, the test that chose, the scores on the rows that measure."""
    layout, region, aggregate = mixture.layout, expert.region, mixture.compiling.metric.aggregate
    rows = layout.claim(region)
    tested = {} if test is None else {"gain": test.gain, "low": test.low, "high": test.high, "p_value": p_value}
    seed = [mixture.answers.seed[row] for row in rows]
    scores = {"seed": seed, "compiled": held_against(seed, mixture.outcomes(rows))}
    return {
        "region": region,
        "train_rows": len(layout.train[region]),
        "choosing_rows": len(layout.gate(region)),
        **tested,
        "measuring_rows": len(rows),
        **{name: aggregate(outcomes) for name, outcomes in scores.items() if rows},
        "expert": OWN if region in mixture.chosen else f"default: {_why(expert, test)}",
    }


def _why(expert: Expert, test: Comparison | None) -> str:
    if test is not None:
        return "its own wasn't confirmed"
    return expert.why or "nothing better was found"


def _texts(parts: Mapping[str, dspy.Module]) -> dict[str, str]:
    """Return instructions by expert and predictor."""
    return {
        routed.label(expert, name): str(predictor.signature.instructions)
        for expert, part in parts.items()
        for name, predictor in predictors(part)
    }


def _stopped(found: Found, experts: Sequence[Expert]) -> str:
    """Return which searches ended early, and why."""
    ended = {"all rows": found.stopped} | {each.region: each.stopped for each in experts}
    return " ".join(f"{where}: {why}" for where, why in ended.items() if why)
