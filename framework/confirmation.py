"""What a confirmation writes down, and what is made of an earlier one on the same rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

import dspy

from preceptor.run import Run
from preceptor.scoring.metrics import Metric
from preceptor.scoring.trial import Candidate, Outcome


def look(run: Run, candidate: Any, outcomes: Sequence[Outcome]) -> int:
    """Return the number of this look at the rows: another one where a judge gives the same answers other scores.

    Args:
        run: That has looked.
        candidate: What tells what is confirmed from anything else.
        outcomes: Of all programs on the rows to confirm on.
    """
    return run.look([candidate, [outcome.score for outcome in outcomes]])


def answers(
    rows: Sequence[dspy.Example],
    candidates: Mapping[str, Candidate],
    before: Sequence[Outcome],
    after: Sequence[Outcome],
    metric: Metric,
    places: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return what is written down of what the seed and the winner answered to each confirmation row.

    Args:
        rows: To confirm on.
        candidates: Whose answers they are, beside the seed's: by expert, or by "" where there is one.
        before: The seed's outcomes.
        after: The winner's.
        metric: That scored them.
        places: Further fields of each row.
    """
    told = [
        {**place, "inputs": _texts(row), "gold": old.gold, "before": _told(old), "after": _told(new)}
        for row, old, new, place in zip(rows, before, after, places or repeat({}), strict=False)
    ]
    demos = {name: each.demos for name, each in candidates.items() if any(each.demos.values())}
    return {
        "candidates": {name: dict(each.instructions) for name, each in candidates.items()},
        **({"demos": demos} if demos else {}),
        "metric": metric.code,
        "rows": told,
    }


def scored_otherwise(before: Mapping[str, Any], now: Mapping[str, Any], *, is_own: bool = False) -> bool:
    """Return True if another metric of the same name scored before: it has other code, and other scores.

    Other code alone may be another version's; other scores of the same answers alone, a judge's that isn't sure. Where
    other code of the user's own hasn't scored all answers of what was confirmed, it is taken to score them otherwise.

    Args:
        before: What `confirmation.json` says of an earlier confirmation on the same rows.
        now: The same of this one.
        is_own: Whether the metric is a function of the user's.

    Example:
        >>> def told(score, metric):
        ...     answer = {"kind": "scored", "answer": "b", "score": score}
        ...     row = {"inputs": {"x": "1"}, "gold": "a", "before": answer, "after": answer}
        ...     return {"metric": metric, "rows": [row]}
        >>> [scored_otherwise(told(*one), told(1.0, "m")) for one in ((1.0, "n"), (0.0, "m"), (0.0, "n"))]
        [False, False, True]
    """

    def scores(told: Mapping[str, Any], *arms: str) -> dict[str, Any]:
        cells = [(row, row[arm]) for row in told.get("rows", []) for arm in arms]
        return {
            json.dumps([row["inputs"], row["gold"], cell["answer"]]): cell["score"]
            for row, cell in cells
            if cell["kind"] == "scored"
        }

    if before.get("metric", now["metric"]) == now["metric"]:
        return False
    known, new = scores(before, "before", "after"), scores(now, "before", "after")
    is_unsure = is_own and not scores(before, "after").keys() <= new.keys()
    return is_unsure or any(known.get(answer, score) != score for answer, score in new.items())


def _texts(row: dspy.Example) -> dict[str, str]:
    return {name: str(value) for name, value in row.inputs().items()}


def _told(outcome: Outcome) -> dict[str, Any]:
    return {"kind": outcome.kind, "score": outcome.score, "answer": outcome.answer}
