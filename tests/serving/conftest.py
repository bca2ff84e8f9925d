"""A real server on the loopback interface, for the tests of this folder."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import httpx
import pytest

from preceptor import program as artifact
from preceptor.modules import Classify
from preceptor.serving.app import application
from preceptor.serving.run import Server, listen
from preceptor.serving.service import Service, Source
from preceptor.serving.settings import Keys, Limits
from preceptor.testing import prompt, simulated

SIGNATURE = "text -> label: Literal['spam', 'mail']"


@dataclass(slots=True)
class Running:
    """A server, and a client of it."""

    service: Service
    server: Server
    thread: threading.Thread
    url: str
    client: httpx.Client

    def post(self, path: str, body: Any, **settings: Any) -> httpx.Response:
        """Post JSON."""
        return self.client.post(path, json=body, **settings)

    def metric(self, line: str) -> float:
        """Return the value of one line of /metrics, 0 where it isn't there."""
        lines = [each.rpartition(" ") for each in self.client.get("/metrics").text.splitlines()]
        return next((float(value) for name, _, value in lines if name == f"preceptor_{line}"), 0.0)


Serve = Callable[..., Running]
Save = Callable[..., Path]


def mail(request: Any) -> str:
    """Tell spam by the word "prize"."""
    return "spam" if "prize" in prompt(request) else "mail"


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Return what saves a program, by default one that sorts mail, and returns its folder."""

    def saved(program: dspy.Module | None = None, name: str = "program", **evidence: Any) -> Path:
        program = program or Classify(SIGNATURE, "Is this spam?")
        artifact.save(program, tmp_path / name, evidence=evidence, lm="simulated/model", replace=True)
        return tmp_path / name

    return saved


@pytest.fixture
def serve() -> Generator[Serve]:
    """Return what starts a server for a saved program, and stops it at the end."""
    with ExitStack() as opened:

        def started(
            path: Path,
            lm: dspy.LM | None = None,
            *,
            limits: Limits | None = None,
            keys: Keys | None = None,
            is_public: bool = False,
            load: Any = artifact.load,
            **settings: Any,
        ) -> Running:
            model = lm or simulated(mail)
            source = Source(path, lm=lambda name: model, load=load)
            service = Service(source, limits or Limits(drain_seconds=1), **settings)
            listening = listen("127.0.0.1", 0)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            server = Server(application(service, keys, is_public=is_public), service)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
            thread.start()
            client = opened.enter_context(httpx.Client(base_url=url, timeout=60))
            opened.callback(stop, server, thread)
            wait_for(lambda: server.started)
            return Running(service, server, thread, url, client)

        yield started


def stop(server: Server, thread: threading.Thread) -> None:
    """Stop a server as a signal does."""
    server.handle_exit(15, None)
    thread.join(60)
    assert not thread.is_alive()


def wait_for(is_so: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is so; it is, sooner or later, on a machine however slow."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Return what waits until something is so."""
    return wait_for
