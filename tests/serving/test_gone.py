"""Clients that go before they are answered, over real connections, and a real model server that counts its calls."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import dspy
import pytest

from preceptor import program as artifact
from preceptor.modules import Generate
from preceptor.serving.settings import Limits
from preceptor.testing import ChatServer, Faults

Save = Callable[..., Path]
Serve = Callable[..., Any]
CHAT = {"model": "program", "messages": [{"role": "user", "content": "a chat"}]}
BODIES: dict[str, tuple[str, Any]] = {
    "row": ("/predict", {"text": "a row"}),
    "batch": ("/predict/batch", {"rows": [{"text": f"row {number}"} for number in range(20)]}),
    "chat": ("/v1/chat/completions", CHAT),
    "stream": ("/v1/chat/completions", {**CHAT, "stream": True}),
}


@pytest.fixture
def free() -> Generator[threading.Event]:
    """Return what lets the model answer."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def model(free: threading.Event) -> Generator[ChatServer]:
    """Return a model server that answers once it is let go."""

    def answer(body: Any) -> str:
        assert free.wait(60)
        return "mail"

    with ChatServer(answer) as server:
        yield server
        free.set()


def asking(url: str, path: str, body: Any) -> socket.socket:
    """Return a connection over which something was asked."""
    address, sent = urlsplit(url), json.dumps(body).encode()
    assert address.hostname is not None
    client = socket.create_connection((address.hostname, address.port or 80), timeout=60)
    head = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    client.sendall(head.format(path, len(sent)).encode() + sent)
    return client


def test_what_clients_that_have_gone_were_waiting_for_is_never_asked_for(
    save: Save, serve: Serve, eventually: Any, model: ChatServer, free: threading.Event
) -> None:
    running = serve(save(), model.lm(num_retries=0), limits=Limits(concurrency=1, drain_seconds=1))
    with ThreadPoolExecutor(1) as pool, ExitStack() as opened:
        first = pool.submit(running.post, "/predict", {"text": "first"})
        eventually(lambda: model.count == 1)
        for path, body in BODIES.values():
            opened.enter_context(asking(running.url, path, body))
        eventually(lambda: running.service.gate.admitted == 1 + len(BODIES))

        opened.close()
        eventually(lambda: running.service.gate.admitted == 1)
        free.set()
        assert first.result().json()["answer"] == {"label": "mail"}

    assert running.post("/predict", {"text": "last"}).status_code == 200
    assert [request.body["messages"][-1]["content"] for request in model.requests] == ["text: first", "text: last"]
    assert running.metric('failures_total{code="client_gone"}') == len(BODIES)
    for path, count in (("/predict", 1), ("/predict/batch", 1), ("/v1/chat/completions", 2)):
        assert running.metric(f'requests_total{{endpoint="{path}",status="499"}}') == count


def test_a_stream_that_is_left_in_the_midst_is_counted_and_one_that_ends_is_not(
    save: Save, serve: Serve, eventually: Any
) -> None:
    slow = Faults(kinds=("slow",), share=1.0, slow_seconds=20)
    with ChatServer(lambda body: "one two three", faults=slow) as model:
        running = serve(save(Generate("text -> summary", "Sum it up.")), model.lm(num_retries=0))
        with asking(running.url, *BODIES["stream"]) as client:
            told = b""
            while b"one" not in told:
                told += client.recv(65536)
        eventually(lambda: running.service.gate.admitted == 0)
        assert running.metric('failures_total{code="client_gone"}') == 1
        assert b"three" not in told

        model.inject(None)
        whole = running.post(*BODIES["stream"]).text
    assert "three" in whole
    assert whole.endswith("data: [DONE]\n\n")
    assert running.metric('failures_total{code="client_gone"}') == 1


class Stubborn(dspy.Module):
    """A program that can't be awaited, and asks once more when it fails."""

    failures: ClassVar[queue.Queue[str]] = queue.Queue()

    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict("text -> label")

    def forward(self, text: str) -> dspy.Prediction:
        for _ in range(2):
            try:
                return self.predict(text=text)
            except dspy.LMError as error:
                self.failures.put(type(error).__name__)
        raise ValueError(text)


@pytest.mark.parametrize("is_patient", [False, True])
def test_a_thread_is_free_when_its_request_is_given_up(
    is_patient: bool, save: Save, serve: Serve, model: ChatServer, eventually: Any
) -> None:
    def load(path: Path) -> dspy.Module:
        return artifact.load(path, student=Stubborn())

    limits = Limits(seconds=60 if is_patient else 5, concurrency=1, drain_seconds=1)
    running = serve(save(Stubborn()), model.lm(num_retries=0), limits=limits, load=load)
    if is_patient:
        with asking(running.url, *BODIES["row"]):
            eventually(lambda: model.count == 1)
    else:
        assert running.post("/predict", {"text": "a row"}).status_code == 504
    assert [Stubborn.failures.get(timeout=60) for _ in range(2)] == ["LMUnexpectedError"] * 2
    assert model.count == 1
    assert model.answered == 0


@pytest.mark.parametrize("kind", BODIES)
def test_a_client_that_goes_while_it_is_answered_leaves_its_place_to_others(
    kind: str, save: Save, serve: Serve, eventually: Any, model: ChatServer, free: threading.Event
) -> None:
    running = serve(save(), model.lm(num_retries=0), limits=Limits(concurrency=2, drain_seconds=1))
    with asking(running.url, *BODIES[kind]):
        eventually(lambda: model.count == 1)
    eventually(lambda: (running.service.gate.admitted, running.service.gate.busy) == (0, 0))
    free.set()
    assert running.post("/predict", {"text": "last"}).status_code == 200
    assert model.count == 2
    assert running.metric("rows_total") == 1
    assert running.metric('failures_total{code="client_gone"}') == 1
