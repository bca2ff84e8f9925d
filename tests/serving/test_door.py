"""What a request passes before it is answered: tokens, names, sizes and times."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preceptor.errors import ConfigError
from preceptor.serving.door import OPEN
from preceptor.serving.run import listen
from preceptor.serving.settings import Keys, Limits, refuse_exposed

TOKEN = "a-token-of-the-tests"
ALLOWED = {200, 400, 401, 403, 404, 405, 408, 409, 413, 415, 421, 422, 429, 502, 503, 504}
Save = Callable[..., Path]
Serve = Callable[..., Any]


def error(response: httpx.Response) -> tuple[int, str]:
    """Return a refusal's status and code."""
    return response.status_code, response.json()["error"]["code"]


def connected(url: str) -> socket.socket:
    """Return a connection to a server."""
    address = urlsplit(url)
    assert address.hostname is not None
    return socket.create_connection((address.hostname, address.port or 80), timeout=60)


def test_without_a_token_only_what_tells_nothing_is_open(save: Save, serve: Serve) -> None:
    running = serve(save(), keys=Keys.of([TOKEN, "another-of-the-tests"]))
    client: httpx.Client = running.client
    paths = [
        *client.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()["paths"],
        "/openapi.json",
    ]

    for path in paths:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            for method in ("GET", "POST"):
                response = client.request(method, path, headers=header, json={"text": "a"})
                if path in OPEN:
                    assert response.status_code in (200, 405)
                else:
                    assert error(response) == (401, "no_token")
                    assert response.headers["www-authenticate"] == "Bearer"
                    assert "spam" not in response.text
    for token in (TOKEN, "another-of-the-tests"):
        answer = client.post("/predict", json={"text": "a"}, headers={"Authorization": f"Bearer {token}"})
        assert answer.json()["answer"] == {"label": "mail"}


def test_a_page_of_another_site_cant_ask_by_a_name_of_its_own(save: Save, serve: Serve) -> None:
    path = save()
    own, public = serve(path).client, serve(path, is_public=True).client
    loopback = ("localhost:1", "127.0.0.1", "127.0.0.2:8000", "[::1]:80", "LOCALHOST")
    others = ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "0.0.0.0", "")
    for host, is_served in [*((host, True) for host in loopback), *((host, False) for host in others)]:
        response = own.get("/program", headers={"Host": host})
        assert response.status_code == (200 if is_served else 421), host
        assert public.get("/program", headers={"Host": host}).status_code == 200


def test_a_server_answers_at_whatever_address_of_this_machine_it_was_let_listen_on(save: Save, serve: Serve) -> None:
    refuse_exposed("127.0.0.2", Keys(), is_told_twice=False)
    running = serve(save(), host="127.0.0.2")
    assert running.url.startswith("http://127.0.0.2:")
    assert running.post("/predict", {"text": "a"}).json()["answer"] == {"label": "mail"}


def test_a_form_of_another_site_cant_ask(save: Save, serve: Serve) -> None:
    """A browser asks first before it sends JSON from elsewhere; anything else it just sends."""
    client = serve(save()).client
    response = client.post("/predict", content=b'{"text": "a"}', headers={"Content-Type": "text/plain"})
    assert error(response) == (415, "not_json")


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_large_body_is_refused_whether_or_not_its_size_is_declared(
    is_chunked: bool, save: Save, serve: Serve
) -> None:
    running = serve(save(), limits=Limits(body_bytes=10_000, drain_seconds=1))
    part = b" " * 500_000
    content: Any = (part for _ in range(8)) if is_chunked else part * 8

    response = running.client.post("/predict", content=content, headers={"Content-Type": "application/json"})

    assert error(response) == (413, "body_too_large")
    assert running.post("/predict", {"text": "a" * 9000}).status_code == 200
    assert error(running.post("/predict", {"text": "a" * 10_000})) == (413, "body_too_large")


def test_a_client_that_sends_slowly_is_given_up(save: Save, serve: Serve) -> None:
    running = serve(save(), limits=Limits(seconds=0.2, drain_seconds=1))
    with connected(running.url) as slow:
        slow.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 14\r\n\r\n{"
        )
        assert slow.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_is_slow_or_too_large_ends_its_connection(save: Save, serve: Serve) -> None:
    running = serve(save(), limits=Limits(seconds=0.5, drain_seconds=1))
    with connected(running.url) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert slow.recv(65536).startswith(b"HTTP/1.1 200 ")
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: ")
        assert slow.recv(65536).startswith(b"HTTP/1.1 408 ")
        assert slow.recv(65536) == b""
    with connected(running.url) as silent:
        assert silent.recv(65536).startswith(b"HTTP/1.1 408 ")
    running = serve(save())
    with connected(running.url) as large:
        large.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 70_000)
        assert large.recv(65536).startswith(b"HTTP/1.1 431 ")


