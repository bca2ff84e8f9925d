"""The endpoints of a served program, asked over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import dspy
import httpx
import pytest

from preceptor import program as artifact
from preceptor.lm.adapter import declare
from preceptor.modules import Generate
from preceptor.serving.settings import Keys, Limits
from preceptor.testing import ChatServer, Faults, asked, prompt, simulated

TOKEN = "a-token-of-the-tests"
Save = Callable[..., Path]
Serve = Callable[..., Any]


class Sync(dspy.Module):
    """A program of the user's own class that can't be awaited, and answers one field more than it declares."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict("text -> label")

    def forward(self, text: str, hint: str | None = None) -> dspy.Prediction:
        if text == "fail":
            raise KeyError(text)
        found = self.predict(text=text)
        return dspy.Prediction(label=f"{found.label} {hint}", length=len(text))


class Blocked:
    """A model that answers once it is let go."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.lm = simulated(self.answer)

    def answer(self, request: Any) -> str:
        assert self.free.wait(60)
        return "mail"


def error(response: httpx.Response) -> tuple[int, str]:
    """Return a refusal's status and code."""
    return response.status_code, response.json()["error"]["code"]


def test_a_row_is_answered_with_what_it_used(save: Save, serve: Serve) -> None:
    path = save()
    running = serve(path)

    response = running.post("/predict", {"text": "Win a prize"})

    told = response.json()
    assert told.pop("seconds") >= 0
    assert told == {
        "answer": {"label": "spam"},
        "route": None,
        "logprobs": None,
        "truncated": False,
        "usage": {"calls": 1, "input_tokens": 14, "output_tokens": 1, "dollars": 0.0},
        "program": running.service.current.digest,
    }
    assert len(response.headers["x-request-id"]) == 16
    assert running.metric("rows_total") == 1
    assert running.metric('tokens_total{direction="input",program="served"}') == 14
    assert running.metric('requests_total{endpoint="/predict",status="200"}') == 1


@pytest.mark.parametrize("outputs", ["label", "label, score: int"])
def test_nothing_of_a_request_is_kept(outputs: str, save: Save, serve: Serve) -> None:
    lm = simulated(lambda request: '{"label": "secret", "score": 3}')
    running = serve(save(Generate(f"text -> {outputs}")), lm)
    assert running.post("/predict", {"text": "secret"}).status_code == 200

    program = running.service.current.program
    assert program.history == program.predict.history == running.service.current.lm.history == lm.history == []
    assert not any("secret" in str(entry) for entry in dspy.clients.base_lm.GLOBAL_HISTORY)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": 3}, "text"),
        ({"text": "a", "other": 1}, "other"),
        ([], None),
        ({"text": "\ud800"}, "text"),
    ],
)
def test_a_row_of_another_form_is_refused_by_the_name_of_its_field(
    body: Any, param: str | None, save: Save, serve: Serve
) -> None:
    headers = {"Content-Type": "application/json"}
    response = serve(save()).client.post("/predict", content=json.dumps(body), headers=headers)
    assert error(response) == (422, "invalid_field")
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("body", [b"{", b"\xff", b'{"text": ' + b"9" * 5000 + b"}", b"[" * 100_000])
def test_what_is_no_json_is_refused(body: bytes, save: Save, serve: Serve) -> None:
    response = serve(save()).client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert error(response) == (400, "no_json")


