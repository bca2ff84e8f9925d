"""Score against calls, and the intervals of candidates: what is to be drawn, in the units of the drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from preceptor.report.folder import Scored, Search

_PANEL: Final = 200
"""Width of the part for the untouched rows."""

_MOST_DOTS: Final = 600
"""Drawn; of more, every second, third and so on."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The drawing, and its axes in it."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float


FRAME: Final = Frame(width=720, height=320, left=62, right=688, top=16, bottom=256)


@dataclass(frozen=True, slots=True)
class Tick:
    """A place on an axis, and what is written there."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Dot:
    """A candidate's score when an evaluation ended: place, radius, and whether it is the seed."""

    x: float
    y: float
    radius: float
    is_seed: bool


@dataclass(frozen=True, slots=True)
class Whisker:
    """A score on the untouched rows, with the ends of its interval, if it has one."""

    x: float
    y: float
    low: float | None
    high: float | None
    name: str
    is_seed: bool


@dataclass(frozen=True, slots=True)
class Chart:
    """Score against calls.

    Attributes:
        right: Where the search's part ends, and that of the untouched rows begins.
        x_ticks: Calls.
        y_ticks: Scores.
        dots: Evaluations.
        best: The best score of those on the most rows so far, as an SVG path.
        seed: Height of the seed's last score.
        whiskers: On the untouched rows.
        told: The drawing in words.
    """

    right: float
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    dots: Sequence[Dot]
    best: str
    seed: float
    whiskers: Sequence[Whisker]
    told: str


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high`, drawn from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return where a value is drawn, to a tenth."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round values around a range: multiples of 1, 2 or 5 times a power of ten, at most so many.

    Example:
        >>> ticks(0.31, 0.88), ticks(0, 730)
        ([0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 200.0, 400.0, 600.0, 800.0])
    """
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    steps = [factor * power for factor in (1, 2, 5, 10, 20)]
    step = next(step for step in steps if math.ceil(high / step) - math.floor(low / step) < most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * at, 10) for at in range(first, max(last, first + 1) + 1)]


def best_so_far(scored: Sequence[Scored]) -> list[tuple[int, float]]:
    """Return the best score after each evaluation, with its calls: of the candidates that saw the most rows by then."""
    known: dict[str, Scored] = {}
    curve: dict[int, float] = {}
    for one in scored:
        known[one.candidate] = one
        most = max(each.seen for each in known.values())
        curve[one.calls] = max(each.score for each in known.values() if each.seen == most)
    return sorted(curve.items())


def chart(search: Search, result: Mapping[str, Any]) -> Chart | None:
    """Return what is drawn of a search, None if it scored nothing.

    Args:
        search: Its first candidate is the one it started from.
        result: Of the compile; {} leaves the untouched rows out.
    """
    scored = search.scored
    if not scored:
        return None
    is_score = all(one.score >= 0 for one in scored)
    told = _whiskers(result) if is_score and result else []
    curve = best_so_far(scored)
    seed = [one for one in scored if one.candidate == scored[0].candidate][-1].score
    heights = [one.score for one in scored] + [end for _, *ends in told for end in ends if end is not None]
    y_values = ticks(*_range(heights))
    x_values = ticks(0, curve[-1][0])
    right = FRAME.right - (_PANEL if told else 0)
    x, y = Scale(0, x_values[-1], FRAME.left, right), Scale(y_values[0], y_values[-1], FRAME.bottom, FRAME.top)
    most = max(one.seen for one in scored)
    return Chart(
        right=right,
        x_ticks=[Tick(x(value), f"{value:,.0f}") for value in x_values],
        y_ticks=[Tick(y(value), f"{value:g}") for value in y_values],
        dots=[
            Dot(x(one.calls), y(one.score), round(1.5 + 2.5 * one.seen / max(1, most), 1), one.key == scored[0].key)
            for one in scored[:: math.ceil(len(scored) / _MOST_DOTS)]
        ],
        best=_steps([(x(calls), y(score)) for calls, score in curve], right),
        seed=y(seed),
        whiskers=[
            Whisker(right + _PANEL * place, y(score), _at(y, low), _at(y, high), name, at == 0)
            for at, (place, (name, score, low, high)) in enumerate(zip((0.3, 0.75), told, strict=False))
        ],
        told=_told(scored, curve, seed),
    )


def _range(heights: Sequence[float]) -> tuple[float, float]:
    """Return a range that is wide enough to be drawn; of scores, it stays in [0, 1]."""
    low, high = min(heights), max(heights)
    room = 0.05 if high - low < 0.1 else 0.0
    return (max(0.0, low - room), min(1.0, high + room)) if low >= 0 and high <= 1 else (low - room, high + room)


def _whiskers(result: Mapping[str, Any]) -> list[tuple[str, float, float | None, float | None]]:
    """Return name, score and interval of the seed and of the winner, on the untouched rows."""
    found: list[tuple[str, float, float | None, float | None]] = [("yours", result["baseline"], *result["baseline_ci"])]
    if result["replaced"]:
        found.append(("compiled", result["compiled"], *result["compiled_ci"]))
    elif result.get("has_candidate"):
        found.append(("candidate", result["baseline"] + result.get("tested_gain", 0.0), None, None))
    return found


def _at(scale: Scale, value: float | None) -> float | None:
    return None if value is None else scale(value)


def _steps(places: Sequence[tuple[float, float]], right: float) -> str:
    """Return a path that keeps its height until the next place, and runs on to the right."""
    (x, y), *others = places
    return f"M{x:g} {y:g}" + "".join(f"H{x:g}V{y:g}" for x, y in others) + f"H{right:g}"


def _told(scored: Sequence[Scored], curve: Sequence[tuple[int, float]], seed: float) -> str:
    candidates = len({one.candidate for one in scored})
    return (
        f"{candidates} candidates in {len(scored)} evaluations. After {curve[0][0]:,} calls the best scored "
        f"{curve[0][1]:.3f}, after {curve[-1][0]:,} calls {curve[-1][1]:.3f}; what the search started from, {seed:.3f}."
    )
