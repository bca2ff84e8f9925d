"""`preceptor bench overhead`: what our evaluation costs beside `dspy.Evaluate`, in one process, by turns.

`cost`: microseconds per row with a model that answers at once, and how they grow with the number of rows.
`waiting`: share of the ideal throughput, concurrency / latency, with a model that takes a while.
`http`: the same with an OpenAI-compatible server on the loopback interface; client and server share the
cores of one machine, so the share says more about the machine than about either client.

Three evaluations take turns, and the best of the repeats counts:
`ours`: `Evaluator` on a metered model with a ledger on disk, as a compile uses it; opening and closing the
ledger, which a compile does once, is counted in.
`dspy chat`: `dspy.Evaluate` with `dspy.Predict` and DSPy's default `ChatAdapter`.
`dspy direct`: `dspy.Evaluate` with our `Classify`, and so our `DirectAdapter`.
Neither of DSPy's counts calls, keeps to a budget or records an answer.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import dspy
import typer

from preceptor.benchmarks.result import Json, Out, give
from preceptor.cli.view import print_table, say
from preceptor.errors import ConfigError
from preceptor.lm.adapter import declare
from preceptor.lm.budget import Account, Budget
from preceptor.lm.ledger import Ledger
from preceptor.lm.meter import Meter
from preceptor.modules import Classify
from preceptor.scoring.evaluate import Counter, Evaluator, Job
from preceptor.scoring.metrics import wrap
from preceptor.testing import ChatServer, simulated, system

SIGNATURE: Final = "text -> label: Literal['spam', 'mail']"
INSTRUCTIONS: Final = "Sort the message."
PARTS: Final = ("cost", "waiting", "http")
CHAT_MARK: Final = "[[ ## "
"""What DSPy's ChatAdapter puts around the names of fields."""

Evaluate = Callable[[dspy.LM, Sequence[dspy.Example], int], float]
"""Scores rows with a model and so many threads; returns the accuracy in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Took:
    """What one evaluation took, in seconds.

    Attributes:
        wall: By the clock.
        cpu: Of all threads of this process; hardly moved by what else the machine does.
    """

    wall: float
    cpu: float


def run(
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}; by default the first two.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Of cost; each is compared with the first.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Of cost.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="Of waiting and http.")] = None,
    latency: Annotated[float, typer.Option(help="Seconds per answer, of waiting and http.")] = 0.2,
    rounds: Annotated[int, typer.Option(help="Rows per call in flight, of waiting and http.")] = 10,
    repeats: Annotated[int, typer.Option(help="Of everything; the best counts.")] = 5,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure the cost per row and the share of the ideal throughput."""
    parts = part or list(PARTS[:2])
    for name in parts:
        if name not in PARTS:
            raise ConfigError(f"No part {name!r}; there are {', '.join(PARTS)}.")
    result: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "repeats": repeats}
    with _quiet():
        if "cost" in parts:
            result |= _cost(rows or [1000, 16_000], threads or [1, 8, 32], repeats)
        if "waiting" in parts:
            flying = concurrency or [32, 128, 512]
            result["waiting"] = _waiting(lambda: _instant(latency), flying, latency, rounds, repeats)
        if "http" in parts:
            with _server(latency) as lm:
                result["http"] = _waiting(lambda: lm, concurrency or [32, 128], latency, rounds, repeats)
    give(result, out, as_json=as_json, show=_print)


