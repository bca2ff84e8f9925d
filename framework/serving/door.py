"""The door: everything a request passes before the application sees it, and what is noted of it afterwards.

In this order: who may ask, for what kind of content, how large and how slowly sent. A request that fails is
answered here with one JSON message; each request is counted, and logged in one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from preceptor.serving.refused import Refused
from preceptor.serving.service import Service
from preceptor.serving.settings import Keys, is_loopback
from preceptor.serving.watch import note, since

OPEN: Final = ("/", "/page.css", "/page.js", "/healthz", "/readyz")
"""Paths that need no token: they tell nothing of the program."""

TOLD: Final = "preceptor.told"
"""Where an endpoint leaves what is to be logged of a request."""

_LINGER_SECONDS: Final = 5.0
"""How long a body that was refused is still taken in: a client that is cut off while sending can't read why."""

_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


@dataclass(slots=True)
class Visit:
    """One request on its way through the door."""

    scope: Scope
    headers: Headers
    id: str
    start: float = field(default_factory=time.perf_counter)
    status: int = 0
    is_read: bool = False
    told: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def path(self) -> str:
        """What was asked for."""
        return str(self.scope["path"])

    @property
    def is_unread(self) -> bool:
        """True if a body is still to come."""
        has_body = self.headers.get("content-length", "0") != "0" or "transfer-encoding" in self.headers
        return has_body and not self.is_read


class Door:
    """An ASGI application around another.

    Args:
        app: What is behind the door.
        service: Whose limits and metrics hold.
        keys: Who may ask; without any, only clients that call this machine by a loopback name.
        is_public: True if, without keys, anybody may ask.
        endpoints: Paths that are counted by their own name.
    """

    def __init__(
        self, app: ASGIApp, service: Service, keys: Keys, endpoints: frozenset[str], *, is_public: bool = False
    ) -> None:
        self._app = app
        self._service = service
        self._keys = keys
        self._endpoints = endpoints
        self._is_public = is_public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or pass on what is none."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit(scope, Headers(scope=scope), secrets.token_hex(8))
        scope[TOLD] = visit.told

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                known = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(header for header in _HEADERS if header[0] not in known),
                    (b"x-request-id", visit.id.encode()),
                ]
            await send(message)

        try:
            await self._enter(visit, receive, sending)
        except Refused as refused:
            visit.told["code"] = refused.code
            await _answer(refused, sending, is_last=visit.is_unread)
        else:
            return
        finally:
            self._leave(visit)
        if visit.is_unread:
            await _linger(receive, sending)

    async def _enter(self, visit: Visit, receive: Receive, send: Send) -> None:
        self._refuse_strangers(visit)
        if visit.scope["method"] in ("GET", "HEAD"):
            await self._app(visit.scope, receive, send)
            return
        body = await self._body(visit, receive)
        if body and visit.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "Send JSON, with Content-Type: application/json.", "not_json")
        await self._app(visit.scope, _replayed(body, receive), send)

    def _refuse_strangers(self, visit: Visit) -> None:
        """Raise unless this client may ask.

        Without keys a page of another site, open in a browser on this machine, could ask too, by a name of its own
        that it lets point here; so the name must be one of this machine's.
        """
        if visit.path in OPEN:
            return
        if self._keys:
            if not self._keys.open(visit.headers.get("authorization", "")):
                headers = {"WWW-Authenticate": "Bearer"}
                raise Refused(
                    401, "Send one of the server's tokens: Authorization: Bearer ...", "no_token", headers=headers
                )
        elif not self._is_public and not is_loopback(_name(visit.headers.get("host", ""))):
            raise Refused(421, "This server has no token, so it answers on localhost only.", "wrong_host")

    async def _body(self, visit: Visit, receive: Receive) -> bytes:
        """Return the whole body."""
        most, seconds = self._service.limits.body_bytes, self._service.limits.seconds
        too_large = Refused(413, f"A request may have {most:,} bytes.", "body_too_large")
        declared = visit.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > most:
            raise too_large
        parts, size, is_whole = list[bytes](), 0, False
        try:
            async with asyncio.timeout(seconds):
                while not is_whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(408, "The request ended before its body did.", "cut_off")
                    parts.append(message.get("body", b""))
                    size, is_whole = size + len(parts[-1]), not message.get("more_body", False)
                    if size > most:
                        raise too_large
        except TimeoutError:
            raise Refused(408, f"The request wasn't whole after {seconds:g} seconds.", "slow_request") from None
        visit.is_read = True
        return b"".join(parts)

    def _leave(self, visit: Visit) -> None:
        """Count and log a request."""
        endpoint = visit.path if visit.path in self._endpoints else "other"
        seconds, metrics = since(visit.start), self._service.metrics
        metrics.requests.labels(endpoint, str(visit.status)).inc()
        metrics.seconds.labels(endpoint).observe(seconds)
        level = logging.DEBUG if visit.path in OPEN or visit.path == "/metrics" else logging.INFO
        method = visit.scope["method"]
        note(
            "request",
            level,
            id=visit.id,
            method=method,
            path=endpoint,
            status=visit.status,
            seconds=seconds,
            **visit.told,
        )


def _name(host: str) -> str:
    """Return a Host header without its port and brackets.

    Example:
        >>> [_name(host) for host in ("localhost:8000", "[::1]:8000", "127.0.0.1", "")]
        ['localhost', '::1', '127.0.0.1', '']
    """
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that tells of a body that was read already, and then of what comes after it."""
    is_told = False

    async def replay() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(refused: Refused, send: Send, *, is_last: bool) -> None:
    """Send a refusal; if it is the connection's last, all that is still to do then is to end the answer."""
    body = json.dumps(refused.body).encode()
    headers: MutableMapping[str, str] = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **({"connection": "close"} if is_last else {}),
        **{name.lower(): value for name, value in refused.headers.items()},
    }
    await send(
        {
            "type": "http.response.start",
            "status": refused.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": is_last})


async def _linger(receive: Receive, send: Send) -> None:
    """Take in the rest of a body, then end the answer: uvicorn closes the connection, and hears no more, with that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while (message := await receive()).get("more_body", False):
                del message
    await send({"type": "http.response.body", "body": b""})
