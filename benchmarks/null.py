"""`preceptor bench null`: what a method claims where nothing can be gained, and whether it sees a gain that is there.

On a coin flip no prompt can help: every replacement is a false one, and every claimed gain is the
winner's curse. With `--effect`, one proposal in eight is truly 15 points better than the user's prompt.
DSPy's own optimizers run beside ours, raw.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, stdev
from typing import Annotated, Any, Final

import dspy
import numpy as np
import typer
from scipy import stats

from preceptor.benchmarks import peers
from preceptor.benchmarks.peers import PEERS, Case, Claim
from preceptor.benchmarks.result import Json, Out, give
from preceptor.cli.view import print_table, progress
from preceptor.errors import ConfigError
from preceptor.lm.adapter import DirectAdapter
from preceptor.lm.budget import Budget
from preceptor.lm.seam import predictors
from preceptor.modules import Classify
from preceptor.scoring.metrics import wrap
from preceptor.scoring.statistics import CONFIDENCE
from preceptor.testing import coin_flip, graded

LABELS: Final = ("heads", "tails")
SEED: Final = "Call the toss."
BETTER: Final = "Call the toss by its number"
NO_BETTER: Final = "Call the toss by its sound"
SEED_ACCURACY: Final = 0.55
BETTER_ACCURACY: Final = 0.70
BUDGET: Final = Budget(calls=2000)
"""Of one compile of ours on the coin, proposals and confirmation included; none where there is a gain to be found."""

FRESH: Final = 500
"""Rows a replaced prompt is tried on that no compile has seen."""


@dataclass(frozen=True, slots=True)
class Compile:
    """One compile of the benchmark.

    Attributes:
        method: One of ours, or of `PEERS`.
        rows: Validation rows; as many train rows.
        seed: Of the method, the rows and the model.
        agreement: Of the graded model, see `preceptor.testing.graded`; None for the coin.
        proposals: Texts the graded model proposes, evenly; the first eighth of them are better than the seed.
    """

    method: str
    rows: int
    seed: int
    agreement: float | None = None
    proposals: int = 8


def run(
    seeds: Annotated[int, typer.Option(min=2, help="Compiles per size, of our methods.")] = 200,
    peer_seeds: Annotated[int, typer.Option(min=2, help="Compiles per size, of DSPy's optimizers.")] = 20,
    rows: Annotated[list[int] | None, typer.Option(help="Validation rows; as many train rows.")] = None,
    effect: Annotated[bool, typer.Option("--effect", help="A true gain of 15 points is there to be found.")] = False,
    proposals: Annotated[int, typer.Option(min=8, help="Texts proposed with --effect; an eighth are better.")] = 8,
    method: Annotated[list[str] | None, typer.Option(help="By default all.")] = None,
    wrapped: Annotated[bool, typer.Option("--wrapped", help="DSPy's optimizers inside our contract too.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Compile with many seeds and count what is replaced and claimed."""
    counts = {name: seeds for name in peers.ours(wrapped=wrapped)} | {name: peer_seeds for name in PEERS}
    unknown = set(method or ()) - set(counts)
    if unknown:
        raise ConfigError(f"No method {sorted(unknown)[0]!r}; there are {', '.join(counts)}.")
    groups = [
        [Compile(name, size, seed, agreement, proposals) for seed in range(counts[name])]
        for agreement in ([0.5, 0.0] if effect else [None])
        for size in rows or ([200] if effect else [50, 200])
        for name in counts
        if name in (method or counts)
    ]
    start = time.monotonic()
    with progress() as report:
        found = iter(peers.spread(measure, [one for group in groups for one in group], jobs, report, "compiling"))
    measured = [_summary(group[0], list(islice(found, len(group)))) for group in groups]
    result = {"model": "graded" if effect else "coin", "seconds": round(time.monotonic() - start), "measured": measured}
    give(result, out, as_json=as_json, show=_print)


def measure(compiled: Compile) -> dict[str, float]:
    """Compile once; return what was replaced, claimed, promised by the search, and truly gained."""
    case = _coin(compiled) if compiled.agreement is None else _graded(compiled, compiled.agreement)
    kinds = peers.ours(wrapped=True)
    name = compiled.method
    budget = BUDGET if compiled.agreement is None else None
    claim = peers.compile_ours(kinds[name], case, budget) if name in kinds else PEERS[name](case)
    true = _fresh_gain(compiled, case, claim) if compiled.agreement is None else _true_gain(claim)
    return {
        "replaced": claim.replaced,
        "claimed": claim.gain,
        "promised": _promised(compiled, claim),
        "true": true,
        "calls": claim.calls,
    }


def _promised(compiled: Compile, claim: Claim) -> float:
    """Return what the search alone would have claimed: its winner's score minus the seed's true accuracy."""
    if claim.evidence is None:
        return claim.gain
    base = 0.5 if compiled.agreement is None else SEED_ACCURACY
    return (claim.evidence.search_score or base) - base


