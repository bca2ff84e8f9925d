"""`preceptor bench samplers`: InstructZero's sampler beside Optuna's, on three made-up searches and on a real task.

The made-up ones are in samplers_made.py, and ask no model. With `--data-dir`, the same samplers search in
InstructZero itself, on published tasks: samplers_real.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Final

import typer
from scipy import stats

from preceptor.benchmarks import samplers_made as made
from preceptor.benchmarks import samplers_real as real
from preceptor.benchmarks.result import Json, Out, give
from preceptor.benchmarks.samplers_made import FRESH, FUNCTIONS, ROWS, Search
from preceptor.benchmarks.samplers_real import SAMPLERS
from preceptor.cli.inputs import DEFAULT_LM
from preceptor.cli.view import print_table, progress
from preceptor.errors import ConfigError
from preceptor.lm.catalogue import cache_folder
from preceptor.scoring.statistics import CONFIDENCE

CHANCE: Final = "random"
"""The sampler that all are compared with, search by search."""

Found = Mapping[str, float]


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
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Search with many seeds and say how good the instruction found is in truth.

    Compiles and made-up searches are kept in the cache, so that a stopped benchmark goes on.
    """
    if seeds == 1:
        raise ConfigError("An interval needs 2 seeds at least; --seeds 0 leaves the made-up searches out.")
    unknown = set(sampler or ()) - set(SAMPLERS)
    if unknown:
        raise ConfigError(f"No sampler {sorted(unknown)[0]!r}; there are {', '.join(SAMPLERS)}.")
    names = [name for name in SAMPLERS if name in (sampler or SAMPLERS)]
    result: dict[str, Any] = {"rows": ROWS, "measured": _made_up(names, seeds, jobs)} if seeds else {}
    if data_dir is not None:
        result["compiled"] = real.compiled(
            data_dir, task or ["subj", "trec"], names, lm, proposer or lm, calls, compiles
        )
    give(result, out, as_json=as_json, show=_print)


def _made_up(names: Sequence[str], seeds: int, jobs: int) -> list[dict[str, Any]]:
    groups = {
        (function, name): [Search(function, name, seed) for seed in range(seeds)]
        for name in names
        for function in FUNCTIONS
    }
    with progress() as report:
        searches = [one for group in groups.values() for one in group]
        found = iter(made.searched(searches, jobs, report, cache_folder() / "samplers.jsonl"))
    each = {place: [next(found) for _ in group] for place, group in groups.items()}
    for name in names:
        each["all three", name] = [one for function in FUNCTIONS for one in each[function, name]]
    return [
        {"function": function, "sampler": name, **_summary(each[function, name], each.get((function, CHANCE)))}
        for function in (*FUNCTIONS, "all three")
        for name in names
    ]


def _summary(found: Sequence[Found], chance: Sequence[Found] | None) -> dict[str, Any]:
    """Return means, with intervals of what is true of the pick, and of how much truer it is than chance's."""
    over = [one["rescored"] - other["rescored"] for one, other in zip(found, chance or (), strict=chance is not None)]
    return {
        "searches": len(found),
        "searched": fmean(one["searched"] for one in found),
        **_interval("true", [one["true"] for one in found]),
        **_interval("rescored", [one["rescored"] for one in found]),
        **(_interval("over random", over) if over else {}),
        **{name: fmean(one[name] for one in found) for name in ("best", "distinct", "seconds")},
    }


def _interval(name: str, values: Sequence[float]) -> dict[str, float]:
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {name: fmean(values), f"{name} low": fmean(values) - half, f"{name} high": fmean(values) + half}


def _print(result: dict[str, Any]) -> None:
    titles = {
        "measured": f"Score on the {ROWS} rows searched on; true score of the pick on {FRESH} others, and re-scored",
        "compiled": "InstructZero: best of the search rows, and of all train rows; confirmed on the rows kept back",
    }
    for name, title in titles.items():
        if name in result:
            header = [column for column in result[name][0] if column != "instructions"]
            print_table(title, header, [[row[column] for column in header] for row in result[name]])
