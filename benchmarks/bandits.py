"""`preceptor bench bandits`: how often each rule of selection picks the best of several prompts, and at what budget.

Prompts are arms of known accuracy on simulated rows: one is right on 0.75 of them, the others on 0.70 down to 0.55,
evenly spread. Half of the rows share their luck under all prompts, as real rows do. Beside our five rules stand those
of ProTeGi's published code, restated from the arithmetic that seeds/protegi.md describes. All rules see the same
simulated tasks, so that each is compared with uniform task by task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Annotated, Any, Final

import numpy as np
import typer
from scipy import stats

from preceptor.benchmarks import peers
from preceptor.benchmarks.result import Json, Out, give
from preceptor.cli.view import print_table, progress
from preceptor.scoring import bandits
from preceptor.scoring.statistics import CONFIDENCE

BEST: Final = 0.75
OTHERS: Final = (0.70, 0.55)
ROWS: Final = 200
AGREEMENT: Final = 0.5
"""Share of rows whose luck is the same under every prompt."""

BEAM: Final = 4
ROUNDS: Final = 8
PROMPTS_A_ROUND: Final = 8
LEAST_ROWS: Final = 4
"""The published code's: rounds of its confidence bounds, prompts in each, and fewest rows of a rejection."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """One simulated task: so many prompts on `ROWS` rows, and a budget in rows per prompt."""

    arms: int
    budget: int
    seed: int

    def scores(self) -> tuple[Any, int]:
        """Return what each prompt scores on each row, of shape (arms, rows), 0 or 1, and which prompt is best."""
        rng = np.random.default_rng([self.arms, self.seed])
        accuracy = rng.permutation([BEST, *np.linspace(*OTHERS, self.arms - 1)])
        is_shared = rng.random(ROWS) < AGREEMENT
        luck = np.where(is_shared, rng.random(ROWS), rng.random((self.arms, ROWS)))
        return (luck < accuracy[:, None]).astype(float), int(accuracy.argmax())


Found = tuple[float, float]
"""Chance that a ranking's first is the best prompt, and that the best is in its beam; ties are broken evenly."""


