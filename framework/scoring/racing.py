"""Racing: poor candidates are dropped after few rows, good ones see all of them.

Successive halving on shared rows (Karnin et al. 2013; APE's adaptive filtering is the same idea with a
threshold): every candidate still in the race sees the same rows in the same order, so that
comparisons are paired, and a candidate's score is its mean over all rows it has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from preceptor.scoring.metrics import Aggregate
from preceptor.scoring.trial import Candidate, Outcome, Trial

Score = Callable[[Sequence[Candidate], Sequence[int]], Sequence[Trial]]
"""Score candidates on rows; one trial per candidate, with exactly those rows."""

FIRST: Final = 16
"""Fewest rows of the first rung."""

FIRST_PART: Final = 5
"""The first rung sees one row in so many: few rows drop good candidates by chance (`preceptor bench null --effect`)."""

FINALISTS: Final = 4
"""Candidates that see all rows, the first (the seed) included."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One round of a race: how many candidates, and which rows of the order they see."""

    candidates: int
    start: int
    stop: int

    @property
    def cost(self) -> int:
        """Rows scored in this round, over all candidates."""
        return self.candidates * (self.stop - self.start)


def plan(candidates: int, rows: int) -> list[Rung]:
    """Return the rungs of a race: candidates halve while rows seen double.

    Example:
        >>> [(rung.candidates, rung.start, rung.stop) for rung in plan(12, 96)]
        [(12, 0, 19), (6, 19, 38), (4, 38, 76), (4, 76, 96)]
    """
    rungs: list[Rung] = []
    start, stop = 0, min(max(FIRST, rows // FIRST_PART), rows)
    while start < rows:
        rungs.append(Rung(candidates, start, stop))
        start, stop = stop, min(2 * stop, rows)
        candidates = min(candidates, max(FINALISTS, -(-candidates // 2)))
    return rungs


def cost(candidates: int, rows: int, known: int = 0) -> int:
    """Return how many row scores a whole race takes, at most.

    Args:
        candidates: In the race, those whose scores are known included.
        rows: Of the race.
        known: Candidates that have been scored on all rows, the first among them. At most, for the race may drop
            all of them but the first.

    Example:
        >>> cost(12, 96), cost(12, 96, known=6)
        (574, 383)
    """
    fresh, free = candidates - known, min(known, 1)
    return sum(min(rung.candidates - free, fresh) * (rung.stop - rung.start) for rung in plan(candidates, rows))


def affordable(candidates: int, rows: int, scores: int | None) -> int:
    """Return how many of the candidates a race can start with, given so many row scores."""
    if scores is None:
        return candidates
    return next((count for count in range(candidates, 0, -1) if cost(count, rows) <= scores), 0)


def race(candidates: Sequence[Candidate], score: Score, order: Sequence[int], aggregate: Aggregate) -> list[Trial]:
    """Race candidates over the rows of `order`; return every candidate's trial, best first.

    The first candidate is the seed: it is never dropped. Ties go to the candidate that came first.
    Those that saw more rows come before those that were dropped earlier.
    """
    seen: list[Trial] = []
    alive = list(candidates)
    dropped: list[Trial] = []
    for rung in plan(len(candidates), len(order)):
        ranked = _ranked(seen)
        alive = _kept(alive, ranked, rung.candidates)
        dropped = [trial for trial in ranked if trial.candidate not in alive] + dropped
        fresh = score(alive, order[rung.start : rung.stop])
        earlier = {trial.candidate.key: trial for trial in seen}
        seen = [_joined(earlier.get(trial.candidate.key), trial, aggregate) for trial in fresh]
    return _ranked(seen) + dropped


def best_so_far(scored: Sequence[Trial], aggregate: Aggregate) -> list[Trial]:
    """Return what an interrupted race knows: the candidates that saw the most rows, best first."""
    joined: dict[str, Trial] = {}
    for trial in scored:
        joined[trial.candidate.key] = _joined(joined.get(trial.candidate.key), trial, aggregate)
    most = max((len(trial.rows) for trial in joined.values()), default=0)
    return _ranked([trial for trial in joined.values() if len(trial.rows) == most])


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: -trial.score)


def _kept(alive: list[Candidate], ranked: list[Trial], count: int) -> list[Candidate]:
    """Keep the seed and the best others, in the order they came."""
    if not ranked:
        return alive[:count]
    best = [trial.candidate for trial in ranked if trial.candidate is not alive[0]][: count - 1]
    return [candidate for candidate in alive if candidate is alive[0] or candidate in best]


def _joined(earlier: Trial | None, fresh: Trial, aggregate: Aggregate) -> Trial:
    if earlier is None:
        return fresh
    seen = dict(zip(earlier.rows + fresh.rows, earlier.outcomes + fresh.outcomes, strict=True))  # a row counts once
    outcomes: tuple[Outcome, ...] = tuple(seen.values())
    return Trial(fresh.candidate, tuple(seen), outcomes, aggregate(outcomes))
