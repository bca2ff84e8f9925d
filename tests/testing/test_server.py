from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import dspy
import httpx
import pytest
from dspy.utils.exceptions import (
    LMAuthError,
    LMBillingError,
    LMInvalidRequestError,
    LMProviderError,
    LMRateLimitError,
    LMServerError,
    LMTransportError,
    LMUnsupportedModelError,
)

from preceptor.errors import ConfigError
from preceptor.testing import KINDS, ChatServer, Faults, Kind, server

ANSWER = "Yes, it is so."
RAISED: dict[Kind, tuple[type[dspy.LMError], int | None, float | None]] = {
    "bad_request": (LMInvalidRequestError, 400, None),
    "unauthorized": (LMAuthError, 401, None),
    "forbidden": (LMAuthError, 403, None),
    "not_found": (LMUnsupportedModelError, 404, None),
    "rate_limit": (LMRateLimitError, 429, None),
    "rate_limit_after": (LMRateLimitError, 429, 0.25),
    "no_quota": (LMBillingError, 429, None),
    "server_error": (LMServerError, 500, None),
    "unavailable": (LMServerError, 503, None),
    "dropped": (LMTransportError, None, None),
    "reset": (LMTransportError, None, None),
    "cut": (LMTransportError, None, None),
    "hang": (LMTransportError, None, None),
    "garbage": (LMProviderError, 200, None),
}
GIVEN: dict[Kind, tuple[str, str]] = {
    "slow": (ANSWER, "stop"),
    "misshapen": ("", "stop"),
    "empty": ("", "stop"),
    "truncated": (ANSWER[:7], "length"),
}
REFUSED = {
    "bad_request": (400, "invalid_request_error", None),
    "unauthorized": (401, "invalid_request_error", "invalid_api_key"),
    "forbidden": (403, "invalid_request_error", "forbidden"),
    "not_found": (404, "invalid_request_error", "model_not_found"),
    "rate_limit": (429, "requests", "rate_limit_exceeded"),
    "rate_limit_after": (429, "requests", "rate_limit_exceeded"),
    "no_quota": (429, "insufficient_quota", "insufficient_quota"),
    "server_error": (500, "server_error", None),
    "unavailable": (503, "server_error", None),
}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60) as opened:
        yield opened


def failing(kind: Kind) -> ChatServer:
    return ChatServer(lambda body: ANSWER, faults=Faults(kinds=(kind,), retry_after=0.25, slow_seconds=0.2))


def body(text: str = "Is it so?", **more: Any) -> dict[str, Any]:
    return {"model": "any-name", "messages": [{"role": "user", "content": text}], **more}


def post(client: httpx.Client, running: ChatServer, posted: dict[str, Any] | None = None) -> httpx.Response:
    return client.post(f"{running.url}/chat/completions", json=posted or body())


def events(streamed: str) -> list[str]:
    return [line.removeprefix("data: ") for line in streamed.split("\n\n") if line]


def test_every_kind_of_fault_is_documented_with_what_dspy_makes_of_it() -> None:
    rows = {line.split()[0]: line for line in (server.__doc__ or "").splitlines() if line.startswith("    ")}

    assert set(rows) == set(KINDS) == {*RAISED, *GIVEN}
    for kind, (error, status, retry_after) in RAISED.items():
        assert f"{error.__name__}" in rows[kind], kind
        assert status is None or f" {status}" in rows[kind], kind
        assert ("with retry_after" in rows[kind]) is (retry_after is not None), kind


@pytest.mark.parametrize("kind", RAISED)
def test_dspy_raises_what_is_documented(kind: Kind) -> None:
    error, status, retry_after = RAISED[kind]
    with failing(kind) as running:
        lm = running.lm("x", num_retries=0, timeout=0.3 if kind == "hang" else 30)
        with pytest.raises(dspy.LMError) as caught:
            lm("Is it so?")

        assert type(caught.value) is error
        assert (caught.value.status, caught.value.retry_after) == (status, retry_after)
        assert str(caught.value).startswith("[openai/x] ")
        wait_for(lambda: running.faults == {kind: 1})
        assert (running.count, running.answered, running.faults) == (1, 0, {kind: 1})


