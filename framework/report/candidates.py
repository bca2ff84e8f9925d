"""The candidates of a search: the best of them with intervals, and which was made of which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from preceptor.lineage import Descendant
from preceptor.report.folder import Scored, Search

MOST: Final = 20
"""Candidates of the search on all rows in the table."""

MOST_OF_A_REGION: Final = 5
MOST_IN_LINEAGE: Final = 40
"""Besides those that they come from."""

_DEEPEST: Final = 8
"""Steps by which the lineage moves to the right."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A line of the table.

    Attributes:
        number: 0 is what the search started from; the same in the lineage.
        scored: Its last score.
        role: `yours`, `compiled`, `best candidate`, or "".
    """

    number: int
    scored: Scored
    role: str


@dataclass(frozen=True, slots=True)
class Table:
    """The best candidates of a search.

    Attributes:
        name: Of the region, "" on all rows.
        best: Those that saw the most rows first, of them the best first.
        others: How many are left out.
        low: Lower end of the scale of the intervals.
        high: Upper end.
    """

    name: str
    best: Sequence[Candidate]
    others: int
    low: float
    high: float

    def at(self, value: float) -> float:
        """Return a score's place on the scale, in percent."""
        return round(100 * (value - self.low) / ((self.high - self.low) or 1), 1)


@dataclass(frozen=True, slots=True)
class Birth:
    """A line of the lineage.

    Attributes:
        depth: Steps from what the search started from; no more than are drawn.
        number: Its own.
        parent: Its parent's number; None if it has none.
        told: What is known of it.
        scored: Its last score, None if it has none.
        role: As in the table.
        hidden: Candidates made of it that are left out.
    """

    depth: int
    number: int
    parent: int | None
    told: Descendant
    scored: Scored | None
    role: str
    hidden: int


def table(search: Search, roles: Mapping[str, str]) -> Table | None:
    """Return the best candidates of a search, None if it scored none.

    Args:
        search: What was scored.
        roles: Key -> what became of the candidate.
    """
    last = _ranked(search)
    if not last:
        return None
    best, numbers = last[: MOST_OF_A_REGION if search.name else MOST], _numbers(search)
    ends = [end for one in best for end in (one.interval or (one.score, one.score))]
    lines = [Candidate(numbers[one.key], one, roles.get(one.key, "")) for one in best]
    return Table(search.name, lines, len(last) - len(best), min(ends), max(ends))


def lineage(search: Search, roles: Mapping[str, str]) -> list[Birth]:
    """Return the candidates a search made of others, each below its parent; of many, the best and their ancestors."""
    if not any(one.parent for one in search.lineage.values()):
        return []
    numbers, last = _numbers(search), {one.key: one for one in reversed(_ranked(search))}
    kept = _with_ancestors(search, _prominent(search, roles))
    children = _children(search)
    births: list[Birth] = []
    waiting = [(0, key) for key in reversed(children.get("", []))]
    while waiting:
        depth, key = waiting.pop()
        own, told = children.get(key, []), search.lineage[key]
        shown = [child for child in own if child in kept]
        if key in kept:
            births.append(
                Birth(
                    depth=min(depth, _DEEPEST),
                    number=numbers[key],
                    parent=numbers.get(told.parent),
                    told=told,
                    scored=last.get(key),
                    role=roles.get(key, ""),
                    hidden=len(own) - len(shown),
                )
            )
        waiting += [(depth + 1, child) for child in reversed(shown)]
    return births


def _ranked(search: Search) -> list[Scored]:
    """Return each candidate's last score: most rows first, then the highest."""
    last = {one.candidate: one for one in search.scored}
    return sorted(last.values(), key=lambda one: (-one.seen, -one.score))


def _numbers(search: Search) -> dict[str, int]:
    """Return each instructions' number, by key: in the order they were scored, those never scored last."""
    keys = dict.fromkeys([*(one.key for one in search.scored), *search.lineage])
    return {key: number for number, key in enumerate(keys)}


def _prominent(search: Search, roles: Mapping[str, str]) -> list[str]:
    if len(search.lineage) <= MOST_IN_LINEAGE:
        return list(search.lineage)
    best = [one.key for one in _ranked(search)][:MOST_IN_LINEAGE]
    return [key for key in (*roles, *best) if key in search.lineage]


def _with_ancestors(search: Search, keys: Sequence[str]) -> set[str]:
    kept: set[str] = set()
    for key in keys:
        while key in search.lineage and key not in kept:
            kept.add(key)
            key = search.lineage[key].parent
    return kept


def _children(search: Search) -> dict[str, list[str]]:
    """Return parent -> what was made of it; below "" those without a parent that is known."""
    children: dict[str, list[str]] = {}
    for key, one in search.lineage.items():
        children.setdefault(one.parent if one.parent in search.lineage else "", []).append(key)
    return children
