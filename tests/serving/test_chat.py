"""OpenAI's protocol, spoken by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from preceptor.modules import Generate
from preceptor.serving.settings import Keys, Limits
from preceptor.testing import ChatServer, Faults, asked, simulated

TOKEN = "a-token-of-the-tests"
Save = Callable[..., Path]
Serve = Callable[..., Any]


def client(running: Any, key: str = TOKEN) -> openai.OpenAI:
    """Return OpenAI's client of a server."""
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0, timeout=60)


def said(text: Any) -> list[Any]:
    """Return a conversation that ends with a user's text."""
    told = {"role": "system", "content": "Be brief."}
    return [
        told,
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": text},
    ]


def test_a_completion_is_the_programs_answer(save: Save, serve: Serve) -> None:
    running = serve(save(), keys=Keys.of([TOKEN]))
    with client(running) as openai_client:
        assert [model.id for model in openai_client.models.list()] == ["program"]
        made = openai_client.chat.completions.create(model="program", messages=said("win a prize"), temperature=1)
        parts = openai_client.chat.completions.create(
            model="program", messages=said([{"type": "text", "text": "win a "}, {"type": "text", "text": "prize"}])
        )
    [choice] = made.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "spam", "stop")
    assert made.object == "chat.completion"
    assert made.model == "program"
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (14, 1, 15)
    assert parts.choices[0].message.content == "spam"


def test_a_stream_ends_with_a_reason_and_what_it_used(save: Save, serve: Serve) -> None:
    running = serve(save())
    with client(running) as openai_client:
        chunks = list(
            openai_client.chat.completions.create(
                model="program", messages=said("prize"), stream=True, stream_options={"include_usage": True}
            )
        )
    *pieces, last = chunks
    assert [piece.choices[0].delta.content for piece in pieces] == ["", "spam", None]
    assert [piece.choices[0].finish_reason for piece in pieces] == [None, None, "stop"]
    assert pieces[0].choices[0].delta.role == "assistant"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 1
    assert len({chunk.id for chunk in chunks}) == 1


def test_text_is_streamed_as_the_model_writes_it(save: Save, serve: Serve) -> None:
    with ChatServer(lambda body: "One two three.") as model:
        running = serve(save(Generate("text -> summary", "Sum it up.")), model.lm())
        with client(running) as openai_client:
            stream = openai_client.chat.completions.create(model="program", messages=said("a"), stream=True)
            pieces = [chunk.choices[0].delta.content for chunk in stream]
    assert pieces == ["", "One", " two", " three.", None]
    assert model.requests[0].body["stream"] is True
    assert running.metric('tokens_total{direction="output",program="served"}') == 3


def test_a_stream_that_breaks_off_says_so(save: Save, serve: Serve) -> None:
    with ChatServer(lambda body: "One two three.", faults=Faults(kinds=("cut",), share=1.0)) as model:
        running = serve(save(Generate("text -> summary", "Sum it up.")), model.lm(num_retries=0))
        with client(running) as openai_client:
            stream = openai_client.chat.completions.create(model="program", messages=said("a"), stream=True)
            with pytest.raises(openai.APIError, match="The model failed"):
                list(stream)
        assert running.service.gate.admitted == 0


def test_what_fails_before_the_first_word_has_a_status_of_its_own(save: Save, serve: Serve) -> None:
    with ChatServer(lambda body: "x", faults=Faults(kinds=("server_error",), share=1.0)) as model:
        running = serve(save(Generate("text -> summary", "Sum it up.")), model.lm(num_retries=0))
        with client(running) as openai_client, pytest.raises(openai.InternalServerError) as caught:
            openai_client.chat.completions.create(model="program", messages=said("a"), stream=True)
    assert caught.value.status_code == 502
    assert caught.value.code == "model_failed"


def test_several_fields_come_as_json_and_go_as_json(save: Save, serve: Serve) -> None:
    lm = simulated(lambda request: '{"label": "spam", "score": 3}')
    running = serve(save(Generate("subject, body -> label, score: int")), lm)
    with client(running) as openai_client:
        made = openai_client.chat.completions.create(
            model="program", messages=said('{"subject": "Win", "body": "a prize"}')
        )
        for wrong in ("just text", '{"subject": "Win"}', "[1]"):
            with pytest.raises(openai.BadRequestError, match="must be a JSON object of subject, body"):
                openai_client.chat.completions.create(model="program", messages=said(wrong))
    assert json.loads(made.choices[0].message.content or "") == {"label": "spam", "score": 3}


