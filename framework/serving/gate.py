"""The gate: how many rows are answered at a time, and how many requests may wait for that."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from preceptor.serving.refused import Refused

_LEARNING: Final = 0.1
"""Weight of the latest row in the moving average of seconds."""


class Gate:
    """Lets requests in, a bounded number at a time.

    A request is admitted or refused at once; then each of its rows waits for a place. Not for use by several
    threads.

    Args:
        concurrency: Places.
        queue: Requests admitted beyond that.

    Attributes:
        admitted: Requests that are in.
        busy: Places taken.
        is_open: False once the server drains.
    """

    def __init__(self, concurrency: int, queue: int) -> None:
        self.admitted = 0
        self.busy = 0
        self.is_open = True
        self._concurrency = concurrency
        self._most = concurrency + queue
        self._places = asyncio.Semaphore(concurrency)
        self._seconds = 0.0

    @contextmanager
    def admitted_request(self) -> Generator[None]:
        """Let a request in.

        Raises:
            Refused: 503 if the gate is closed, 429 if too many are in, with the time after which to come again.
        """
        if not self.is_open:
            raise Refused(503, "The server is shutting down.", "draining", headers={"Retry-After": "1"})
        if self.admitted >= self._most:
            wait = max(1, math.ceil(self._seconds * self.admitted / self._concurrency))
            raise Refused(
                429,
                f"{self.admitted} requests are being answered or waiting; come again in {wait} s.",
                "busy",
                headers={"Retry-After": str(wait)},
            )
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    @asynccontextmanager
    async def place(self) -> AsyncGenerator[None]:
        """Wait for a place and take it."""
        async with self._places:
            self.busy += 1
            start = asyncio.get_running_loop().time()
            try:
                yield
            finally:
                self.busy -= 1
                took = asyncio.get_running_loop().time() - start
                self._seconds += _LEARNING * (took - self._seconds)
