"""`preceptor bench kill`: compiles killed with SIGKILL and resumed, beside one that was left alone.

Each compile runs in a process of its own. It is killed up to three times, at moments drawn evenly over the
time an undisturbed compile takes once its imports are done, and then let finish. What a model was asked is
written down on the model's side, not in the run: `simulated` and `local` append every call to a file, `http`
is a server in this process. So a call paid for twice is seen even if the ledger had forgotten it. Answers
depend on the request alone.

A call is in flight if it was asked and its answer had not reached the ledger when the process died. Nobody
has that answer, so the call has to be asked again: at most one per thread and kill. `local` answers in
batches; there it is at most the batch that had been computed and not yet recorded.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Final

import typer
from dspy._vendor.lm15.serde import request_from_dict  # the only door to JSON
from dspy.lm15 import request_from_openai_chat

from preceptor.benchmarks.killed import ROWS, Order, answerer, digest
from preceptor.benchmarks.result import Json, Out, give
from preceptor.cli.compiling import _knobs, _method
from preceptor.cli.pairs import pair
from preceptor.cli.view import print_table, say
from preceptor.errors import ConfigError, RunError
from preceptor.testing import ChatServer

KILLS: Final = {"simulated": 30, "http": 30, "local": 3}
KNOBS: Final = {("ape", "local"): {"candidates": "3", "max_tokens": "12"}, ("ape", ""): {"candidates": "8"}}
MOST_KILLS: Final = 3
FILES: Final = ("program.json", "evidence.json", "manifest.json")

Asked = tuple[float, str]
"""When a model was asked, in seconds since the epoch, and the digest of what."""


def run(
    kills: Annotated[int | None, typer.Option(help="In all, per model; by default 30, of local 3.")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ROWS)}.")] = None,
    method: Annotated[str, typer.Option(help="See: preceptor methods.")] = "ape",
    knob: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method: candidates=8.")] = None,
    threads: Annotated[int, typer.Option(help="Calls in flight.")] = 8,
    latency: Annotated[float, typer.Option(help="Seconds per answer of simulated and http.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the moments of the kills.")] = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Kill compiles at random moments, resume them, and compare."""
    found: list[dict[str, Any]] = []
    for name in model or ["simulated", "http"]:
        if name not in ROWS:
            raise ConfigError(f"No model {name!r}; there are {', '.join(ROWS)}.")
        knobs = KNOBS.get((method, name)) or KNOBS.get((method, "")) or {}
        given = dict(pair("--set", text) for text in knob or ())
        _knobs(_method(method), given)  # refused here rather than by a child
        order = Order(model=name, method=method, knobs={**knobs, **given}, threads=threads, latency=latency)
        found.append(_measure(order, KILLS[name] if kills is None else kills, random.Random(seed)))
    result = {"seed": seed, "latency": latency, "measured": found}
    give(result, out, as_json=as_json, show=_print)


def _print(result: dict[str, Any]) -> None:
    found: list[dict[str, Any]] = result["measured"]
    columns = [name.replace("_", " ") for name in found[0]]
    print_table("Killed and resumed", columns, [list(row.values()) for row in found])


@dataclass(frozen=True, slots=True)
class Life:
    """One process of a compile, from its start to its end.

    Attributes:
        started: When the process was started, in seconds since the epoch.
        ready: When its imports were done.
        ended: When it was gone.
        is_killed: False if it finished before its kill came, or was let finish.
        asked: What the model was asked meanwhile, in order.
        recorded: How often each digest is in the ledger after its end.
    """

    started: float
    ready: float
    ended: float
    is_killed: bool
    asked: Sequence[Asked]
    recorded: Counter[str]

    @property
    def digests(self) -> Counter[str]:
        """How often the model was asked what."""
        return Counter(digest for _, digest in self.asked)

    @property
    def went_on(self) -> float | None:
        """When it first asked the model, or finished without; None if it was killed before."""
        if self.asked:
            return self.asked[0][0]
        return None if self.is_killed else self.ended


def lost(lives: Sequence[Life]) -> list[int]:
    """Return, per life, how many calls were asked and not recorded."""
    before = [Counter[str](), *(life.recorded for life in lives)]
    return [(life.digests - (life.recorded - old)).total() for life, old in zip(lives, before, strict=False)]


def repeated(lives: Sequence[Life]) -> int:
    """Return how many calls were asked although their answers were in the ledger already."""
    before = [Counter[str](), *(life.recorded for life in lives)]
    last = lives[-1].recorded
    return sum((life.digests - (last - old)).total() for life, old in zip(lives, before, strict=False))


def _measure(order: Order, kills: int, rng: random.Random) -> dict[str, Any]:
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        order, asked = _watched(order, folder, opened)
        whole, seconds = _undisturbed(order, folder, asked)
        runs: list[list[Life]] = []
        equal = 0
        for number in range(2 * kills):  # a run may finish before it is killed; it shows nothing then
            if (left := kills - _kills(runs)) == 0:
                break
            moments = sorted(rng.uniform(0, seconds) for _ in range(min(left, rng.randint(1, MOST_KILLS))))
            to = folder / str(number)
            lives = list(_lives(dataclasses.replace(order, folder=str(to)), moments, asked))
            if not _kills([lives]):
                continue
            runs.append(lives)
            other = _different(folder / "whole", to)
            equal += not other
            told = f"differs in {', '.join(other)}" if other else "identical"
            say(f"  run {len(runs)}: killed {_kills([lives])} times, {told}; {_kills(runs)} of {kills} kills")
    return {**_row(order, runs, whole), "identical": equal}


