"""What people look at: progress on stderr, verdicts, diffs and tables on stdout."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from preceptor.difference import diff
from preceptor.errors import BudgetExhausted, LMFailed, PreceptorError
from preceptor.task import Report
from preceptor.untrusted import spelt_out

_WRONG, _STOPPED, _FAILED, _OWN_FAULT = 2, 3, 4, 5

TRACEBACK: Final = "PRECEPTOR_TRACEBACK"
"""The variable that, set to anything, has the whole traceback of a fault of preceptor's own printed."""

_LARGEST: Final = 10**300
"""Whole numbers above it can't be written as decimals."""


def out() -> Console:
    """Return the console for results; wide where stdout is no terminal, so that lines aren't broken."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)


def plain(text: str, style: str = "") -> Text:
    """Return a text that may be anybody's, with the characters that steer a terminal spelt out."""
    return Text(spelt_out(text), style=style)


def counted(number: int, noun: str) -> str:
    """Return `1 row`, `2 rows`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def say(message: str) -> None:
    """Write one message to stderr."""
    Console(file=sys.stderr, highlight=False, soft_wrap=True).print(plain(message))


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout; half a character is written as JSON's escape for it."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    sys.stdout.write(text.encode(errors="backslashreplace").decode() + "\n")


def tell_fault(error: PreceptorError, result: Mapping[str, Any] | None = None, *, as_json: bool) -> int:
    """Say what went wrong, for machines in one object with the result if there is one; return the exit code."""
    code = _STOPPED if isinstance(error, BudgetExhausted) else _FAILED if isinstance(error, LMFailed) else _WRONG
    say(f"{'Error' if code == _WRONG else 'Stopped'}: {error}")
    if as_json:
        print_json({**(result or {}), "error": str(error), "exit_code": code})
    return code


def tell_own_fault(error: Exception) -> int:
    """Say in one line what is a fault of preceptor's own, or with its traceback if asked; return the exit code."""
    if os.environ.get(TRACEBACK):
        say("".join(traceback.format_exception(error)).rstrip())
    told = " ".join(f"{type(error).__name__}: {error}".split())
    where = "" if os.environ.get(TRACEBACK) else f" {TRACEBACK}=1 before the same command shows where."
    say(f"This is a fault of preceptor's own, not of what you gave: {told}.{where} Please report it.")
    return _OWN_FAULT


@contextmanager
def aside() -> Generator[None]:
    """Have what the user's own program or metric prints on stderr: on stdout there are results only."""
    with redirect_stdout(sys.stderr):
        yield


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
    lock = threading.Lock()

    def report(what: str, done: int, total: int) -> None:
        with lock:
            if not total:  # said once, with nothing to wait for
                bars.console.print(plain(f"  {what}"), soft_wrap=True)
                return
            if what not in current:
                for task in current.values():
                    bars.remove_task(task)
                current.clear()
                current[what] = bars.add_task(what, total=total)
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
    console.print(plain(result["verdict"], "bold"), soft_wrap=True)
    if result.get("stopped"):
        console.print(plain(f"Stopped early: {result['stopped']}"), soft_wrap=True)
    console.print()
    console.print(_scores(result))
    selection = _selection(result)
    if selection:
        console.print(Text(f"\n{selection}"), soft_wrap=True)
    console.print()
    console.print(_totals(result))
    if result.get("regions"):
        print_regions(result["regions"])
    if result.get("principles"):
        print_principles(result["principles"])
    changed = diff(result["seed_instructions"], result["instructions"])
    if changed:
        console.print("\nInstructions, before and after:")
        print_diff(changed)
    if result.get("demos"):
        console.print(
            Text(f"and {counted(result['demos'], 'demonstration')} from the train rows below them, part of the gain")
        )
    if result.get("program"):
        console.print(plain(f"\nProgram  {result['program']}\nRun      {result['run']}"), soft_wrap=True)


def print_regions(regions: Sequence[Mapping[str, Any]]) -> None:
    """Print what became of each region of a mixture: rows, the test that chose its expert, and the scores."""
    cells: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "region": lambda row: str(row.get("region", "")),
        "train rows": lambda row: str(row.get("train_rows", "")),
        "choosing rows": lambda row: str(row.get("choosing_rows", "")),
        "gain there": lambda row: _points(row.get("gain")),
        "p (Holm)": lambda row: f"{row['p_value']:.2g}" if isinstance(row.get("p_value"), float) else "",
        "measuring rows": lambda row: str(row.get("measuring_rows", "")),
        "yours": lambda row: _score(row.get("seed")),
        "compiled": lambda row: _score(row.get("compiled")),
        "expert": lambda row: str(row.get("expert", "")),
    }
    out().print()
    print_table("Regions", list(cells), [[cell(row) for cell in cells.values()] for row in regions])


