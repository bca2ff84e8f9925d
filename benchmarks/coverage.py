"""`preceptor bench coverage`: how often the intervals hold the truth, and how often chance is confirmed.

Two programs answer the same simulated rows; their true scores are those of a very large sample. Where each input
comes several times, its answers are equal: so many rows say no more than their different inputs do. Of the rare label,
a row in twenty has it, and three in ten of those are right before; where there is a gain, nearly all are after. Of
graded scores with rare losses all rows gain a little, but one in twenty falls to 0, as an answer that can't be read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

import numpy as np
import typer

from preceptor.benchmarks.result import Json, Out, give
from preceptor.cli.view import print_table, say
from preceptor.scoring.metrics import wrap
from preceptor.scoring.statistics import compare, interval, smallest_gain
from preceptor.scoring.trial import Outcome

Pair = tuple[list[Outcome], list[Outcome]]
SIZES: Final = {"accuracy": (20, 50, 200, 1000), "f1:bug": (50, 200), "macro_f1": (50, 200), "token_f1": (20, 50, 200)}
REPEATED: Final = {"accuracy": (20, 50, 200), "f1:bug": (50, 200), "macro_f1": (50, 200)}
RARE: Final = {"f1:bug": (50, 100, 200), "macro_f1": (100, 200), "token_f1": (20, 50, 100, 200)}
FALLS: Final = 0.05
"""Rows that lose all, where losses are rare."""

LEVEL: Final = 0.6
"""Score of all rows before, about."""

RARE_AND_REPEATED: Final = {"f1:bug": (100,)}
TIMES: Final = 10
LABELS: Final = np.array(["bug", "praise", "question"])
LARGE: Final = 400_000


def run(
    repeats: Annotated[int, typer.Option(help="Simulated data sets per number.")] = 2_000,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Simulate data sets with a gain of 15 points, with none, and with the smallest that should be confirmed."""
    measured = [
        _line(Case(name, inputs, times, is_rare=is_rare), repeats)
        for times, is_rare, lines in (
            (1, False, SIZES),
            (TIMES, False, REPEATED),
            (1, True, RARE),
            (TIMES, True, RARE_AND_REPEATED),
        )
        for name, sizes in lines.items()
        for inputs in sizes
    ]
    give({"repeats": repeats, "measured": measured}, out, as_json=as_json, show=_print)


def _print(result: dict[str, Any]) -> None:
    lines: list[dict[str, Any]] = result["measured"]
    print_table(f"Share of {result['repeats']} data sets", list(lines[0]), [list(line.values()) for line in lines])


@dataclass(frozen=True, slots=True)
class Case:
    """What is simulated.

    Attributes:
        metric: Its name.
        inputs: Different ones.
        times: How often each comes.
        is_rare: Whether the label "bug" is rare, and nearly all of it turns right; of graded scores, whether few rows
            lose all.
    """

    metric: str
    inputs: int
    times: int = 1
    is_rare: bool = False

    def pair(self, rng: Any, rows: int, gain: float) -> Pair:
        """Return two programs' outcomes on so many different inputs."""
        if self.metric == "accuracy":  # one row in ten gets worse, as `smallest_gain` assumes
            stays = 0.8 - gain
            change = rng.choice(4, rows, p=(0.1, 0.1 + gain, 0.6 * stays, 0.4 * stays))
            return _scored(np.isin(change, (0, 2))), _scored(np.isin(change, (1, 2)))
        if self.metric == "token_f1" and self.is_rare:
            first, more = LEVEL + rng.uniform(-0.05, 0.05, rows), (gain + FALLS * LEVEL) / (1 - FALLS)
            return _scored(first), _scored(np.where(rng.random(rows) < FALLS, 0.0, first + more))
        if self.metric == "token_f1":  # many zeros and ones, the rest between; every other row is answered anew
            kinds = (rng.choice(3, rows, p=(0.2, 0.5 - more, 0.3 + more)) for more in (0.0, gain))
            first, again = (np.select([kind == 0, kind == 2], [0.0, 1.0], rng.beta(2, 2, rows)) for kind in kinds)
            return _scored(first), _scored(np.where(rng.random(rows) < 0.5, again, first))
        gold = rng.choice(3, rows, p=(0.05, 0.45, 0.5) if self.is_rare else (0.5, 0.2, 0.3))
        luck, is_shared = rng.random(rows), rng.random(rows) < 0.6
        first, second = (
            np.where(
                np.where(is_shared, luck, rng.random(rows)) < right[gold], gold, (gold + rng.integers(1, 3, rows)) % 3
            )
            for right in self._right(gain)
        )
        return _labelled(gold, first), _labelled(gold, second)

    def _right(self, gain: float) -> tuple[Any, Any]:
        """Return the share of right answers, label by label, of both programs."""
        if self.is_rare:
            return np.array([0.3, 0.95, 0.95]), np.array([0.95 if gain else 0.3, 0.95, 0.95])
        return np.full(3, 0.65), np.full(3, 0.65 + gain)


def _line(case: Case, repeats: int) -> dict[str, Any]:
    name, inputs, times = case.metric, case.inputs, case.times
    label = "rare" if case.is_rare else ""
    say(", ".join(filter(None, [f"  {name}, {inputs} inputs", f"each {times} times" if times > 1 else "", label])))
    score, gain, _ = _shares(case, repeats, 0.15)
    _, none, false = _shares(case, repeats, 0.0)
    power = _shares(case, repeats, smallest_gain(inputs))[2] if name == "accuracy" else "-"
    shares = {"score covered": score, "gain covered": gain, "no gain covered": none, "no gain confirmed": false}
    told = {"metric": name, "rows": inputs * times, "inputs": inputs, "rare": case.is_rare}
    return {**told, **shares, "smallest gain confirmed": power}


def _shares(case: Case, repeats: int, gain: float) -> tuple[float, float, float]:
    """Return how often the score's interval and the gain's held the truth, and a gain was confirmed."""
    rng, metric = np.random.default_rng(case.inputs), wrap(case.metric, "label")
    old, new = (metric.aggregate(outcomes) for outcomes in case.pair(rng, LARGE, gain))
    truth = new - old if gain else 0.0
    found = np.zeros(3)
    for seed in range(repeats):
        before, after = (_often(outcomes, case.times) for outcomes in case.pair(rng, case.inputs, gain))
        low, high = interval(after, metric)
        verdict = compare(before, after, metric, seed=seed)
        found += [low <= new <= high, verdict.low <= truth <= verdict.high, verdict.is_confirmed]
    score, covered, confirmed = (found / repeats).tolist()
    return score, covered, confirmed


def _often(outcomes: list[Outcome], times: int) -> list[Outcome]:
    return [replace(outcome, of=str(at)) for at, outcome in enumerate(outcomes) for _ in range(times)]


def _scored(scores: Any) -> list[Outcome]:
    return [Outcome("scored", score) for score in scores.astype(float).tolist()]


def _labelled(gold: Any, answer: Any) -> list[Outcome]:
    names = zip(LABELS[gold].tolist(), LABELS[answer].tolist(), strict=True)
    return [Outcome("scored", float(label == given), given, label) for label, given in names]
