"""A real server on the loopback interface, for the tests of this folder."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
from preceptor.serving.watch import LOGGER, Lines
from preceptor.testing import prompt, simulated

SIGNATURE = "text -> label: Literal['spam', 'mail']"
TOKEN = "a-token-of-the-tests"
SECRET = "Nobody may read these instructions."


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
            host: str = "127.0.0.1",
            **settings: Any,
        ) -> Running:
            model = lm or simulated(mail)
            source = Source(path, lm=lambda name: model, load=load)
            service = Service(source, limits or Limits(drain_seconds=1), **settings)
            listening = listen(host, 0)
            url = f"http://{host}:{listening.getsockname()[1]}"
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


@pytest.fixture
def logged() -> Generator[list[dict[str, Any]]]:
    """Return what is told of each request, the first first, as it stands in the log."""
    told = list[dict[str, Any]]()

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = json.loads(Lines().format(record))
            if line["event"] == "request":
                told.append(line)

    kept, level = Kept(), LOGGER.level
    LOGGER.addHandler(kept)
    LOGGER.setLevel(logging.INFO)
    yield told
    LOGGER.removeHandler(kept)
    LOGGER.setLevel(level)


class Model:
    """A model server in a process of its own, which can be killed and come back where it was."""

    def __init__(self) -> None:
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        """Start it."""
        command = [sys.executable, str(Path(__file__).with_name("model_server.py")), str(self._port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())

    def kill(self) -> None:
        """End it without a word."""
        self._process.kill()
        self._process.communicate()


@dataclass(slots=True)
class Process:
    """`preceptor serve` as a process, with its token."""

    url: str
    process: subprocess.Popen[str]
    folder: Path
    model: Model

    @property
    def log(self) -> list[dict[str, Any]]:
        """What it has logged."""
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines() if line.startswith("{")]

    def save(self, instructions: str = SECRET, name: str = "program") -> Path:
        """Save a program in the place of the one that is there."""
        return _saved(self.folder, name, instructions)

    def client(self, token: str = TOKEN, **settings: Any) -> httpx.Client:
        """Return a client that shows a token."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {token}"}, timeout=60, **settings)


def _saved(folder: Path, name: str, instructions: str) -> Path:
    program = Classify(SIGNATURE, instructions)
    artifact.save(program, folder / name, evidence={}, lm="openai/model", replace=True)
    return folder / name


@contextmanager
def _process(folder: Path, *options: str) -> Generator[Process]:
    _saved(folder, "program", SECRET)
    _saved(folder, "other", "The shadow sorts by itself.")
    model = Model()
    command = [sys.executable, "-m", "preceptor", "serve", str(folder / "program"), "--port", "0", "--json"]
    environment = {**os.environ, "OPENAI_API_KEY": "none", "PRECEPTOR_TOKEN": TOKEN}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--api-base", model.url, *options],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            told = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")
            running = Process(told["url"], process, folder, model)
            wait_for(lambda: any(line["event"] == "ready" for line in running.log))
            yield running
        finally:
            process.terminate()
            process.communicate(timeout=60)
            model.kill()


@pytest.fixture(scope="session")
def process() -> Callable[..., AbstractContextManager[Process]]:
    """Return what starts `preceptor serve` in a folder, with a model server, and ends both."""
    return _process
