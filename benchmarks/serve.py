"""`preceptor bench serve`: requests per second of a served program, and what it keeps of them.

Three parts, each in processes of their own, so that clients don't take turns with the server's threads:

    waiting   a model that takes 0.2 s and 32 clients: the ideal is 160 requests a second
    instant   a model that answers at once, beside the plain recipe: FastAPI and `await program.acall`
    memory    the server's resident memory over many requests

The recipe serves the same program with the same model, no tokens, limits, metrics or log.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Annotated, Any, Final, cast

import dspy
import numpy as np
import typer
import uvicorn
from dspy.lm15 import Message, Request, Response, TextPart, Usage
from fastapi import FastAPI
from pydantic import BaseModel

from preceptor import program as artifact
from preceptor.benchmarks.result import Json, Out, give
from preceptor.cli.view import print_table, say
from preceptor.errors import ConfigError
from preceptor.modules import Classify
from preceptor.serving.app import application
from preceptor.serving.run import Server, listen, log_lines, spare_garbage_collection
from preceptor.serving.service import Service, Source
from preceptor.serving.settings import Limits

SIGNATURE: Final = "text -> label: Literal['spam', 'mail']"
INSTRUCTIONS: Final = "Sort the message."
PARTS: Final = ("waiting", "instant", "memory")
SERVERS: Final = ("ours", "recipe")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Load:
    """What clients met.

    Attributes:
        seconds: From the first request to the last answer.
        latencies: Of each request, in seconds.
    """

    seconds: float
    latencies: list[float]

    @property
    def row(self) -> dict[str, float]:
        """Requests per second and the latencies' 50th and 99th percentile in milliseconds."""
        p50, p99 = (1000 * float(each) for each in np.percentile(self.latencies, [50, 99]))
        return {"requests/s": len(self.latencies) / self.seconds, "p50 ms": p50, "p99 ms": p99}


class Running:
    """A server in a process of its own."""

    def __init__(self, pipe: IO[str], told: IO[str]) -> None:
        self._pipe = pipe
        self._told = told

    @cached_property
    def url(self) -> str:
        """Where it is, once it is there."""
        return self._told.readline().strip()

    def used(self) -> dict[str, float]:
        """Return its resident memory in MB and the CPU time it has taken in seconds."""
        self._pipe.write("\n")
        self._pipe.flush()
        return cast("dict[str, float]", json.loads(self._told.readline()))


def run(
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}; by default all.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="Connections that ask at a time.")] = 32,
    latency: Annotated[float, typer.Option(help="Seconds per answer, of waiting.")] = 0.2,
    requests: Annotated[int, typer.Option(min=1, help="Of waiting and instant, each time.")] = 3200,
    memory_requests: Annotated[int, typer.Option(min=10, help="Of memory.")] = 100_000,
    repeats: Annotated[int, typer.Option(min=1, help="Of waiting and instant, by turns; the best counts.")] = 3,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure a server's throughput, latency and memory."""
    parts = part or list(PARTS)
    for name in parts:
        if name not in PARTS:
            raise ConfigError(f"No part {name!r}; there are {', '.join(PARTS)}.")
    result: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "clients": clients}
    if "waiting" in parts:
        result["waiting"] = _compared(("ours",), latency, clients, requests, repeats)
        for row in result["waiting"]:
            row["share of the ideal"] = row["requests/s"] * latency / clients
    if "instant" in parts:
        result["instant"] = _compared(SERVERS, 0.0, clients, requests, repeats)
    if "memory" in parts:
        result["memory"] = _memory(clients, memory_requests)
    give(result, out, as_json=as_json, show=_print)


def _compared(names: Sequence[str], latency: float, clients: int, requests: int, repeats: int) -> list[dict[str, Any]]:
    """Return a line for each server: its best of several loads, taken by turns."""
    best: dict[str, dict[str, float]] = {}
    with ExitStack() as opened:
        servers = {name: opened.enter_context(_server(name, latency)) for name in names}
        for server in servers.values():
            _loaded(server.url, clients, 10 * clients)
        for _ in range(repeats):
            for name, server in servers.items():
                before = server.used()["cpu"]
                row = _loaded(server.url, clients, requests).row
                row["CPU us/request"] = 1e6 * (server.used()["cpu"] - before) / requests
                say(f"  {name}: {row['requests/s']:.0f} requests/s")
                best[name] = max(best.get(name, row), row, key=lambda each: each["requests/s"])
    first = best[names[0]]["requests/s"]
    return [{"server": name, **row, f"{names[0]} / it": first / row["requests/s"]} for name, row in best.items()]