def test_the_document_describes_fields_as_the_signature_does(save: Save, serve: Serve) -> None:
    fields: dict[str, Any] = {
        "text": (str, dspy.InputField(desc="What came in.")),
        "urgency": (int | None, dspy.InputField()),
        "label": (str, dspy.OutputField(desc="What it is.")),
        "reasons": (list[str], dspy.OutputField()),
    }
    signature = declare(cast("Any", dspy.Signature)(fields, "Sort."))
    lm = simulated(lambda request: '{"label": "spam", "reasons": ["a", "b"]}')
    running = serve(save(Generate(signature)), lm)

    shapes = running.client.get("/openapi.json").json()["components"]["schemas"]

    assert shapes["Inputs"]["properties"]["text"]["description"] == "What came in."
    assert shapes["Inputs"]["required"] == ["text"]
    assert shapes["Outputs"]["properties"]["reasons"]["items"] == {"type": "string"}
    assert "description" not in shapes["Outputs"]["properties"]["reasons"]
    answer = running.post("/predict", {"text": "a"}).json()["answer"]
    assert answer == {"label": "spam", "reasons": ["a", "b"]}
    assert "urgency" not in prompt(asked(lm)[0])


def test_labels_are_an_enumeration(save: Save, serve: Serve) -> None:
    document = serve(save()).client.get("/openapi.json").json()
    assert document["components"]["schemas"]["Outputs"]["properties"]["label"]["enum"] == ["spam", "mail"]
    assert document["components"]["schemas"]["Batch"]["properties"]["rows"]["maxItems"] == 256


def test_a_batch_is_answered_in_order_and_says_which_rows_failed(save: Save, serve: Serve) -> None:
    def answer(request: Any) -> str:
        return "neither" if "broken" in prompt(request) else "spam" if "prize" in prompt(request) else "mail"

    running = serve(save(), simulated(answer), limits=Limits(concurrency=4, batch_rows=50, drain_seconds=1))
    texts = ["prize" if n % 3 == 0 else "broken" if n == 7 else "hello" for n in range(50)]

    told = running.post("/predict/batch", {"rows": [{"text": text} for text in texts]}).json()["answers"]

    labels = [each["answer"]["label"] if "answer" in each else each["error"]["code"] for each in told]
    known = {"prize": "spam", "hello": "mail", "broken": "unreadable_answer"}
    assert labels == [known[text] for text in texts]
    assert error(running.post("/predict/batch", {"rows": [{"text": "a"}] * 51})) == (422, "invalid_field")
    assert error(running.post("/predict/batch", {"rows": []})) == (422, "invalid_field")


def test_what_is_served_is_told_without_the_rows_it_was_tried_on(save: Save, serve: Serve) -> None:
    path = save(probes=[{"inputs": {"text": "private"}, "answer": "mail"}])
    told = serve(path).client.get("/program")

    assert told.json()["instructions"] == {"predict": "Is this spam?"}
    assert told.json()["evidence"] == {}
    assert told.json()["lm"] == "simulated/model"
    assert "private" not in told.text


def test_too_many_requests_are_told_when_to_come_again(save: Save, serve: Serve, eventually: Any) -> None:
    blocked = Blocked()
    running = serve(save(), blocked.lm, limits=Limits(concurrency=1, queue=1, drain_seconds=1))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.post, "/predict", {"text": "a"})
        eventually(lambda: running.service.gate.busy == 1)
        second = pool.submit(running.post, "/predict", {"text": "b"})
        eventually(lambda: running.service.gate.admitted == 2)

        third = running.post("/predict", {"text": "c"})

        assert running.client.get("/readyz").status_code == 200
        assert running.metric("busy") == 1
        blocked.free.set()
        assert [each.result().status_code for each in (first, second)] == [200, 200]
    assert error(third) == (429, "busy")
    assert int(third.headers["retry-after"]) >= 1
    assert running.post("/predict", {"text": "c"}).status_code == 200


def test_an_answer_that_takes_too_long_is_given_up(save: Save, serve: Serve) -> None:
    blocked = Blocked()
    running = serve(save(), blocked.lm, limits=Limits(seconds=1, drain_seconds=1))
    assert error(running.post("/predict", {"text": "a"})) == (504, "timeout")
    assert running.metric('failures_total{code="timeout"}') == 1
    blocked.free.set()
    assert running.service.gate.admitted == 0


