"""`preceptor serve`: what it refuses, and its life as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import dspy
import httpx
import pytest

from preceptor.cli import run
from preceptor.cli.inputs import REASONING_TOKENS
from preceptor.cli.serving import _model, _program, _source
from preceptor.errors import ConfigError
from preceptor.modules import Classify
from preceptor.program import save
from preceptor.serving.model import served
from preceptor.testing import ChatServer

SIGNATURE = "text -> label: Literal['spam', 'mail']"
TOKEN = "a-token-of-the-tests"


def saved(folder: Path, instructions: str = "Is this spam?") -> Path:
    """Save a program in the place of the one that is there."""
    save(Classify(SIGNATURE, instructions), folder, evidence={}, lm="openai/model", replace=True)
    return folder


def test_a_wider_address_without_a_token_is_a_wrong_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = str(saved(tmp_path / "program"))
    monkeypatch.delenv("PRECEPTOR_TOKEN", raising=False)
    for told in ([], ["--no-token"], ["--anyone-may-ask"]):
        assert run(["serve", program, "--host", "0.0.0.0", *told]) == 2
        assert "anybody who reaches this machine could use your model" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setenv("PRECEPTOR_TOKEN", TOKEN)
    assert run(["serve", program, "--no-token"]) == 2
    assert "--no-token, and yet there is a token" in capsys.readouterr().err


def test_a_place_without_a_program_is_a_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(tmp_path)]) == 2
    assert "is no saved program: it has no manifest.json" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "asked", "sent"),
    [("m", None, 512), ("m", 900, 900), ("o4-mini", None, 16_000), ("o4-mini", 20_000, 20_000)],
)
def test_a_served_model_has_the_bound_that_was_asked_for_else_its_own(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: int | None, sent: int
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with ChatServer(lambda body: "spam") as server:
        served(_model(None, server.url, asked, f"openai/{name}"), asked or REASONING_TOKENS)("Spam?")
        assert server.requests[0].body["max_completion_tokens"] == sent


def test_a_missing_key_is_told_before_the_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    save(Classify(SIGNATURE, "Spam?"), tmp_path / "program", evidence={}, lm="openai/gpt-4o-mini")
    assert run(["serve", str(tmp_path / "program"), "--port", "0"]) == 2
    assert "openai/gpt-4o-mini needs a key. Set OPENAI_API_KEY" in " ".join(capsys.readouterr().err.split())


def test_a_program_of_another_address_is_not_put_in_the_place_of_the_one_that_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    path, server = tmp_path / "program", "http://127.0.0.1:9"
    save(Classify(SIGNATURE, "Spam?"), path, evidence={}, lm="openai/m")
    source = _source(path, partial(_model, None, None, 9), partial(_program, None, None, None, None))
    assert source.served(9).artifact.instructions == {"predict": "Spam?"}

    moved = dspy.LM("openai/m", api_base=server)
    save(Classify(SIGNATURE, "Spam!"), path, evidence={}, lm=moved, replace=True)

    with pytest.raises(ConfigError, match=r"was compiled with openai/m at an address of its own"):
        source.served(9)
    given = _source(path, partial(_model, None, server, 9), partial(_program, None, None, None, server))
    assert given.served(9).artifact.instructions == {"predict": "Spam!"}


def test_a_port_of_anothers_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    program = str(saved(tmp_path / "program"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "preceptor", "serve", program, "--lm", "local/gpt-9", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert f"Can't listen on 127.0.0.1:{port}" in " ".join(done.stderr.split())


def test_a_server_reloads_on_hangup_and_ends_on_term_without_losing_a_request(tmp_path: Path) -> None:
    program, began, free = saved(tmp_path / "program"), threading.Event(), threading.Event()

    def answer(body: dict[str, Any]) -> str:
        told = " ".join(str(message["content"]) for message in body["messages"])
        if "wait" in told:
            began.set()
            assert free.wait(60)
        return "spam" if "Spam!" in told else "mail"

    command = [sys.executable, "-m", "preceptor", "serve", str(program), "--port", "0", "--json"]
    environment = {**os.environ, "OPENAI_API_KEY": "none", "PRECEPTOR_TOKEN": TOKEN}
    with ChatServer(answer) as model:
        server = subprocess.Popen(
            [*command, "--api-base", model.url, "--max-tokens", "700"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        assert server.stderr is not None
        url = json.loads("".join(iter(server.stdout.readline, "}\n")) + "}")["url"]
        lines = iter(json.loads(line) for line in server.stderr if line.startswith("{"))
        assert next(lines)["event"] == "ready"
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:

            def ask(text: str) -> Any:
                return client.post("/predict", json={"text": text}).json()["answer"]

            assert ask("private") == {"label": "mail"}
            first = next(lines)
            assert (first["event"], first["path"], first["status"]) == ("request", "/predict", 200)
            assert "private" not in json.dumps(first)

            saved(program, "Spam!")
            server.send_signal(signal.SIGHUP)
            assert next(lines)["event"] == "reloaded"
            assert ask("again") == {"label": "spam"}
            (program / "program.json").write_bytes(b"{}")
            server.send_signal(signal.SIGHUP)
            assert [next(lines)["event"] for _ in range(2)] == ["request", "reload_refused"]

            with ThreadPoolExecutor(1) as pool:
                last = pool.submit(ask, "wait")
                assert began.wait(60)
                server.send_signal(signal.SIGTERM)
                free.set()
                assert last.result() == {"label": "spam"}
        assert {received.body["max_completion_tokens"] for received in model.requests} == {700}
        assert [line["event"] for line in lines] == ["request", "stopped"]
        assert server.wait(60) == 0
        server.stdout.close()
        server.stderr.close()
