"""Paired statistics: what a difference on shared rows can and can't say.

A gain in a 0/1 score is tested by the exact McNemar test (a binomial test on the rows that changed) and has
Tango's score interval. Any other gain, of graded scores or of metrics over the whole set such as F1, is tested
by swapping the two programs' rows at random and has Student's interval on the jackknife's standard error, or
Tango's at so many 0/1 rows where all rows say the same, which is no certainty. An
interval is stretched to zero where its test finds nothing, so the two never disagree in what they confirm.
Measured coverage: benchmarks/results/coverage.json. Rows of equal inputs are tested as one, which weighs what its
rows weigh; where a single input makes most of the rows, the interval is too narrow, though nothing more is confirmed.

Where nearly all rows of a rare label turn right, or a graded score is a little higher on all rows seen but 0 on one in
twenty to come, their spread says too little of what else could have been seen. So a standard error of F1 or of
graded scores is that of the rows, or if it is larger, that of the rows and two made-up ones, of each label if there
are labels: one is right and one wrong; of a gain, one turns right and one turns wrong. The gain is that of the rows.

Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
design", Statistics in Medicine 17, 1998. Bonett and Price, "Adjusted Wald confidence interval for a difference of
binomial proportions based on paired data", Journal of Educational and Behavioral Statistics 37, 2012, add a row to
each of the two kinds of 0/1 pairs that change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from scipy import optimize, stats

from preceptor.scoring.metrics import Array, Metric, Sums
from preceptor.scoring.trial import Outcome

CONFIDENCE: Final = 0.95
POWER: Final = 0.80
SWAPS: Final = 4_999
"""Random exchanges of rows in a permutation test; all are tried where there are fewer."""

_Z: Final = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
_CHURN: Final = 0.10
"""Rows assumed to turn from right to wrong when planning; `smallest_gain` says so."""
_NO_ERROR: Final = 1e-9
"""Of a jackknife, below which the rows show no spread to go by."""
_BLOCK: Final = 4_000_000
"""Coin tosses held in memory at a time."""


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
        rows: Rows compared; rows where either failed are left out (see `evaluate.held_against`).
        test: Name of the test: `exact McNemar`, `permutation`, `permutation of inputs` where 0/1 rows have equal ones,
            or `none` without rows.
        repeated: How many of these rows have the inputs of an earlier one; equal inputs are tested as one row.
        look: How many candidates have been compared on these rows, this one included; the level is divided by it.
    """

    before: float
    after: float
    gain: float
    low: float
    high: float
    p_value: float
    rows: int
    test: str
    repeated: int = 0
    look: int = 1

    @property
    def level(self) -> float:
        """What the p-value of a gain must be below, less at each look: it bounds each, not all of them together."""
        return (1 - CONFIDENCE) / self.look

    @property
    def is_confirmed(self) -> bool:
        """True if the whole interval lies above zero and the test agrees."""
        return self.low > 0 and self.p_value < self.level

    @property
    def is_refuted(self) -> bool:
        """True if the whole interval lies below zero and the test agrees: a loss is confirmed."""
        return self.high < 0 and self.p_value < 1 - CONFIDENCE

    @property
    def smallest_gain(self) -> float:
        """Smallest true gain that so many rows confirm about four times in five.

        For 0/1 scores as planned by `smallest_gain`; for others from the spread of the rows seen here.
        """
        if self.test != "permutation":
            return smallest_gain(self.rows - self.repeated, self.level)
        half = (self.high - self.low) / 2 / _Z
        return min(1.0, half * float(stats.norm.isf(self.level / 2) + stats.norm.ppf(POWER)))


def compare(before: Sequence[Outcome], after: Sequence[Outcome], metric: Metric, *, seed: int = 0) -> Comparison:
    """Compare two programs' outcomes on the same rows, in the same order.

    Example:
        >>> from preceptor.scoring.metrics import wrap
        >>> bad, good = [Outcome("scored", 0.0)] * 8, [Outcome("scored", 1.0)] * 8
        >>> verdict = compare(bad, good, wrap("accuracy", "label"))
        >>> verdict.gain, round(verdict.low, 3), round(verdict.p_value, 4), verdict.is_confirmed
        (1.0, 0.351, 0.0078, True)
    """
    first, second = answered_by_both(before, after)
    if not first:
        return Comparison(0.0, 0.0, 0.0, -1.0, 1.0, 1.0, 0, "none")
    old, new = metric.aggregate(first), metric.aggregate(second)
    inputs = min(_inputs(first), _inputs(second), key=lambda numbers: len(set(numbers)))
    repeated = len(first) - len(set(inputs))
    is_certain = metric.is_mean and all(outcome.score in (0, 1) for outcome in first + second)
    if is_certain and not repeated:
        low, high, p_value, test = *_mcnemar(first, second), "exact McNemar"
    else:
        test = "permutation of inputs" if is_certain else "permutation"
        old_terms, new_terms = (_by_input(metric.sums.terms(outcomes), inputs) for outcomes in (first, second))
        low, high, p_value = _permutation(old_terms, new_terms, metric.sums, seed, len(first) / len(old_terms))
    if p_value >= 1 - CONFIDENCE:
        low, high = min(low, 0.0), max(high, 0.0)
    return Comparison(old, new, new - old, low, high, p_value, len(first), test, repeated)