@pytest.mark.parametrize("kind", GIVEN)
def test_dspy_takes_these_faults_for_answers(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="dspy")
    with failing(kind) as running:
        lm = running.lm(num_retries=0, timeout=30)
        request = dspy.lm15.Request(lm.model, (dspy.lm15.Message.user("Is it so?"),))
        response = lm(request)

        assert (response.message.text, response.finish_reason) == GIVEN[kind]
        assert (running.count, running.answered, running.faults) == (1, int(kind == "slow"), {kind: 1})


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_come_in_openais_form(client: httpx.Client, kind: Kind, stream: bool) -> None:
    with failing(kind) as running:
        reply = post(client, running, body(stream=stream))

    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["code"]) == REFUSED[kind]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert reply.headers.get("retry-after") == ("0.25" if kind == "rate_limit_after" else None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("dropped", httpx.RemoteProtocolError, "disconnected without sending a response"),
        ("reset", httpx.ReadError, "Connection reset by peer"),
        ("cut", httpx.RemoteProtocolError, "closed connection without sending complete message body"),
        ("hang", httpx.ReadTimeout, "timed out"),
    ],
)
def test_broken_connections_break_a_plain_client_too(
    client: httpx.Client, kind: Kind, error: type[Exception], message: str, stream: bool
) -> None:
    with failing(kind) as running, pytest.raises(error, match=message):
        client.post(f"{running.url}/chat/completions", json=body(stream=stream), timeout=0.2 if kind == "hang" else 30)


def test_a_reset_comes_after_half_of_the_body(client: httpx.Client) -> None:
    came = bytearray()

    def read(reply: httpx.Response) -> None:
        for piece in reply.iter_raw():
            came.extend(piece)

    with failing("reset") as running, client.stream("POST", f"{running.url}/chat/completions", json=body()) as reply:
        with pytest.raises(httpx.ReadError, match="Connection reset by peer"):
            read(reply)

        assert reply.status_code == 200
        assert len(came) in {0, int(reply.headers["content-length"]) // 2}  # a reset may overtake what isn't read yet


@pytest.mark.parametrize("stream", [False, True])
def test_a_slow_answer_drips_over_its_seconds_and_arrives_whole(client: httpx.Client, stream: bool) -> None:
    with failing("slow") as running:
        start = time.monotonic()
        reply = post(client, running, body(stream=stream))
        seconds = time.monotonic() - start

    assert seconds >= 0.2
    assert ANSWER.split()[0] in reply.text
    assert running.answered == 1


def test_a_slow_answer_that_nobody_waits_for_is_not_counted(client: httpx.Client) -> None:
    with ChatServer(lambda body: ANSWER, faults=Faults(kinds=("slow",), slow_seconds=10)) as running:
        with client.stream("POST", f"{running.url}/chat/completions", json=body()) as reply:
            assert next(reply.iter_raw()).startswith(b"{")
        wait_for(lambda: running._flying == 0)

        assert running.answered == 0


def test_garbage_is_a_page_and_misshapen_lacks_choices(client: httpx.Client) -> None:
    with failing("garbage") as running:
        page = post(client, running)
    with failing("misshapen") as running:
        lacking, streamed = post(client, running).json(), events(post(client, running, body(stream=True)).text)

    assert (page.status_code, page.headers["content-type"], page.text[:6]) == (200, "text/html", "<html>")
    assert sorted(lacking) == ["created", "id", "model", "object", "usage"]
    assert "choices" not in json.loads(streamed[0])


def test_a_truncated_answer_is_half_and_says_so(client: httpx.Client) -> None:
    with failing("truncated") as running:
        whole = post(client, running).json()
        streamed = [json.loads(event) for event in events(post(client, running, body(stream=True)).text)[:-1]]

    assert whole["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Yes, it"}, "finish_reason": "length"}
    ]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in streamed) == "Yes, it"
    assert streamed[-1]["choices"][0]["finish_reason"] == "length"


