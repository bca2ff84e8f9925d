"""The clients of `preceptor bench serve`; they import next to nothing, for they share the cores with the server."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from urllib.parse import urlsplit


async def asked(url: str, clients: int, requests: int) -> tuple[float, list[float]]:
    """Return the seconds from the first request to the last answer, and those of each request."""
    address = urlsplit(url)
    left = iter(range(requests))
    latencies = list[float]()

    async def client() -> None:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        for number in left:
            body = json.dumps({"text": f"Take part in our lottery, number {number}, and win a prize!"}).encode()
            head = f"POST /predict HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(body)}\r\n"
            start = time.perf_counter()
            writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            await _read(reader)
            latencies.append(time.perf_counter() - start)
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - start, latencies


async def _read(reader: asyncio.StreamReader) -> None:
    """Read one response.

    Raises:
        RuntimeError: If it isn't the right answer.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    body = await reader.readexactly(int(head.partition("content-length: ")[2].split("\r\n")[0]))
    if not head.startswith("http/1.1 200") or b'"spam"' not in body:
        raise RuntimeError(f"Every row is answered rightly, yet this came: {head} {body[:200]!r}")


if __name__ == "__main__":
    seconds, latencies = asyncio.run(asked(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    sys.stdout.write(json.dumps({"seconds": seconds, "latencies": latencies}))
