"""The process that `preceptor bench batch` runs: one batch, told what to do by one JSON argument.

It writes the time to stdout when its imports are done and its model is there, and ends with 0. What came of the
batch, and the most memory the process held, go into a file.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from preceptor.batch import Batch, open_source
from preceptor.benchmarks.killed import digest
from preceptor.lm.seam import InThread
from preceptor.lm.workers import RayLM
from preceptor.modules import Classify
from preceptor.testing import prompt

SIGNATURE: Final = "text -> label: Literal['spam', 'mail']"
KILOBYTE: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a process is to run.

    Attributes:
        rows: A file with a column `text`.
        folder: Where everything goes: `out`, and the file `result.json`.
        log: Every call is written down there, "" for not at all.
        busy: Milliseconds of processor time an answer takes.
        workers: Processes of the model, on Ray; 0 for none.
        threads: Rows under way where the model is in this process.
        shard_rows: Of a shard.
    """

    rows: str
    folder: str
    log: str = ""
    busy: float = 0.0
    workers: int = 0
    threads: int = 8
    shard_rows: int = 10_000


class Instant:
    """An engine that remembers nothing: answers by the text, after so much work."""

    def __init__(self, busy: float, log: str) -> None:
        self._busy = busy / 1000
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND) if log else None

    def __deepcopy__(self, memo: dict[int, object]) -> Instant:
        return self

    def complete(self, request: Request) -> Response:
        """Answer one request."""
        if self._log is not None:  # one write: whole or not at all
            os.write(self._log, f"{time.time()} {digest(request)}\n".encode())
        end = time.thread_time() + self._busy
        while time.thread_time() < end:
            pass
        answer = Message.assistant([TextPart("spam" if "prize" in prompt(request) else "mail")])
        usage = Usage(input_tokens=16, output_tokens=1)
        return Response(id=None, model="bench/instant", message=answer, finish_reason="stop", usage=usage)


def model(busy: float, log: str = "") -> dspy.LM:
    """Return a model that answers at once, or after so many milliseconds of work."""
    engine = Instant(busy, log)
    settings: dict[str, Any] = {"cache": False, "num_retries": 0, "temperature": 0.0, "max_tokens": 8}
    return dspy.LM("bench/instant", engine=engine, async_engine=InThread(engine), **settings)


def main(order: Order) -> None:
    """Run the batch as ordered."""
    lm = RayLM(partial(model, order.busy), order.workers) if order.workers else model(order.busy, order.log)
    sys.stdout.write(f"{time.time()}\n")
    sys.stdout.flush()
    folder = Path(order.folder)
    job = Batch(
        program=Classify(SIGNATURE, "Sort the message."),
        identity="bench",
        inputs={"text": str},
        lm=lm,
        source=open_source(order.rows),
        out=folder / "out",
        threads=order.threads,
        shard_rows=order.shard_rows,
    )
    result = job.run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE
    (folder / "result.json").write_text(json.dumps({**result, "peak": peak}), encoding="utf-8")


if __name__ == "__main__":
    main(Order(**json.loads(sys.argv[1])))
