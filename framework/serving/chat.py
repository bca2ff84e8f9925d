"""OpenAI's chat protocol, so that its clients can ask a compiled program.

The program's own instructions answer, so system messages and earlier turns aren't read, nor are settings of
the model such as `temperature`. The last user message is the input, in JSON if that is a list or a record; where a
program takes several fields it is a JSON object of them. A program of one output answers with its text, of several
with a JSON object.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response, StreamingResponse

from preceptor.serving import fields
from preceptor.serving.door import TOLD
from preceptor.serving.gone import while_there
from preceptor.serving.model import Tally
from preceptor.serving.refused import Refused
from preceptor.serving.service import Answer, Served, Service
from preceptor.serving.shapes import written
from preceptor.values import is_json

_STREAM: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_END: Final = b"data: [DONE]\n\n"


class Part(BaseModel):
    """A part of a message."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        """Its text.

        Raises:
            Refused: If a part of it isn't text.
        """
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        if any(part.type != "text" or part.text is None for part in self.content):
            raise Refused(400, "A message may have parts of type text only.", "unsupported", param="messages")
        return "".join(part.text or "" for part in self.content)


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    include_usage: bool | None = False


class Format(BaseModel):
    """How an answer is written."""

    type: Literal["text", "json_object"]


class Asked(BaseModel):
    """A request for a completion."""

    model_config = ConfigDict(extra="ignore")

    model: str = Field(description="As GET /v1/models names it.")
    messages: list[Message] = Field(min_length=1, description="The last user message is the program's input.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: Literal[1] | None = None
    response_format: Format | None = None
    tools: None = None
    functions: None = None
    logprobs: Literal[False] | None = None

    @property
    def has_usage(self) -> bool:
        """True if the last chunk of a stream is to say what was used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def tally(self) -> Tally:
        """Return what counts its calls."""
        bounds = [bound for bound in (self.max_tokens, self.max_completion_tokens) if bound is not None]
        return Tally(min(bounds, default=None))


def add_to(app: FastAPI, service: Service, said: dict[int | str, dict[str, Any]]) -> None:
    """Add the endpoints; `said` describes their refusals."""
    began = int(time.time())

    async def models() -> dict[str, Any]:
        """List the one program there is."""
        one = {"id": service.current.name, "object": "model", "created": began, "owned_by": "preceptor"}
        return {"object": "list", "data": [one]}

    async def complete(request: Request, asked: Asked) -> Response:
        """Answer as OpenAI's chat completions do; see the program's fields in GET /program."""
        start, program = time.perf_counter(), service.current
        _refuse_other_model(asked.model, program)
        inputs = inputs_of(asked, program)
        request.scope[TOLD].update(service.shown(inputs=inputs))
        head = _head(program)
        if asked.stream:
            answering = _Answering(service, inputs, asked, start)
            async with while_there(request, service.metrics):
                await answering.begun()
            told = request.scope[TOLD]
            return StreamingResponse(
                _streamed(answering, asked, head, told), media_type="text/event-stream", headers=_STREAM
            )
        with service.gate.admitted_request():
            async with while_there(request, service.metrics):
                answer = await service.answer(inputs, asked.tally(), starting=start)
        request.scope[TOLD].update(_noted(service, answer))
        return Response(written(_completion(head, answer, asked)), media_type="application/json")

    app.add_api_route("/v1/models", models, methods=["GET"], responses={401: said[401], 421: said[421]})
    app.add_api_route("/v1/chat/completions", complete, methods=["POST"], response_model=dict[str, Any], responses=said)


def inputs_of(asked: Asked, program: Served) -> dict[str, Any]:
    """Return the program's inputs: the last user message, as JSON where that is what a field holds, or its fields.

    Raises:
        Refused: If there is no user message, or it isn't what the program takes.
    """
    last = next((message for message in reversed(asked.messages) if message.role == "user"), None)
    if last is None:
        raise Refused(400, "messages: there is none of role user.", "invalid_field", param="messages")
    names, text = list(program.inputs.model_fields), last.text
    is_text = len(names) == 1 and not is_json(program.inputs.model_fields[names[0]].annotation)
    found = text if is_text else _parsed(text)
    given = {names[0]: found} if len(names) == 1 else found
    try:
        return fields.given(program.inputs.model_validate(given))
    except ValidationError as error:
        wanted = f"a JSON object of {', '.join(names)}" if len(names) > 1 else f"the program's {names[0]}"
        raise Refused(
            400,
            f"The last user message must be {wanted}. {fields.complaint(error)}.",
            "invalid_field",
            param="messages",
        ) from None


