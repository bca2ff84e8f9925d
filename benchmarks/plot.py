"""`preceptor bench plot`: score on test rows against calls, method by method, as an SVG drawing.

A line is the mean over seeds of what each run's search held for best; see `preceptor.benchmarks.anytime`. Before a
search has scored anything, that is the seed instruction. One panel a task, and one of the mean gain over the tasks that
all methods drawn ran on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Final

import typer

from preceptor.benchmarks.anytime import held, steps
from preceptor.benchmarks.compared import HUMAN, PEERS, Run, base
from preceptor.benchmarks.table import FOLDER, read
from preceptor.cli.view import out as console
from preceptor.errors import DataError
from preceptor.report.curves import Frame, Scale, Tick, ticks

FRAME: Final = Frame(width=380, height=270, left=52, right=362, top=34, bottom=216)
MARGIN: Final = 20
COLUMNS: Final = 3
ENTRY: Final = 250
"""Width of an entry of the legend."""

INKS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f3c8d", "#6b6b6b")
"""Told apart by most who are colour-blind (Okabe and Ito); of more methods they begin again."""

PERSON: Final = "#000"
DASHES: Final = {True: "7 4", False: ""}
"""Of a peer, and of ours."""

Places = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """A method's curve in a panel: its path, its end, how it is drawn."""

    path: str
    x: float
    y: float
    ink: str
    dash: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One of the legend."""

    x: float
    y: float
    name: str
    ink: str
    dash: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A task, or the mean over tasks."""

    x: float
    y: float
    title: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[Line]


def run(
    group: Annotated[str, typer.Option(help="Of equal model and budget.")],
    folder: Annotated[Path, typer.Option(help="Folder of results.", show_default="the committed ones")] = FOLDER,
    task: Annotated[list[str] | None, typer.Option(help="By default all that have curves.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="By default all that have curves.")] = None,
    out: Annotated[Path | None, typer.Option(help="By default anytime.svg in the group's folder.")] = None,
) -> None:
    """Draw a group's anytime curves."""
    runs = read(folder / group)
    meant = [
        one
        for one in runs
        if steps(one) and (not task or one["task"] in task) and (not method or one["method"] in method)
    ]
    if not meant:
        raise DataError(
            f"{folder / group} holds no curves of such runs. Runs made before curves were recorded have none; "
            "delete their files and make them again: their answers are in the run folders."
        )
    path = out or folder / group / "anytime.svg"
    path.write_text(drawing(group, meant, [one for one in runs if one["method"] == HUMAN]), encoding="utf-8")
    console().print(str(path), soft_wrap=True)


def drawing(group: str, runs: Sequence[Run], people: Sequence[Run] = ()) -> str:
    """Return the drawing of runs that have curves.

    Args:
        group: Named in the headline.
        runs: To be drawn.
        people: Runs of instructions that people wrote, drawn as level lines.
    """
    import jinja2

    methods = sorted({run["method"] for run in runs}, key=lambda name: (base(name) in PEERS, name))
    styles = {name: (INKS[at % len(INKS)], DASHES[base(name) in PEERS]) for at, name in enumerate(methods)}
    tasks = sorted({run["task"] for run in runs})
    end = max(run["budget"] for run in runs)
    curves = {task: _curves([run for run in runs if run["task"] == task]) for task in tasks}
    whole = [task for task in tasks if curves[task].keys() == set(methods)]
    levels = {task: [run["compiled"] for run in people if run["task"] == task] for task in tasks}
    if any(levels.values()):
        styles[HUMAN] = (PERSON, "2 3")
    legend = _legend(styles)
    top = legend[-1].y + 16
    places = [
        (MARGIN + at % COLUMNS * FRAME.width, top + at // COLUMNS * FRAME.height)
        for at in range(len(tasks) + (len(whole) > 1))
    ]
    panels = [
        _panel(place, f"{task}, {_metric(runs, task)}", _with_level(curves[task], levels[task], end), styles, end)
        for task, place in zip(tasks, places, strict=False)
    ]
    if len(whole) > 1:
        mean = {name: _mean_gain([curves[task][name] for task in whole]) for name in methods}
        panels.append(_panel(places[-1], f"gain in points, mean of {len(whole)} tasks", mean, styles, end))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    columns = max(2, min(COLUMNS, len(panels)))
    return environment.get_template("plot.svg").render(
        width=2 * MARGIN + columns * FRAME.width,
        height=top + -(-len(panels) // COLUMNS) * FRAME.height,
        margin=MARGIN,
        frame=FRAME,
        headline=f"Score on test rows against calls: {group}",
        told=f"What each search held for best, mean over {_seeds(runs)}. Peers are dashed; a dot ends a search.",
        legend=legend,
        panels=panels,
    )


def _seeds(runs: Sequence[Run]) -> str:
    """Return how many seeds a line is of: at most so many, where lines differ."""
    counts = set(Counter((run["task"], run["method"]) for run in runs).values())
    seeds = f"{max(counts)} seeds" if max(counts) > 1 else "1 seed"
    return seeds if len(counts) == 1 else f"up to {seeds}"


def _metric(runs: Sequence[Run], task: str) -> str:
    return str(next(run["metric"] for run in runs if run["task"] == task))


def _legend(styles: dict[str, tuple[str, str]]) -> list[Entry]:
    most = 2 * FRAME.width // ENTRY
    return [
        Entry(
            MARGIN + at % most * ENTRY,
            70 + at // most * 20,
            "a person's instruction" if name == HUMAN else name,
            *style,
        )
        for at, (name, style) in enumerate(styles.items())
    ]


def _curves(runs: Sequence[Run]) -> dict[str, Places]:
    """Return each method's curve: the mean over its runs."""
    return {
        name: _mean([steps(run) for run in runs if run["method"] == name])
        for name in sorted({run["method"] for run in runs})
    }


def _mean(curves: Sequence[Sequence[tuple[float, float]]]) -> Places:
    """Return the mean of step functions, where any of them steps."""
    calls = sorted({begun for curve in curves for begun, _ in curve})
    return [(at, fmean(held(curve, at) for curve in curves)) for at in calls]


def _mean_gain(curves: Sequence[Places]) -> Places:
    return _mean([[(at, 100 * (score - curve[0][1])) for at, score in curve] for curve in curves])


def _with_level(curves: dict[str, Places], level: Sequence[float], end: float) -> dict[str, Places]:
    return {**curves, HUMAN: [(0, fmean(level)), (end, fmean(level))]} if level else curves


def _panel(
    place: tuple[float, float], title: str, curves: dict[str, Places], styles: dict[str, tuple[str, str]], end: float
) -> Panel:
    heights = [score for curve in curves.values() for _, score in curve]
    y_values, x_values = ticks(min(heights), max(heights)), ticks(0, end)
    x = Scale(0, x_values[-1], FRAME.left, FRAME.right)
    y = Scale(y_values[0], y_values[-1], FRAME.bottom, FRAME.top)
    lines: list[Line] = []
    for name, curve in curves.items():
        (first, *others), ink = [(x(calls), y(score)) for calls, score in curve], styles[name]
        path = f"M{first[0]:g} {first[1]:g}" + "".join(f"H{at:g}V{height:g}" for at, height in others)
        lines.append(Line(path, *[first, *others][-1], *ink))
    return Panel(
        *place,
        title,
        [Tick(x(value), f"{value:,.0f}") for value in x_values],
        [Tick(y(value), f"{value:g}") for value in y_values],
        lines,
    )
