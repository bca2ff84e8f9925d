"""Load and abuse of `preceptor serve`, a real process with a real model server, both on this machine only."""

from __future__ import annotations

import json
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.config import SchemathesisConfig

OPEN_CONNECTIONS = 2000
SECONDS = 15
"""What a request may take there."""

PRIVATE = "Nobody may read this input."
BAD_GATEWAYS = {502, 503, 504}


@pytest.fixture(scope="module")
def server(process: Any, tmp_path_factory: pytest.TempPathFactory) -> Generator[Any]:
    """Return the server that all of it happens to, one test after the other."""
    folder = tmp_path_factory.mktemp("served")
    shadow = ["--shadow", str(folder / "other"), "--shadow-share", "0.5"]
    with process(folder, "--timeout", str(SECONDS), *shadow) as running:
        yield running


@pytest.fixture(autouse=True)
def is_well(server: Any) -> Generator[None]:
    """See that it answers after each test, and has told nothing of what it holds to its log."""
    yield
    with server.client() as client:
        assert client.post("/predict", json={"text": "win a prize"}).json()["answer"] == {"label": "spam"}
    assert server.process.poll() is None
    told = json.dumps(server.log)
    assert PRIVATE not in told
    assert "Nobody may read" not in told
    assert not [line for line in server.log if line["level"] == "error"]


def connected(url: str) -> socket.socket:
    """Return a connection to a server."""
    address = urlsplit(url)
    assert address.hostname is not None
    return socket.create_connection((address.hostname, address.port or 80), timeout=60)


@contextmanager
def asking(server: Any, threads: int = 4) -> Generator[Counter[int]]:
    """Ask all the time in several threads; yields the statuses that came so far."""
    statuses, ends, lock = Counter[int](), threading.Event(), threading.Lock()

    def ask() -> None:
        with server.client() as client:
            while not ends.is_set():
                response = client.post("/predict", json={"text": PRIVATE})
                assert response.status_code == 200 or PRIVATE not in response.text
                with lock:
                    statuses[response.status_code] += 1

    with ThreadPoolExecutor(threads) as pool:
        clients = [pool.submit(ask) for _ in range(threads)]
        try:
            yield statuses
        finally:
            ends.set()
        for each in clients:
            each.result()


@pytest.mark.parametrize("is_wrong", [False, True])
def test_whatever_is_asked_is_answered_as_the_document_says(server: Any, is_wrong: bool) -> None:
    modes = schemathesis.GenerationMode
    with server.client() as client:
        document = client.get("/openapi.json").json()
        found = schemathesis.openapi.from_dict(document, config=SchemathesisConfig(seed=0))
        asked = Counter[int]()
        for result in found.get_all_operations():
            operation = cast("Any", result).ok()
            if is_wrong and not operation.body:
                continue

            @settings(
                max_examples=15,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
            )
            @given(case=operation.as_strategy(generation_mode=modes.NEGATIVE if is_wrong else modes.POSITIVE))
            def fuzz(case: Any) -> None:
                headers = dict(client.headers)
                response = case.call(base_url=server.url, headers=headers, timeout=60)
                asked[response.status_code] += 1
                case.validate_response(response, headers=headers)

            fuzz()
    assert asked[422] + asked[400] > 10 if is_wrong else asked[200] > 20, asked
    assert not any(status >= 500 for status in asked)


def test_a_hundred_megabytes_are_refused_and_never_held(server: Any) -> None:
    part = b" " * 1_000_000
    held, before = Path(f"/proc/{server.process.pid}"), 0
    if held.exists():
        before = int((held / "statm").read_text().split()[1]) * resource.getpagesize()
        (held / "clear_refs").write_text("5")  # forgets the most it has held so far

    def send(is_chunked: bool) -> tuple[int, str]:
        content: Any = (part for _ in range(100)) if is_chunked else part * 100
        headers = {"Content-Type": "application/json"}
        with server.client() as client:
            response = client.post("/predict", content=content, headers=headers)
        return response.status_code, response.json()["error"]["code"]

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(send, [False, True, False, True])) == {(413, "body_too_large")}
    if held.exists():
        lines = (held / "status").read_text().splitlines()
        most = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        assert most - before < 50e6


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(server: Any, sent: bytes) -> None:
    with connected(server.url) as odd:
        odd.sendall(sent)
        answer = odd.recv(65536)
    assert answer == b"" or answer[9:12] in (b"400", b"401", b"408", b"431"), answer