def _memory(clients: int, requests: int) -> list[dict[str, Any]]:
    """Return the server's memory after each tenth of the requests."""
    found: list[dict[str, Any]] = []
    with _server("ours", 0.0) as server:
        for tenth in range(1, 11):
            _loaded(server.url, clients, requests // 10)
            found.append({"requests": tenth * (requests // 10), "MB": server.used()["MB"]})
            say(f"  {found[-1]['requests']} requests: {found[-1]['MB']:.1f} MB")
    return found


@contextmanager
def _server(name: str, latency: float) -> Generator[Running]:
    with ExitStack() as opened:
        command = [sys.executable, "-m", "preceptor.benchmarks.serve", name, str(latency)]
        process = opened.enter_context(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        )
        assert process.stdin is not None
        assert process.stdout is not None
        opened.callback(process.stdin.close)  # which ends it
        yield Running(process.stdin, process.stdout)


def _loaded(url: str, clients: int, requests: int) -> Load:
    """Return what clients in a process of their own met."""
    command = [sys.executable, "-m", "preceptor.benchmarks.serve_clients", url, str(clients), str(requests)]
    with tempfile.TemporaryFile("w+", encoding="ascii") as told:
        subprocess.run(command, check=True, stdout=told)
        told.seek(0)
        found = json.load(told)
    return Load(found["seconds"], found["latencies"])


class _Engine:
    """Answers after a while."""

    def __init__(self, latency: float) -> None:
        self._latency = latency

    def complete(self, request: Request) -> Response:
        """Answer one request."""
        time.sleep(self._latency)
        return _answer(request)


class _AsyncEngine:
    """Answers after a while, awaited."""

    def __init__(self, latency: float) -> None:
        self._latency = latency

    async def complete(self, request: Request) -> Response:
        """Answer one request."""
        await asyncio.sleep(self._latency)
        return _answer(request)


def _answer(request: Request) -> Response:
    return Response(
        id=None,
        model=request.model,
        message=Message.assistant([TextPart("spam")]),
        finish_reason="stop",
        usage=Usage(input_tokens=40, output_tokens=1),
    )


def _lm(latency: float) -> dspy.LM:
    engines = _Engine(latency), _AsyncEngine(latency)
    return dspy.LM("simulated/model", engine=engines[0], async_engine=engines[1], cache=False, max_tokens=64)


class _Row(BaseModel):
    text: str


def _recipe(latency: float) -> FastAPI:
    """Return what one writes by hand."""
    app, program, lm = FastAPI(), Classify(SIGNATURE, INSTRUCTIONS), _lm(latency)
    dspy.configure(lm=lm, disable_history=True, trace=None)

    @app.post("/predict")
    async def predict(row: _Row) -> dict[str, Any]:
        prediction = await program.acall(text=row.text)
        return cast("dict[str, Any]", prediction.toDict())

    return app


def _serve(name: str, latency: float) -> None:
    """Serve until stdin ends; each line on it asks what was used."""
    listening = listen("127.0.0.1", 0)
    if name == "recipe":
        server: uvicorn.Server = uvicorn.Server(uvicorn.Config(_recipe(latency), log_level="warning"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "program"
            artifact.save(Classify(SIGNATURE, INSTRUCTIONS), path, evidence={}, lm="simulated/model")
            service = Service(Source(path, lm=lambda name: _lm(latency)), Limits(drain_seconds=1))
        log_lines()
        server = Server(application(service), service)
        spare_garbage_collection()

    def told() -> None:
        for _ in sys.stdin:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            sys.stdout.write(json.dumps({"MB": pages * _PAGE / 1e6, "cpu": time.process_time()}) + "\n")
            sys.stdout.flush()
        server.should_exit = True

    threading.Thread(target=told, daemon=True).start()
    listening.listen(2048)
    sys.stdout.write(f"http://127.0.0.1:{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    server.run(sockets=[listening])


def _print(result: dict[str, Any]) -> None:
    say(f"{result['cores']} cores, load {result['load']:.1f}, {result['clients']} clients")
    titles = {
        "waiting": "With a model that takes a while",
        "instant": "With a model that answers at once, beside FastAPI and acall by hand",
        "memory": "Resident memory of the server",
    }
    for name, title in titles.items():
        if name in result:
            table = result[name]
            print_table(title, list(table[0]), [list(row.values()) for row in table])


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]))
