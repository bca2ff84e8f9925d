"""The clients of `preceptor bench serve`; they import next to nothing, for they share the cores with the server."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from typing import cast
from urllib.parse import urlsplit

import uvloop


class Client(asyncio.Protocol):
    """One connection, kept alive: asks, reads the answer, asks again.

    Args:
        netloc: Of the server.
        left: Numbers of the requests that are to be sent, shared with other clients.
        latencies: Where the seconds of each request go.
    """

    def __init__(self, netloc: str, left: Iterator[int], latencies: list[float]) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._head = f"POST /predict HTTP/1.1\r\nHost: {netloc}\r\nContent-Type: application/json\r\nContent-Length: "
        self._left, self._latencies = left, latencies
        self._got, self._start = b"", 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the first time."""
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Read a part of an answer."""
        self._got += data
        head, ends, body = self._got.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if not ends or len(body) < int(length):
            return
        self._latencies.append(time.perf_counter() - self._start)
        if not head.startswith(b"HTTP/1.1 200") or b'"spam"' not in body:
            message = f"Every row is answered rightly, yet this came: {head.decode()} {body[:200]!r}"
            self.done.set_exception(RuntimeError(message))
        else:
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """Say that the server is gone, unless all is done."""
        if not self.done.done():
            self.done.set_exception(exc or ConnectionResetError("The server closed the connection."))

    def _ask(self) -> None:
        number = next(self._left, None)
        if number is None:
            self.done.set_result(None)
            self._transport.close()
            return
        body = f'{{"text": "Take part in our lottery, number {number}, and win a prize!"}}'
        self._got, self._start = b"", time.perf_counter()
        self._transport.write(f"{self._head}{len(body)}\r\n\r\n{body}".encode())


async def asked(url: str, clients: int, requests: int) -> tuple[float, list[float]]:
    """Return the seconds from the first request to the last answer, and those of each request."""
    address = urlsplit(url)
    host, port = cast("str", address.hostname), cast("int", address.port)
    left, latencies = iter(range(requests)), list[float]()
    loop, start = asyncio.get_running_loop(), time.perf_counter()

    async def client() -> None:
        _, each = await loop.create_connection(lambda: Client(address.netloc, left, latencies), host, port)
        await each.done

    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - start, latencies


if __name__ == "__main__":
    seconds, latencies = uvloop.run(asked(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    sys.stdout.write(json.dumps({"seconds": seconds, "latencies": [round(each, 6) for each in latencies]}))