def print_principles(principles: Sequence[Mapping[str, Any]]) -> None:
    """Print what each principle of a program's constitutions is worth, and how it came to be."""
    cells: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
        "expert": lambda row: str(row.get("expert", "")),
        "predictor": lambda row: str(row.get("predictor", "")),
        "principle": lambda row: str(row.get("principle", "")),
        "worth": lambda row: _points(row["worth"]) if isinstance(row.get("worth"), float) else "not measured",
        "train rows": lambda row: str(row.get("rows", "")),
        "history": lambda row: str(row.get("history", "")),
    }
    told = {name: [cell(row) for row in principles] for name, cell in cells.items()}
    kept = {
        name: column for name, column in told.items() if len(set(column)) > 1 or name not in ("expert", "predictor")
    }
    out().print()
    title = "Principles (worth is on the train rows that decided to keep them, so partly luck)"
    print_table(title, list(kept), list(zip(*kept.values(), strict=True)))


def _scores(result: Mapping[str, Any]) -> Table:
    """Return the seed and the winner, as the search saw them and as they were confirmed."""
    seed, winner = _searched(result)
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("")
    for name in ("train rows", "untouched rows", "95 % interval"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    table.add_row("your instructions", _score(seed), _score(result["baseline"]), _interval(result["baseline_ci"], 1))
    if not _has_candidate(result):
        return table
    confirmed = result["baseline"] + _tested(result)
    name, ci = ("compiled program", result["compiled_ci"]) if result["replaced"] else ("best candidate", None)
    table.add_row(name, _score(winner), _score(confirmed), _interval(ci, 1))
    seen = winner - seed if seed is not None and winner is not None and winner >= 0 else None
    table.add_row("difference", _points(seen), _points(_tested(result)), _interval(result.get("ci"), 100))
    return table


def _selection(result: Mapping[str, Any]) -> str:
    """Return what to think of the search's scores, "" where there is nothing to say."""
    seed, winner = _searched(result)
    if winner is None or not _has_candidate(result):
        return ""
    if winner < 0:
        return "On the train rows the search went by log-likelihoods, which are no estimate of the score."
    chosen = f"The search chose its winner for the {winner:.3f} on the train rows, so that score is partly luck"
    if seed is not None and winner - seed > _tested(result):
        return f"{chosen}: of {_points(winner - seed)} there, {_points(_tested(result))} were left on untouched rows."
    if f"{winner:.3f}" == f"{result['baseline'] + _tested(result):.3f}":
        return ""
    return f"{chosen}; only the untouched rows, which no search step has seen, give an estimate."


def _totals(result: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    claimed = f"{100 * result['gain']:+.1f} points, on {result['rows']} rows no search step has seen"
    table.add_row("gain claimed", claimed if result["replaced"] else "none; your instructions stay")
    billed = f", {result['billed_calls']} billed now" if "billed_calls" in result else ""
    told = f"{result['calls']}{billed}; {result['tokens']:,} tokens; {cost(result)}"
    table.add_row("calls", plain(told))
    if "seconds" in result:
        table.add_row("time", f"{result['seconds']:.0f} s")
    return table


def cost(result: Mapping[str, Any]) -> str:
    """Return the dollars of a result, and what they are without."""
    names = ", ".join(result.get("unpriced", ()))
    without = f", but for {names}: no price is known, give it with --price" if names else ""
    return f"${result['dollars']:.4f}{without}"


def _searched(result: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return the seed's and the winner's score in the search, None for what isn't known."""
    scores = [result.get(name) for name in ("seed_search_score", "search_score")]
    seed, winner = (float(score) if isinstance(score, (int, float)) else None for score in scores)
    return seed, winner


def _has_candidate(result: Mapping[str, Any]) -> bool:
    return result.get("has_candidate") is not False


def _tested(result: Mapping[str, Any]) -> float:
    return float(result.get("tested_gain", result["gain"]))


def _score(score: Any) -> str:
    return f"{score:.3f}" if _is_number(score) else ""


def _points(gain: Any) -> str:
    return f"{100 * gain:+.1f} points" if _is_number(gain) else ""


def _is_number(value: Any) -> bool:
    """Return True for what can be printed as a number; a file may hold anything."""
    return type(value) is float or (type(value) is int and abs(value) < _LARGEST)


def _interval(ci: Sequence[float] | None, scale: int) -> str:
    if ci is None:
        return ""
    return f"{ci[0]:.3f} to {ci[1]:.3f}" if scale == 1 else f"{scale * ci[0]:+.1f} to {scale * ci[1]:+.1f}"


def print_diff(text: str) -> None:
    """Print a unified diff, coloured on a terminal."""
    styles = {"+": "green", "-": "red", "@": "cyan"}
    console = out()
    for line in text.split("\n"):
        console.print(plain(line, styles.get(line[:1], "")), soft_wrap=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; columns of numbers are aligned to the right."""
    if title:
        out().print(Text(title, style="bold"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for at, name in enumerate(header):
        numeric = all(isinstance(row[at], (int, float)) for row in rows)
        table.add_column(plain(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(plain(f"{cell:.3f}" if isinstance(cell, float) else str(cell)) for cell in row))
    out().print(table)
