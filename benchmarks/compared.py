"""Methods against each other, in runs of `preceptor bench papers` of one group: equal model, equal budget of all calls.

Runs are paired: methods are compared on the tasks and seeds that both have. Those of one task are averaged over seeds
first: tasks, not runs, are what a claim generalizes over, so intervals and tests are over tasks. Of two methods on
these very tasks there is an interval over test rows too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, Final

import numpy as np
from scipy import stats

from preceptor.scoring.multiplicity import holm
from preceptor.scoring.statistics import CONFIDENCE

Run = Mapping[str, Any]
Scores = dict[tuple[str, str], dict[int, float]]
"""Task and method -> seed -> score."""

MIXTURE: Final = "+mixture"
HUMAN: Final = "human"
PEERS: Final = ("gepa", "miprov2", "copro")

DIGITS: Final = 12
ROUNDING: Final = 10**-DIGITS
"""Scores that lie nearer to each other than this are equal: the rest is how they were added and subtracted."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What runs say of a difference.

    Attributes:
        value: Mean over tasks, in points of [0, 1].
        low: Of its 95 % interval; nan with one task, or if all differences are equal.
        high: Of its 95 % interval.
        tasks: There are runs for.
    """

    value: float
    low: float
    high: float
    tasks: int


def is_ours(method: str) -> bool:
    """Return True if a method, alone, in a mixture or with settings, is one of this package's own."""
    return base(method) not in (*PEERS, HUMAN)


def base(method: str) -> str:
    """Return a method's name without settings and mixture.

    Example:
        >>> base("gepa:auto=light"), base("copro+mixture"), base("ape")
        ('gepa', 'copro', 'ape')
    """
    return method.removesuffix(MIXTURE).partition(":")[0]


def made(runs: Iterable[Run]) -> list[Run]:
    """Return the runs that measured something: a compile that was refused before its first call says nothing.

    Example:
        >>> [run["method"] for run in made([{"method": "ape"}, {"method": "ape+mixture", "refused": "calls=9"}])]
        ['ape']
    """
    return [run for run in runs if not run.get("refused")]


def scored(runs: Iterable[Run], score: str = "compiled") -> Scores:
    """Return the scores by task, method and seed; runs without that score, or refused, are left out."""
    found: Scores = {}
    for run in made(runs):
        if score in run:
            found.setdefault((run["task"], run["method"]), {})[run.get("seed", 0)] = run[score]
    return found