def _parsed(text: str) -> Any:
    """Return what a text says in JSON, None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def text_of(outputs: Mapping[str, Any], *, as_json: bool) -> str:
    """Return outputs as a message's text."""
    values = list(outputs.values())
    if len(values) == 1 and not as_json:
        return values[0] if isinstance(values[0], str) else written(values[0]).decode()
    return written(dict(outputs)).decode()


class _Answering:
    """A streamed answer on its way: its text piece by piece where the model tells it so, else at once.

    `begun` returns when there is something to send, so that a request which fails before that gets a status
    of its own.
    """

    def __init__(self, service: Service, inputs: Mapping[str, Any], asked: Asked, start: float) -> None:
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self.service = service
        self._has_text = False
        self._as_json = asked.response_format is not None and asked.response_format.type == "json_object"
        tally = asked.tally()
        if service.current.writes_text and not self._as_json:
            tally.on_text = self._pieces.put_nowait
        self._task = asyncio.create_task(self._run(inputs, tally, start))
        self._first: str | None = None

    async def _run(self, inputs: Mapping[str, Any], tally: Tally, start: float) -> Answer:
        try:
            with self.service.gate.admitted_request():
                return await self.service.answer(inputs, tally, starting=start)
        finally:
            self._pieces.put_nowait(None)

    async def begun(self) -> None:
        """Wait for the first piece.

        Raises:
            Refused: If there won't be any.
        """
        try:
            self._first = await self._pieces.get()
            if self._first is None:
                await self._task
        except asyncio.CancelledError:
            self._task.cancel()
            raise

    async def pieces(self) -> AsyncGenerator[str]:
        """Yield the text's pieces."""
        piece = self._first
        if piece is None:
            yield text_of((await self._task).outputs, as_json=self._as_json)
        while piece is not None:
            yield piece
            piece = await self._pieces.get()

    async def answer(self) -> Answer:
        """Return the whole answer.

        Raises:
            Refused: If the model failed in the midst of it.
        """
        return await self._task

    def leave(self) -> None:
        """Stop asking, if that isn't over; nobody listens any longer."""
        if self._task.cancel():
            self.service.metrics.failures.labels("client_gone").inc()


async def _streamed(
    answering: _Answering, asked: Asked, head: Mapping[str, Any], told: dict[str, Any]
) -> AsyncGenerator[bytes]:
    """Yield the events of a streamed answer."""
    common = {**head, "object": "chat.completion.chunk", **({"usage": None} if asked.has_usage else {})}
    try:
        yield _chunk(common, {"role": "assistant", "content": ""})
        async for piece in answering.pieces():
            yield _chunk(common, {"content": piece})
        answer = await answering.answer()
        told.update(_noted(answering.service, answer))
        yield _chunk(common, {}, _reason(answer))
        if asked.has_usage:
            yield _event({**common, "choices": [], "usage": _usage(answer.tally)})
        yield _END
    except Refused as refused:
        told["code"] = refused.code
        yield _event(refused.body)
    finally:
        answering.leave()


def _chunk(common: Mapping[str, Any], delta: Mapping[str, Any], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return _event({**common, "choices": [choice]})


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + written(value) + b"\n\n"


def _head(program: Served) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": program.name,
        "system_fingerprint": f"fp_{program.digest}",
    }


def _completion(head: Mapping[str, Any], answer: Answer, asked: Asked) -> dict[str, Any]:
    as_json = asked.response_format is not None and asked.response_format.type == "json_object"
    message = {"role": "assistant", "content": text_of(answer.outputs, as_json=as_json), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(answer)}
    return {**head, "choices": [choice], "usage": _usage(answer.tally)}


def _noted(service: Service, answer: Answer) -> dict[str, Any]:
    return {"program": answer.digest, **_usage(answer.tally), **service.shown(outputs=answer.outputs)}


def _reason(answer: Answer) -> str:
    return "length" if answer.tally.was_cut else "stop"


def _usage(tally: Tally) -> dict[str, int]:
    return {
        "prompt_tokens": tally.input_tokens,
        "completion_tokens": tally.output_tokens,
        "total_tokens": tally.input_tokens + tally.output_tokens,
    }


def _refuse_other_model(name: str, program: Served) -> None:
    if name != program.name:
        raise Refused(
            404,
            f"There is no model {name[:80]!r}; this server has {program.name!r}.",
            "model_not_found",
            param="model",
        )
