"""Scores that are asked for once: where candidates meet the same rows again, what is known is used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from preceptor.scoring.metrics import Aggregate
from preceptor.scoring.trial import Candidate, Outcome, Trial

ScoreEach = Callable[[Sequence[tuple[Candidate, Sequence[int]]]], Sequence[Trial]]
"""Score every candidate on rows of its own."""


@dataclass(frozen=True, slots=True)
class Known:
    """What candidates came to on rows.

    Attributes:
        score_each: Asked for what isn't known.
        aggregate: Makes a score of outcomes.
    """

    score_each: ScoreEach
    aggregate: Aggregate
    _outcomes: dict[str, dict[int, Outcome]] = field(default_factory=lambda: defaultdict(dict), init=False)

    def score(self, candidates: Sequence[Candidate], rows: Sequence[int]) -> list[Trial]:
        """Return one trial for each candidate, with exactly these rows in this order; costs the rows not known.

        One that is given twice is asked once.
        """
        distinct = {one.key: one for one in candidates}.values()
        walks = [(one, [row for row in rows if row not in self._outcomes[one.key]]) for one in distinct]
        missing = [(one, unseen) for one, unseen in walks if unseen]
        for trial in self.score_each(missing) if missing else ():
            self._outcomes[trial.candidate.key].update(zip(trial.rows, trial.outcomes, strict=True))
        return [self._trial(one, rows) for one in candidates]

    def whole(self, candidate: Candidate) -> Trial:
        """Return a candidate's trial on all rows it was scored on; no call."""
        return self._trial(candidate, list(self._outcomes[candidate.key]))

    def _trial(self, candidate: Candidate, rows: Sequence[int]) -> Trial:
        outcomes = tuple(self._outcomes[candidate.key][row] for row in rows)
        return Trial(candidate, tuple(rows), outcomes, self.aggregate(outcomes))