def answered_by_both(before: Sequence[Outcome], after: Sequence[Outcome]) -> tuple[list[Outcome], list[Outcome]]:
    """Return two programs' outcomes without the rows that either failed with."""
    kept = [pair for pair in zip(before, after, strict=True) if "failed" not in (pair[0].kind, pair[1].kind)]
    return [old for old, _ in kept], [new for _, new in kept]


def _inputs(outcomes: Sequence[Outcome]) -> list[int]:
    """Return the number of each outcome's input, in the order in which they come first."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(outcome.of or at, len(numbers)) for at, outcome in enumerate(outcomes)]


def _by_input(terms: Array, inputs: Sequence[int]) -> Array:
    """Return the sums of the terms of each input's rows."""
    summed = np.zeros((max(inputs) + 1, terms.shape[1]))
    np.add.at(summed, inputs, terms)
    return summed


def _mcnemar(first: list[Outcome], second: list[Outcome]) -> tuple[float, float, float]:
    """Return the interval and p-value of a gain in 0/1 scores."""
    changes = [(old.score, new.score) for old, new in zip(first, second, strict=True)]
    better, worse = changes.count((0.0, 1.0)), changes.count((1.0, 0.0))
    p_value = float(stats.binomtest(better, better + worse, 0.5).pvalue) if better + worse else 1.0
    return _tango(better, worse, len(changes)), -_tango(worse, better, len(changes)), p_value


def _tango(better: float, worse: float, rows: int) -> float:
    """Return the lower end of Tango's interval: the true gain the rows are just too good for."""
    gain = (better - worse) / rows
    if gain == -1:
        return -1.0

    def excess(true: float) -> float:
        # the likeliest share of rows that got worse, if the true gain were so: 2n q^2 + b q + c = 0
        b, c = (2 * rows - better + worse) * true - better - worse, -worse * true * (1 - true)
        share = (math.sqrt(max(0.0, b * b - 8 * rows * c)) - b) / (4 * rows)
        return float((better - worse - rows * true) ** 2 - _Z**2 * rows * (2 * share + true * (1 - true)))

    return float(cast("float", optimize.brentq(excess, -1.0, gain - 1e-9)))


def _permutation(before: Array, after: Array, sums: Sums, seed: int, times: float) -> tuple[float, float, float]:
    """Return the interval and p-value of a gain in any other score, from the terms of inputs that come so often."""
    changed = (before != after).any(axis=1)
    counted = max(1, int(((before != 0) | (after != 0)).any(axis=1).sum()))  # true negatives don't count in F1
    if not changed.any():
        return _tango(0, 0, counted), -_tango(0, 0, counted), 1.0
    if len(before) < 2:
        return -1.0, 1.0, 1.0
    totals = before.sum(axis=0), after.sum(axis=0)
    gain = float(sums.score(totals[1]) - sums.score(totals[0]))
    p_value = _swap_test(before[changed], after[changed], totals, sums, seed)
    error = _error_of_gain(before, after, sums)
    if error < _NO_ERROR:
        better, worse = max(0.0, gain) * counted, max(0.0, -gain) * counted
        return _tango(better, worse, counted), -_tango(worse, better, counted), p_value
    made = sums.turns(before.shape[1])
    old, new = (np.vstack([own, times * turned]) for own, turned in zip((before, after), made, strict=True))
    half = _student(len(before)) * max(error, _error_of_gain(old, new, sums))
    return max(-1.0, gain - half), min(1.0, gain + half), p_value


def _swap_test(before: Array, after: Array, totals: tuple[Array, Array], sums: Sums, seed: int) -> float:
    """Return how often swapping rows at random gives as large a gain, either way; unchanged rows don't matter."""
    old, new = totals
    seen = abs(float(sums.score(new) - sums.score(old))) - 1e-9
    as_large = tried = 0
    for swapped in _swaps(len(before), seed):
        moved = swapped @ (after - before)
        as_large += int((np.abs(sums.score(new - moved) - sums.score(old + moved)) >= seen).sum())
        tried += len(swapped)
    return as_large / tried


