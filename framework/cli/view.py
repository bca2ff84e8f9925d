"""What people look at: progress on stderr, verdicts, diffs and tables on stdout."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from preceptor.program import diff
from preceptor.task import Report


def out() -> Console:
    """Return the console for results; wide where stdout is no terminal, so that lines aren't broken."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)


def say(message: str) -> None:
    """Write one message to stderr."""
    Console(file=sys.stderr, highlight=False, soft_wrap=True).print(Text(message))


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


@contextmanager
def progress() -> Generator[Report]:
    """Show what is going on: a bar on a terminal, else a line for each new stage."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bars:
        yield _bar(bars)


def _lines() -> Report:
    last = ""
    lock = threading.Lock()

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        with lock:
            if what != last:
                last = what
                say(f"  {what}")

    return report


def _bar(bars: Progress) -> Report:
    current: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in current:
            for task in current.values():
                bars.remove_task(task)
            current.clear()
            current[what] = bars.add_task(what, total=total or None)
        bars.update(current[what], completed=done)

    return report


def download() -> Any:
    """Return a progress callback for downloads, in megabytes."""
    report = _lines()

    def told(what: str, done: int, total: int) -> None:
        report(f"{what} ({done / 1e6:.0f} of {total / 1e6:.0f} MB)" if total else what, done, total)

    return told


def print_verdict(result: Mapping[str, Any]) -> None:
    """Print a compile's result: the sentence, the numbers, the diff and where things are."""
    console = out()
    console.print(Text(result["verdict"], style="bold"), soft_wrap=True)
    if result.get("stopped"):
        console.print(Text(f"Stopped early: {result['stopped']}"))
    console.print()
    console.print(_numbers(result))
    changed = diff(result["seed_instructions"], result["instructions"])
    if changed:
        console.print("\nInstructions, before and after:")
        print_diff(changed)
    if result.get("demos"):
        console.print(Text(f"and {result['demos']} demonstrations from the train rows below them, part of the gain"))
    if result.get("program"):
        console.print(Text(f"\nProgram  {result['program']}\nRun      {result['run']}"), soft_wrap=True)


def _numbers(result: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("your instructions", _score(result["baseline"], result["baseline_ci"]))
    table.add_row("compiled program", _score(result["compiled"], result["compiled_ci"]))
    table.add_row(
        "gain claimed", f"{100 * result['gain']:+.1f} points, on {result['rows']} rows no search step has seen"
    )
    if result["search_score"] is not None:
        note = "on train rows (chosen for being high: no estimate)"
        table.add_row("winner's search score", f"{result['search_score']:.3f} {note}")
    billed = f", {result['billed_calls']} billed now" if "billed_calls" in result else ""
    table.add_row("calls", f"{result['calls']}{billed}; {result['tokens']:,} tokens; ${result['dollars']:.4f}")
    if "seconds" in result:
        table.add_row("time", f"{result['seconds']:.0f} s")
    return table


def _score(score: float, ci: Sequence[float]) -> str:
    return f"{score:.3f}  [{ci[0]:.3f}, {ci[1]:.3f}]"


def print_diff(text: str) -> None:
    """Print a unified diff, coloured on a terminal."""
    styles = {"+": "green", "-": "red", "@": "cyan"}
    console = out()
    for line in text.splitlines():
        console.print(Text(line, style=styles.get(line[:1], "")), soft_wrap=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; columns of numbers are aligned to the right."""
    if title:
        out().print(Text(title, style="bold"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for at, name in enumerate(header):
        numeric = all(isinstance(row[at], (int, float)) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    out().print(table)