def test_an_answer_has_openais_form_and_counts_tokens_as_words(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "two words"}, {"type": "text", "text": " more"}]
    with ChatServer(lambda body: "Yes, it is.") as running:
        posted = body()
        posted["messages"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
        reply = post(client, running, posted)

    assert reply.json() == {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "any-name",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes, it is."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    }


def test_a_streamed_answer_comes_word_by_word_and_ends_with_its_usage(client: httpx.Client) -> None:
    with ChatServer(lambda body: "Yes,\n it is.") as running:
        reply = post(client, running, body(stream=True, stream_options={"include_usage": True}))

    assert reply.headers["content-type"] == "text/event-stream"
    *told, done = events(reply.text)
    chunks = [json.loads(event) for event in told]
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [choice["delta"] for chunk in chunks for choice in chunk["choices"]] == [
        *({"role": "assistant", "content": ""}, {"content": "Yes,"}, {"content": "\n it"}, {"content": " is."}),
        {},
    ]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}


def test_dspy_streams_from_it() -> None:
    async def streamed(lm: dspy.LM) -> list[Any]:
        listener = dspy.streaming.StreamListener("answer")
        program = cast("Any", dspy.streamify(dspy.Predict("question -> answer"), stream_listeners=[listener]))
        with dspy.context(lm=lm):
            return [piece async for piece in program(question="Is it so?")]

    with ChatServer(lambda body: f"[[ ## answer ## ]]\n{ANSWER}\n\n[[ ## completed ## ]]") as running:
        *pieces, prediction = asyncio.run(streamed(running.lm(max_tokens=16)))

    assert running.requests[0].body["stream"] is True
    assert "".join(piece.chunk for piece in pieces) == prediction.answer == ANSWER


def test_the_models_are_listed(client: httpx.Client) -> None:
    with ChatServer(lambda body: ANSWER) as running:
        listed = client.get(f"{running.url}/models").json()

    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["model"]


def test_other_paths_and_bodies_are_refused_and_not_counted(client: httpx.Client) -> None:
    with ChatServer(lambda body: ANSWER) as running:
        replies = [
            client.get(f"{running.url}/engines"),
            client.post(f"{running.url}/completions", json=body()),
            client.post(f"{running.url}/chat/completions", content=b"{"),
            client.post(f"{running.url}/chat/completions", json=["no", "object"]),
            client.post(f"{running.url}/chat/completions", json={"model": "any-name"}),
        ]
        assert running.count == 0

    assert [reply.status_code for reply in replies] == [404, 404, 400, 400, 400]


def test_the_key_is_asked_for_where_one_was_given(client: httpx.Client) -> None:
    with ChatServer(lambda body: ANSWER, key="sk-right") as running:
        wrong = [post(client, running), client.get(f"{running.url}/models")]
        with pytest.raises(LMAuthError, match="Incorrect API key provided"):
            running.lm(api_key="sk-wrong", num_retries=0)("Is it so?")
        assert running.count == 0

        assert running.lm()("Is it so?") == [ANSWER]
        assert running.requests[0].headers["authorization"] == "Bearer sk-right"

    assert [reply.json()["error"]["code"] for reply in wrong] == ["invalid_api_key"] * 2


def test_requests_are_kept_in_order_of_arrival(client: httpx.Client) -> None:
    with ChatServer(lambda body: str(body["messages"][0]["content"]).upper()) as running:
        answers = [post(client, running, body(text)).json()["choices"][0]["message"]["content"] for text in "abc"]

        assert answers == ["A", "B", "C"]
        assert [received.body for received in running.requests] == [body("a"), body("b"), body("c")]
        assert running.requests[0].headers["content-type"] == "application/json"
        assert (running.count, running.answered, running.most_concurrent) == (3, 3, 1)


def test_faults_are_switched_on_and_off() -> None:
    with ChatServer(lambda body: ANSWER) as running:
        lm = running.lm(num_retries=0)
        assert lm("Is it so?") == [ANSWER]
        running.inject(Faults(kinds=("server_error",)))
        with pytest.raises(LMServerError):
            lm("Is it so?")
        running.inject(None)
        assert lm("Is it so?") == [ANSWER]

        assert (running.count, running.answered, running.faults) == (3, 2, {"server_error": 1})


def test_a_request_that_failed_may_succeed_when_it_is_sent_again() -> None:
    with ChatServer(lambda body: ANSWER, faults=Faults(kinds=("server_error",), share=0.5, seed=1)) as running:
        lm = running.lm(num_retries=0)
        outcomes = ""
        for _ in range(12):
            try:
                lm("Is it so?")
                outcomes += "."
            except LMServerError:
                outcomes += "x"

    assert sorted(set(outcomes)) == [".", "x"]


def test_the_same_requests_fail_with_any_number_of_threads(client: httpx.Client) -> None:
    faults = Faults(kinds=("rate_limit", "server_error", "empty"), share=0.4, seed=3)

    def outcomes(threads: int) -> tuple[list[tuple[int, int]], Counter[Kind]]:
        with ChatServer(lambda body: ANSWER, faults=faults) as running:

            def outcome(number: int) -> tuple[int, int]:
                reply = post(client, running, body(f"row {number}"))
                return reply.status_code, len(reply.content)

            with ThreadPoolExecutor(threads) as pool:
                return list(pool.map(outcome, range(100))), running.faults

    alone, faults_alone = outcomes(1)
    assert (alone, faults_alone) == outcomes(16)
    assert sorted(faults_alone) == ["empty", "rate_limit", "server_error"]
    assert 20 < sum(faults_alone.values()) < 60


def test_a_share_of_nothing_never_fails_and_of_one_always() -> None:
    never, always = Faults(kinds=("hang",), share=0.0), Faults(kinds=("hang",))

    assert {never.drawn(f"row {row}", 0) for row in range(200)} == {None}
    assert {always.drawn(f"row {row}", 0) for row in range(200)} == {"hang"}


def test_faults_depend_on_seed_body_and_repetition() -> None:
    def drawn(seed: int, text: str) -> list[Kind | None]:
        return [Faults(kinds=("hang", "cut"), share=0.5, seed=seed).drawn(text, seen) for seen in range(40)]

    assert drawn(1, "a") == drawn(1, "a")
    assert drawn(1, "a") != drawn(2, "a")
    assert drawn(1, "a") != drawn(1, "b")
    assert set(drawn(1, "a")) == {None, "hang", "cut"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ()}, r"kinds among bad_request, .*, truncated; got \[\]\."),
        ({"kinds": ("fire", "hang")}, r"kinds among bad_request, .*; got \['fire', 'hang'\]\."),
        ({"share": 1.5}, r"a share in \[0, 1\], got 1\.5\."),
        ({"retry_after": -1}, r"seconds >= 0, got retry_after=-1 and slow_seconds=0\.5\."),
        ({"slow_seconds": -1}, r"seconds >= 0, got retry_after=0\.05 and slow_seconds=-1\."),
    ],
)
def test_faults_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"kinds": ("hang",), **settings}
    with pytest.raises(ConfigError, match=rf"^Faults needs {message}$"):
        Faults(**given)


