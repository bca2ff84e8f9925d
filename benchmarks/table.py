"""`preceptor bench table`: results of `preceptor bench papers` by run, method, pair of methods and claim of a paper."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Final

import typer

from preceptor.benchmarks.anytime import ratios, speeds
from preceptor.benchmarks.claims import checked
from preceptor.benchmarks.compared import (
    HUMAN,
    Run,
    comparisons,
    duels,
    gaps_of,
    interval,
    is_ours,
    made,
    means_by_task,
    ranks,
    scored,
)
from preceptor.benchmarks.result import Json
from preceptor.benchmarks.tasks import find
from preceptor.cli.view import out, print_json, print_table
from preceptor.errors import DataError

FOLDER: Final = Path(__file__).parent / "results" / "papers"
"""Where results are committed."""

BOUNDS: Final = "bounds"
"""In a group's folder, what `preceptor bench bounds` has written."""

MARKS: Final = ("<!-- preceptor bench table {} --markdown -->", "<!-- end of the table -->")
YOURS, INDUCTION = "your instructions", "induction"
TITLES: Final = {
    "ranks": "Mean rank over tasks that all methods ran on",
    "duels": "Method against method, over tasks, with Wilcoxon's signed-rank test; holm: of all pairs",
    "comparisons": "Ours against peers, and mixtures against none, at equal calls, over tasks",
    "speeds": "Calls after which a search holds 95 % of its final score, and of its final gain; means over tasks",
    "ratios": "The same, calls of ours divided by calls of the peers; geometric means over tasks",
    "bounds": "Upper bounds: the best of all candidates, chosen by one half of the test rows and scored on the other",
    "claims": "What the papers claim, in points, and what is measured here",
}


