"""`preceptor bench batch`: a program over many rows, in a process of its own.

`linear`: rows a second and the most memory held, at growing numbers of rows, with a model that answers at once.
`kills`: one batch, killed with SIGKILL at moments drawn evenly over the time an undisturbed one takes, then let
finish. What the model was asked is written down on the model's side. Every row must have been answered once, as
in the undisturbed batch, and no call asked again whose answer was in the ledger; calls in flight are, at most one
a thread and kill.
`ray`: a model that keeps a processor busy, in one process and in several on Ray: the same shards, byte for byte,
and the ratio of their rates, without the start of Ray and its workers.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from preceptor.benchmarks.batched import Order
from preceptor.benchmarks.kill import Life, _read, _wait, lost, recorded, repeated
from preceptor.benchmarks.result import Json, Out, give
from preceptor.cli.view import print_table, say
from preceptor.errors import ConfigError, RunError

PARTS: Final = ("linear", "kills", "ray")
MEGABYTE: Final = 1e6


def run(
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}; by default all.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Of linear; each is compared with the first.")] = None,
    kills: Annotated[int, typer.Option(help="Of kills.")] = 20,
    kill_rows: Annotated[int, typer.Option(help="Rows of kills.")] = 20_000,
    workers: Annotated[int, typer.Option(help="Of ray.")] = 2,
    ray_rows: Annotated[int, typer.Option(help="Rows of ray.")] = 2000,
    busy: Annotated[float, typer.Option(help="Milliseconds of work an answer takes, of ray.")] = 20.0,
    shard_rows: Annotated[int, typer.Option(help="Rows of a shard.")] = 10_000,
    threads: Annotated[int, typer.Option(help="Rows under way.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the moments of the kills.")] = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure rate, memory, kills and Ray."""
    parts = part or list(PARTS)
    for name in parts:
        if name not in PARTS:
            raise ConfigError(f"No part {name!r}; there are {', '.join(PARTS)}.")
    result: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        order = Order(rows="", folder=folder, threads=threads, shard_rows=shard_rows)
        measured: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "linear": lambda: _linear(order, rows or [10_000, 30_000, 100_000]),
            "kills": lambda: [_killed(order, kill_rows, kills, random.Random(seed))],
            "ray": lambda: [_spread(dataclasses.replace(order, busy=busy), ray_rows, workers)],
        }
        result |= {name: measured[name]() for name in parts}
    give(result, out, as_json=as_json, show=_print)


def _print(result: dict[str, Any]) -> None:
    say(f"{result['cores']} cores, load {result['load']:.1f}")
    for name in filter(result.__contains__, PARTS):
        table = result[name]
        print_table(name, [column.replace("_", " ") for column in table[0]], [list(row.values()) for row in table])


def _linear(order: Order, sizes: Sequence[int]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for size in sizes:
        order = _placed(order, f"linear {size}", size)
        _live(order, None)
        result = _result(order)
        took = 1e6 * result["seconds"] / size
        row = {"rows": size, "rows_a_second": size / result["seconds"], "microseconds_a_row": took}
        first = found[0]["microseconds_a_row"] if found else took
        found.append({**row, "growth": took / first, "peak_megabytes": result["peak"] / MEGABYTE})
        say(f"  {size} rows: {size / result['seconds']:.0f} a second, {result['peak'] / MEGABYTE:.0f} MB at most")
    return found


def _killed(order: Order, rows: int, kills: int, rng: random.Random) -> dict[str, Any]:
    """Return what became of a batch that was killed so often, beside one that was left alone."""
    whole = _placed(order, "whole", rows, is_logged=True)
    life = _live(whole, None)
    seconds = life.ended - life.ready
    say(f"  {rows} rows in {seconds:.1f} s undisturbed")
    killed = _placed(order, "killed", rows, is_logged=True)
    lives: list[Life] = []
    moments = [0.0, *sorted(rng.uniform(0, seconds) for _ in range(kills))]
    lives += [_live(killed, end - start) for start, end in pairwise(moments)]
    lives.append(_live(killed, None))
    return {
        "rows": rows,
        "kills": sum(life.is_killed for life in lives),
        "identical": _shards(killed) == _shards(whole),
        "answered": _result(killed)["answered"],
        "recorded": lives[-1].recorded.total(),
        "recorded_and_asked_again": repeated(lives),
        "in_flight_and_asked_again": sum(lost(lives)),
        "most_in_flight": max(lost(lives)),
    }


def _spread(order: Order, rows: int, workers: int) -> dict[str, Any]:
    one, several = _placed(order, "one", rows), _placed(order, "several", rows)
    several = dataclasses.replace(several, workers=workers)
    for each in (one, several):
        _live(each, None)
    rates = [rows / _result(each)["seconds"] for each in (one, several)]
    return {
        "rows": rows,
        "busy_milliseconds": order.busy,
        "workers": workers,
        "rows_a_second_of_one": rates[0],
        "rows_a_second": rates[1],
        "ratio": rates[1] / rates[0],
        "identical": _shards(one) == _shards(several),
    }


def _placed(order: Order, name: str, rows: int, *, is_logged: bool = False) -> Order:
    """Return the order with a folder of its own and so many rows to read."""
    root = Path(order.rows).parent if order.rows else Path(order.folder)
    source, folder = root / f"{rows}.csv", root / name
    folder.mkdir()
    if not source.exists():
        _write_rows(source, rows)
    log = folder / "asked"
    log.touch()
    return dataclasses.replace(order, rows=str(source), folder=str(folder), log=str(log) if is_logged else "")


def _write_rows(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "text"])
        for number in range(count):
            what = "Take part in our great lottery and win a prize" if number % 2 else "Shall we have lunch at noon"
            table.writerow([number, f"{what}, message number {number}, sent on Monday."])


def _live(order: Order, seconds: float | None) -> Life:
    """Run a process to its end, or kill it so many seconds after its imports."""
    log, folder = Path(order.folder) / "asked", Path(order.folder) / "out.batch"
    known, started = len(_read(log)), time.time()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "preceptor.benchmarks.batched", json.dumps(dataclasses.asdict(order))],
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            ready = _wait(child, seconds)
        finally:
            child.kill()
            child.wait()
        is_killed = seconds is not None and child.returncode == -signal.SIGKILL
        if child.returncode != 0 and not is_killed:
            errors.seek(0)
            raise RunError(f"The batch in {order.folder} ended with {child.returncode}: {errors.read()[-2000:]}")
    ended = time.time()
    return Life(started, ready, ended, is_killed, _read(log)[known:], recorded(folder) if order.log else Counter())


def _result(order: Order) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(order.folder) / "result.json").read_text(encoding="utf-8"))
    return found


def _shards(order: Order) -> dict[str, bytes]:
    """Return the answered rows, by shard."""
    return {path.name: path.read_bytes() for path in sorted((Path(order.folder) / "out").iterdir())}