def run(
    seeds: Annotated[int, typer.Option(min=2, help="Simulated tasks per number of prompts and budget.")] = 1000,
    arms: Annotated[list[int] | None, typer.Option(min=2, help="Prompts; by default 9 and 36.")] = None,
    budget: Annotated[list[int] | None, typer.Option(min=1, help="Rows per prompt; by default 12, 25 and 50.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Select with every rule on the same simulated tasks."""
    start = time.monotonic()
    sizes = [(count, rows) for count in arms or [9, 36] for rows in budget or [12, 25, 50]]
    work = [Simulation(count, rows, seed) for count, rows in sizes for seed in range(seeds)]
    with progress() as report:
        found = peers.spread(measure, work, jobs, report, "selecting")
    measured = [
        line
        for at, (count, rows) in enumerate(sizes)
        for line in _lines(count, rows, found[at * seeds : (at + 1) * seeds])
    ]
    result = {"seeds": seeds, "rows": ROWS, "seconds": round(time.monotonic() - start), "measured": measured}
    give(result, out, as_json=as_json, show=_print)


def measure(simulation: Simulation) -> dict[str, Found]:
    """Return what every rule found on one simulated task."""
    scores, best = simulation.scores()
    total = simulation.arms * simulation.budget
    found = {name: _ours(bandits.rule(name), scores, best, total) for name in bandits.RULES}
    for name, rule in PUBLISHED.items():
        rng = np.random.default_rng([simulation.arms, simulation.seed, 1])
        first, beam = (_chance(rule(scores, total, keep, rng), best, keep) for keep in (1, BEAM))
        found[f"published {name}"] = (first, beam)
    return found


def puller(scores: Any) -> bandits.Pull:
    """Return what shows a rule its next rows, of scores of shape (arms, rows)."""
    arms, rows = scores.shape
    means = (scores.cumsum(axis=1) / np.arange(1, rows + 1)).tolist()
    pulls = [0] * arms

    def pull(counts: Mapping[int, int]) -> Mapping[int, float]:
        for arm, count in counts.items():
            pulls[arm] += count
        return {arm: means[arm][pulls[arm] - 1] for arm in counts}

    return pull


def _ours(rule: bandits.Rule, scores: Any, best: int, total: int) -> Found:
    arms, rows = scores.shape
    ranking = rule(arms, puller(scores), rows, total).ranking
    return float(ranking[0] == best), float(best in ranking[:BEAM])


def _chance(ranks: Sequence[float], best: int, keep: int) -> float:
    """Return how likely the best is among the `keep` with the highest ranks, ties broken evenly.

    Example:
        >>> _chance([0.0, 2.0, 2.0, 2.0, 3.0], best=2, keep=2), _chance([0.0, 1.0], best=0, keep=1)
        (0.3333333333333333, 0.0)
    """
    higher = sum(rank > ranks[best] for rank in ranks)
    equal = sum(rank == ranks[best] for rank in ranks)
    return min(1.0, max(0.0, (keep - higher) / equal))


def _confidence_bound(scores: Any, total: int, keep: int, rng: Any, *, time_bonus: bool, c: float) -> list[float]:
    """Rank as the published code's UCB does: eight rounds, each the same rows for eight prompts.

    The bonus is c * sqrt(ln(round) / rows seen), with the round counted from 0, or c * sqrt(c / rows seen). The budget,
    which that code fixes at 8 x 8 x 32, is spread over its rounds.
    """
    del keep
    arms, rows = scores.shape
    width = min(PROMPTS_A_ROUND, arms)
    right, seen = np.zeros(arms), np.zeros(arms)
    each = total // width
    for number in range(ROUNDS):
        sample = rng.permutation(rows)[: min(rows, each * (number + 1) // ROUNDS - each * number // ROUNDS)]
        if number == 0:
            chosen = rng.permutation(arms)[:width]
        else:
            bonus = math.log(number) if time_bonus else c
            chosen = np.argsort(right / np.maximum(seen, 1) + c * np.sqrt(bonus / (seen + 1e-3)))[::-1][:width]
        right[chosen] += scores[chosen][:, sample].sum(axis=1)
        seen[chosen] += len(sample)
    return list(right / np.maximum(seen, 1))


def _rejects(scores: Any, total: int, keep: int, rng: Any) -> list[float]:
    """Rank as the published code's successive rejects does: each phase judges by its own fresh rows alone.

    It stops when the beam is full, and takes four rows at least.
    """
    arms, rows = scores.shape
    alive, ranks, before = list(range(arms)), [math.inf] * arms, 0.0
    phases = arms - keep
    log_bar = 0.5 + sum(1 / rank for rank in range(2, phases + 1))
    for phase in range(1, phases + 1):
        upto = (total - phases) / (log_bar * (phases + 1 - phase))
        sample = rng.permutation(rows)[: max(LEAST_ROWS, int(upto - before))]
        worst = int(scores[alive][:, sample].mean(axis=1).argmin())
        ranks[alive.pop(worst)], before = float(phase), upto
    return ranks


def _halving(scores: Any, total: int, keep: int, rng: Any) -> list[float]:
    """Rank as the published code's successive halving does: what is below the mean of a round's fresh rows goes."""
    del keep
    arms, rows = scores.shape
    alive, ranks, rounds = np.arange(arms), [math.inf] * arms, math.ceil(math.log2(arms))
    for number in range(rounds):
        sample = rng.permutation(rows)[: total // (len(alive) * rounds)]
        means = scores[alive][:, sample].mean(axis=1)
        is_below = means < means.mean() - 1e-9  # equal means have rounding errors
        for arm in alive[is_below].tolist():
            ranks[arm] = float(number)
        alive = alive[~is_below]
    return ranks


PUBLISHED: Final[Mapping[str, Callable[[Any, int, int, Any], list[float]]]] = {
    "ucb": partial(_confidence_bound, time_bonus=True, c=1.0),
    "ucb-e": partial(_confidence_bound, time_bonus=False, c=1.0),
    "successive-rejects": _rejects,
    "successive-halving": _halving,
}
"""Published rule -> rank of each prompt, higher is better; its brute force is our `uniform`. c = 1.0 as there."""


def _lines(arms: int, budget: int, found: Sequence[Mapping[str, Found]]) -> list[dict[str, Any]]:
    """Return one line a rule: both chances with 95 % intervals, and the first one minus that of uniform."""
    return [
        {
            "prompts": arms,
            "rows each": budget,
            "rule": name,
            **interval("picked", [one[name][0] for one in found]),
            **interval("over uniform", [one[name][0] - one["uniform"][0] for one in found]),
            **interval("in beam", [one[name][1] for one in found]),
        }
        for name in found[0]
    ]


def interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the mean of independent values, with its 95 % interval."""
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * stdev(values) / len(values) ** 0.5
    return {name: fmean(values), f"{name} low": fmean(values) - half, f"{name} high": fmean(values) + half}


def _print(result: dict[str, Any]) -> None:
    header = list(result["measured"][0])
    title = f"How often the best prompt is picked, and kept in a beam of {BEAM}, in {result['seeds']} simulated tasks"
    print_table(title, header, [list(line.values()) for line in result["measured"]])
