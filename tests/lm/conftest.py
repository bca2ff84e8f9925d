"""A language model behind HTTP, on the loopback interface only, and one exact enough to compare numbers."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import dspy
import pytest

from preceptor.lm.local import LocalEngine

KEY = "sk-secret-0123456789"


class Endpoint:
    """An OpenAI-compatible server that answers by a function of the last message.

    Attributes:
        bodies: What was posted, in order of arrival.
        headers: The headers that came with it.
        answer: Makes the answer's text.
        status: HTTP status to answer with; other than 200, the body is an error.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[str], str] = str.upper
        self.status = 200
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def count(self) -> int:
        with self._lock:
            return len(self.bodies)

    def lm(self, **settings: Any) -> dspy.LM:
        """Return a `dspy.LM` that asks this server."""
        given: dict[str, Any] = {"max_tokens": 16, "cache": False, "num_retries": 0, "api_key": KEY, **settings}
        return dspy.LM("openai/x", api_base=self.url, **given)

    def take(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """Record one request and return the status and body to answer with."""
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
        if self.status != 200:
            return self.status, {"error": {"message": "overloaded", "type": "server_error"}}
        last = str(body["messages"][-1]["content"])
        return 200, {
            "id": "answer-1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.answer(last)}}
            ],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


def _handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = endpoint.take(body, dict(self.headers.items()))
            payload = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    return Handler


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.close()


@pytest.fixture(scope="session")
def engine(smollm: dspy.LM) -> LocalEngine:
    """Return the engine of smollm."""
    assert isinstance(smollm.engine, LocalEngine)
    return smollm.engine


@pytest.fixture(scope="session")
def precise(engine: LocalEngine) -> LocalEngine:
    """Return smollm in float32 on the processor: bfloat16 rounds differently in every layout of a batch."""
    return LocalEngine(copy.deepcopy(engine._model).float().cpu(), engine._tokenizer, engine.name)
