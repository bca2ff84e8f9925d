"""What became of each confirmation row: right before and after, mended, broken, or wrong before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from preceptor.report.folder import Row

Fate = Literal["right", "mended", "broken", "wrong", "failed"]
FATES: Final[tuple[Fate, ...]] = ("right", "mended", "broken", "wrong", "failed")

LISTED: Final[tuple[Fate, ...]] = ("broken", "mended", "wrong")
MOST: Final = 10
"""Rows listed of each fate."""

_NAMES: Final[Mapping[Fate, str]] = {
    "right": "Right before and after",
    "mended": "Mended: wrong before, right after",
    "broken": "Broken: right before, wrong after",
    "wrong": "Wrong before and after",
    "failed": "Not answered: the call failed",
}
_GRADED: Final[Mapping[Fate, str]] = {
    "right": "Full score before and after",
    "mended": "Better after",
    "broken": "Worse after",
    "wrong": "The same, below the full score",
    "failed": "Not answered: the call failed",
}


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of one fate.

    Attributes:
        fate: In a word.
        name: In a few.
        count: Of all.
        rows: Of them, those that are listed, with their numbers from 0.
    """

    fate: Fate
    name: str
    count: int
    rows: Sequence[tuple[int, Row]]


def fate(row: Row) -> Fate:
    """Return what became of a row; a score counts as right if it is 1."""
    before, after = row.before.score, row.after.score
    if before is None or after is None:
        return "failed"
    if before != after:
        return "mended" if after > before else "broken"
    return "right" if after == 1 else "wrong"


def names(rows: Iterable[Row]) -> Mapping[Fate, str]:
    """Return what the fates are called: scores between 0 and 1 are better or worse, not right or wrong."""
    scores = {score for row in rows for score in (row.before.score, row.after.score)}
    return _NAMES if scores <= {0.0, 1.0, None} else _GRADED


def groups(rows: Sequence[Row]) -> list[Group]:
    """Return the rows that measure, by fate; those in which something is wrong are listed. Nothing if none measures."""
    measuring = [(at, row) for at, row in enumerate(rows) if row.measures]
    fates, called = Counter(fate(row) for _, row in measuring), names(row for _, row in measuring)
    return [
        Group(
            one,
            called[one],
            fates[one],
            [place for place in measuring if fate(place[1]) == one and one in LISTED][:MOST],
        )
        for one in FATES
        if fates[one] or (measuring and one != "failed")
    ]
