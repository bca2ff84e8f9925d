"""`batch`: a program over a data set."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from preceptor import program as artifact
from preceptor.batch import SHARD_ROWS, Batch, Progress, open_source, refuse_failures
from preceptor.batch.folder import Folder
from preceptor.cli.command import DEFAULT
from preceptor.cli.compiling import Bound, Json, MaxTokens, Price, Retries, Timeout, Workers
from preceptor.cli.evaluating import Embedding, Student, load
from preceptor.cli.inputs import (
    DEFAULT_LM,
    Columns,
    budget_of,
    check_columns,
    columns_of,
    fields_of,
    is_saved,
    lm_named,
    lm_on,
    program_of,
)
from preceptor.cli.planning import check_keys
from preceptor.cli.view import aside, cost, counted, out, plain, print_json, say, tell_fault
from preceptor.data import HUB_ID, as_fields
from preceptor.errors import ConfigError, PreceptorError
from preceptor.lm.dispatch import Patience
from preceptor.lm.seam import own_models

_WINDOW: Final = 30.0
"""Seconds over which the rate is taken."""

_TERMINAL: Final = 0.5
_FILE: Final = 10.0
"""Seconds between two lines of progress, on a terminal (drawn over each other) and elsewhere."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(batch)


def batch(
    program: Annotated[str, typer.Argument(help="A saved program, FILE.py:NAME, or a signature.")],
    source: Annotated[str, typer.Argument(metavar="IN", help=f"CSV, TSV, JSONL, Parquet, a folder, or {HUB_ID}.")],
    to: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for shards; or a file, named like IN.")],
    *,
    lm: Annotated[str | None, typer.Option("--lm", help="By default the model the program was compiled for.")] = None,
    api_base: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server.")] = None,
    max_tokens: MaxTokens = None,
    instructions: Annotated[str | None, typer.Option(help="The prompt of a signature.")] = None,
    column: Columns = None,
    student: Student = None,
    embedder: Embedding = None,
    budget: Bound = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again for rows that failed.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Calls in flight.")] = 8,
    timeout: Timeout = DEFAULT.timeout,
    retries: Retries = DEFAULT.retries,
    price: Price = None,
    part: Annotated[str, typer.Option(help="Of a folder or a hub id: train, validation, test.")] = "train",
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows of a shard.")] = SHARD_ROWS,
    engine: Workers = None,
    json: Json = False,
) -> None:
    """Answer every row of a data set, once; the same command again goes on where it was stopped."""
    with aside():
        ready, model, identity = _ready(program, instructions, student, embedder, lm, api_base)
        rows = open_source(source, part=part)
        if rows.name != source:
            say(f"  The rows are those of {rows.name}; give that name to go on once the data set has changed.")
        read_from = columns_of(column)
        check_columns(read_from, ready)
        inputs, _ = fields_of(ready, as_fields(dict.fromkeys(rows.columns), read_from))
        bounds = budget_of(budget, price or (), [model, *(own.model for _, own in own_models(ready))])
        asked = lm_on(engine, model, api_base, max_tokens)
        if not (Folder(to, rows.kind).work / "run.json").is_file():  # a batch made again may need no call
            check_keys(ready, asked)
        with _progress() as report:
            job = Batch(
                program=ready,
                identity=identity,
                inputs=inputs,
                lm=asked,
                source=rows,
                out=to,
                budget=bounds,
                threads=threads,
                patience=Patience(timeout=timeout, retries=retries),
                shard_rows=shard_rows,
                report=report,
                read_from=read_from,
            )
            result = job.run(retry_failed=retry_failed)
    if not json:
        _print(result)
    try:
        refuse_failures(result)
    except PreceptorError as error:
        raise typer.Exit(tell_fault(error, result, as_json=json)) from error
    if json:
        print_json(result)


