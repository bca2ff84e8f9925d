"""What calls take: each provider's counters as they come over HTTP, and bounds that hold."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Config, FunctionTool, ImagePart, Message, Request, ToolCallPart

from preceptor.errors import BudgetExhausted, ConfigError
from preceptor.lm import usage
from preceptor.lm.budget import Account, Budget, Cost
from preceptor.lm.dispatch import Patience
from preceptor.lm.ledger import Call, Ledger
from preceptor.lm.local import LocalEngine
from preceptor.lm.meter import Meter
from preceptor.testing import ChatServer, asked, simulated

CLAUDE = {
    "id": "msg_0",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-4-5",
    "content": [{"type": "text", "text": "yes"}],
    "stop_reason": "end_turn",
    "usage": {
        "input_tokens": 5,
        "cache_creation_input_tokens": 20,
        "cache_read_input_tokens": 300,
        "output_tokens": 1,
    },
}
GEMINI = {
    "candidates": [{"content": {"role": "model", "parts": [{"text": "yes"}]}, "finishReason": "STOP"}],
    "usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 1, "thoughtsTokenCount": 90},
}


@contextmanager
def provider(body: dict[str, Any]) -> Generator[str]:
    """Serve one body to every request, on the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def ledger(tmp_path: Path) -> Generator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite")
    yield opened
    opened.close()


def request(lm: dspy.LM, *, text: str = "Is water wet?", **config: Any) -> Request:
    return Request(model=lm.model, messages=(Message.user(text),), config=Config(**config))


@pytest.mark.parametrize(
    ("model", "body", "tokens", "dollars"),
    [
        ("anthropic/claude-sonnet-4-5", CLAUDE, 5 + 20 + 300 + 1, 325 * 3 + 15),
        ("gemini/gemini-2.5-flash", GEMINI, 7 + 1 + 90, 7 * 3 + 91 * 15),
    ],
)
def test_what_was_cached_and_what_was_thought_is_counted(
    ledger: Ledger, model: str, body: dict[str, Any], tokens: int, dollars: float
) -> None:
    account = Account(Budget(tokens=10_000, prices={model: (3.0, 15.0)}))
    with provider(body) as url:
        lm = dspy.LM(model, api_base=url, api_key="none", max_tokens=200, cache=False)
        Meter(ledger, account).ask_one(lm, Call(request(lm, max_tokens=200)))
    assert account.spent == account.billed
    assert (account.spent.calls, account.spent.tokens) == ledger.paid[:2] == (1, tokens)
    assert account.spent.dollars == ledger.paid[2] == pytest.approx(dollars / 1e6)


def test_an_answer_that_was_thought_over_to_its_bound_is_not_broken(ledger: Ledger) -> None:
    cut = {**GEMINI, "candidates": [{"content": {"parts": [{"text": "ye"}]}, "finishReason": "MAX_TOKENS"}]}
    account = Account(Budget())
    with provider(cut) as url:
        lm = dspy.LM("gemini/gemini-2.5-flash", api_base=url, api_key="none", cache=False)
        answer = Meter(ledger, account, patience=Patience(first_wait=0)).ask_one(lm, Call(request(lm, max_tokens=91)))
    assert answer.message.text == "ye"
    assert (account.spent.calls, account.lost.calls) == (1, 0)


def silent(completion: dict[str, Any]) -> None:
    del completion["usage"]


def no_output(completion: dict[str, Any]) -> None:
    del completion["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("shape", "max_tokens", "tokens"),
    [(silent, 50, 13 + 128 + 50), (no_output, 50, 3 + 50), (silent, None, 13 + 128 + 13), (no_output, None, 3 + 13)],
)
def test_what_a_provider_does_not_count_is_taken_for_the_most_it_can_be(
    ledger: Ledger,
    server: ChatServer,
    shape: Callable[[dict[str, Any]], None],
    max_tokens: int | None,
    tokens: int,
) -> None:
    account, server.shape = Account(Budget()), shape
    lm = server.lm()
    Meter(ledger, account).ask_one(lm, Call(request(lm, max_tokens=max_tokens)))
    assert account.spent == Cost(1, tokens)


def test_a_budget_of_tokens_ends_with_a_provider_that_counts_none(ledger: Ledger, server: ChatServer) -> None:
    server.shape = silent
    lm, account = server.lm(max_tokens=50), Account(Budget(tokens=500))
    metered = Meter(ledger, account, threads=1)
    with pytest.raises(BudgetExhausted, match="tokens to 573, past the budget of 500"):
        metered.ask(lm, [Call(request(lm, max_tokens=50), draw) for draw in range(5)])
    assert (server.count, account.spent.tokens) == (2, 382)


def test_choices_are_bounded_by_the_longest(smollm: dspy.LM, engine: LocalEngine) -> None:
    asked = request(smollm, extensions={"choices": ["no", "yes"]}, max_tokens=512)
    assert usage.bound(smollm, asked, engine, {}) == Cost(1, engine.count_tokens(asked) + 4)
    free = request(smollm, max_tokens=512)
    assert usage.bound(smollm, free, engine, {}) == Cost(1, engine.count_tokens(free) + 512)


@pytest.mark.parametrize("budget", [Budget(tokens=10_000), Budget(dollars=1)])
def test_an_answer_that_nothing_bounds_is_not_asked_for(ledger: Ledger, budget: Budget) -> None:
    lm = simulated(lambda request: "word " * 500)
    with pytest.raises(ConfigError, match=r"can't bound a call of simulated/model that says no max_tokens"):
        Meter(ledger, Account(budget)).ask_one(lm, Call(request(lm)))
    assert asked(lm) == []


def test_a_budget_of_calls_needs_no_bound_of_an_answer(ledger: Ledger) -> None:
    lm, account = simulated(lambda request: "word"), Account(Budget(calls=1, seconds=60))
    Meter(ledger, account).ask_one(lm, Call(request(lm)))
    assert account.spent.calls == 1


def test_an_image_has_no_bound() -> None:
    parts = (*Message.user("What is this?").parts, ImagePart(media_type="image/png", url="http://127.0.0.1/x.png"))
    with pytest.raises(ConfigError, match="can't bound what a prompt with image input takes; budget calls or minutes"):
        usage.most_tokens(Request(model="m", messages=(Message(role="user", parts=parts),)))


def test_tools_and_the_answer_s_schema_are_bounded_with_the_prompt() -> None:
    wide: Any = {"type": "object", "properties": {"x" * 900: {"type": "string"}}}
    messages = (Message.user("Well?"),)
    bare = usage.most_tokens(Request(model="m", messages=messages))
    tool = FunctionTool(name="search", description="Look it up.", parameters=wide)
    schema = Config(response_format={"type": "json_schema", "schema": wide, "name": "x"})
    assert usage.most_tokens(Request(model="m", messages=messages, tools=(tool,))) >= bare + 900
    assert usage.most_tokens(Request(model="m", messages=messages, config=schema)) >= bare + 900


def test_text_beside_other_parts_is_bounded_too() -> None:
    call = ToolCallPart(id="1", name="search", input={"query": "x" * 500})
    parts = (*Message.assistant("I shall look. " * 50).parts, call)
    asked = Request(model="m", messages=(Message.user("Well?"), Message(role="assistant", parts=parts)))
    assert usage.most_tokens(asked) > 14 * 50 + 500