def _undisturbed(order: Order, folder: Path, asked: Callable[[], list[Asked]]) -> tuple[Life, float]:
    """Compile twice without killing; return the first life, and the seconds of the faster one.

    Raises:
        RunError: If the programs differ: what kills change couldn't be told then.
    """
    whole, again = (
        _live(dataclasses.replace(order, folder=str(folder / name)), None, asked) for name in ("whole", "again")
    )
    if other := _different(folder / "whole", folder / "again"):
        raise RunError(f"Two undisturbed compiles with {order.model} differ in {', '.join(other)}.")
    seconds = min(life.ended - life.ready for life in (whole, again))
    say(f"  {order.model}: {len(whole.asked)} calls in {seconds:.1f} s undisturbed; twice the same program")
    return whole, seconds


def _kills(runs: Sequence[Sequence[Life]]) -> int:
    return sum(life.is_killed for lives in runs for life in lives)


def _row(order: Order, runs: Sequence[Sequence[Life]], whole: Life) -> dict[str, Any]:
    missed = [count for lives in runs for count in lost(lives)]
    resumed = [(life, life.went_on) for lives in runs for life in lives[1:]]
    starts = [went_on - life.started for life, went_on in resumed if went_on is not None]
    replays = [went_on - life.ready for life, went_on in resumed if went_on is not None]
    return {
        "model": order.model,
        "method": order.method,
        "threads": order.threads,
        "calls": len(whole.asked),
        "runs": len(runs),
        "kills": _kills(runs),
        "same_calls": sum(lives[-1].recorded == whole.recorded for lives in runs),
        "recorded_and_asked_again": sum(map(repeated, runs)),
        "in_flight_and_asked_again": sum(missed),
        "most_in_flight": max(missed, default=0),
        "seconds_to_resume": fmean(starts) if starts else None,
        "seconds_of_replay": fmean(replays) if replays else None,
    }


def _watched(order: Order, folder: Path, opened: ExitStack) -> tuple[Order, Callable[[], list[Asked]]]:
    """Return an order whose model writes down what it is asked, and what reads that."""
    if order.model != "http":
        log = folder / "asked"
        log.touch()
        return dataclasses.replace(order, log=str(log)), lambda: _read(log)
    asked: list[Asked] = []
    lock, answer = threading.Lock(), answerer()

    def respond(body: dict[str, Any]) -> str:
        request = request_from_openai_chat({name: body[name] for name in ("model", "messages", "seed") if name in body})
        with lock:
            asked.append((time.time(), digest(request)))
        return answer(request)

    server = opened.enter_context(ChatServer(respond, latency=order.latency))
    return dataclasses.replace(order, url=server.url), lambda: list(asked)


def _lives(order: Order, moments: Sequence[float], asked: Callable[[], list[Asked]]) -> Iterator[Life]:
    """Yield the lives of one compile; it is killed where each has lasted from one moment to the next."""
    for start, end in zip([0.0, *moments], moments, strict=False):
        life = _live(order, end - start, asked)
        yield life
        if not life.is_killed:
            return
    yield _live(order, None, asked)


def _live(order: Order, seconds: float | None, asked: Callable[[], list[Asked]]) -> Life:
    """Run a child process to its end, or kill it so many seconds after its imports."""
    known, started = len(asked()), time.time()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "preceptor.benchmarks.killed", json.dumps(dataclasses.asdict(order))],
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            ready = _wait(child, seconds)
        finally:
            child.kill()
            child.wait()
        ended = time.time()
        is_killed = seconds is not None and child.returncode == -signal.SIGKILL
        if child.returncode != 0 and not is_killed:
            errors.seek(0)
            raise RunError(f"The compile in {order.folder} ended with {child.returncode}: {errors.read()[-2000:]}")
    _settle(asked)
    return Life(started, ready, ended, is_killed, asked()[known:], recorded(Path(order.folder)))


def _wait(child: subprocess.Popen[bytes], seconds: float | None) -> float:
    """Wait for a child, so many seconds at most once it is ready; return when it was, by its own clock."""
    assert child.stdout is not None
    with child.stdout as told:
        ready = float(told.readline() or time.time())
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
        return ready


def _settle(asked: Callable[[], list[Asked]]) -> None:
    """Wait until the server has read what a process that is gone had sent."""
    known = -1
    while known != (known := len(asked())):
        time.sleep(0.1)


def recorded(run: Path) -> Counter[str]:
    """Return how often each digest is in a run's ledger; read from a copy, so that nothing is mended."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("ledger.sqlite", "ledger.sqlite-wal"):
            if (run / name).is_file():
                shutil.copy(run / name, folder)
        db = sqlite3.connect(Path(folder) / "ledger.sqlite")
        try:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone():
                return Counter()  # killed before the table was made
            rows = db.execute("SELECT request FROM answers").fetchall()
        finally:
            db.close()
    return Counter(digest(request_from_dict(json.loads(text))) for (text,) in rows)


def _different(whole: Path, run: Path) -> list[str]:
    """Return the files of a program that aren't the same, byte for byte."""
    pairs = ((whole / "program" / name, run / "program" / name) for name in FILES)
    return [one.name for one, other in pairs if one.read_bytes() != other.read_bytes()]


def _read(log: Path) -> list[Asked]:
    lines = [line.split() for line in log.read_text(encoding="ascii").splitlines()]
    return [(float(when), what) for when, what in lines]
