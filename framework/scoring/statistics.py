"""Paired statistics: what a difference on shared rows can and can't say.

Every test is scipy's. For scores of 0 and 1: the exact McNemar test (a binomial test on the rows that
changed) and the interval that follows from it. For graded scores: a sign-flip permutation test and a
bootstrap interval. For metrics over the whole set, such as F1: a paired bootstrap over rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from scipy import stats

from preceptor.scoring.metrics import Metric
from preceptor.scoring.trial import Outcome

CONFIDENCE: Final = 0.95
RESAMPLES: Final = 5_000
_CHURN: Final = 0.10
"""Rows assumed to turn from right to wrong when planning; `smallest_gain` says so."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired comparison of two programs on the same rows.

    Attributes:
        before: Score of the first, in [0, 1].
        after: Score of the second.
        gain: after - before.
        low: Lower end of the 95 % interval of the gain.
        high: Upper end.
        p_value: Two-sided.
        rows: Rows compared; rows where either failed are left out.
        test: Name of the test.
    """

    before: float
    after: float
    gain: float
    low: float
    high: float
    p_value: float
    rows: int
    test: str

    @property
    def is_confirmed(self) -> bool:
        """True if the whole interval lies above zero and the test agrees."""
        return self.low > 0 and self.p_value < 1 - CONFIDENCE


def compare(before: Sequence[Outcome], after: Sequence[Outcome], metric: Metric, *, seed: int = 0) -> Comparison:
    """Compare two programs' outcomes on the same rows, in the same order.

    Example:
        >>> from preceptor.scoring.metrics import wrap
        >>> bad, good = [Outcome("scored", 0.0)] * 8, [Outcome("scored", 1.0)] * 8
        >>> verdict = compare(bad, good, wrap("accuracy", "label"))
        >>> verdict.gain, round(verdict.low, 3), round(verdict.p_value, 4), verdict.is_confirmed
        (1.0, 0.261, 0.0078, True)
    """
    pairs = [pair for pair in zip(before, after, strict=True) if "failed" not in (pair[0].kind, pair[1].kind)]
    if not pairs:
        return Comparison(0.0, 0.0, 0.0, -1.0, 1.0, 1.0, 0, "none")
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    old, new = metric.aggregate(first), metric.aggregate(second)
    differences = np.array([cast("float", b.score) - cast("float", a.score) for a, b in pairs])
    if not metric.is_mean:
        low, high, p_value, test = *_bootstrap_sets(first, second, metric, seed), "paired bootstrap"
    elif set(differences.tolist()) <= {-1.0, 0.0, 1.0}:
        low, high, p_value, test = *_mcnemar(differences), "exact McNemar"
    else:
        low, high, p_value, test = *_permutation(differences, seed), "permutation"
    return Comparison(old, new, new - old, low, high, p_value, len(pairs), test)


def _mcnemar(differences: Any) -> tuple[float, float, float]:
    """Return interval and p-value from the rows that changed; Clopper-Pearson carries over to the gain."""
    better, changed = int((differences > 0).sum()), int((differences != 0).sum())
    if not changed:
        return 0.0, 0.0, 1.0
    test = stats.binomtest(better, changed, 0.5)
    share = test.proportion_ci(CONFIDENCE, "exact")
    scale = changed / len(differences)
    return scale * (2 * share.low - 1), scale * (2 * share.high - 1), float(test.pvalue)


def _permutation(differences: Any, seed: int) -> tuple[float, float, float]:
    if np.ptp(differences) == 0:
        value = float(differences[0])
        return value, value, 1.0 if value == 0 else 2.0 ** (1 - len(differences))
    rng = np.random.default_rng(seed)
    test = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, vectorized=True, rng=rng
    )
    low, high = _interval(lambda sample, axis: sample.mean(axis=axis), differences, rng, vectorized=True)
    return low, high, float(test.pvalue)


def _bootstrap_sets(
    first: list[Outcome], second: list[Outcome], metric: Metric, seed: int
) -> tuple[float, float, float]:
    """Resample rows; the p-value is twice the smaller share of resampled gains on one side of zero."""
    if len(first) < 2:
        return -1.0, 1.0, 1.0

    def gain(rows: Any) -> float:
        picked = rows.astype(int)
        return metric.aggregate([second[row] for row in picked]) - metric.aggregate([first[row] for row in picked])

    rng = np.random.default_rng(seed)
    result = stats.bootstrap(
        (np.arange(len(first)),),
        gain,
        vectorized=False,
        n_resamples=2_000,
        method="percentile",
        confidence_level=CONFIDENCE,
        rng=rng,
    )
    gains = result.bootstrap_distribution
    share = min((gains <= 0).mean(), (gains >= 0).mean())
    interval = result.confidence_interval
    return float(interval.low), float(interval.high), min(1.0, 2 * max(float(share), 1 / len(gains)))


def _interval(statistic: Callable[..., Any], values: Any, rng: Any, *, vectorized: bool) -> tuple[float, float]:
    result = stats.bootstrap(
        (values,),
        statistic,
        vectorized=vectorized,
        n_resamples=RESAMPLES,
        method="percentile",
        confidence_level=CONFIDENCE,
        rng=rng,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def interval(outcomes: Sequence[Outcome], metric: Metric, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of one program's score: Wilson's for 0/1 scores, else a bootstrap.

    Example:
        >>> from preceptor.scoring.metrics import wrap
        >>> outcomes = [Outcome("scored", 1.0)] * 8 + [Outcome("scored", 0.0)] * 2
        >>> [round(end, 2) for end in interval(outcomes, wrap("accuracy", "label"))]
        [0.49, 0.94]
    """
    answered = [outcome for outcome in outcomes if outcome.kind != "failed"]
    scores = np.array([cast("float", outcome.score) for outcome in answered])
    if not answered or (not metric.is_mean and len(answered) == 1):
        return 0.0, 1.0
    rng = np.random.default_rng(seed)
    if not metric.is_mean:
        return _interval(
            lambda rows: metric.aggregate([answered[row] for row in rows.astype(int)]),
            np.arange(len(answered)),
            rng,
            vectorized=False,
        )
    if set(scores.tolist()) <= {0.0, 1.0}:
        wilson = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(CONFIDENCE, "wilson")
        return float(wilson.low), float(wilson.high)
    if np.ptp(scores) == 0:
        return float(scores[0]), float(scores[0])
    return _interval(lambda sample, axis: sample.mean(axis=axis), scores, rng, vectorized=True)


def smallest_gain(rows: int) -> float:
    """Return the smallest true gain that so many rows confirm four times in five.

    By the normal approximation to McNemar's test, if one row in ten turns from right to wrong: the
    gain g where g = 2.8 sqrt((0.2 + g - g²) / rows). 2.8 = 1.96 for 95 % confidence + 0.84 for 80 % power.

    Example:
        >>> [round(smallest_gain(rows), 2) for rows in (50, 200, 1000)]
        [0.25, 0.11, 0.04]
    """
    unit = 2.8**2 / rows  # (1 + unit) g² - unit g - 2 churn unit = 0
    root = math.sqrt(unit**2 + 8 * _CHURN * unit * (1 + unit))
    return min(1.0, (unit + root) / (2 * (1 + unit)))
