"""Best-arm identification: which of many candidates is best, with a given number of rows to score them on.

Five published rules, as pure policies: they decide which arms to pull, the caller pulls and keeps the means.
Arms walk one shared order of rows: an arm's k-th pull is the k-th row of that order, so any two arms are
compared on the same rows as far as the shorter walk went. Means are over all rows an arm has seen, time is
counted in rows, and an arm that has seen every row of the order is known and not pulled again.

    uniform             every arm gets the same number of rows
    ucb                 mean + c * sqrt(ln t / n), Auer et al. 2002, as ProTeGi uses it
    ucb_e               mean + sqrt(a / n), Audibert and Bubeck 2010; ProTeGi's c * sqrt(c / n) is a = c ** 3
    successive_rejects  K - 1 phases, the worst arm leaves after each, Audibert and Bubeck 2010
    successive_halving  ceil(log2 K) rounds, the worse half leaves after each, Karnin et al. 2013
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

Pull = Callable[[Mapping[int, int]], Mapping[int, float]]
"""Shows arms their next rows: arm -> how many, at least 1. Returns each one's mean over all rows it has seen."""

BATCH: Final = 32
"""Rows the two confidence bounds ask for at once, so that they can be scored in parallel."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a rule found.

    Attributes:
        ranking: All arms, best first; ties go to the arm that came first.
        means: Mean reward of each arm, in [0, 1]; 0 if it was never pulled.
        pulls: Rows each arm has seen.
    """

    ranking: tuple[int, ...]
    means: tuple[float, ...]
    pulls: tuple[int, ...]


class Rule(Protocol):
    """A rule of selection.

    Args:
        arms: How many, at least 1.
        pull: Scores them.
        rows: Length of the shared order, at least 1: the most an arm can be pulled.
        budget: Pulls of all arms together; never passed.
    """

    def __call__(self, arms: int, pull: Pull, rows: int, budget: int) -> Selection:
        """Return the arms, ranked."""
        ...


class _Arms:
    """What has been seen of the arms so far."""

    def __init__(self, arms: int, pull: Pull, rows: int, budget: int) -> None:
        self.means = [0.0] * arms
        self.pulls = [0] * arms
        self.left = budget
        self._pull = pull
        self._rows = rows

    def show(self, counts: Mapping[int, int]) -> None:
        """Pull arms so many times more, or as often as there are rows."""
        fits = {arm: min(count, self._rows - self.pulls[arm]) for arm, count in counts.items()}
        fits = {arm: count for arm, count in fits.items() if count > 0}
        if not fits:
            return
        for arm, mean in self._pull(fits).items():
            self.means[arm] = mean
            self.pulls[arm] += fits[arm]
        self.left -= sum(fits.values())

    def best_first(self, arms: Sequence[int]) -> list[int]:
        """Return arms by their means; those never pulled come last."""
        return sorted(arms, key=lambda arm: (self.pulls[arm] == 0, -self.means[arm], arm))

    def selection(self, ranking: Sequence[int]) -> Selection:
        return Selection(tuple(ranking), tuple(self.means), tuple(self.pulls))


