"""Made-up searches with each sampler: the part of `preceptor bench samplers` that asks no model.

A made-up search is what InstructZero does without the models. A point of ten numbers is seen through a random matrix
in a hundred dimensions; there it has a level; each row is answered right above a level of its own, which depends on
where the point lies. The samplers see 20 such rows; the truth is the mean over a thousand others.

Each search is kept as a line of JSON, and made again only if it is another: by another Optuna, or after a change of
this file or of the sampler's.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from preceptor.benchmarks import peers
from preceptor.benchmarks.samplers_real import SAMPLERS
from preceptor.run import fingerprint
from preceptor.study import quiet_study
from preceptor.task import Report
from preceptor.teleprompters.coupled import SCORES

Array = npt.NDArray[np.float64]

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


def searched(searches: Sequence[Search], jobs: int, report: Report, kept: Path) -> list[dict[str, float]]:
    """Return what each search found, in order; those that the file `kept` has are not made again.

    Args:
        searches: What to search.
        jobs: Processes.
        report: Told how far it is.
        kept: One line of JSON a search, added to as they are done.
    """
    known = _known(kept)
    missing = [search for search in searches if _key(search) not in known]
    kept.parent.mkdir(parents=True, exist_ok=True)
    peers.spread(partial(_measured, kept), missing, jobs, report, "searching")
    known = _known(kept) if missing else known
    return [known[_key(search)] for search in searches]


def _known(kept: Path) -> dict[str, dict[str, float]]:
    """Return what the file has; a line that was cut short is none."""
    found: dict[str, dict[str, float]] = {}
    for line in kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []:
        try:
            one = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[one["key"]] = one["found"]
    return found


def _key(search: Search) -> str:
    """Return what tells a search from all that may end otherwise."""
    sampler = SAMPLERS[search.sampler]
    kind = sampler.func if isinstance(sampler, partial) else sampler
    code = [inspect.getsource(sys.modules[name]) for name in (__name__, kind.__module__)]
    return fingerprint([asdict(search), optuna.__version__, *code])


def _measured(kept: Path, search: Search) -> None:
    line = json.dumps({"key": _key(search), **asdict(search), "found": measure(search)})
    with kept.open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")  # one write; the first line feed ends what a killed process began


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
