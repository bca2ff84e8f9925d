"""What the runs of `preceptor bench papers` say of methods against each other, and of what the papers claim.

Runs of one task are averaged over seeds first: tasks, not runs, are what a claim generalizes over, so intervals and
tests are over tasks.
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

from preceptor.benchmarks.tasks import find
from preceptor.scoring.statistics import CONFIDENCE

Run = Mapping[str, Any]
Means = dict[tuple[str, str], float]
"""Task and method -> mean over seeds."""

MIXTURE: Final = "+mixture"
PEERS: Final = ("gepa", "miprov2", "copro")
OTHERS: Final = ("ape", "protegi", "instruct_zero", *PEERS)


@dataclass(frozen=True, slots=True)
class Measured:
    """What runs say of a claim.

    Attributes:
        value: Mean over tasks, of differences in points of [0, 1].
        low: Of its 95 % interval; nan with one task.
        high: Of its 95 % interval.
        tasks: There are runs for.
    """

    value: float
    low: float
    high: float
    tasks: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A headline claim of a paper.

    Attributes:
        paper: Which.
        says: In words.
        figure: Its number, in points of [0, 1].
        differences: Returns a difference per task, of those there are runs for; positive if the claim's side is ahead.
    """

    paper: str
    says: str
    figure: float
    differences: Callable[[Sequence[Run]], list[float]]


def means(runs: Iterable[Run], score: str = "compiled") -> Means:
    """Return each task's and method's mean over seeds; runs without that score are left out."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if score in run:
            found.setdefault((run["task"], run["method"]), []).append(run[score])
    return {key: fmean(values) for key, values in found.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean; nan for fewer than two values.

    Example:
        >>> [round(end, 3) for end in interval([0.1, 0.2, 0.3])]
        [-0.048, 0.448]
    """
    if len(values) < 2:
        return math.nan, math.nan
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def measured(values: Sequence[float]) -> Measured | None:
    """Return the mean and its interval, None of nothing."""
    return Measured(fmean(values), *interval(values), len(values)) if values else None


def verdict(claim: Claim, found: Measured | None) -> str:
    """Return what is to be said of a claim.

    It is reproduced if the whole interval is above zero and the claimed figure isn't above it; refuted if the whole
    interval is below the figure.
    """
    if found is None:
        return "not measured"
    if math.isnan(found.low):
        return "one task decides nothing"
    if found.high < claim.figure:
        return "not reproduced"
    return "reproduced" if found.low > 0 else "undecided"


def checked(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a line for each claim: the paper's figure, ours, and what is to be said of it."""
    lines: list[dict[str, Any]] = []
    for claim in CLAIMS:
        found = measured(claim.differences(runs))
        ours = {name: None if found is None else getattr(found, name) for name in ("value", "low", "high", "tasks")}
        lines.append(
            {"paper": claim.paper, "claim": claim.says, "figure": claim.figure}
            | {"ours": ours.pop("value"), **ours, "verdict": verdict(claim, found)}
        )
    return lines


def duels(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a line for each pair of methods: wins and losses over tasks, and Wilcoxon's signed-rank test.

    The p-value is exact, two-sided, and None where every task is a tie.
    """
    scores = means(runs)
    lines: list[dict[str, Any]] = []
    for one, other in combinations(sorted({method for _, method in scores}), 2):
        gaps = _gaps(scores, one, other)
        if gaps:
            ahead = sum(gap > 0 for gap in gaps)
            behind = sum(gap < 0 for gap in gaps)
            p = _signed_rank(gaps) if ahead + behind else None
            low, high = interval(gaps)
            lines.append(
                {"method": one, "against": other, "tasks": len(gaps), "wins": ahead, "losses": behind}
                | {"gain": fmean(gaps), "low": low, "high": high, "p_value": p}
            )
    return lines


def ranks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return each method's mean rank, 1 the best, over the tasks that all methods ran on; ties share a rank.

    Example:
        >>> runs = [{"task": "a", "method": name, "compiled": score} for name, score in [("x", 0.5), ("y", 0.7)]]
        >>> ranks(runs)
        [{'method': 'y', 'rank': 1.0, 'tasks': 1}, {'method': 'x', 'rank': 2.0, 'tasks': 1}]
    """
    scores = means(runs)
    methods = sorted({method for _, method in scores})
    tasks = sorted({task for task, _ in scores})
    whole = [task for task in tasks if all((task, method) in scores for method in methods)]
    if not whole:
        return []
    table = np.array([[-scores[task, method] for method in methods] for task in whole])
    mean = stats.rankdata(table, axis=1).mean(axis=0)
    order = np.argsort(mean, kind="stable")
    return [{"method": methods[at], "rank": float(mean[at]), "tasks": len(whole)} for at in order]


def _signed_rank(gaps: Sequence[float]) -> float:
    found: Any = stats.wilcoxon([gap for gap in gaps if gap])
    return float(found.pvalue)


def _gaps(scores: Means, one: str, other: str) -> list[float]:
    both = [task for task, method in scores if method == one and (task, other) in scores]
    return [scores[task, one] - scores[task, other] for task in both]


def _against(
    one: str, other: str, is_meant: Callable[[str], bool] = lambda task: True
) -> Callable[[Sequence[Run]], list[float]]:
    return lambda runs: _gaps(means(run for run in runs if is_meant(run["task"])), one, other)


def _over_seed(method: str, tasks: Sequence[str]) -> Callable[[Sequence[Run]], list[float]]:
    def gains(runs: Sequence[Run]) -> list[float]:
        meant = (run for run in runs if run["method"] == method and run["task"] in tasks)
        return list(means(meant, "gain").values())

    return gains


def _f1_over_others(runs: Sequence[Run]) -> list[float]:
    scores = means(runs, "compiled_f1")
    ours = [task for task, method in scores if method == "constitutional_experts"]
    others = {task: [scores[task, name] for name in OTHERS if (task, name) in scores] for task in ours}
    return [scores[task, "constitutional_experts"] - fmean(each) for task, each in others.items() if each]


def _f1_of_mixture(runs: Sequence[Run]) -> list[float]:
    scores = means(runs, "compiled_f1")
    gaps: dict[str, list[float]] = {}
    for task, method in scores:
        if (task, method + MIXTURE) in scores:
            gaps.setdefault(task, []).append(scores[task, method + MIXTURE] - scores[task, method])
    return [fmean(each) for each in gaps.values()]


def _is_induction(task: str) -> bool:
    return find(task).human is not None


CLAIMS: Final = (
    Claim(
        "APE",
        "as good as a person's instruction: .810 against .749 on 24 tasks",
        0.061,
        _against("ape", "human", _is_induction),
    ),
    Claim("ProTeGi", "15.3 % above the first prompt on 4 data sets", 0.153, _over_seed("protegi", ("ethos", "liar"))),
    Claim("ProTeGi", "3.9 % above Monte-Carlo search as in APE", 0.039, _against("protegi", "ape")),
    Claim("InstructZero", "better than APE on 32 of 32 tasks", 0.0, _against("instruct_zero", "ape", _is_induction)),
    Claim("ConstitutionalExperts", "10.9 % F1 above other optimizers", 0.109, _f1_over_others),
    Claim("ConstitutionalExperts", "the mixture adds 2.0 % F1 to all methods", 0.02, _f1_of_mixture),
)
"""The papers don't say what their "%" is of; points are taken."""
