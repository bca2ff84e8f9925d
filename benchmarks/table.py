"""`preceptor bench table`: results of `preceptor bench papers` by run, method, pair of methods and claim of a paper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Final

import typer

from preceptor.benchmarks.claims import checked, duels, interval, ranks
from preceptor.cli.view import print_json, print_table
from preceptor.errors import DataError

FOLDER: Final = Path(__file__).parent / "results" / "papers"
"""Where results are committed."""


def main(arguments: list[str]) -> None:
    """Print the table with command-line arguments."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    app(arguments, standalone_mode=False, prog_name="preceptor bench table")


def run(
    folder: Annotated[Path, typer.Option(help="Folder of results.")] = FOLDER,
    group: Annotated[str | None, typer.Option(help="Of equal model and budget; by default each in turn.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print what is in the folder of results."""
    groups = [folder / group] if group else sorted(path for path in folder.glob("*") if path.is_dir())
    held = {place.name: [_read(path) for path in sorted(place.glob("*.json"))] for place in groups}
    if not any(held.values()):
        raise DataError(f"{folder} holds no results; make some with: preceptor bench papers --data-dir DATA.")
    if as_json:
        print_json({name: {"runs": runs, **_told(runs)} for name, runs in held.items()})
        return
    for name, runs in held.items():
        summary(runs, name)
        told = _told(runs)
        titles = {
            "ranks": "Mean rank over tasks that all methods ran on",
            "duels": "Method against method, over tasks, with Wilcoxon's signed-rank test",
            "claims": "What the papers claim, in points, and what is measured here",
        }
        for part, title in titles.items():
            if told[part]:
                print_table(title, list(told[part][0]), [list(row.values()) for row in told[part]])


def _told(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {"methods": methods(runs), "ranks": ranks(runs), "duels": duels(runs), "claims": checked(runs)}


def summary(runs: Sequence[dict[str, Any]], title: str = "") -> None:
    """Print one line a run, and one a method."""
    columns = ["task", "method", "seed", "metric", "test_rows", "seed_score", "compiled", "gain", "low", "high"]
    columns += ["compiled_f1", "replaced", "candidate", "calls", "seconds"]
    ordered = sorted(runs, key=lambda run: (run["task"], run["seed"], run["method"]))
    print_table(
        f"{title} Scores on test rows".strip(), columns, [[run.get(name) for name in columns] for run in ordered]
    )
    found = methods(runs)
    print_table("Gain over the seed, mean over runs", list(found[0]), [list(row.values()) for row in found])


def methods(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each method's mean gain on test rows with Student's interval over its runs, and how often it replaced.

    Example:
        >>> runs = [{"method": "ape", "gain": gain, "candidate_gain": 0.2, "replaced": gain > 0} for gain in (0.0, 0.2)]
        >>> [found] = methods(runs)
        >>> found["runs"], found["replaced"], round(found["gain"], 3), round(found["high"], 2)
        (2, 1, 0.1, 1.37)
    """
    names = sorted({run["method"] for run in runs})
    return [_mean(name, [run for run in runs if run["method"] == name]) for name in names]


def _mean(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    gains = [run["gain"] for run in runs]
    candidates = [run.get("candidate_gain", run["gain"]) for run in runs]
    low, high = interval(gains)
    return {
        "method": name,
        "runs": len(runs),
        "replaced": sum(run["replaced"] for run in runs),
        "gain": fmean(gains),
        "low": low,
        "high": high,
        "candidate_gain": fmean(candidates),
    }


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
