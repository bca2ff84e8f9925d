"""The map of the regions: what is to be drawn, in the units of the drawing.

Rows lie in the plane in which the train rows spread the most (`preceptor.regions.Plane`). Colour says which
region a row is in, the mark what became of a confirmation row; each region is named by a number, too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from preceptor.report.errors import FATES, Fate, fate, names
from preceptor.report.folder import Findings, Place, Plan, Row

T = TypeVar("T")

WIDTH: Final = 720
HEIGHT: Final = 460
_EDGE: Final = 24

HUES: Final = 8
"""Colours; beyond, they come again."""

_MOST: Final = 1_500
"""Rows of a kind drawn; of more, every second, third and so on."""

MARKS: Final[Mapping[Fate, str]] = {
    "right": "h0",
    "mended": "m0 -6l6 10.5h-12z",
    "broken": "m-4.5 -4.5l9 9m0 -9l-9 9",
    "wrong": "m-4.5 -4.5h9v9h-9z",
    "failed": "m-4 0h8",
}
"""Drawn around a place, as SVG paths."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Rows drawn alike: the class of their colour, what they are, and where, as one SVG path."""

    hue: str
    kind: str
    path: str


@dataclass(frozen=True, slots=True)
class Centroid:
    """A region: its place, number and colour, what answers there, and whether that is an expert of its own."""

    x: float
    y: float
    number: int
    name: str
    hue: str
    expert: str
    is_own: bool


@dataclass(frozen=True, slots=True)
class Map:
    """The drawing.

    Attributes:
        marks: In the order they are drawn.
        centroids: The regions.
        fates: What became of confirmation rows: kind, name, and the path of its mark.
        has_outside: True if a confirmation row lies beyond the radius.
        drawn: Share of the train rows that are drawn, in (0, 1].
        explained: See `preceptor.report.folder.Plan`.
        embedder: What embedded the rows.
        told: The drawing in words.
    """

    marks: Sequence[Marks]
    centroids: Sequence[Centroid]
    fates: Sequence[tuple[Fate, str, str]]
    has_outside: bool
    drawn: float
    explained: float
    embedder: str
    told: str


def mapped(found: Findings) -> Map | None:
    """Return the map of a run's regions, None if it has none."""
    plan = found.plan
    if plan is None or not plan.train:
        return None
    to = _Frame.around([*plan.train, *plan.confirm, *plan.centroids])
    hues = {name: f"r{at % HUES}" for at, name in enumerate(plan.regions)}
    fates: list[Fate] = [fate(row) for row in found.rows] if len(found.rows) == len(plan.confirm) else []
    known = names(found.rows)
    return Map(
        marks=[*_train(plan, to, hues), *_confirm(plan, to, hues, fates)],
        centroids=_centroids(plan, to, hues, found.result),
        fates=[(one, known[one], MARKS[one]) for one in FATES if one in fates],
        has_outside="" in plan.routes,
        drawn=len(_some(plan.train)) / len(plan.train),
        explained=plan.explained,
        embedder=plan.embedder,
        told=_told(plan, found.rows, fates),
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    """Places, moved and stretched alike in both directions, to fill the drawing."""

    left: float
    top: float
    scale: float

    @classmethod
    def around(cls, places: Sequence[Place]) -> _Frame:
        xs, ys = zip(*places, strict=True)
        wide, high = max(xs) - min(xs), max(ys) - min(ys)
        scale = min((WIDTH - 2 * _EDGE) / (wide or 1e-9), (HEIGHT - 2 * _EDGE) / (high or 1e-9), 1e6)
        return cls(WIDTH / 2 - scale * (min(xs) + wide / 2), HEIGHT / 2 + scale * (min(ys) + high / 2), scale)

    def __call__(self, place: Place) -> Place:
        return round(self.left + self.scale * place[0], 1), round(self.top - self.scale * place[1], 1)


def _some(rows: Sequence[T]) -> Sequence[T]:
    """Return at most `_MOST` of the rows: all, every second, every third and so on."""
    return rows[:: math.ceil(len(rows) / _MOST) or 1]


def _train(plan: Plan, to: _Frame, hues: Mapping[str, str]) -> list[Marks]:
    drawn = _some(list(zip(plan.train, plan.members, strict=True)))
    return [
        Marks(hue, "train", _path([to(place) for place, member in drawn if member == name], "h0"))
        for name, hue in hues.items()
    ]


def _confirm(plan: Plan, to: _Frame, hues: Mapping[str, str], fates: Sequence[Fate]) -> list[Marks]:
    """Return the marks of confirmation rows, those of errors above those of right answers."""
    drawn = _some(list(zip(plan.confirm, plan.routes, fates, strict=False)))
    return [
        Marks(hue, one, _path(places, MARKS[one]))
        for one in ("failed", "right", "wrong", "mended", "broken")
        for name, hue in {**hues, "": "outside"}.items()
        if (places := [to(place) for place, route, what in drawn if (route, what) == (name, one)])
    ]


def _path(places: Sequence[Place], mark: str) -> str:
    return "".join(f"M{x:g} {y:g}{mark}" for x, y in places)


def _centroids(plan: Plan, to: _Frame, hues: Mapping[str, str], result: Mapping[str, Any]) -> list[Centroid]:
    experts = {str(row.get("region")): str(row.get("expert", "")) for row in result.get("regions", [])}
    return [
        Centroid(*to(place), number, name, hues[name], experts.get(name, ""), experts.get(name) == "its own")
        for number, (name, place) in enumerate(zip(plan.regions, plan.centroids, strict=True), start=1)
    ]


def _told(plan: Plan, rows: Sequence[Row], fates: Sequence[Fate]) -> str:
    train, seen = Counter(plan.members), Counter(zip(plan.routes, fates, strict=False))
    called = names(rows)

    def counted(name: str) -> str:
        counts = [f"{called[one].lower()} {seen[name, one]}" for one in FATES if seen[name, one]]
        return f"{name or 'beyond every region'}: {train[name]} train rows; {', '.join(counts) or 'no answers'}."

    outside = [""] if "" in plan.routes else []
    return " ".join(counted(name) for name in [*plan.regions, *outside])