def together(runs: Iterable[Run], methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return task -> method -> mean over the seeds that all these methods have; tasks without any are left out."""
    scores = scored(runs)
    return {
        task: {method: fmean(scores[task, method][seed] for seed in seeds) for method in methods}
        for task, seeds in _seeds(scores, methods).items()
    }


def _seeds(scores: Scores, methods: Sequence[str]) -> dict[str, set[int]]:
    """Return task -> the seeds that all these methods have; tasks without any are left out."""
    every = {
        task: set[int].intersection(*(set(scores.get((task, method), ())) for method in methods))
        for task in sorted({task for task, _ in scores})
    }
    return {task: seeds for task, seeds in every.items() if seeds}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean; nan for fewer than two values.

    nan too if all values are equal: they tell nothing of how far others would lie apart.

    Example:
        >>> [round(end, 3) for end in interval([0.1, 0.2, 0.3])]
        [-0.048, 0.448]
        >>> interval([0.0, 0.0, 0.0])
        (nan, nan)
    """
    if len(values) < 2 or math.isclose(min(values), max(values), abs_tol=ROUNDING):
        return math.nan, math.nan
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def means_by_task(runs: Iterable[Run], value: Callable[[Run], float | None]) -> list[float]:
    """Return each task's mean of a value over its runs that have one: of tasks, runs of one aren't independent.

    Example:
        >>> runs = [{"task": "a", "gain": 0.25}, {"task": "a", "gain": 0.5}, {"task": "b"}]
        >>> means_by_task(runs, lambda run: run.get("gain"))
        [0.375]
    """
    found: dict[str, list[float]] = {}
    for run in runs:
        if (known := value(run)) is not None:
            found.setdefault(run["task"], []).append(known)
    return [fmean(found[task]) for task in sorted(found)]


def measured(values: Sequence[float]) -> Measured | None:
    """Return the mean and its interval, None of nothing."""
    return Measured(fmean(values), *interval(values), len(values)) if values else None


def settled(gap: float) -> float:
    """Return a difference of scores, 0 of equal ones.

    Example:
        >>> settled((0.8 - 0.7 + 0.2 - 0.3) / 2), settled(0.01)
        (0.0, 0.01)
    """
    return 0.0 if abs(gap) < ROUNDING else gap


def duels(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a line for each pair of methods: wins and losses over tasks, and Wilcoxon's signed-rank test.

    The p-value is two-sided, exact up to 13 tasks or without ties, and None where every task is a tie; `holm` is the
    same corrected for the number of pairs.
    """
    scores = scored(runs)
    lines: list[dict[str, Any]] = []
    for one, other in combinations(sorted({method for _, method in scores}), 2):
        gaps = gaps_of(scores, one, other)
        if gaps:
            ahead = sum(gap > 0 for gap in gaps)
            behind = sum(gap < 0 for gap in gaps)
            p = _signed_rank(gaps) if ahead + behind else None
            low, high = interval(gaps)
            arms = over_rows(runs, one, other, _seeds(scores, (one, other)))
            lines.append(
                {"method": one, "against": other, "tasks": len(gaps), "wins": ahead, "losses": behind}
                | {"gain": fmean(gaps), "low": low, "high": high, **_ends(fmean(gaps), arms), "p_value": p}
            )
    known = {str(at): line["p_value"] for at, line in enumerate(lines) if line["p_value"] is not None}
    corrected = holm(known)
    return [line | {"holm": corrected.get(str(at))} for at, line in enumerate(lines)]


def ranks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return each method's mean rank, 1 the best, over the tasks that all methods ran on; ties share a rank.

    A person's instructions are no method: few tasks have any. Methods with settings of their own are left out, as where
    the best are chosen. `runs` counts those of each method: of the seeds that all methods have.

    Example:
        >>> runs = [{"task": "a", "method": name, "compiled": score} for name, score in [("x", 0.5), ("y", 0.7)]]
        >>> ranks(runs)
        [{'method': 'y', 'rank': 1.0, 'tasks': 1, 'runs': 1}, {'method': 'x', 'rank': 2.0, 'tasks': 1, 'runs': 1}]
    """
    methods = sorted({run["method"] for run in made(runs) if ":" not in run["method"]} - {HUMAN})
    whole = together(runs, methods) if methods else {}
    if not whole:
        return []
    table = np.array([[-round(scores[method], DIGITS) for method in methods] for scores in whole.values()])
    mean = stats.rankdata(table, axis=1).mean(axis=0)
    order = np.argsort(mean, kind="stable")
    held = sum(map(len, _seeds(scored(runs), methods).values()))
    return [{"method": methods[at], "rank": float(mean[at]), "tasks": len(whole), "runs": held} for at in order]


def _signed_rank(gaps: Sequence[float]) -> float:
    found: Any = stats.wilcoxon([round(gap, DIGITS) for gap in gaps if gap])  # so that equal ones share a rank
    return float(found.pvalue)


def gaps_of(scores: Scores, one: str, other: str) -> list[float]:
    """Return how far one method is ahead of another, a task each."""
    return list(by_task(scores, one, other).values())


def by_task(scores: Scores, one: str, other: str) -> dict[str, float]:
    """Return task -> mean difference over the seeds that both have."""
    gaps: dict[str, float] = {}
    for task, method in scores:
        theirs = scores.get((task, other), {})
        pairs = [(ours, theirs[seed]) for seed, ours in scores[task, method].items() if seed in theirs]
        if method == one and pairs:
            gaps[task] = settled(fmean(ours - other for ours, other in pairs))
    return gaps


Arms = tuple[float, float]
"""How far an interval reaches below and above a value; nan if that isn't known."""

UNKNOWN: Final[Arms] = (math.nan, math.nan)


def over_rows(runs: Sequence[Run], one: str, other: str, seeds: Mapping[str, Iterable[int]]) -> Arms:
    """Return how far a 95 % interval over test rows reaches on both sides of the mean gap on these very tasks.

    Of other test rows, not of other tasks or seeds: both methods' programs are taken as they are. The files hold each
    program's interval against the prompt. What lies between two of these is at most the sum of their arms, which is
    taken; a program that is the prompt has none. Seeds of a task share its rows: theirs are averaged.

    Args:
        runs: Of both methods.
        one: Ahead, if the gap is above zero.
        other: Behind.
        seeds: Task -> seeds.

    Example:
        >>> kept = {"task": "a", "method": "x", "replaced": False, "gain": 0.0, "low": -0.02, "high": 0.02}
        >>> found = {"task": "a", "method": "y", "replaced": True, "gain": 0.2, "low": 0.125, "high": 0.25}
        >>> [round(arm, 3) for arm in over_rows([kept, found], "y", "x", {"a": [0]})]
        [0.075, 0.05]
    """
    known = {(run["task"], run["method"], run.get("seed", 0)): _arms(run) for run in made(runs)}
    below, above = list[float](), list[float]()
    for task, drawn in seeds.items():
        pairs = [(known[task, one, seed], known[task, other, seed]) for seed in drawn]
        below.append(fmean(ours[0] + theirs[1] for ours, theirs in pairs))
        above.append(fmean(ours[1] + theirs[0] for ours, theirs in pairs))
    return (math.hypot(*below) / len(below), math.hypot(*above) / len(above)) if below else UNKNOWN


def _arms(run: Run) -> Arms:
    if "low" not in run:
        return UNKNOWN
    return (run["gain"] - run["low"], run["high"] - run["gain"]) if run["replaced"] else (0.0, 0.0)


def _shared(runs: Sequence[Run], methods: Sequence[str], tasks: Iterable[str]) -> dict[str, set[int]]:
    found = _seeds(scored(runs), methods)
    return {task: found[task] for task in tasks}


def comparisons(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a line for each comparison: best against best, what searches held, experts' F1, what a mixture adds."""
    ahead = f1_over(runs, PEERS, "constitutional_experts")
    lines = [*_best(runs), *_held(runs), _line("constitutional_experts against the mean of the peers", "F1", ahead)]
    for score, name in (("compiled", "score"), ("compiled_f1", "F1")):
        added = mixed(runs, score)
        if len(added) > 1:
            lines.append(_line(f"a mixture against none, mean of {len(added)} methods", name, mean_of_tasks(added)))
        for one, gaps in added.items():
            pair = (one + MIXTURE, one)
            arms = over_rows(runs, *pair, _shared(runs, pair, gaps)) if score == "compiled" else UNKNOWN
            lines.append(_line(f"{one}{MIXTURE} against {one}", name, list(gaps.values()), arms))
    return [line for line in lines if line["tasks"]]


def f1_over(runs: Sequence[Run], others: Sequence[str], one: str) -> list[float]:
    """Return a method's F1 minus the mean of the others', a task each."""
    scores = scored(runs, "compiled_f1")
    gaps = [by_task(scores, one, other) for other in others]
    return mean_of_tasks({str(at): each for at, each in enumerate(gaps)})


def mixed(runs: Sequence[Run], score: str) -> dict[str, dict[str, float]]:
    """Return what a mixture adds: method -> task -> difference."""
    scores = scored(runs, score)
    gaps = {method: by_task(scores, method + MIXTURE, method) for _, method in sorted(scores)}
    return {method: each for method, each in gaps.items() if each}


def mean_of_tasks(gaps: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Return each task's mean over methods."""
    tasks = sorted({task for each in gaps.values() for task in each})
    return [settled(fmean(each[task] for each in gaps.values() if task in each)) for task in tasks]


def _best(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the best of ours against the best peer, chosen on every second task and tested on the others, and on all.

    Methods with settings of their own are in neither: defaults against defaults. ConstitutionalExperts shows train rows
    by default, no peer does. Only tasks count that all of these methods ran on. Chosen and tested on the same tasks,
    either side's score is biased by how many methods there were to choose from.
    """
    methods = sorted({run["method"] for run in made(runs) if ":" not in run["method"]})
    sides = [[one for one in methods if is_ours(one)], [one for one in methods if one in PEERS]]
    if not all(sides):
        return []
    scores = together(runs, [*sides[0], *sides[1]])
    tasks = list(scores)
    lines: list[dict[str, Any]] = []
    for chosen_on, tested_on, which in ((tasks[::2], tasks[1::2], "other"), (tasks, tasks, "same")):
        if chosen_on and tested_on:
            ours, theirs = (_best_of(scores, side, chosen_on) for side in sides)
            says = f"{ours}, best of {len(sides[0])} of ours, against {theirs}, best of {len(sides[1])} peers"
            gaps = [settled(scores[task][ours] - scores[task][theirs]) for task in tested_on]
            arms = over_rows(runs, ours, theirs, _shared(runs, [*sides[0], *sides[1]], tested_on))
            lines.append(_line(f"{says}; chosen on the {which} {len(chosen_on)} tasks", "score", gaps, arms))
    return lines


def _held(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return each method of ours against each peer by what their searches held for best, confirmed or not.

    So what a peer finds isn't hidden by our confirmation. Methods with settings of their own are left out, and runs
    that were scored only where they were confirmed: mixtures, and older ones with demonstrations.
    """
    scores = scored((run for run in runs if "best_candidate" in run), "candidate")
    names = sorted({method for _, method in scores if base(method) == method and method != HUMAN})
    pairs = [(one, other) for one in names if is_ours(one) for other in names if other in PEERS]
    says = "{} against {}, what each held for best, confirmed or not"
    return [_line(says.format(*pair), "score", gaps_of(scores, *pair)) for pair in pairs]


def _best_of(scores: Mapping[str, Mapping[str, float]], methods: Sequence[str], tasks: Sequence[str]) -> str:
    return max(methods, key=lambda method: round(fmean(scores[task][method] for task in tasks), DIGITS))


def _line(says: str, score: str, gaps: Sequence[float], arms: Arms = UNKNOWN) -> dict[str, Any]:
    low, high = interval(gaps)
    gain = fmean(gaps) if gaps else math.nan
    line = {"comparison": says, "of": score, "tasks": len(gaps), "gain": gain, "low": low, "high": high}
    return {**line, **_ends(gain, arms)}


def _ends(gain: float, arms: Arms) -> dict[str, float]:
    """Return the interval over rows; where it isn't known, the one nan there is, so that equal lines are equal."""
    low, high = UNKNOWN if any(map(math.isnan, arms)) else (gain - arms[0], gain + arms[1])
    return {"rows_low": low, "rows_high": high}
