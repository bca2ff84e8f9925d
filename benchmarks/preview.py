"""`preceptor bench preview`: ProTeGi's successors drawn at random, against those that a preview scores best.

A round makes fourteen prompts of each parent and lets eight compete. Ours draws the eight at random, as the paper
does; the published code's `--reject_on_errors` first scores each on at most sixteen of the rows that the parent got
wrong, and keeps the best eight. Here both spend the same calls: a preview is paid out of the rows that the bandit
would have had, half of them at most. Prompts, rows and rules are those of `preceptor bench bandits`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
import typer

from preceptor.benchmarks import bandits as simulated
from preceptor.benchmarks import peers
from preceptor.benchmarks.bandits import interval, puller
from preceptor.benchmarks.result import Json, Out, give
from preceptor.cli.view import print_table, progress
from preceptor.scoring import bandits

MADE: Final = 14
"""Prompts of one parent: 4 edits, and 2 paraphrases of each and of the parent."""

KEPT: Final = 8
PARENT: Final = 0.65
"""What a parent is right on, the middle of the others; the best of its successors is right on 0.75."""

MINIBATCH: Final = 64
MOST_ERRORS: Final = 16
"""Of one parent that each of its prompts is previewed on, as in the published code."""

RULES: Final = ("ucb", "successive-rejects")
AGREEMENTS: Final = (0.0, 0.5, 1.0)
PARENTS: Final = (1, 4)
"""Of a first round, and of a later one."""

Found = dict[str, tuple[float, float, float]]
"""By way of choosing and rule: is the best prompt picked, accuracy of the pick, mean accuracy of the beam."""


@dataclass(frozen=True, slots=True)
class Round:
    """One simulated round: so many parents, rows for each prompt kept, and share of rows with common luck."""

    parents: int
    budget: int
    agreement: float
    seed: int

    def prompts(self) -> tuple[Any, Any]:
        """Return accuracies, the parents' first, and scores of shape (prompts, rows), the minibatch last."""
        rng = np.random.default_rng([self.parents, self.seed])
        made = MADE * self.parents
        fresh = rng.permutation([simulated.BEST, *np.linspace(*simulated.OTHERS, made - 1)])
        accuracy = np.array([*[PARENT] * self.parents, *fresh])
        rows = simulated.ROWS + MINIBATCH
        is_shared = rng.random(rows) < self.agreement
        luck = np.where(is_shared, rng.random(rows), rng.random((len(accuracy), rows)))
        return accuracy, (luck < accuracy[:, None]).astype(float)


def run(
    seeds: Annotated[int, typer.Option(min=2, help="Simulated rounds per size, budget and agreement.")] = 1000,
    budget: Annotated[list[int] | None, typer.Option(min=1, help="Rows per prompt; by default 12, 25 and 50.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Choose the successors of the same simulated rounds both ways, at equal calls."""
    sizes = list(itertools.product(AGREEMENTS, PARENTS, budget or [12, 25, 50]))
    work = [Round(parents, rows, agreement, seed) for agreement, parents, rows in sizes for seed in range(seeds)]
    with progress() as report:
        found = peers.spread(measure, work, jobs, report, "choosing")
    measured = [
        _line(size, rule, found[at * seeds : (at + 1) * seeds]) for at, size in enumerate(sizes) for rule in RULES
    ]
    result = {"seeds": seeds, "measured": measured}
    give(result, out, as_json=as_json, show=_print)


def measure(one: Round) -> Found:
    """Return what both ways of choosing lead to, with each rule."""
    accuracy, scores = one.prompts()
    found: Found = {}
    for rule in RULES:
        for way in ("random", "preview"):
            rng = np.random.default_rng([one.parents, one.seed, 1])
            total = one.budget * one.parents * (1 + KEPT)
            most = MOST_ERRORS if way == "preview" else 0
            kept, paid = _kept(one.parents, scores[:, simulated.ROWS :], min(most, _affordable(one, total)), rng)
            ranking = _ranking(rule, scores[kept, : simulated.ROWS], total - paid)
            true = accuracy[kept][list(ranking)]
            beam = float(true[: simulated.BEAM].mean())
            found[f"{way} {rule}"] = (float(true[0] == simulated.BEST), float(true[0]), beam)
    return found


def _affordable(one: Round, total: int) -> int:
    """Return the errors per prompt that half of the budget pays for."""
    return total // 2 // (MADE * one.parents)


def _kept(parents: int, minibatch: Any, most: int, rng: Any) -> tuple[list[int], int]:
    """Return the parents and eight successors of each, and the rows that choosing them took.

    Args:
        parents: How many; the successors stand behind them, parent by parent.
        minibatch: Scores of all prompts on it.
        most: Errors of its parent that each successor is previewed on; 0 draws at random.
        rng: Draws errors, and among equals.
    """
    kept, paid = list(range(parents)), 0
    for parent in range(parents):
        made = parents + MADE * parent + rng.permutation(MADE)
        wrong = rng.permutation(np.flatnonzero(minibatch[parent] == 0))[:most]
        right = minibatch[made][:, wrong].sum(axis=1)
        kept += sorted(made[np.argsort(-right, kind="stable")[:KEPT]].tolist())
        paid += MADE * len(wrong)
    return kept, paid


def _ranking(rule: str, scores: Any, total: int) -> tuple[int, ...]:
    arms, rows = scores.shape
    return bandits.rule(rule)(arms, puller(scores), rows, total).ranking


def _line(size: tuple[float, int, int], rule: str, found: Sequence[Found]) -> dict[str, Any]:
    """Return how often the best was picked both ways, and what a preview adds to the pick's and the beam's accuracy."""
    agreement, parents, rows = size
    pairs = [(one[f"random {rule}"], one[f"preview {rule}"]) for one in found]
    picked = {way: sum(pair[at][0] for pair in pairs) / len(pairs) for at, way in enumerate(("random", "preview"))}
    return {
        "agreement": agreement,
        "parents": parents,
        "rows each": rows,
        "rule": rule,
        **picked,
        **interval("picks more", [after[0] - before[0] for before, after in pairs]),
        **interval("better pick", [after[1] - before[1] for before, after in pairs]),
        **interval("better beam", [after[2] - before[2] for before, after in pairs]),
    }


def _print(result: dict[str, Any]) -> None:
    header = list(result["measured"][0])
    title = f"Successors drawn at random against previewed, at equal calls, in {result['seeds']} simulated rounds"
    print_table(title, header, [list(line.values()) for line in result["measured"]])
