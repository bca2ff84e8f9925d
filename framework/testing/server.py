"""An OpenAI-compatible server on the loopback interface, with faults that can be switched on.

What each fault is, and what comes out of a `dspy.LM` with DSPy 3.4's default engine and `num_retries=0`:

    bad_request       400                                          LMInvalidRequestError
    unauthorized      401                                          LMAuthError
    forbidden         403                                          LMAuthError
    not_found         404, the model is unknown                    LMUnsupportedModelError
    rate_limit        429                                          LMRateLimitError
    rate_limit_after  429 with Retry-After                         LMRateLimitError, with retry_after
    no_quota          429, the quota is used up                    LMBillingError
    server_error      500                                          LMServerError
    unavailable       503                                          LMServerError
    dropped           the connection is closed, nothing was sent   LMTransportError
    reset             the connection is reset in mid-body          LMTransportError
    cut               it is closed before the promised length      LMTransportError
    hang              nothing, until the client leaves             LMTransportError, after the LM's timeout
    garbage           200, an HTML page                            LMProviderError, with status 200
    slow              the whole answer, byte by byte               the answer: timeout bounds each byte, not their sum
    misshapen         200, JSON without choices                    "" with finish_reason "stop"
    empty             200, no text                                 "" with finish_reason "stop"
    truncated         200, half of the answer's characters         that half with finish_reason "length"

With `num_retries` above 0, DSPy itself asks again after LMRateLimitError, LMServerError and LMTransportError.
"""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import socketserver
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import dspy

from preceptor.testing import wire
from preceptor.testing.faults import REFUSALS, Faults, Kind
from preceptor.testing.wire import Body

_NO_FAULTS: Final = Faults(kinds=("server_error",), share=0.0)
_GARBAGE: Final = b"<html><body>Welcome to the gateway.</body></html>"
_MODELS: Final = {"object": "list", "data": [{"id": "model", "object": "model", "created": 0, "owned_by": "preceptor"}]}
_POLL_SECONDS: Final = 0.02
_RESET: Final = struct.pack("ii", 1, 0)
"""The SO_LINGER that makes a close a reset."""


@dataclass(frozen=True, slots=True)
class Received:
    """A request for a completion, as it came.

    Attributes:
        body: What was posted.
        headers: Name in lower case -> value.
    """

    body: Body
    headers: Mapping[str, str]