def _cost(sizes: Sequence[int], threads: Sequence[int], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Return microseconds per row by the clock and of CPU time, per number of threads and rows."""
    found: dict[str, list[dict[str, Any]]] = {"cost": [], "cpu": []}
    for count in threads:
        for size in sizes:
            took = _by_turns(_instant, _rows(size), count, repeats)
            wall = {name: 1e6 * min(each.wall for each in several) / size for name, several in took.items()}
            cpu = {name: 1e6 * min(each.cpu for each in several) / size for name, several in took.items()}
            for part, row in (("cost", wall), ("cpu", cpu)):
                found[part].append(_compared(count, size, row, found[part]))
            say(f"  {count} threads, {size} rows: {wall['ours']:.0f} us a row")
    return found


def _compared(threads: int, rows: int, took: dict[str, float], before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one line of a table: what was taken, beside DSPy, and beside the first size."""
    first = next((row for row in before if row["threads"] == threads), None)
    return {
        "threads": threads,
        "rows": rows,
        **{f"{name} us": value for name, value in took.items()},
        "ours / dspy chat": took["ours"] / took["dspy chat"],
        "ours / dspy direct": took["ours"] / took["dspy direct"],
        **{f"{name} growth": value / first[f"{name} us"] if first else 1.0 for name, value in took.items()},
    }


def _waiting(
    model: Callable[[], dspy.LM], concurrency: Sequence[int], latency: float, rounds: int, repeats: int
) -> list[dict[str, Any]]:
    """Return the share of the ideal throughput, per number of calls in flight."""
    found: list[dict[str, Any]] = []
    for flying in concurrency:
        took = _by_turns(model, _rows(flying * rounds), flying, repeats)
        best = {name: min(each.wall for each in several) for name, several in took.items()}
        found.append(
            {
                "in flight": flying,
                "rows": flying * rounds,
                "ideal rows/s": flying / latency,
                **{f"{name} rows/s": flying * rounds / seconds for name, seconds in best.items()},
                **{f"{name} share": rounds * latency / seconds for name, seconds in best.items()},
            }
        )
        say(f"  {flying} in flight: {rounds * latency / best['ours']:.3f} of the ideal")
    return found


def _by_turns(
    model: Callable[[], dspy.LM], rows: Sequence[dspy.Example], threads: int, repeats: int
) -> dict[str, list[Took]]:
    """Evaluate in all three ways, by turns, each time with a fresh model and ledger."""
    took: dict[str, list[Took]] = {name: [] for name in EVALUATIONS}
    for _ in range(repeats):
        for name, evaluate in EVALUATIONS.items():
            took[name].append(_timed(evaluate, model(), rows, threads))
    return took


def _timed(evaluate: Evaluate, lm: dspy.LM, rows: Sequence[dspy.Example], threads: int) -> Took:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    score = evaluate(lm, rows, threads)
    took = Took(time.perf_counter() - wall, time.process_time() - cpu)
    if score != 1.0:
        raise RuntimeError(f"Every row is answered rightly, yet the evaluation gave {score}.")
    return took


def _ours(lm: dspy.LM, rows: Sequence[dspy.Example], threads: int) -> float:
    """Evaluate as a compile does."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite", is_alone=True)
        metered = Meter(ledger, Account(Budget(calls=len(rows))), threads=threads).wrap(lm)
        counted = Counter(lambda done: None)
        evaluator = Evaluator(metered, wrap("accuracy", "label"), "label", False, threads, on_row=counted)
        program = Classify(SIGNATURE, INSTRUCTIONS)
        outcomes = evaluator.run([Job(program, row) for row in rows])
        ledger.close()
    return sum(outcome.score or 0.0 for outcome in outcomes) / len(outcomes)


def _dspy(program: dspy.Module, lm: dspy.LM, rows: Sequence[dspy.Example], threads: int) -> float:
    evaluate = dspy.Evaluate(devset=list(rows), metric=_is_right, num_threads=threads, display_progress=False)
    with dspy.context(lm=lm):
        return float(evaluate(program).score) / 100


def _dspy_chat(lm: dspy.LM, rows: Sequence[dspy.Example], threads: int) -> float:
    return _dspy(dspy.Predict(declare(SIGNATURE, INSTRUCTIONS)), lm, rows, threads)


def _dspy_direct(lm: dspy.LM, rows: Sequence[dspy.Example], threads: int) -> float:
    return _dspy(Classify(SIGNATURE, INSTRUCTIONS), lm, rows, threads)


EVALUATIONS: Final[dict[str, Evaluate]] = {"ours": _ours, "dspy chat": _dspy_chat, "dspy direct": _dspy_direct}


def _is_right(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return bool(example.label == prediction.label)


def _rows(count: int) -> list[dspy.Example]:
    texts = (
        f"Answer quickly, number {n}, and take part in our great lottery: win a prize today!" for n in range(count)
    )
    return [dspy.Example(text=text, label="spam").with_inputs("text") for text in texts]


def _instant(latency: float = 0.0) -> dspy.LM:
    return simulated(lambda request: _answer(system(request)), latency=latency)


def _answer(told: str) -> str:
    """Return the right answer in the form that the system message asks for."""
    return f"{CHAT_MARK}label ## ]]\nspam\n\n{CHAT_MARK}completed ## ]]" if CHAT_MARK in told else "spam"


@contextmanager
def _quiet() -> Generator[None]:
    """Keep DSPy from logging a line per evaluation."""
    logger = logging.getLogger("dspy.evaluate.evaluate")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _server(latency: float) -> Generator[dspy.LM]:
    """Run the server in a process of its own, so that it doesn't wait for this one's threads."""
    command = [sys.executable, "-m", "preceptor.benchmarks.overhead", str(latency)]
    with ExitStack() as opened:
        server = opened.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert server.stdin is not None
        assert server.stdout is not None
        opened.callback(server.stdin.close)  # which ends it
        url = server.stdout.readline().strip()
        yield dspy.LM("openai/model", api_base=url, api_key="none", cache=False, temperature=0.0, max_tokens=64)


def _serve(latency: float) -> None:
    """Serve until stdin ends."""
    with ChatServer(_answer_body, latency=latency) as server:
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        sys.stdin.read()


def _answer_body(body: dict[str, Any]) -> str:
    return _answer(" ".join(str(message["content"]) for message in body["messages"]))


def _print(result: dict[str, Any]) -> None:
    say(f"{result['cores']} cores, load {result['load']:.1f}, best of {result['repeats']}")
    titles = {
        "cost": "Microseconds per row, with a model that answers at once",
        "cpu": "The same in CPU time, which other processes hardly move",
        "waiting": "Throughput beside the ideal, with a model that takes a while",
        "http": "Throughput beside the ideal, over HTTP; client and server share the cores",
    }
    for name, title in titles.items():
        if name in result:
            table = result[name]
            print_table(title, list(table[0]), [list(row.values()) for row in table])


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
