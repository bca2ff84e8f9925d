"""What an OpenAI-compatible server sends: HTTP/1.1 responses, chat completions, server-sent events."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final, TypeAlias

Body: TypeAlias = dict[str, Any]

END_OF_HEAD: Final = b"\r\n\r\n"

_UNSENT: Final = 16
"""Bytes that a response promises and doesn't send, where it is to be cut short."""


def response(
    status: int, content: bytes, *, kind: str = "application/json", headers: Mapping[str, str] | None = None
) -> bytes:
    """Return a whole response, head and body."""
    return _head(status, {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}) + content


def answered(reply: Body, *, is_cut: bool = False) -> bytes:
    """Return a response that holds a completion; one that is cut promises more than it sends."""
    content = json.dumps(reply).encode()
    promised = len(content) + (_UNSENT if is_cut else 0)
    return response(200, content, headers={"Content-Length": str(promised)})


def streamed(reply: Body, *, has_usage: bool, is_cut: bool = False) -> bytes:
    """Return a response that holds a completion as server-sent events; one that is cut lacks its end."""
    events = [f"data: {json.dumps(event)}\n\n".encode() for event in _events(reply, has_usage=has_usage)]
    last = [] if is_cut else [b"data: [DONE]\n\n", b""]
    head = _head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*events, *last])


def refused(
    status: int, message: str, kind: str, code: str | None, *, headers: Mapping[str, str] | None = None
) -> bytes:
    """Return a response that holds an error in OpenAI's form."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return response(status, json.dumps({"error": error}).encode(), headers=headers)


def completion(body: Body, text: str, finish_reason: str) -> Body:
    """Return the completion of a posted body; tokens are counted as words."""
    given = sum(len(_text(message.get("content")).split()) for message in body.get("messages", []))
    made = len(text.split())
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": body.get("model", ""),
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made},
    }


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode("latin-1") + END_OF_HEAD


def _events(reply: Body, *, has_usage: bool) -> Iterator[Body]:
    """Yield the events of a completion: its text word by word, why it ended, and what it used if asked for."""
    same = {"id": reply["id"], "object": "chat.completion.chunk", "created": 0, "model": reply["model"]}
    if "choices" not in reply:
        yield same
        return
    [choice] = reply["choices"]
    for delta in _deltas(choice["message"]["content"]):
        yield {**same, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**same, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    if has_usage:
        yield {**same, "choices": [], "usage": reply["usage"]}


def _deltas(text: str) -> Iterable[Body]:
    return [{"role": "assistant", "content": ""}, *({"content": word} for word in re.findall(r"\s*\S+|\s+", text))]


def _text(content: Any) -> str:
    """Return the text of a message's content, which is a text or a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""