def _ready(
    target: str,
    instructions: str | None,
    student: str | None,
    embedder: str | None,
    lm: str | None,
    api_base: str | None,
) -> tuple[Any, str, Any]:
    """Return the program, its model, and what tells it apart from another of the same signature.

    Raises:
        ConfigError: If there are instructions for a saved program, which has its own.
    """
    if not is_saved(target):
        return program_of(target, instructions), lm or DEFAULT_LM, _code(target)
    if instructions is not None:
        raise ConfigError(
            f"--instructions goes with a signature; {target} is a saved program with its own. Leave them out, or give "
            "the program's signature in its place."
        )
    saved = artifact.read(Path(target))
    parts = {name: _sha(saved.path / name) for name in ("program.json", "centroids.safetensors")}
    return load(Path(target), student, embedder), lm_named(saved, lm, api_base), [parts, _code(student)]


def _code(target: str | None) -> str:
    """Return the fingerprint of a user's own file, "" where none is named."""
    return "" if target is None or ".py:" not in target else _sha(Path(target.rpartition(":")[0]))


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


@contextmanager
def _progress() -> Generator[Callable[[Progress], None]]:
    """Say on stderr how far a batch is, how fast, at what price, and what is still to come."""
    is_terminal = sys.stderr.isatty()
    pace = Pace()
    said = time.monotonic() - (_TERMINAL if is_terminal else 0.0)

    def report(progress: Progress) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < (_TERMINAL if is_terminal else _FILE):
            return
        said, line = now, pace.line(progress, now)
        if is_terminal:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
        else:
            say(f"  {line}")

    try:
        yield report
    finally:
        if is_terminal:
            sys.stderr.write("\r\x1b[K")


class Pace:
    """Rows a second of late, and what they say about the rest."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def line(self, progress: Progress, now: float) -> str:
        """Return one line about a batch.

        Args:
            progress: How far it is.
            now: Seconds, by any clock.

        Example:
            >>> from preceptor.lm.budget import Cost
            >>> pace = Pace()
            >>> pace.line(Progress(100, 0, 1000, Cost(100, 5000, 0.5), 100), 0.0)
            '100 of about 1,000 rows, $0.5000 so far, about $4.5000 to go'
            >>> pace.line(Progress(300, 2, 1000, Cost(300, 15000, 1.5), 300), 10.0)
            '300 of about 1,000 rows, 2 without an answer, 20.0 rows/s, $1.5000 so far, about $3.5000 and 35 s to go'
        """
        self._seen.append((now, progress.fresh))
        while now - self._seen[0][0] > _WINDOW and len(self._seen) > 2:
            self._seen.popleft()
        (then, before), dollars = self._seen[0], progress.paid.dollars
        rate = (progress.fresh - before) / (now - then) if now > then else 0.0
        total = f" of about {progress.about:,}" if progress.about else ""
        failed = [f"{progress.failed:,} without an answer"] if progress.failed else []
        pace = [f"{rate:,.1f} rows/s"] if rate else []
        price = [f"${dollars:.4f} so far"] if dollars else []
        return ", ".join([f"{progress.rows:,}{total} rows", *failed, *pace, *price, *self._rest(progress, rate)])

    def _rest(self, progress: Progress, rate: float) -> list[str]:
        left = max(0, (progress.about or 0) - progress.rows)
        dollars = progress.paid.dollars / progress.rows * left
        coming = [f"${dollars:.4f}"] if dollars else []
        coming += [_duration(left / rate)] if left and rate else []
        return [f"about {' and '.join(coming)} to go"] if coming else []


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _print(result: dict[str, Any]) -> None:
    unusable = f", {result['unusable']} not asked, since they can't be used" if result["unusable"] else ""
    lines = [
        f"{counted(result['answered'], 'row')} answered, {result['failed']} failed{unusable}; in {result['out']}",
        f"columns added: {', '.join(result['columns'])}",
        f"{counted(result['calls'], 'call')}, {result['billed_calls']} billed now; {result['tokens']:,} tokens; "
        f"{cost(result)}; {result['seconds']:.0f} s",
    ]
    if result["failed_rows"]:
        again = "; --retry-failed asks again for those that failed" if result["failed"] else ""
        lines.append(f"rows without an answer, with the reason: {result['failed_rows']}{again}")
    for line in lines:
        out().print(plain(line), soft_wrap=True)
