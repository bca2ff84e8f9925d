"""`preceptor bench null`: how often a method replaces a prompt where no prompt can help.

The model tosses a fair coin, whatever it is told. Every replacement is a false one, and every claimed
gain is the winner's curse.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import dspy
import typer

from preceptor.cli.view import print_json, print_table, say
from preceptor.lm.budget import Budget
from preceptor.modules import Classify
from preceptor.teleprompters import APE
from preceptor.testing import coin_flip

LABELS = ("heads", "tails")


def main(arguments: list[str]) -> None:
    """Run the benchmark with command-line arguments."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    app(arguments, standalone_mode=False, prog_name="preceptor bench null")


def run(
    seeds: Annotated[int, typer.Option(help="Compiles per size.")] = 100,
    rows: Annotated[list[int] | None, typer.Option(help="Validation rows; as many train rows.")] = None,
    candidates: Annotated[int, typer.Option(help="Of APE.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Write the JSON object here too.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Compile a coin-flip task with many seeds."""
    measured = [_measure(size, seeds, candidates) for size in rows or [50, 200]]
    result = {"method": "APE", "seeds": seeds, "candidates": candidates, "measured": measured}
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(result)
        return
    header = ["rows", "replaced", "share", "gain claimed", "gain tested", "± 95 %", "search gain"]
    names = ["rows", "replaced", "share", "claimed", "tested", "tested_half_width", "search"]
    print_table(f"APE on a coin flip, {seeds} seeds", header, [[row[name] for name in names] for row in measured])


def _measure(rows: int, seeds: int, candidates: int) -> dict[str, Any]:
    evidence = [_compile(rows, seed, candidates) for seed in range(seeds)]
    say(f"  {rows} rows: {seeds} compiles")
    tested = [each.comparison.gain for each in evidence]
    replaced = sum(each.replaced for each in evidence)
    return {
        "rows": rows,
        "replaced": replaced,
        "share": replaced / seeds,
        "claimed": fmean(each.gain for each in evidence),
        "tested": fmean(tested),
        "tested_half_width": 1.96 * stdev(tested) / seeds**0.5,
        "search": fmean((each.search_score or 0.0) - 0.5 for each in evidence),
    }


def _compile(rows: int, seed: int, candidates: int) -> Any:
    """Compile once; labels alternate, so that an even coin is right half of the time."""
    examples = [
        dspy.Example(text=f"Toss {seed}-{number}", side=LABELS[number % 2]).with_inputs("text")
        for number in range(2 * rows)
    ]
    program = Classify("text -> side: Literal['heads', 'tails']", instructions="Call the toss.")
    with tempfile.TemporaryDirectory() as folder:
        method = APE(
            metric="accuracy",
            lm=coin_flip(LABELS, seed=seed),
            candidates=candidates,
            budget=Budget(calls=100_000),
            run_dir=folder,
            threads=1,
            seed=seed,
        )
        return method.compile(program, trainset=examples[:rows], valset=examples[rows:]).evidence
