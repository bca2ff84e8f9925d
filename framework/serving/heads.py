"""Heads of requests that never end: uvicorn waits for them forever and keeps all of them."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_BYTES: Final = 65_536
"""Of a request's head."""

_SLOW: Final = b"408 Request Timeout"
_LARGE: Final = b"431 Request Header Fields Too Large"


class Bounded(HttpToolsProtocol):
    """A connection that is closed if a request's head is too slow or too large.

    Bodies are bounded by whoever reads them; one that goes on though its request was answered may take as long as a
    head.

    Args:
        seconds: From the opening of the connection, or the first byte of a later request, to its head's last byte.
        settings: Of uvicorn's own.
    """

    def __init__(self, *, seconds: float, **settings: Any) -> None:
        super().__init__(**settings)
        self._seconds = seconds
        self._bytes = 0
        self._is_body = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Wait for the first head."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self._seconds, self._refuse, _SLOW)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        self._bytes += 0 if self._is_body else len(data)
        super().data_received(data)
        if not self._is_between():
            return
        if self._bytes > MOST_BYTES:
            self._refuse(_LARGE)
        elif self._timer is None and self._is_body:
            self._timer = self.loop.call_later(self._seconds, self.transport.close)
        elif self._timer is None and self._bytes:
            self._timer = self.loop.call_later(self._seconds, self._refuse, _SLOW)

    def on_message_begin(self) -> None:
        """Note that a head has begun, in the midst of what was received last, perhaps."""
        self._bytes = max(1, self._bytes)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Wait no longer."""
        self._let_go()
        self._is_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Count the next head's bytes."""
        self._let_go()
        self._is_body = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._let_go()
        super().connection_lost(exc)

    def _is_between(self) -> bool:
        """Return True if no request is being answered."""
        cycle: Any = self.cycle  # None before the first
        return cycle is None or bool(cycle.response_complete)

    def _let_go(self) -> None:
        self._bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