def uniform(arms: int, pull: Pull, rows: int, budget: int) -> Selection:
    """Show every arm the same rows; those that don't divide evenly go to the arms that came first.

    Example:
        >>> uniform(2, lambda counts: {arm: (0.5, 0.75)[arm] for arm in counts}, rows=9, budget=8)
        Selection(ranking=(1, 0), means=(0.5, 0.75), pulls=(4, 4))
    """
    known = _Arms(arms, pull, rows, budget)
    known.show({arm: budget // arms + (arm < budget % arms) for arm in range(arms)})
    return known.selection(known.best_first(range(arms)))


def ucb(arms: int, pull: Pull, rows: int, budget: int, *, c: float = 2.0, batch: int = 1) -> Selection:
    """Pull the arm with the highest mean + c * sqrt(ln t / n) in the t-th pull of all; rank by mean.

    Args:
        arms: See `Rule`, as for the next three.
        pull: Scores them.
        rows: The most an arm can be pulled.
        budget: Pulls of all arms together.
        c: Weight of the bonus (2.0 in ProTeGi).
        batch: Pulls decided at once, with the means before the first and the t of the last; 1 is the published rule.
    """
    return _bounded(_Arms(arms, pull, rows, budget), rows, lambda t: c**2 * math.log(t), batch)


def ucb_e(arms: int, pull: Pull, rows: int, budget: int, *, c: float = 2.0, batch: int = 1) -> Selection:
    """Pull the arm with the highest mean + c * sqrt(c / n); rank by mean. Arguments as in `ucb`."""
    return _bounded(_Arms(arms, pull, rows, budget), rows, lambda t: c**3, batch)


def _bounded(known: _Arms, rows: int, exploration: Callable[[int], float], batch: int) -> Selection:
    """Pull by mean + sqrt(exploration(t) / n) until the budget or the rows are used up."""
    while known.left and min(known.pulls) < rows:
        width = min(batch, known.left)
        known.show(_highest(known, rows, exploration(sum(known.pulls) + width), width))
    return known.selection(known.best_first(range(len(known.means))))


def _highest(known: _Arms, rows: int, exploration: float, width: int) -> dict[int, int]:
    """Return how often to pull which arms: each time the one with the highest bound, which sinks with every pull."""

    def entry(arm: int, more: int) -> tuple[float, int]:
        seen = known.pulls[arm] + more
        return -(known.means[arm] + math.sqrt(exploration / seen)) if seen else -math.inf, arm

    counts = Counter[int]()
    bounds = [entry(arm, 0) for arm in range(len(known.means)) if known.pulls[arm] < rows]
    heapq.heapify(bounds)
    for _ in range(min(width, sum(rows - seen for seen in known.pulls))):
        _, arm = heapq.heappop(bounds)
        counts[arm] += 1
        if known.pulls[arm] + counts[arm] < rows:
            heapq.heappush(bounds, entry(arm, counts[arm]))
    return dict(sorted(counts.items()))


def successive_rejects(arms: int, pull: Pull, rows: int, budget: int) -> Selection:
    """Pull all arms left equally often in each of `arms` - 1 phases, and drop the worst after each.

    After phase k an arm has seen n_k = ceil((budget - arms) / (log_bar * (arms + 1 - k))) rows, where
    log_bar = 1/2 + 1/2 + 1/3 + ... + 1/arms. The ranking is the last one left, then the latest dropped.
    A budget below `arms` is shared as `uniform` shares it.
    """
    if arms == 1 or budget <= arms:
        return uniform(arms, pull, rows, budget)
    known, alive, dropped = _Arms(arms, pull, rows, budget), list(range(arms)), list[int]()
    log_bar = 0.5 + sum(1 / rank for rank in range(2, arms + 1))
    for phase in range(1, arms):
        upto = math.ceil((budget - arms) / (log_bar * (arms + 1 - phase)))
        known.show({arm: upto - known.pulls[arm] for arm in alive})
        alive = known.best_first(alive)
        dropped.insert(0, alive.pop())
    return known.selection(alive + dropped)


def successive_halving(arms: int, pull: Pull, rows: int, budget: int) -> Selection:
    """Give each of ceil(log2 arms) rounds an equal part of the budget, and drop the worse half after each.

    A round shows each of the S arms left floor(budget / (S * ceil(log2 arms))) rows and keeps ceil(S / 2). The
    ranking is the last one left, then those dropped, latest and best first. Means are over all rounds; in the
    paper over the last one only. A budget too small for a row each in the first round is shared as `uniform` does.
    """
    rounds = math.ceil(math.log2(arms)) if arms > 1 else 0
    if not rounds or budget < arms * rounds:
        return uniform(arms, pull, rows, budget)
    known, alive, dropped = _Arms(arms, pull, rows, budget), list(range(arms)), list[int]()
    for _ in range(rounds):
        known.show(dict.fromkeys(alive, budget // (len(alive) * rounds)))
        alive = known.best_first(alive)
        kept = -(-len(alive) // 2)
        alive, dropped = alive[:kept], alive[kept:] + dropped
    return known.selection(alive + dropped)


def rule(name: str, c: float = 2.0) -> Rule:
    """Return the rule of that name, one of `RULES`; `c` is the weight of the bonus of the two that have one."""
    settings: dict[str, Any] = {"c": c, "batch": BATCH} if name in ("ucb", "ucb-e") else {}
    chosen = RULES[name]
    return lambda arms, pull, rows, budget: chosen(arms, pull, rows, budget, **settings)


RULES: Final[Mapping[str, Callable[..., Selection]]] = {
    "ucb": ucb,
    "ucb-e": ucb_e,
    "successive-rejects": successive_rejects,
    "successive-halving": successive_halving,
    "uniform": uniform,
}
"""By name."""
