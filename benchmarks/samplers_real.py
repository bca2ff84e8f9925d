"""InstructZero with each sampler on a published task: the part of `preceptor bench samplers` that asks models."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from preceptor.benchmarks import tasks as published
from preceptor.benchmarks.tasks import Published
from preceptor.cli.inputs import lm_of
from preceptor.cli.view import progress
from preceptor.evidence import Evidence
from preceptor.lm.budget import Budget
from preceptor.lm.catalogue import cache_folder
from preceptor.run import fingerprint
from preceptor.study import CANDIDATES, FILE
from preceptor.teleprompters import InstructZero
from preceptor.teleprompters.coupled import CoupledSampler

SAMPLERS: Final[Mapping[str, Callable[..., BaseSampler]]] = {
    "coupled": CoupledSampler,
    "coupled, paper's kernel": functools.partial(CoupledSampler, explores=False),
    "optuna GPSampler": GPSampler,
    "optuna TPESampler": TPESampler,
    "random": RandomSampler,
}


def compiled(
    data_dir: Path, tasks: Sequence[str], samplers: Sequence[str], lm: str, proposer: str, calls: int, compiles: int
) -> list[dict[str, Any]]:
    """Compile each task with each of the samplers, `compiles` times; return what came of it."""
    found: list[dict[str, Any]] = []
    with progress() as report:
        models = lm_of(lm), lm_of(proposer)
        for task, seed, sampler in itertools.product(map(published.find, tasks), range(compiles), samplers):
            name = fingerprint([seed, sampler, calls, [model.model for model in models]])
            method = InstructZero(
                metric=task.metric,
                lm=models[0].copy(max_tokens=task.max_tokens),
                proposer=models[1],
                budget=Budget(calls=calls),
                sampler=SAMPLERS[sampler],
                run_dir=cache_folder() / "runs" / f"samplers-{task.name}-{name}",
                seed=seed,
                report=report,
            )
            found.append({"task": task.name, "seed": seed, "sampler": sampler, **_measured(method, task, data_dir)})
    return found


def _measured(method: InstructZero, task: Published, data_dir: Path) -> dict[str, Any]:
    parts = task.rows(data_dir, method.seed)
    program: Any = method.compile(task.student(), trainset=parts.train, valset=parts.val)
    evidence: Evidence = program.evidence
    search = _study(Path(evidence.run), "InstructZero predict").user_attrs
    return {
        "points": search["points"],
        "distinct": search["distinct instructions"],
        "left_out": search["left out"],
        **_searched(Path(evidence.run)),
        "gain": evidence.comparison.gain,
        "low": evidence.comparison.low,
        "high": evidence.comparison.high,
        "replaced": evidence.replaced,
        "calls": evidence.spent.calls,
        "seconds": round(evidence.seconds),
        "instructions": evidence.instructions,
    }


def _searched(run: Path) -> dict[str, float]:
    """Return the seed's and the best score of the search, on its rows and on all train rows."""
    trials = _study(run, CANDIDATES).get_trials(deepcopy=False)
    rows = {min(trial.intermediate_values) for trial in trials}
    first = [trial.intermediate_values[min(rows)] for trial in trials]
    best = max((trial for trial in trials if trial.state.name == "COMPLETE"), key=lambda trial: trial.value or 0.0)
    return {
        "seed_searched": first[0],
        "best_searched": max(first),
        "seed_rescored": trials[0].value or 0.0,
        "best_rescored": best.value or 0.0,
    }


def _study(run: Path, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(run / FILE))))
