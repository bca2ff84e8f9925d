"""`preceptor bench samplers`: InstructZero's sampler beside Optuna's, on three made-up searches and on a real task.

A made-up search is what InstructZero does without the models. A point of ten numbers is seen through a random matrix
in a hundred dimensions; there it has a level; each row is answered right above a level of its own, which depends on
where the point lies. The samplers see 20 such rows; the truth is the mean over a thousand others.

With `--data-dir`, the same samplers search in InstructZero itself, on a published task.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
import typer
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from scipy import stats

from preceptor.benchmarks import peers
from preceptor.benchmarks import samplers_real as real
from preceptor.benchmarks.samplers_real import SAMPLERS
from preceptor.cli.inputs import DEFAULT_LM
from preceptor.cli.view import print_json, print_table, progress
from preceptor.errors import ConfigError
from preceptor.scoring.statistics import CONFIDENCE
from preceptor.study import quiet_study
from preceptor.teleprompters.coupled import SCORES

Array = npt.NDArray[np.float64]
Level = Callable[[Array], Array]

FUNCTIONS: Final = ("bowl", "ripples", "plateaus")

LATENT: Final = 10
SEEN_THROUGH: Final = 100
ACTIVE: Final = 6
"""Of the hundred dimensions, those the level depends on."""

ROWS: Final = 20
FURTHER: Final = 80
FRESH: Final = 1000
BATCHES: Final = (25,) * 6
"""InstructZero's own: 25 points to start with, 5 iterations of 25."""

FINALISTS: Final = 4
INSTRUCTIONS: Final = 400
"""Different instructions on the plateaus: about as many points lead to one as PRESTO counted."""


@dataclass(frozen=True, slots=True)
class Search:
    """One search of the benchmark."""

    function: str
    sampler: str
    seed: int


class Problem:
    """What one search is on.

    Args:
        function: One of `FUNCTIONS`: a single top; the same with small tops all over; the first in steps, where
            all points of a step lead to the same instruction.
        seed: Of the matrix, the top, the rows and the steps.
    """

    def __init__(self, function: str, seed: int) -> None:
        rng = np.random.default_rng([seed, *function.encode()])
        self._function = function
        self._matrix = rng.uniform(-1, 1, (SEEN_THROUGH, LATENT))[:ACTIVE]  # the other dimensions change nothing
        self._top = rng.normal(0, 0.8, ACTIVE)
        self._steps = self._seen(rng.uniform(-1, 1, (INSTRUCTIONS, LATENT)))
        rows = ROWS + FURTHER + FRESH
        self._slopes, self._bars = rng.normal(0, 0.3, (rows, ACTIVE)), rng.normal(1.2, 1.0, rows)
        levels = self._level(self._seen(rng.uniform(-1, 1, (2000, LATENT))))
        self._mean, self._spread = float(levels.mean()), float(levels.std())

    def instruction(self, point: Array) -> int | None:
        """Return the number of the step a point is on; None where every point is its own instruction."""
        if self._function != "plateaus":
            return None
        return int(((self._steps - self._seen(point[None])) ** 2).sum(1).argmin())

    def scores(self, point: Array) -> Array:
        """Return 0 or 1 for each row, the first `ROWS` being those the search sees."""
        step = self.instruction(point)
        place = self._seen(point[None]) if step is None else self._steps[step][None]
        level = (float(self._level(place)[0]) - self._mean) / self._spread
        scores: Array = (level + self._slopes @ place[0] > self._bars).astype(float)
        return scores

    def _seen(self, points: Array) -> Array:
        places: Array = points @ self._matrix.T
        return places

    def _level(self, places: Array) -> Array:
        level: Array = -((places - self._top) ** 2).mean(1)
        if self._function == "ripples":
            level += 0.5 * np.cos(6 * places).mean(1)
        return level