def _swaps(rows: int, seed: int) -> Iterator[Any]:
    """Yield which rows to swap, a few thousand times: every way there is, or random ones and the one seen."""
    if 2**rows <= SWAPS:
        yield (np.arange(2**rows)[:, None] >> np.arange(rows)) & 1
        return
    yield np.zeros((1, rows))
    rng = np.random.default_rng(seed)
    size = max(1, _BLOCK // rows)
    for start in range(0, SWAPS, size):
        yield rng.integers(0, 2, (min(size, SWAPS - start), rows))


def _error_of_gain(before: Array, after: Array, sums: Sums) -> float:
    """Return the jackknife's standard error of a gain."""
    return _standard_error(sums.score(after.sum(axis=0) - after) - sums.score(before.sum(axis=0) - before))


def _error_of_score(terms: Array, sums: Sums) -> float:
    """Return the jackknife's standard error of a score."""
    return _standard_error(sums.score(terms.sum(axis=0) - terms))


def _standard_error(without: Array) -> float:
    """Return the jackknife's standard error, from the scores without each of the rows."""
    rows = len(without)
    return math.sqrt((rows - 1) / rows * float(((without - without.mean()) ** 2).sum()))


def _student(rows: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, rows - 1))


def interval(outcomes: Sequence[Outcome], metric: Metric) -> tuple[float, float]:
    """Return the 95 % interval of one program's score: Wilson's.

    For scores that aren't 0 or 1, at the number of 0/1 rows that would be as certain: with s the jackknife's
    standard error, (z / t)² score (1 - score) / s².

    Example:
        >>> from preceptor.scoring.metrics import wrap
        >>> outcomes = [Outcome("scored", 1.0)] * 8 + [Outcome("scored", 0.0)] * 2
        >>> [round(end, 2) for end in interval(outcomes, wrap("accuracy", "label"))]
        [0.49, 0.94]
    """
    answered = [outcome for outcome in outcomes if outcome.kind != "failed"]
    inputs = _inputs(answered)
    is_certain = metric.is_mean and all(outcome.score in (0, 1) for outcome in answered)
    if is_certain and len(set(inputs)) == len(answered):
        return _wilson(metric.aggregate(answered), len(answered))
    if len(set(inputs)) < 2:
        return 0.0, 1.0
    terms = _by_input(metric.sums.terms(answered), inputs)
    score, error = float(metric.sums.score(terms.sum(axis=0))), _error_of_score(terms, metric.sums)
    if not 0 < score < 1 or error < _NO_ERROR:
        return _wilson(score, int((terms != 0).any(axis=1).sum()))
    made = np.vstack([terms, len(answered) / len(terms) * metric.sums.turns(terms.shape[1])[0]])
    error = max(error, _error_of_score(made, metric.sums))
    return _wilson(score, (_Z / _student(len(terms))) ** 2 * score * (1 - score) / error**2)


def _wilson(share: float, rows: float) -> tuple[float, float]:
    """Return Wilson's interval; with no row to go by, (0, 1)."""
    middle = (rows * share + _Z**2 / 2) / (rows + _Z**2)
    half = _Z / (rows + _Z**2) * math.sqrt(rows * share * (1 - share) + _Z**2 / 4)
    return (max(0.0, middle - half) if share > 0 else 0.0), (min(1.0, middle + half) if share < 1 else 1.0)


def smallest_gain(rows: int, level: float = 1 - CONFIDENCE) -> float:
    """Return the smallest true gain of a 0/1 metric that so many rows confirm four times in five, at a level.

    The exact power of the exact McNemar test, if one row in ten turns from right to wrong; 1 if no gain is
    confirmed so often.

    Example:
        >>> [round(smallest_gain(rows), 3) for rows in (50, 200, 1000)]
        [0.282, 0.114, 0.045]
    """
    largest = 1 - 2 * _CHURN
    if _power(largest, rows, level) < POWER:
        return 1.0
    return float(
        cast("float", optimize.bisect(lambda gain: _power(gain, rows, level) - POWER, 0.0, largest, xtol=1e-4))
    )


def _power(gain: float, rows: int, level: float) -> float:
    """Return the probability that the exact McNemar test confirms a true gain."""
    changing = 2 * _CHURN + gain
    spread = 6 * math.sqrt(rows * changing * (1 - changing)) + 1
    changed = np.arange(max(0, int(rows * changing - spread)), min(rows, int(rows * changing + spread)) + 1)
    most_worse = stats.binom.ppf(level / 2, changed, 0.5) - 1  # P(worse <= this) stays under half of the level
    confirmed = stats.binom.cdf(most_worse, changed, _CHURN / changing)
    return float((stats.binom.pmf(changed, rows, changing) * confirmed).sum())