def test_slow_clients_are_given_up_and_hold_up_nobody(server: Any) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a-token-of-the-tests\r\n"
    whole = head + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    with ExitStack() as opened, asking(server, 1) as statuses:
        slow = [opened.enter_context(connected(server.url)) for _ in range(100)]
        for at, each in enumerate(slow):
            each.sendall(head if at % 2 else whole)
        end, dripped = time.monotonic() + 120, 0
        left = list(slow)
        while left and time.monotonic() < end:
            time.sleep(0.1)
            dripped += 1
            left = [each for each in left if _goes_on(each)]
    assert left == []
    assert dripped > 1
    assert set(statuses) == {200}


def _goes_on(slow: socket.socket) -> bool:
    """Send another byte; return False if the server has given up."""
    slow.setblocking(False)
    try:
        return not slow.recv(65536).startswith(b"HTTP/1.1 408 ")
    except BlockingIOError:
        slow.send(b"x")
        return True


def test_two_thousand_open_connections_keep_nobody_out(server: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * OPEN_CONNECTIONS:
        pytest.skip(f"The system allows {hard} open files only.")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * OPEN_CONNECTIONS), hard))
    try:
        with ExitStack() as opened:
            idle = [opened.enter_context(connected(server.url)) for _ in range(OPEN_CONNECTIONS)]
            for each in idle[::2]:
                each.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-")
            with server.client() as client:
                for _ in range(5):
                    assert client.post("/predict", json={"text": "a"}).status_code == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_wrong_token_learns_nothing(server: Any) -> None:
    with server.client() as known:
        paths = list(known.get("/openapi.json").json()["paths"])
    closed = [*(path for path in paths if path not in ("/healthz", "/readyz")), "/openapi.json", "/nowhere"]
    for token in ("wrong", "a-token-of-the-test", "a-token-of-the-tests2", "x" * 10_000):
        with server.client(token) as stranger:
            for path in closed:
                for method in ("GET", "POST"):
                    response = stranger.request(method, path, json={"text": PRIVATE})
                    assert response.status_code == 401
                    assert set(response.json()) == {"error"}
                    assert "Nobody may read" not in response.text
            for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz"):
                response = stranger.get(path)
                assert response.status_code == 200
                assert "Nobody may read" not in response.text


def test_a_model_server_that_is_killed_and_comes_back_needs_no_restart(server: Any, eventually: Any) -> None:
    with asking(server) as statuses:
        eventually(lambda: statuses[200] > 10)
        server.model.kill()
        eventually(lambda: any(statuses[each] for each in BAD_GATEWAYS))
        with server.client() as client:
            assert client.get("/healthz").status_code == 200
            assert client.get("/readyz").status_code == 200
        server.model.start()
        before = statuses[200]
        eventually(lambda: statuses[200] > before + 10)
    assert set(statuses) <= {200, *BAD_GATEWAYS}, statuses


def test_reloads_and_a_shadow_under_load_fail_no_request(
    server: Any, eventually: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len([line for line in server.log if line["event"] == "reloaded"])
    with asking(server) as statuses:
        for number in range(1, 6):
            server.save(f"Nobody may read version {number}.")
            server.process.send_signal(signal.SIGHUP)
            eventually(lambda wanted=before + number: _reloads(server) == wanted)
            asked = statuses[200]
            eventually(lambda asked=asked: statuses[200] > asked + 20)
    with server.client() as client:
        assert client.get("/program").json()["instructions"] == {"predict": "Nobody may read version 5."}
        counted = [each for each in client.get("/metrics").text.splitlines() if each.startswith("preceptor_shadow_t")]
    agreed = {each.partition('"')[2].partition('"')[0]: float(each.split()[-1]) for each in counted}
    assert set(statuses) == {200}
    assert agreed["agrees"] > 50
    assert agreed.get("differs", 0) == 0
    with capsys.disabled():
        print(f" 5 reloads, {statuses[200]} requests, none failed; the shadow: {agreed}", end="")  # noqa: T201


def _reloads(server: Any) -> int:
    return len([line for line in server.log if line["event"] == "reloaded"])
