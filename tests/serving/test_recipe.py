"""The recipe of framework/serving/recipe: nginx before two processes, and the container's file."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest

RECIPE = files("preceptor.serving") / "recipe"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")
TOKEN = "a-token-of-the-tests"
needs_nginx = pytest.mark.skipif(NGINX is None, reason="No nginx here.")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


@pytest.fixture
def fleet(process: Any, tmp_path: Path, eventually: Any) -> Generator[tuple[str, list[Any]]]:
    """Return the address of nginx and the two servers behind it, of one program."""
    with ExitStack() as opened:
        folders = [tmp_path / name for name in ("one", "two")]
        for folder in folders:
            folder.mkdir()
        with ThreadPoolExecutor() as pool:  # they take long to start
            servers = [
                opened.enter_context(each)
                for each in pool.map(lambda folder: Entered(process(folder, "--drain", "20")), folders)
            ]
        port, temporary = free_port(), tmp_path / "nginx"
        temporary.mkdir()
        text = (RECIPE / "nginx.conf").read_text(encoding="utf-8").replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        for own, server in zip(("127.0.0.1:8001", "127.0.0.1:8002"), servers, strict=True):
            assert own in text
            text = text.replace(own, server.url.removeprefix("http://"))
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        places = "".join(f"{kind}_temp_path {temporary}/{kind}; " for kind in kinds)
        (temporary / "nginx.conf").write_text(text.replace("http {", f"http {{ {places}", 1), encoding="utf-8")
        command = [cast("str", NGINX), "-p", str(temporary), "-e", "stderr", "-c", "nginx.conf"]
        nginx = subprocess.Popen([*command, "-g", f"daemon off; pid {temporary}/pid;"])
        opened.callback(nginx.wait, 60)
        opened.callback(nginx.terminate)
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: nginx.poll() is None and _answers(url))
        yield url, servers


class Entered(ExitStack):
    """A context that was entered already."""

    def __init__(self, context: Any) -> None:
        super().__init__()
        self._value = self.enter_context(context)

    def __enter__(self) -> Any:
        return self._value


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def rows(server: Any) -> float:
    """Return how many rows a server has answered."""
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("preceptor_rows_total"))


@needs_nginx
def test_nginx_spreads_requests_and_a_process_that_ends_costs_none(fleet: tuple[str, list[Any]]) -> None:
    url, servers = fleet
    statuses, ends = Counter[int](), threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
            while not ends.is_set():
                statuses[client.post("/predict", json={"text": "win a prize"}).status_code] += 1

    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        assert client.post("/predict", json={"text": "win a prize"}).json()["answer"] == {"label": "spam"}
        large = client.post("/predict", content=b" " * 1_000_001, headers={"Content-Type": "application/json"})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
        for closed in ("/metrics", "/admin/reload"):
            assert client.get(closed).json()["error"]["code"] == "no_such_path"
        assert httpx.post(f"{url}/predict", json={"text": "a"}).status_code == 401
        asking = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0, timeout=60)
        said: Any = [{"role": "user", "content": "win a prize"}]
        with asking:
            chunks = list(asking.chat.completions.create(model="program", messages=said, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "spam"

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask) for _ in range(4)]
            try:
                _wait(lambda: all(rows(server) > 10 for server in servers))
                servers[0].process.terminate()
                assert servers[0].process.wait(60) == 0
                before = rows(servers[1])
                _wait(lambda: rows(servers[1]) > before + 20)
            finally:
                ends.set()
            for each in asked:
                each.result()
        assert set(statuses) == {200}
        servers[1].process.terminate()
        assert servers[1].process.wait(60) == 0
        gone = client.post("/predict", json={"text": "a"})
    assert (gone.status_code, gone.json()["error"]["code"], gone.headers["retry-after"]) == (503, "not_ready", "1")


def _wait(is_so: Any) -> None:
    for _ in range(6000):
        if is_so():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came to be")


def test_the_container_runs_a_command_that_is_there_and_not_as_root() -> None:
    text = (RECIPE / "Dockerfile").read_text(encoding="utf-8")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {name for name, _ in lines} <= {
        "FROM", "COPY", "RUN", "USER", "WORKDIR", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT",
    }  # fmt: skip
    names = [name for name, _ in lines]
    user = names.index("USER")
    assert lines[user][1] not in ("root", "0")
    assert f" {lines[user][1]}" in next(told for name, told in lines[:user] if name == "RUN" and "useradd" in told)
    assert "RUN" not in names[user:]
    assert user < names.index("ENTRYPOINT")
    entry = json.loads(dict(cast("list[tuple[str, str]]", lines))["ENTRYPOINT"])
    assert entry == ["preceptor", "serve", "/program", "--host", "0.0.0.0"]
    check = json.loads(next(told for name, told in lines if name == "HEALTHCHECK").partition(" CMD ")[2])
    compile(check[2], "HEALTHCHECK", "exec")
    root = Path(__file__).resolve().parents[2]
    sources = [shlex.split(told)[0] for name, told in lines if name == "COPY" and not told.startswith("--from")]
    assert all((root / source).exists() for source in sources)
    assert re.search(r"^\.venv$", (RECIPE / "Dockerfile.dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