def test_a_list_comes_as_json_and_only_the_last_message_is_read(save: Save, serve: Serve) -> None:
    lm = simulated(lambda request: "two" if "egg" in (request.messages[-1].text or "") else "none")
    running = serve(save(Generate("items: list[str] -> count")), lm)
    picture = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
    with client(running) as openai_client:
        earlier: Any = [{"role": "user", "content": [picture]}, *said('["milk", "eggs"]')]
        made = openai_client.chat.completions.create(model="program", messages=earlier)
        assert made.choices[0].message.content == "two"
        with pytest.raises(openai.BadRequestError, match="must be the program's items"):
            openai_client.chat.completions.create(model="program", messages=said("milk, eggs"))


def test_what_was_asked_in_a_chat_is_logged_where_that_is_wanted(
    save: Save, serve: Serve, logged: list[dict[str, Any]], eventually: Any
) -> None:
    running = serve(save(), logs_inputs=True)
    with client(running) as openai_client:
        openai_client.chat.completions.create(model="program", messages=said("win a prize"))
        list(openai_client.chat.completions.create(model="program", messages=said("a prize"), stream=True))
    eventually(lambda: len(logged) == 2)
    running.post("/predict/batch", {"rows": [{"text": "prize"}, {"text": "lunch"}]})
    eventually(lambda: len(logged) == 3)
    assert [(line["inputs"], line["outputs"]) for line in logged] == [
        ({"text": "win a prize"}, {"label": "spam"}),
        ({"text": "a prize"}, {"label": "spam"}),
        ([{"text": "prize"}, {"text": "lunch"}], [{"label": "spam"}, {"label": "mail"}]),
    ]


def test_a_json_object_can_be_asked_for(save: Save, serve: Serve) -> None:
    with client(serve(save())) as openai_client:
        for stream in (False, True):
            made: Any = openai_client.chat.completions.create(
                model="program", messages=said("prize"), response_format={"type": "json_object"}, stream=stream
            )
            text = (
                "".join(each.choices[0].delta.content or "" for each in made)
                if stream
                else made.choices[0].message.content
            )
            assert text == '{"label":"spam"}'


def test_a_completion_is_cut_at_the_tokens_that_were_asked_for(save: Save, serve: Serve) -> None:
    lm = simulated(lambda request: "mail")
    running = serve(save(), lm, limits=Limits(output_tokens=20, drain_seconds=1))
    with client(running) as openai_client:
        for bounds in ({"max_tokens": 5}, {"max_completion_tokens": 6}, {"max_tokens": 500}, {}):
            create: Any = openai_client.chat.completions.create
            create(model="program", messages=said("a"), **bounds)
    assert [request.config.max_tokens for request in asked(lm)] == [5, 6, 20, 20]


def test_an_answer_that_was_cut_off_says_so(save: Save, serve: Serve) -> None:
    with ChatServer(lambda body: "One two three.", faults=Faults(kinds=("truncated",), share=1.0)) as model:
        running = serve(save(Generate("text -> summary", "Sum it up.")), model.lm())
        with client(running) as openai_client:
            made = openai_client.chat.completions.create(model="program", messages=said("a"))
    assert made.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.type"),
    ],
)
def test_what_a_program_cant_do_is_refused_rather_than_ignored(
    changed: dict[str, Any], param: str, save: Save, serve: Serve
) -> None:
    with client(serve(save())) as openai_client:
        create: Any = openai_client.chat.completions.create
        with pytest.raises(openai.BadRequestError) as caught:
            create(**{"model": "program", "messages": said("a"), **changed})
    assert caught.value.param == param


def test_another_model_isnt_there_and_a_wrong_key_doesnt_open(save: Save, serve: Serve) -> None:
    running = serve(save(), keys=Keys.of([TOKEN]))
    with client(running) as known, pytest.raises(openai.NotFoundError, match="this server has 'program'"):
        known.chat.completions.create(model="gpt-4o", messages=said("a"))
    with client(running, "wrong") as unknown, pytest.raises(openai.AuthenticationError):
        unknown.chat.completions.create(model="program", messages=said("a"))