def whole(connection: socket.socket) -> bytes:
    """Return all that a server sends until it closes the connection."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(("path", "host", "code"), [("/predict", "localhost", 413), ("/predict", "evil.example", 421)])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_client_that_uploads_slowly_reads_why_it_is_refused(
    path: str, host: str, code: int, is_chunked: bool, save: Save, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preceptor.serving.door._LINGER_SECONDS", 60)
    running = serve(save(), limits=Limits(body_bytes=10_000, drain_seconds=1))
    part, count = b" " * 100_000, 20
    length = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % (len(part) * count)
    with connected(running.url) as slow:
        slow.sendall(b"POST %s HTTP/1.1\r\nHost: %s\r\n%s\r\n\r\n" % (path.encode(), host.encode(), length))
        for _ in range(count):
            slow.sendall(b"%x\r\n%s\r\n" % (len(part), part) if is_chunked else part)
            time.sleep(0.02)
        slow.sendall(b"0\r\n\r\n" if is_chunked else b"")
        head, _, body = whole(slow).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % code)
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == {413: "body_too_large", 421: "wrong_host"}[code]


def test_a_wrong_token_and_a_large_body_get_one_answer_and_a_right_one_keeps_its_connection(
    save: Save, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preceptor.serving.door._LINGER_SECONDS", 60)
    running = serve(save(), keys=Keys.of([TOKEN]))
    with connected(running.url) as stranger:
        stranger.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300000\r\n\r\n")
        for _ in range(3):
            stranger.sendall(b" " * 100_000)
            time.sleep(0.05)
        told = whole(stranger)
    assert told.startswith(b"HTTP/1.1 401 ")
    assert told.count(b"HTTP/1.1 ") == 1
    without = running.client.get("/program")
    assert (without.status_code, "connection" in without.headers) == (401, False)


def test_a_client_that_expects_to_be_told_to_go_on_is_told_no_instead(save: Save, serve: Serve) -> None:
    running = serve(save(), limits=Limits(body_bytes=10, drain_seconds=1))
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 100\r\n\r\n"
    with connected(running.url) as asking:
        asking.sendall(head)
        told = asking.recv(65536)
        asking.shutdown(socket.SHUT_WR)
        told += whole(asking)
    assert told.startswith(b"HTTP/1.1 413 ")
    assert told.count(b"HTTP/1.1 ") == 1


def test_a_large_body_counts_for_no_head_that_comes_after_it(save: Save, serve: Serve) -> None:
    running = serve(save())
    body = json.dumps({"text": "a" * 100_000}).encode()
    sent = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    with connected(running.url) as client:
        for _ in range(2):
            for piece in (sent[:30], sent[30:], b"%d\r\n\r\n" % len(body), body[:60_000], body[60_000:]):
                client.sendall(piece)
                time.sleep(0.02)
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        for _ in range(3):
            time.sleep(0.02)
            client.sendall(b"x" * 30_000)
        assert client.recv(65536).startswith(b"HTTP/1.1 431 ")


def test_a_body_that_goes_on_after_its_answer_ends_with_the_connection(save: Save, serve: Serve) -> None:
    running = serve(save(), limits=Limits(seconds=0.5, drain_seconds=1))
    with connected(running.url) as dripping:
        dripping.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        told = dripping.recv(65536)
        assert told.startswith(b"HTTP/1.1 200 ")
        dripping.settimeout(0.05)
        for _ in range(200):
            try:
                assert dripping.recv(65536) == b""
                break
            except TimeoutError:
                with suppress(ConnectionError):  # it may have been closed since; then nothing more is received
                    dripping.send(b"x")
            except ConnectionError:  # closed before it had read the last byte sent
                break
        else:
            pytest.fail("It was never closed.")


def test_a_client_that_leaves_while_it_sends_is_noted(save: Save, serve: Serve, eventually: Any) -> None:
    running = serve(save())
    with connected(running.url) as leaving:
        leaving.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
    eventually(lambda: running.metric('requests_total{endpoint="/predict",status="408"}') == 1)


def test_a_port_takes_connections_before_it_is_announced_and_is_no_second_process_s() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 5).close()
        with pytest.raises(ConfigError, match="Address already in use"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["x..y", f"{64 * 'a'}.example"])
def test_a_host_that_can_be_none_is_told_with_what_to_change(host: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^Can't listen on {host}:8000: .*Choose another --port, or --host, an addr"
    ):
        listen(host, 8000)


def test_each_request_is_one_line_without_what_was_asked(
    save: Save, serve: Serve, logged: list[dict[str, Any]], eventually: Any
) -> None:
    path = save()
    for shown in (False, True):
        running = serve(path, logs_inputs=shown)
        running.post("/predict", {"text": "win my private prize"})
        running.post("/predict", {"txt": "private"})
        running.client.get("/private")
    eventually(lambda: len(logged) == 6)
    quiet, loud = logged[:3], logged[3:]
    assert [(each["path"], each["status"], each.get("code")) for each in quiet] == [
        ("/predict", 200, None),
        ("/predict", 422, "invalid_field"),
        ("other", 404, "no_such_path"),
    ]
    assert quiet[0]["output_tokens"] == 1
    assert "private" not in json.dumps(quiet)
    assert loud[0]["inputs"] == {"text": "win my private prize"}
    assert loud[0]["outputs"] == {"label": "spam"}


def test_whatever_is_sent_the_answer_is_a_documented_one(save: Save, serve: Serve) -> None:
    client: httpx.Client = serve(save(), keys=None).client
    paths = ["/predict", "/predict/batch", "/v1/chat/completions", "/admin/reload", "/program", "/nowhere"]
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
    rows = st.fixed_dictionaries({"text": values | st.text()}, optional={"more": values})
    chats = st.fixed_dictionaries(
        {
            "model": st.just("program") | values,
            "messages": st.lists(st.dictionaries(st.just("content"), values)) | values,
        },
        optional={"stream": values, "max_tokens": values, "n": values},
    )
    bodies = st.one_of(values, rows, st.fixed_dictionaries({"rows": st.lists(rows) | values}), chats).map(json.dumps)

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        path=st.sampled_from(paths), method=st.sampled_from(["POST", "PUT"]), body=bodies.map(str.encode) | st.binary()
    )
    def fuzz(path: str, method: str, body: bytes) -> None:
        response = client.request(method, path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code in ALLOWED - {502, 503, 504}, response.text
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    fuzz()