def test_an_answer_that_raises_is_shown_and_drops_the_connection(
    client: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    with ChatServer(lambda body: str(body["no such field"])) as running:
        with pytest.raises(httpx.RemoteProtocolError, match="disconnected"):
            post(client, running)

        assert (running.count, running.answered, running._flying) == (1, 0, 0)
    assert "KeyError: 'no such field'" in capsys.readouterr().err


def test_it_answers_128_requests_at_a_time() -> None:
    together = threading.Barrier(128)

    def answer(body: dict[str, Any]) -> str:
        together.wait(timeout=60)
        return str(body["messages"][0]["content"]).upper()

    with ChatServer(answer) as running, ThreadPoolExecutor(128) as pool:
        lms = [running.lm(num_retries=0) for _ in range(2)]  # one dspy.LM opens 100 connections at most
        answers = list(pool.map(lambda number: lms[number % 2](f"row {number}"), range(128)))

        assert answers == [[f"ROW {number}"] for number in range(128)]
        assert (running.count, running.answered, running.most_concurrent) == (128, 128, 128)


def test_latency_is_waited_for_before_an_answer_and_cut_short_by_the_end(client: httpx.Client) -> None:
    with ChatServer(lambda body: ANSWER, latency=0.2) as running:
        start = time.monotonic()
        assert post(client, running).status_code == 200
        assert time.monotonic() - start >= 0.2

    running = ChatServer(lambda body: ANSWER, latency=600)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, client, running)
        wait_for(lambda: running.count == 1)
        running.close()
        with pytest.raises(httpx.HTTPError):
            waiting.result(timeout=10)


def test_closing_lets_go_of_clients_that_hang() -> None:
    with failing("hang") as running, ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(running.lm(num_retries=0, timeout=600), f"row {number}") for number in range(8)]
        wait_for(lambda: running.count == 8)
        running.close()

        assert {type(client.exception(timeout=60)) for client in clients} == {LMTransportError}


def test_a_client_that_leaves_a_hanging_request_frees_its_place(client: httpx.Client) -> None:
    with failing("hang") as running:
        for number in range(1, 4):
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{running.url}/chat/completions", json=body(), timeout=0.1)
            wait_for(lambda: running.faults["hang"] == number and running._flying == 0)  # noqa: B023  before the next

        assert running.most_concurrent == 1


def test_a_server_left_open_with_a_hanging_request_keeps_no_process_alive() -> None:
    script = (
        "import socket; from preceptor.testing import ChatServer, Faults\n"
        "server = ChatServer(lambda body: 'yes', faults=Faults(kinds=('hang',)))\n"
        "client = socket.create_connection(('127.0.0.1', int(server.url.split(':')[2].split('/')[0])))\n"
        "client.sendall(b'POST /v1/chat/completions HTTP/1.1\\r\\nContent-Length: 15\\r\\n\\r\\n{\"messages\":[]}')\n"
        "while not server.count: pass\n"
        "print('left')"
    )
    left = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)

    assert left.stdout == "left\n"


def wait_for(claim: Any) -> None:
    """Wait until a claim about another thread is true."""
    end = time.monotonic() + 60
    while not claim():
        assert time.monotonic() < end, "waited for 60 seconds"
        time.sleep(0.005)