def run(
    folder: Annotated[Path, typer.Option(help="Folder of results.", show_default="the committed ones")] = FOLDER,
    group: Annotated[str | None, typer.Option(help="Of equal model and budget; by default each in turn.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="By default all.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The README's table of methods and tasks.")] = False,
    as_json: Json = False,
) -> None:
    """Print what is in the folder of results."""
    groups = [folder / group] if group else sorted(path for path in folder.glob("*") if path.is_dir())
    held = {place: runs for place in groups if (runs := _of(read(place), task))}
    if not held:
        which = f" of {', '.join(task)}" if task else ""
        raise DataError(f"{folder} holds no results{which}; make some with: preceptor bench papers --data-dir DATA.")
    if as_markdown:
        for place, runs in held.items():
            out().print(
                block(asked(folder, place.name, task or ()), runs), markup=False, highlight=False, soft_wrap=True
            )
        return
    if as_json:
        print_json({place.name: _plain({"runs": runs, **_told(place, runs)}) for place, runs in held.items()})
        return
    for place, runs in held.items():
        summary(runs, place.name)
        for part, rows in _told(place, runs).items():
            if rows and part in TITLES:
                print_table(TITLES[part], list(rows[0]), [_shown(row.values()) for row in rows])


def _of(runs: list[dict[str, Any]], tasks: Sequence[str] | None) -> list[dict[str, Any]]:
    return [run for run in runs if not tasks or run["task"] in tasks]


def read(place: Path) -> list[dict[str, Any]]:
    """Return a group's runs.

    Raises:
        DataError: If two of one task and seed can't be compared: made of other data, or the seed instruction, which is
            the same for all of them, scored otherwise, as on another device.
    """
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(place.glob("*.json"))]
    first: dict[tuple[str, str, int], tuple[Path, Any]] = {}
    for path, run in found:
        for name in ("data", "seed_score"):
            if name not in run or (name == "seed_score" and run.get("refused")):
                continue
            other, value = first.setdefault((name, run["task"], run.get("seed", 0)), (path, run[name]))
            if value != run[name]:
                raise DataError(
                    f"{other} and {path} are of one task and seed but can't be compared: {name} {value} and "
                    f"{run[name]}. Keep the runs of each device and data in a folder of their own."
                )
    return [run for _, run in found]


def upper_bounds(place: Path) -> list[dict[str, Any]]:
    """Return a line for each task of a group whose bounds were measured.

    Beside the best candidate there is, by `preceptor bench bounds`, stand the seed, a person's instruction and the
    compiled programs, means over the runs of all methods.
    """
    runs, lines = read(place), list[dict[str, Any]]()
    for path in sorted((place / BOUNDS).glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        own = [run for run in made(runs) if run["task"] == found["task"]]
        if not own:
            continue  # its runs are gone
        human = [run["compiled"] for run in own if run["method"] == HUMAN]
        compiled = [run["compiled"] for run in own if run["method"] != HUMAN]
        lines.append(
            {"task": found["task"], "seed": fmean(run["seed_score"] for run in own)}
            | {"human": fmean(human) if human else None, "compiled": fmean(compiled) if compiled else None}
            | {name: found[name] for name in ("candidates", "oracle", "oracle_biased")}
        )
    return lines


def _told(place: Path, runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {
        "methods": methods(runs),
        "ranks": ranks(runs),
        "duels": duels(runs),
        "comparisons": comparisons(runs),
        "speeds": speeds(runs),
        "ratios": ratios(runs),
        "bounds": upper_bounds(place),
        "claims": checked(runs),
    }


def _plain(value: dict[str, Any]) -> Any:
    """Return a value as JSON can say it: what there is none of is None, for JSON knows no nan.

    Example:
        >>> _plain({"low": math.nan, "tasks": [3]})
        {'low': None, 'tasks': [3]}
    """
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def asked(folder: Path, group: str, tasks: Sequence[str]) -> str:
    """Return the options that a table is asked for with.

    Example:
        >>> asked(FOLDER, "model-600", []), asked(Path("runs"), "model-600", ["subj", "trec"])
        ('--group model-600', '--folder runs --group model-600 --task subj --task trec')
    """
    place = "" if folder == FOLDER else f"--folder {folder.as_posix()} "
    return f"{place}--group {group}{''.join(f' --task {task}' for task in tasks)}"


def block(told: str, runs: Sequence[dict[str, Any]]) -> str:
    """Return a group's scores as the README shows them, between the two comments that `tests/test_figures.py` finds.

    `told` are the options that it is asked for with. A row a method with its runs, those refused left out, a column a
    task, means over seeds; the 24 induction tasks share one, of those that all of the rows have. The last column is the
    mean gain over tasks, in points, of the seeds that each has, with Student's interval over tasks if they differ.
    """
    seeds = [{**run, "method": YOURS, "compiled": run["seed_score"]} for run in made(runs)]
    scores = scored([*runs, *seeds])
    names = sorted(
        {method for _, method in scores} - {YOURS}, key=lambda name: (name == HUMAN, not is_ours(name), name)
    )
    grouped: dict[str, list[str]] = {}
    for task in sorted({task for task, _ in scores}, key=lambda task: (_column(task) == INDUCTION, task)):
        grouped.setdefault(_column(task), []).append(task)
    header = [f"{name} ({len(held)})" if name == INDUCTION else name for name, held in grouped.items()]
    lines = [["method", "runs", *header, "gain in points"], ["---"] * (len(header) + 3)]
    for name in (YOURS, *names):
        of = {task: seeds for (task, method), seeds in scores.items() if method == name}
        cells = [_cell([fmean(of[task].values()) for task in held if task in of], held) for held in grouped.values()]
        count = "" if name == YOURS else str(sum(map(len, of.values())))
        gaps = [100 * gap for gap in gaps_of(scores, name, YOURS)]
        lines.append([name if name == YOURS else f"`{name}`", count, *cells, "" if name == YOURS else _gain(gaps)])
    table = "\n".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|" for line in lines)
    return f"{MARKS[0].format(told)}\n{table}\n{MARKS[1]}"


def _column(task: str) -> str:
    return INDUCTION if find(task).human is not None else task


def _cell(scores: Sequence[float], tasks: Sequence[str]) -> str:
    return f"{fmean(scores):.3f}" if len(scores) == len(tasks) else ""


def _gain(gaps: Sequence[float]) -> str:
    low, high = interval(gaps)
    tasks = f"{len(gaps)} tasks" if len(gaps) > 1 else "1 task"
    ends = "" if math.isnan(low) else f"{low:+.1f} to {high:+.1f}, "
    return f"{fmean(gaps):+.1f} ({ends}{tasks})"


def summary(runs: Sequence[dict[str, Any]], title: str = "") -> None:
    """Print one line a run, and one a method: of those that were not refused."""
    columns = ["task", "method", "seed", "metric", "test_rows", "seed_score", "compiled", "gain", "low", "high"]
    columns += ["compiled_f1", "replaced", "candidate", "calls", "seconds"]
    ordered = sorted(runs, key=lambda run: (run["task"], run["seed"], run["method"]))
    print_table(
        f"{title} Scores on test rows".strip(), columns, [_shown(run.get(name) for name in columns) for run in ordered]
    )
    if found := methods(runs):
        print_table("Gain over the seed, mean over tasks", list(found[0]), [_shown(row.values()) for row in found])


def _shown(cells: Iterable[Any]) -> list[Any]:
    return ["" if cell is None else cell for cell in cells]


def methods(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return each method's mean gain on test rows with Student's interval over tasks, and how often it replaced.

    Of several runs of a task, their mean is taken first. Runs that were refused are left out. `candidate_gain` is the
    mean over those whose candidate has a score, None if there is none.

    Example:
        >>> runs = [
        ...     {"task": task, "method": "ape", "gain": gain, "candidate_gain": 0.2, "replaced": gain > 0}
        ...     for task, gain in (("a", 0.0), ("b", 0.1), ("b", 0.3))
        ... ]
        >>> [found] = methods(runs)
        >>> found["runs"], found["replaced"], round(found["gain"], 3), round(found["high"], 2)
        (3, 2, 0.1, 1.37)
    """
    kept = made(runs)
    names = sorted({run["method"] for run in kept})
    return [_mean(name, [run for run in kept if run["method"] == name]) for name in names]


def _mean(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    gains = means_by_task(runs, lambda run: run["gain"])
    candidates = means_by_task(runs, lambda run: run.get("candidate_gain"))
    low, high = interval(gains)
    return {
        "method": name,
        "runs": len(runs),
        "replaced": sum(run["replaced"] for run in runs),
        "gain": fmean(gains),
        "low": low,
        "high": high,
        "candidate_gain": fmean(candidates) if candidates else None,
    }
