"""Keys and passwords, however a model was given them, reach the server and nothing else: no file, no log, no error."""

from __future__ import annotations

import json
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy._vendor.lm15.credentials import BearerToken
from dspy.lm15 import (
    AccessPolicy,
    EndpointSupport,
    OpenAIChatCompat,
    ProviderDefinition,
    register_provider,
    unregister_provider,
)

from preceptor.cli import run
from preceptor.errors import ConfigError, LMFailed, PreceptorError
from preceptor.lm.dispatch import Patience
from preceptor.modules import Classify
from preceptor.resuming import remember_command
from preceptor.run import read_run
from preceptor.teleprompters import APE

pytestmark = pytest.mark.filterwarnings("ignore")  # what LiteLLM and Pydantic tell each other

KEY = "sk-secret-0123456789abcdef"
SIGNATURE = "text -> label: Literal['yes', 'no']"


class Echo:
    """A server that answers, or refuses with everything it was told in the error.

    Attributes:
        status: Of its answers.
        told: Paths and headers it received.
    """

    def __init__(self) -> None:
        self.status = 200
        self.told: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.place}/v1"

    def reply(self, body: dict[str, Any], told: str) -> dict[str, Any]:
        self.told.append(told)
        if self.status != 200:
            return {"error": {"message": f"Incorrect API key provided: {KEY}. You sent {told}", "type": "invalid"}}
        is_task = body["messages"][0]["role"] == "system"
        message = {"role": "assistant", "content": "yes" if is_task else f"Say yes or no. ({len(self.told)})"}
        return {
            **{"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]},
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(echo: Echo) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            payload = json.dumps(echo.reply(body, f"{self.path} {dict(self.headers.items())}")).encode()
            self.send_response(echo.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    return Handler


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Echo]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Echo()
    yield server
    server.close()


def rows(count: int = 12) -> list[dspy.Example]:
    labels = [["yes", "no"][n % 2] for n in range(count)]
    return [dspy.Example(text=f"row {n}", label=label).with_inputs("text") for n, label in enumerate(labels)]


def lm(echo: Echo, model: str = "openai/x", **settings: Any) -> dspy.LM:
    given: dict[str, Any] = {"api_base": echo.url, "max_tokens": 16, "cache": False, **settings}
    return dspy.LM(model, **given)


def by_environment(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> dspy.LM:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return lm(echo)


def by_own_provider(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> dspy.LM:
    monkeypatch.setenv("HOUSE_LOGIN", KEY)
    access = AccessPolicy("house", EndpointSupport(complete=True), env_keys=("HOUSE_LOGIN",), base_url=echo.url)
    register_provider(ProviderDefinition.chat(access, compat=OpenAIChatCompat()), replace=True)
    try:
        return dspy.LM("house/x", max_tokens=16, cache=False)
    finally:
        unregister_provider("house")


Way = Callable[[Echo, pytest.MonkeyPatch], dspy.LM]
WAYS: dict[str, Way] = {
    "key": lambda echo, _: lm(echo, api_key=KEY),
    "token": lambda echo, _: lm(echo, api_key=BearerToken(KEY)),
    "headers": lambda echo, _: lm(echo, api_key="none", headers={"Authorization": f"Bearer {KEY}"}),
    "extra headers": lambda echo, _: lm(echo, api_key="none", extra_headers={"X-Key": KEY}),
    "query": lambda echo, _: lm(echo, api_key="none", api_base=f"{echo.url}?key={KEY}"),
    "other engine": lambda echo, _: lm(echo, api_key=KEY, engine="litellm"),
    "environment": by_environment,
    "own provider": by_own_provider,
}


def compiled(model: dspy.LM, folder: Path, *, student: dspy.Module | None = None, **settings: Any) -> Any:
    knobs: dict[str, Any] = {"candidates": 3, "demos": 2, "subsamples": 1, **settings}
    patience = Patience(retries=1, first_wait=0.01, timeout=20)
    method = APE(metric="accuracy", lm=model, run_dir=folder, patience=patience, **knobs)
    return method.compile(student or Classify(SIGNATURE, "Sort."), trainset=rows())


def leaks(folder: Path, secret: str = KEY) -> list[str]:
    """Files below a folder that hold the secret."""
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Return a function that gives all that was logged, at the level of information or above."""
    caplog.set_level(logging.INFO)
    loggers = [logging.getLogger(name) for name in ("dspy", "preceptor", "LiteLLM", "httpx", "openai")]
    for each in loggers:
        each.addHandler(caplog.handler)

    def told() -> str:
        for each in loggers:
            each.removeHandler(caplog.handler)
        return "\n".join(record.getMessage() for record in caplog.records)

    return told


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_compile_sends_the_key_and_writes_it_nowhere(
    tmp_path: Path,
    echo: Echo,
    way: Way,
    monkeypatch: pytest.MonkeyPatch,
    records: Callable[[], str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = compiled(way(echo, monkeypatch), tmp_path / "run")

    assert any(KEY in told for told in echo.told)
    assert (tmp_path / "run" / "program" / "program.json").is_file()
    assert leaks(tmp_path) == []
    assert KEY not in records()
    assert KEY not in "".join(capfd.readouterr())
    assert KEY not in json.dumps(program.evidence.as_dict())


@pytest.mark.parametrize("role", ["proposer", "predictor"])
def test_so_does_one_with_a_key_of_the_proposers_or_a_predictors_own(tmp_path: Path, echo: Echo, role: str) -> None:
    student = Classify(SIGNATURE, "Sort.")
    if role == "predictor":
        student.predict.lm = lm(echo, api_key=KEY)
        compiled(lm(echo, api_key="none"), tmp_path / "run", student=student)
    else:
        compiled(lm(echo, api_key="none"), tmp_path / "run", proposer=lm(echo, "openai/y", api_key=KEY))

    assert 0 < sum(KEY in told for told in echo.told) < len(echo.told)
    assert leaks(tmp_path) == []


@pytest.mark.parametrize("role", ["model", "proposer", "predictor"])
def test_a_secret_among_the_settings_that_are_recorded_is_refused_before_the_first_call(
    tmp_path: Path, echo: Echo, role: str
) -> None:
    student, model, proposer = Classify(SIGNATURE, "Sort."), lm(echo, api_key="none"), None
    if role == "predictor":
        student.predict.config["api_key"] = KEY
    elif role == "model":
        model = lm(echo, api_key="none", aws_secret_access_key=KEY)
    else:
        proposer = lm(echo, api_key="none", extra_body={"session_token": KEY})

    with pytest.raises(ConfigError, match="which would be recorded with every call"):
        compiled(model, tmp_path / "run", student=student, proposer=proposer)

    assert echo.told == []
    assert leaks(tmp_path) == []


@pytest.mark.parametrize("status", [400, 401, 500])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_key_that_the_server_repeats_in_its_error_is_hidden(
    tmp_path: Path,
    echo: Echo,
    way: Way,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    records: Callable[[], str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    echo.status = status

    with pytest.raises(LMFailed, match=r"\[hidden\]") as caught:
        compiled(way(echo, monkeypatch), tmp_path / "run")

    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert leaks(tmp_path) == []
    assert KEY not in records()
    assert KEY not in "".join(capfd.readouterr())


def test_a_password_in_an_address_is_hidden_when_no_server_is_found(tmp_path: Path, echo: Echo) -> None:
    with pytest.raises(PreceptorError) as caught:
        compiled(lm(echo, api_key="none", api_base=f"http://user:{KEY}@{echo.place}/v1"), tmp_path / "run")

    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert leaks(tmp_path) == []


def data(folder: Path) -> Path:
    path = folder / "rows.csv"
    path.write_text("\n".join(["text,label", *(f"{r['text']},{r['label']}" for r in rows())]) + "\n", encoding="utf-8")
    return path


def compile_command(tmp_path: Path, api_base: str) -> list[str]:
    return [
        *("compile", SIGNATURE, "--instructions", "Sort.", "--data", str(data(tmp_path)), "--lm", "openai/x"),
        *("--api-base", api_base, "--run", str(tmp_path / "run"), "--retries", "0"),
        *("--set", "candidates=3", "--set", "demos=2", "--set", "subsamples=1"),
    ]


def test_the_command_line_sends_the_key_of_the_environment_and_shows_it_nowhere(
    tmp_path: Path, echo: Echo, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    assert run(compile_command(tmp_path, echo.url)) == 0
    assert run(["resume", str(tmp_path / "run")]) == 0
    echo.status = 401
    (tmp_path / "run").rename(tmp_path / "first")
    assert run(compile_command(tmp_path, echo.url)) == 4

    assert any(KEY in told for told in echo.told)
    assert leaks(tmp_path) == []
    shown = "".join(capfd.readouterr())
    assert KEY not in shown
    assert "[hidden]" in shown


@pytest.mark.parametrize("address", ["http://user:{}@{}/v1", "http://{}@{}/v1"])
def test_a_password_in_the_command_lines_address_is_shown_and_written_nowhere(
    tmp_path: Path, echo: Echo, address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    password = "hunter2hunter2"

    assert run(compile_command(tmp_path, address.format(password, echo.place))) in (2, 4)

    assert password not in "".join(capfd.readouterr())
    assert leaks(tmp_path, password) == []


def test_a_run_goes_on_at_another_address(tmp_path: Path, echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    assert run(compile_command(tmp_path, "http://127.0.0.1:1/v1")) == 4
    assert run(["resume", str(tmp_path / "run"), "--api-base", echo.url]) == 0

    assert (tmp_path / "run" / "program" / "program.json").is_file()


def test_a_remembered_command_has_no_password_and_no_query(tmp_path: Path) -> None:
    command = {"lm": "openai/x", "api_base": f"https://user:{KEY}@host:8000/v1?key={KEY}", "instructions": "Ask a@b."}
    remember_command(tmp_path / "run", command)

    assert read_run(tmp_path / "run")["command"] == {**command, "api_base": "https://host:8000/v1"}
    assert leaks(tmp_path) == []