def main(arguments: list[str]) -> None:
    """Run the benchmark with command-line arguments."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    app(arguments, standalone_mode=False, prog_name="preceptor bench samplers")


def run(
    seeds: Annotated[int, typer.Option(min=0, help="Made-up searches per function and sampler; 0 for none.")] = 16,
    sampler: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SAMPLERS)}; by default all.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes of the made-up searches.")] = 2,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data sets; compiles in earnest.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Published tasks, by default subj and trec.")] = None,
    lm: Annotated[str, typer.Option("--lm")] = DEFAULT_LM,
    proposer: Annotated[str | None, typer.Option(help="A model in this process; by default --lm.")] = None,
    calls: Annotated[int, typer.Option(help="Budget of one compile.")] = 1500,
    compiles: Annotated[int, typer.Option(min=1, help="Per task and sampler.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the JSON object here too.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Search with many seeds and say how good the instruction found is in truth.

    Compiles are kept in the cache, so that a stopped benchmark goes on; made-up searches start anew.
    """
    if seeds == 1:
        raise ConfigError("An interval needs 2 seeds at least; --seeds 0 leaves the made-up searches out.")
    unknown = set(sampler or ()) - set(SAMPLERS)
    if unknown:
        raise ConfigError(f"No sampler {sorted(unknown)[0]!r}; there are {', '.join(SAMPLERS)}.")
    names = [name for name in SAMPLERS if name in (sampler or SAMPLERS)]
    result: dict[str, Any] = _made_up(names, seeds, jobs) if seeds else {}
    if data_dir is not None:
        result["compiled"] = real.compiled(
            data_dir, task or ["subj", "trec"], names, lm, proposer or lm, calls, compiles
        )
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_json(result) if as_json else _print(result)


def _made_up(names: Sequence[str], seeds: int, jobs: int) -> dict[str, Any]:
    groups = [[Search(function, name, seed) for seed in range(seeds)] for function in FUNCTIONS for name in names]
    start = time.monotonic()
    with progress() as report:
        found = iter(peers.spread(measure, [one for group in groups for one in group], jobs, report, "searching"))
    measured = [_summary(group[0], list(islice(found, len(group)))) for group in groups]
    return {"rows": ROWS, "seconds": round(time.monotonic() - start), "measured": measured}


def measure(search: Search) -> dict[str, float]:
    """Search once; return how good the pick is in truth, chosen on 20 rows and on 100."""
    problem, start = Problem(search.function, search.seed), time.perf_counter()
    found = _points(problem, SAMPLERS[search.sampler](seed=search.seed))
    seconds = time.perf_counter() - start
    scores = np.array([problem.scores(point) for point in found])
    seen, truth = scores[:, :ROWS].mean(1), scores[:, ROWS + FURTHER :].mean(1)
    finalists = np.argsort(-seen, kind="stable")[:FINALISTS]
    rescored = finalists[scores[finalists, : ROWS + FURTHER].mean(1).argmax()]
    return {
        "searched": float(seen.max()),
        "true": float(truth[finalists[0]]),
        "rescored": float(truth[rescored]),
        "best": float(truth.max()),
        "distinct": len(found) / sum(BATCHES),
        "seconds": seconds,
    }


def _points(problem: Problem, sampler: BaseSampler) -> list[Array]:
    """Return the point of each different instruction, in the order they were come by."""
    study = quiet_study("search", InMemoryStorage(), sampler)
    box: dict[str, Any] = {f"z{at}": FloatDistribution(-1, 1) for at in range(LATENT)}
    found: dict[bytes | int, Array] = {}
    for size in BATCHES:
        asked = [study.ask(box) for _ in range(size)]
        for trial in asked:
            point = np.array([trial.params[name] for name in box])
            scores, step = problem.scores(point)[:ROWS], problem.instruction(point)
            trial.set_user_attr(SCORES, scores.tolist())
            key = point.tobytes() if step is None else step
            is_new = found.setdefault(key, point) is point
            study.tell(trial, float(scores.mean()) if is_new else None, None if is_new else TrialState.FAIL)
    return list(found.values())


def _summary(search: Search, found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    means = {name: fmean(one[name] for one in found) for name in found[0]}
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1)) / len(found) ** 0.5
    ends = {name: half * stdev(one[name] for one in found) for name in ("true", "rescored")}
    return {
        "function": search.function,
        "sampler": search.sampler,
        "seeds": len(found),
        "searched": means["searched"],
        **{
            f"{name}{end}": means[name] + sign * ends[name]
            for name in ends
            for end, sign in (("", 0), ("_low", -1), ("_high", 1))
        },
        "best": means["best"],
        "distinct": means["distinct"],
        "seconds": means["seconds"],
    }


def _print(result: dict[str, Any]) -> None:
    titles = {
        "measured": f"Score on the {ROWS} rows searched on; true score of the pick on {FRESH} others, and re-scored",
        "compiled": "InstructZero: best of the search rows, and of all train rows; confirmed on the rows kept back",
    }
    for name, title in titles.items():
        if name in result:
            header = [column for column in result[name][0] if column != "instructions"]
            print_table(title, header, [[row[column] for column in header] for row in result[name]])
