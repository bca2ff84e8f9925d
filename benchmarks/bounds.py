"""`preceptor bench bounds`: what the model could reach on a task at all, if the search could look at the test rows.

An oracle over candidates: of the instructions that the compiles of a group have proposed for a task, the best on the
test rows. Chosen and scored on the same rows, that is biased upwards. So the rows are halved: the best on one half is
scored on the other, both ways, and the mean of both is unbiased for choosing with half as many rows.

The candidates are those in the run folders of the group's compiles, where they still are, and in its results: each
compile's best first, the compiles by turns. One file a task, in the group's folder `bounds`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Final

import typer

from preceptor.benchmarks import tasks
from preceptor.benchmarks.compared import HUMAN, Run
from preceptor.benchmarks.papers import _Bench, made_elsewhere, made_here
from preceptor.benchmarks.result import Json
from preceptor.benchmarks.table import BOUNDS, FOLDER, read, upper_bounds
from preceptor.cli.inputs import DEFAULT_LM, lm_of
from preceptor.cli.view import print_json, print_table, progress, say
from preceptor.errors import DataError
from preceptor.lm.catalogue import cache_folder
from preceptor.scoring.evaluate import held_against
from preceptor.scoring.metrics import Metric
from preceptor.scoring.trial import Outcome

Texts = Mapping[str, str]

MOST: Final = 100
"""Candidates."""


def run(
    group: Annotated[str, typer.Option(help="Of the results.")],
    data_dir: Annotated[Path | None, typer.Option(help="As for `bench papers`.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="By default all of the group.")] = None,
    lm: Annotated[str, typer.Option("--lm", help="The group's model.")] = DEFAULT_LM,
    candidates: Annotated[int, typer.Option(min=2, help="Scored on a task's test rows, at most.")] = MOST,
    out: Annotated[Path, typer.Option(help="Folder of results.", show_default="the committed ones")] = FOLDER,
    as_json: Json = False,
) -> None:
    """Score the candidates of a group's compiles on test rows, and write one file a task."""
    place, model = out / group, lm_of(lm)
    runs = read(place)
    if not runs or {one["lm"] for one in runs} != {model.model}:
        raise DataError(
            f"{place} holds no results of {model.model}; --group, --lm and --out must be those of the runs."
        )
    texts_of = _candidates(runs, place, task, candidates)
    _refuse_others([one for one in runs if one["task"] in texts_of], data_dir)
    with progress() as report:
        for name, found in texts_of.items():
            published = tasks.find(name)
            bench = _Bench(published, data_dir, model, report)
            rows = published.rows(data_dir, 0).test[: _test_rows(runs, name)]
            before = bench._scored(published.student(), rows)
            scored = [bench._scored(published.student(texts), rows) for texts in found]
            told = {"task": name, **made_here(name, data_dir)}
            (place / BOUNDS).mkdir(exist_ok=True)
            (place / BOUNDS / f"{name}.json").write_text(
                json.dumps({**told, **bound(found, before, scored, bench.metric)}, indent=1, ensure_ascii=False) + "\n",
                encoding="utf-8",
            )
            say(f"{name}: {len(found)} candidates")
    lines = upper_bounds(place)
    if as_json:
        print_json({"bounds": lines})
    else:
        print_table("Upper bounds", list(lines[0]), [list(line.values()) for line in lines])


def _refuse_others(runs: Sequence[Run], data: Path | None) -> None:
    """Raise if a run that the bounds would stand beside is of other rows or another device.

    Raises:
        DataError: Naming it, and what differs.
    """
    for one in runs:
        if other := made_elsewhere(one, made_here(one["task"], data)):
            raise DataError(
                f"{one['task']}-{one['method']}-{one['seed']} was made with {other}: "
                "bounds made here can't stand beside it. Pass the runs' own --data-dir, where they were made."
            )


def _test_rows(runs: Sequence[Run], task: str) -> int | None:
    """Return how many test rows the runs of a task were scored on, None if none of them says."""
    return min((one["test_rows"] for one in runs if one["task"] == task and "test_rows" in one), default=None)


def _candidates(runs: Sequence[Run], place: Path, names: Sequence[str] | None, most: int) -> dict[str, list[str]]:
    """Return what was proposed for each task that is named, or for each there is something for.

    Raises:
        DataError: If nothing was for one that is named, or for any.
    """
    folders = cache_folder() / "runs" / "papers" / place.name
    every = {
        name: proposed([one for one in runs if one["task"] == name], folders, most)
        for name in sorted({one["task"] for one in runs})
    }
    held = {name: found for name, found in every.items() if found}
    missing = [name for name in names or () if name not in held]
    if missing or not held:
        told = f"; there are some for {', '.join(held)}" if held else ""
        raise DataError(f"{place} holds no candidates for {', '.join(missing or every)}{told}.")
    return {name: held[name] for name in names} if names else held


def bound(
    found: Sequence[str], before: Sequence[Outcome], scored: Sequence[Sequence[Outcome]], metric: Metric
) -> dict[str, Any]:
    """Return what the best of several instructions scores: chosen on one half of the rows, told on the other.

    Rows that only the instruction fails with count against it, as in the scores that stand beside it.

    Args:
        found: Instructions.
        before: The outcomes of the seed instruction.
        scored: The outcomes of each on the same rows.
        metric: Makes a score of outcomes.
    """
    scored = [held_against(before, outcomes) for outcomes in scored]
    whole = [metric.aggregate(outcomes) for outcomes in scored]
    halves = [[metric.aggregate(outcomes[at::2]) for outcomes in scored] for at in (0, 1)]
    told = [other[one.index(max(one))] for one, other in (halves, halves[::-1])]
    best = whole.index(max(whole))
    return {
        "candidates": len(found),
        "test_rows": len(scored[0]),
        "oracle": fmean(told),
        "oracle_biased": whole[best],
        "instructions": found[best],
    }


def proposed(runs: Sequence[Run], folders: Path, most: int) -> list[str]:
    """Return the distinct instructions that compiles have proposed: each compile's best first, by turns.

    A person's instructions are none of them.

    Args:
        runs: Results of one task.
        folders: Holds their run folders, those that are still there.
        most: So many.
    """
    compiles = [one for one in runs if one["method"] != HUMAN]
    turns = zip_longest(*(_texts(one, folders / f"{one['task']}-{one['method']}-{one['seed']}") for one in compiles))
    texts = dict.fromkeys(text for turn in turns for text in turn if text is not None)
    return list(texts)[:most]


def _texts(run: Run, folder: Path) -> Iterator[str]:
    """Return what one compile has proposed, the best of those that saw the most rows first."""
    held: list[Texts | str] = [run[name] for name in ("best_candidate", "instructions") if name in run]
    held += [point["instructions"] for point in reversed(run.get("curve", []))]
    trials = folder / "trials.jsonl"
    if trials.is_file():
        held += _ranked(json.loads(line) for line in trials.read_text(encoding="utf-8").splitlines())
    for one in held:
        texts = [one] if isinstance(one, str) else list(one.values())
        if len(texts) == 1:
            yield texts[0]


def _ranked(lines: Iterable[Mapping[str, Any]]) -> list[Texts]:
    known = {line["candidate"]: line for line in lines}
    ordered = sorted(known.values(), key=lambda line: (-line["seen"], -line["so_far"]))
    return [line["instructions"] for line in ordered]
