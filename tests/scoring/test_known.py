from __future__ import annotations

from collections.abc import Sequence

from preceptor.scoring.known import Known
from preceptor.scoring.metrics import mean
from preceptor.scoring.trial import Candidate, Outcome, Trial

ONE, OTHER = Candidate({"predict": "One."}), Candidate({"predict": "Other."})


def test_only_what_is_not_known_is_asked_for() -> None:
    asked: list[tuple[str, list[int]]] = []

    def score_each(walks: Sequence[tuple[Candidate, Sequence[int]]]) -> list[Trial]:
        asked.extend((candidate.instructions["predict"], list(rows)) for candidate, rows in walks)
        return [
            Trial(candidate, tuple(rows), tuple(Outcome("scored", float(row % 2)) for row in rows), 9.0)
            for candidate, rows in walks
        ]

    known = Known(score_each, mean)
    [first] = known.score([ONE], [0, 1, 2])
    both = known.score([ONE, OTHER, OTHER], [3, 1])

    assert asked == [("One.", [0, 1, 2]), ("One.", [3]), ("Other.", [3, 1])]
    assert (first.rows, first.score) == ((0, 1, 2), 1 / 3)
    told = [(trial.candidate, trial.rows, trial.score) for trial in both]
    assert told == [(one, (3, 1), 1.0) for one in (ONE, OTHER, OTHER)]
    assert known.score([ONE], [1, 0])[0].score == 0.5
    assert (known.whole(ONE).rows, known.whole(ONE).score) == ((0, 1, 2, 3), 0.5)
    assert len(asked) == 3
