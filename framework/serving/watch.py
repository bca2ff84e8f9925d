"""What can be seen of a server from outside: metrics for Prometheus, and one line of JSON for each request."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from preceptor.serving.model import Tally

LOGGER: Final = logging.getLogger("preceptor.serving")

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry, "namespace": "preceptor"}
        self.requests = Counter("requests", "Requests by endpoint and status.", ["endpoint", "status"], **own)
        self.seconds = Histogram(
            "request_seconds", "From a request's arrival to its last byte.", ["endpoint"], buckets=_SECONDS, **own
        )
        self.rows = Counter("rows", "Rows answered.", **own)
        self.failures = Counter("failures", "Rows and requests not answered, by what went wrong.", ["code"], **own)
        self.calls = Counter("model_calls", "Answers of the model.", ["program"], **own)
        self.tokens = Counter("tokens", "Tokens read and written by the model.", ["program", "direction"], **own)
        self.dollars = Counter("dollars", "Price of the calls whose price is known.", ["program"], **own)
        self.unpriced = Counter("unpriced_calls", "Calls of a model whose price isn't known.", ["program"], **own)
        self.routes = Counter("routes", "Rows by the region they are in and who answered.", ["region", "expert"], **own)
        self.shadow = Counter("shadow", "Rows the shadow answered too, by outcome.", ["outcome"], **own)
        self.reloads = Counter("reloads", "Hot reloads, by outcome.", ["outcome"], **own)
        self.busy = Gauge("busy", "Rows being answered.", **own)
        self.admitted = Gauge("admitted", "Requests that are in, waiting ones included.", **own)
        self.ready = Gauge("ready", "1 if the server takes requests.", **own)
        self.program = Gauge("program", "1 for the program that is served.", ["digest", "name"], **own)
        for direction in ("input", "output"):
            self.tokens.labels("served", direction)

    def text(self) -> bytes:
        """Return all of them in Prometheus' format."""
        return generate_latest(self._registry)

    def count(self, tally: Tally, program: str) -> None:
        """Count what was asked of the models for one row; `program` is "served" or "shadow"."""
        self.calls.labels(program).inc(tally.calls)
        self.tokens.labels(program, "input").inc(tally.input_tokens)
        self.tokens.labels(program, "output").inc(tally.output_tokens)
        if tally.dollars is None:
            self.unpriced.labels(program).inc(tally.calls)
        elif tally.dollars:
            self.dollars.labels(program).inc(tally.dollars)


def note(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event with its fields."""
    if LOGGER.isEnabledFor(level):
        LOGGER.log(level, event, extra={"fields": fields})


class Lines(logging.Formatter):
    """Formats a record as one line of JSON: time (Unix seconds), level, event, and the fields of `note`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage()}
        if record.exc_info and record.exc_info[1] is not None:  # its message may hold an input
            line |= {"error": type(record.exc_info[1]).__name__, "at": place_of(record.exc_info[1])}
        return json.dumps({**line, **fields}, ensure_ascii=False, default=str)


def since(start: float) -> float:
    """Return the seconds since a `time.perf_counter()`, to the tenth of a millisecond."""
    return round(time.perf_counter() - start, 4)


def place_of(error: BaseException) -> str:
    """Return where an error was raised, without what it says, which may be an input."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return "" if last is None else f"{Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}"