@pytest.mark.parametrize("kind", ["server_error", "dropped", "garbage", "unauthorized", "rate_limit_after"])
def test_a_model_that_fails_is_a_bad_gateway_until_it_is_well_again(kind: Any, save: Save, serve: Serve) -> None:
    with ChatServer(
        lambda body: "mail", faults=Faults(kinds=(kind,), share=1.0, retry_after=7), key="sk-12345"
    ) as model:
        running = serve(save(), model.lm(num_retries=0))

        failed = running.post("/predict", {"text": "a"})

        assert error(failed) == (502, "model_failed")
        assert "sk-12345" not in failed.text
        assert model.url not in failed.text
        assert failed.headers.get("retry-after") == ("7" if kind == "rate_limit_after" else None)
        model.inject(None)
        assert running.post("/predict", {"text": "a"}).json()["answer"] == {"label": "mail"}


def test_a_model_server_that_is_gone_is_a_bad_gateway(save: Save, serve: Serve) -> None:
    with ChatServer(lambda body: "mail") as model:
        running = serve(save(), model.lm(num_retries=0))
        assert running.post("/predict", {"text": "a"}).status_code == 200
    assert error(running.post("/predict", {"text": "a"})) == (502, "model_failed")


def test_a_program_of_ones_own_class_runs_in_a_thread_and_is_counted(save: Save, serve: Serve) -> None:
    lm = simulated(lambda request: "[[ ## label ## ]]\nmail\n\n[[ ## completed ## ]]")
    running = serve(save(Sync()), lm, load=lambda path: artifact.load(path, student=Sync()))

    told = running.post("/predict", {"text": "abc", "hint": "x"}).json()

    assert told["answer"] == {"label": "mail x", "length": 3}
    assert told["usage"]["calls"] == 1
    shape = running.client.get("/openapi.json").json()["components"]["schemas"]["Inputs"]
    assert shape["required"] == ["text"]
    failed = running.post("/predict", {"text": "fail"})
    assert error(failed) == (502, "program_failed")
    assert failed.json()["error"]["message"] == "The program failed with KeyError."


def test_a_draining_server_takes_no_more(save: Save, serve: Serve) -> None:
    running = serve(save())
    running.service.drain()
    assert error(running.post("/predict", {"text": "a"})) == (503, "draining")
    assert error(running.client.get("/readyz")) == (503, "not_ready")
    assert running.client.get("/healthz").json() == {"status": "ok"}
    assert running.metric("ready") == 0


def test_paths_and_methods_that_arent_there(save: Save, serve: Serve) -> None:
    client = serve(save()).client
    assert error(client.get("/predict")) == (405, "wrong_method")
    assert error(client.get("/docs")) == (404, "no_such_path")
    assert error(client.post("/route", json={"text": "a"})) == (404, "no_experts")


def test_output_tokens_are_bounded(save: Save, serve: Serve) -> None:
    lm = simulated(lambda request: "mail")
    serve(save(), lm, limits=Limits(output_tokens=9, drain_seconds=1)).post("/predict", {"text": "a"})
    assert [request.config.max_tokens for request in asked(lm)] == [9]


def test_answers_that_json_cant_hold_are_still_json(save: Save, serve: Serve) -> None:
    lm = simulated(lambda request: "nan" if "number" in prompt(request) else "half \ud83d")
    numbers = serve(save(Generate("text -> size: float"), "numbers"), lm)
    texts = serve(save(Generate("text -> size"), "texts"), lm)
    assert numbers.post("/predict", {"text": "number"}).json()["answer"] == {"size": None}
    assert texts.post("/predict", {"text": "x"}).json()["answer"] == {"size": "half"}


def test_the_document_says_that_a_token_is_needed(save: Save, serve: Serve) -> None:
    running = serve(save(), keys=Keys.of([TOKEN]))
    document = running.client.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    assert document["security"] == [{"token": []}]
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert "security" not in document["paths"]["/predict"]["post"]