def power(rows: int, better: float, worse: float) -> float:
    """Return how likely the confirmation is to confirm one given candidate: the exact McNemar test's power.

    Args:
        rows: Confirmation rows.
        better: Chance that a row is right under the candidate only.
        worse: Chance that it is right under the seed only.

    Example:
        >>> round(power(6, 1.0, 0.0), 3), power(5, 1.0, 0.0)  # 6 of 6 has p = 2 / 64, 5 of 5 has p = 2 / 32
        (1.0, 0.0)
    """
    changed = np.arange(rows + 1)
    least = stats.binom.isf((1 - CONFIDENCE) / 2, changed, 0.5) + 1  # the fewest improvements that are significant
    confirmed = stats.binom.sf(least - 1, changed, better / (better + worse))
    return float((stats.binom.pmf(changed, rows, better + worse) * confirmed).sum())


def effect_power(rows: int, agreement: float) -> float:
    """Return the power on the graded model: rows that agree share their luck, in the others it is drawn anew.

    Example:
        >>> [round(effect_power(200, agreement), 2) for agreement in (0.5, 0.0)]
        [0.97, 0.85]
    """
    alone = 1 - agreement
    better = agreement * (BETTER_ACCURACY - SEED_ACCURACY) + alone * BETTER_ACCURACY * (1 - SEED_ACCURACY)
    return power(rows, better, alone * SEED_ACCURACY * (1 - BETTER_ACCURACY))


def _coin(compiled: Compile) -> Case:
    """Return a task on which every prompt is right half of the time: labels alternate, the coin is even."""
    return _case(compiled, coin_flip(LABELS, seed=compiled.seed))


def _graded(compiled: Compile, agreement: float) -> Case:
    truth = {row.text: row.side for row in _rows(compiled, 0, 2 * compiled.rows)}
    better, count = compiled.proposals // 8, compiled.proposals
    model = graded(
        truth,
        {BETTER: BETTER_ACCURACY},
        proposals=[f"{BETTER if number < better else NO_BETTER}, way {number}." for number in range(count)],
        default=SEED_ACCURACY,
        agreement=agreement,
        seed=compiled.seed,
        name=f"graded-{compiled.seed}",
    )
    return _case(compiled, model)


def _case(compiled: Compile, lm: dspy.LM) -> Case:
    rows = _rows(compiled, 0, 2 * compiled.rows)
    return Case(
        student=Classify("text -> side: Literal['heads', 'tails']", instructions=SEED),
        lm=peers.speaking(lm),
        train=rows[: compiled.rows],
        val=rows[compiled.rows :],
        output="side",
        seed=compiled.seed,
    )


def _rows(compiled: Compile, start: int, count: int) -> list[dspy.Example]:
    return [
        dspy.Example(text=f"Toss {compiled.seed}-{number}", side=LABELS[number % 2]).with_inputs("text")
        for number in range(start, start + count)
    ]


def _fresh_gain(compiled: Compile, case: Case, claim: Claim) -> float:
    """Return the returned program's score minus the student's on rows no compile has seen; 0 if it is the student."""
    if not claim.replaced:
        return 0.0
    rows = _rows(compiled, 2 * compiled.rows, FRESH)
    return _score(claim.program, case.lm, rows) - _score(case.student, case.lm, rows)


def _score(program: dspy.Module, lm: dspy.LM, rows: Sequence[dspy.Example]) -> float:
    metric = wrap("accuracy", "side")
    with dspy.context(lm=lm, adapter=DirectAdapter(), disable_history=True):
        return fmean(metric(row, program(**row.inputs())) for row in rows)


def _true_gain(claim: Claim) -> float:
    """Return the true accuracy of what was returned minus the seed's."""
    [(_, predictor)] = predictors(claim.program)
    return BETTER_ACCURACY - SEED_ACCURACY if BETTER in predictor.signature.instructions else 0.0


def _summary(compiled: Compile, found: list[dict[str, float]]) -> dict[str, Any]:
    replaced, seeds = sum(map(bool, (one["replaced"] for one in found))), len(found)
    share = stats.binomtest(replaced, seeds).proportion_ci(CONFIDENCE, "exact")
    claimed = [one["claimed"] for one in found]
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) * stdev(claimed) / seeds**0.5
    return {
        **_known(compiled),
        "method": compiled.method,
        "rows": compiled.rows,
        "seeds": seeds,
        "replaced": replaced,
        "share": replaced / seeds,
        "share_low": float(share.low),
        "share_high": float(share.high),
        "claimed": fmean(claimed),
        "claimed_low": fmean(claimed) - half,
        "claimed_high": fmean(claimed) + half,
        "true": fmean(one["true"] for one in found),
        "promised": fmean(one["promised"] for one in found),
        "calls": round(fmean(one["calls"] for one in found)),
    }


def _known(compiled: Compile) -> dict[str, float]:
    """Return what is known of the graded model."""
    if compiled.agreement is None:
        return {}
    power = effect_power(compiled.rows, compiled.agreement)
    return {"agreement": compiled.agreement, "proposals": compiled.proposals, "power": power}


def _print(result: dict[str, Any]) -> None:
    names = list(result["measured"][0])
    title = {
        "coin": f"A coin flip: no prompt can help. True gain on {FRESH} fresh rows, of the programs returned",
        "graded": "A gain of 0.15 is there. Power: of the confirmation alone; true: of the programs returned",
    }[result["model"]]
    header = [name.replace("_", " ") for name in names]
    print_table(title, header, [[row[name] for name in names] for row in result["measured"]])