class ChatServer:
    """A server on a free port of 127.0.0.1 that answers chat completions by a function, or fails as it is told.

    It listens from its construction until it is closed; serves `/v1/chat/completions`, as one body or as
    server-sent events, and `/v1/models`; carries 512 connections at a time; counts tokens as words.

    Args:
        answer: Makes the answer's text from the posted body; called from many threads at a time. If it
            raises, its traceback is printed and the connection is closed.
        faults: Which requests fail, and how; None for none.
        key: What clients must send as their bearer token, else they get 401; None if anything will do.
        latency: Seconds before each answer, good or faulty.

    Attributes:
        answer: As above; may be replaced at any time.
        requests: Every request for a completion, in order of arrival, but those without the right key.
        shape: Changes a completion before it is sent, such as its usage; may be replaced at any time.
        answered: Good answers sent whole, slow ones included.
        faults: Kind of fault -> how many requests met it.
        most_concurrent: The most requests that were being answered at a time.

    Example:
        >>> with ChatServer(lambda body: body["messages"][-1]["content"].upper()) as server:
        ...     lm = server.lm("any-name", max_tokens=16)
        ...     lm("hello"), server.count, server.requests[0].body["model"]
        (['HELLO'], 1, 'any-name')
    """

    def __init__(
        self,
        answer: Callable[[Body], str],
        *,
        faults: Faults | None = None,
        key: str | None = None,
        latency: float = 0.0,
    ) -> None:
        self.answer = answer
        self.shape: Callable[[Body], None] = lambda completion: None
        self.requests: list[Received] = []
        self.answered = 0
        self.faults: Counter[Kind] = Counter()
        self.most_concurrent = 0
        self._key = key
        self._latency = latency
        self._injected = faults or _NO_FAULTS
        self._posted: Counter[str] = Counter()
        self._flying = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_SECONDS,), daemon=True)
        self._thread.start()

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The address that clients take as their base."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def count(self) -> int:
        """How many completions were asked for, with the right key."""
        return len(self.requests)

    def lm(self, name: str = "model", **settings: Any) -> dspy.LM:
        """Return a `dspy.LM` that asks this server, with DSPy's cache off; it may have any name."""
        given: dict[str, Any] = {"api_base": self.url, "api_key": self._key or "none", "cache": False, **settings}
        return dspy.LM(f"openai/{name}", **given)

    def inject(self, faults: Faults | None) -> None:
        """Let requests fail in this way from now on; None: no more."""
        self._injected = faults or _NO_FAULTS

    def close(self) -> None:
        """Stop, and close all connections, whatever they wait for."""
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _begin(self, received: Received) -> tuple[Kind | None, Faults]:
        """Count a request; return how it fails."""
        canonical = json.dumps(received.body, sort_keys=True)
        with self._lock:
            self.requests.append(received)
            self._flying += 1
            self.most_concurrent = max(self.most_concurrent, self._flying)
            kind = self._injected.drawn(canonical, self._posted[canonical])
            self._posted[canonical] += 1
            if kind is not None:
                self.faults[kind] += 1
            return kind, self._injected

    def _end(self, *, has_answered: bool) -> None:
        """Count a request as done."""
        with self._lock:
            self._flying -= 1
            self.answered += has_answered

    def _pause(self, seconds: float) -> None:
        """Wait; a server that is closed meanwhile gives up on the connection."""
        if seconds and self._closing.wait(seconds):
            raise ConnectionAbortedError("The server was closed.")

    def _payload(self, body: Body, kind: Kind | None, faults: Faults) -> bytes:
        """Return what is to be sent to a request that fails in this way."""
        if kind in REFUSALS:
            headers = {"Retry-After": f"{faults.retry_after:g}"} if kind == "rate_limit_after" else {}
            return wire.refused(*REFUSALS[kind], headers=headers)
        if kind in {"dropped", "hang"}:
            return b""
        if kind == "garbage":
            return wire.response(200, _GARBAGE, kind="text/html")
        text = "" if kind in {"empty", "misshapen"} else self.answer(body)
        if kind == "truncated":
            completion = wire.completion(body, text[: len(text) // 2], "length")
        else:
            completion = wire.completion(body, text, "stop")
        self.shape(completion)
        if kind == "misshapen":
            del completion["choices"]
        if body.get("stream"):
            has_usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return wire.streamed(completion, has_usage=has_usage, is_cut=kind == "cut")
        return wire.answered(completion, is_cut=kind == "cut")


class _Server(ThreadingHTTPServer):
    """Listens, and closes connections that wait for something when it is closed itself."""

    request_queue_size = 512

    def __init__(self, chat: ChatServer) -> None:
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, chat))

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own looks up the name of the host
        self.server_name, self.server_port = "127.0.0.1", self.socket.getsockname()[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may leave whenever they like
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads its requests and sends what the server makes of them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, chat: ChatServer, *connection: Any) -> None:
        self.chat = chat
        self._is_flying = False
        super().__init__(*connection)

    def do_GET(self) -> None:
        if self._is_let_in("/v1/models"):
            self.wfile.write(wire.response(200, json.dumps(_MODELS).encode()))

    def do_POST(self) -> None:
        posted = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._is_let_in("/v1/chat/completions"):
            return
        body = _parsed(posted)
        if body is None:
            self.wfile.write(wire.refused(*REFUSALS["bad_request"]))
            return
        self._answer(Received(body, {name.lower(): value for name, value in self.headers.items()}))

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def _is_let_in(self, path: str) -> bool:
        """Return True if the key is right and the path is served; else say what is wrong."""
        has_key = self.chat._key is None or self.headers.get("Authorization") == f"Bearer {self.chat._key}"
        if not has_key or self.path != path:
            self.wfile.write(wire.refused(*REFUSALS["not_found" if has_key else "unauthorized"]))
        return has_key and self.path == path

    def _answer(self, received: Received) -> None:
        """Answer a request for a completion, or fail as the server's faults say."""
        kind, faults = self.chat._begin(received)
        self._is_flying = True
        try:
            payload = self.chat._payload(received.body, kind, faults)
            self.chat._pause(self.chat._latency)
            self._send(kind, payload, faults)
        finally:
            self._leave()

    def _send(self, kind: Kind | None, payload: bytes, faults: Faults) -> None:
        if kind == "slow":
            self._drip(payload, faults.slow_seconds)
            return
        if kind == "hang":
            self._wait_for_the_end()
        self._leave(has_answered=kind is None)
        if kind == "reset":
            self._reset(payload)
            return
        self.wfile.write(payload)
        self.close_connection = self.close_connection or kind in {"hang", "dropped", "cut"}

    def _leave(self, *, has_answered: bool = False) -> None:
        """Count the request as done, before its last byte is sent: the client may go on at once."""
        if self._is_flying:
            self._is_flying = False
            self.chat._end(has_answered=has_answered)

    def _drip(self, payload: bytes, seconds: float) -> None:
        body = _start_of_body(payload)
        self.wfile.write(payload[:body])
        for at in range(body, len(payload) - 1):
            self.wfile.write(payload[at : at + 1])
            self.chat._pause(seconds / (len(payload) - body))
        self._leave(has_answered=True)
        self.wfile.write(payload[-1:])

    def _wait_for_the_end(self) -> None:
        """Wait until the client leaves or the server closes the connection."""
        with contextlib.suppress(ConnectionError):
            while self.connection.recv(4096):
                pass

    def _reset(self, payload: bytes) -> None:
        """Send half of the body and reset the connection."""
        self.wfile.write(payload[: (_start_of_body(payload) + len(payload)) // 2])
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.rfile.close()  # the socket stays open as long as it is read from
        self.connection.close()
        self.close_connection = True


def _start_of_body(payload: bytes) -> int:
    return payload.index(wire.END_OF_HEAD) + len(wire.END_OF_HEAD)


def _parsed(posted: bytes) -> Body | None:
    """Return a posted body, None if it doesn't ask for a completion."""
    try:
        body = json.loads(posted)
    except ValueError:
        return None
    return body if isinstance(body, dict) and isinstance(body.get("messages"), list) else None
