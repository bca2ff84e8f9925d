"""Changing the served program for another, and running one in its shadow."""

from __future__ import annotations

import asyncio
import math
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import httpx
import pydantic
import pytest

from preceptor import load
from preceptor import program as artifact
from preceptor.errors import ArtifactError, ConfigError
from preceptor.lm.adapter import declare
from preceptor.lm.embedding import embedder_of
from preceptor.modules import Classify, Experts, Generate
from preceptor.regions import divided
from preceptor.serving.service import Service, Source
from preceptor.serving.settings import Keys, Limits
from preceptor.testing import asked as asked_of
from preceptor.testing import prompt, simulated, system

SIGNATURE = "text -> label: Literal['spam', 'mail']"
TOKEN = "a-token-of-the-tests"
PETS = [f"My {animal} {does}." for animal in ("cat", "dog", "kitten", "puppy") for does in ("sleeps", "barks", "eats")]
TAXES = [f"The {paper} is {state}." for paper in ("tax return", "invoice", "tax bill") for state in ("due", "paid")]
Save = Callable[..., Path]
Serve = Callable[..., Any]


def by_instruction(request: Any) -> str:
    """Answer "spam" if the instruction says so."""
    return "spam" if "Spam!" in system(request) else "mail"


def headers() -> dict[str, str]:
    """Return the header that opens a server."""
    return {"Authorization": f"Bearer {TOKEN}"}


def reload(running: Any) -> httpx.Response:
    """Ask for a hot reload."""
    response: httpx.Response = running.client.post("/admin/reload", headers=headers())
    return response


def asked(running: Any) -> str:
    """Return the label of a row."""
    response = running.post("/predict", {"text": "a"}, headers=headers())
    return str(response.json()["answer"]["label"])


def test_a_program_is_replaced_while_it_is_served_without_one_failed_request(save: Save, serve: Serve) -> None:
    running = serve(save(), simulated(by_instruction), keys=Keys.of([TOKEN]))
    before = running.service.current.digest
    ends = threading.Event()

    def ask() -> set[str]:
        found = set[str]()
        while not ends.is_set():
            found.add(asked(running))
        return found

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask) for _ in range(4)]
        try:
            save(Classify(SIGNATURE, "Spam!"))
            told = reload(running).json()
            assert asked(running) == "spam"
        finally:
            ends.set()
        assert all(client.result() <= {"mail", "spam"} for client in clients)
    assert told == {"before": before, "serving": running.service.current.digest, "changed": True}
    assert running.service.metrics.text().count(b"preceptor_program{") == 1
    assert reload(running).json()["changed"] is False


def test_a_bad_program_isnt_put_in_place(save: Save, serve: Serve) -> None:
    path = save()
    running = serve(path, simulated(by_instruction), keys=Keys.of([TOKEN]))

    save(Classify(SIGNATURE, "Spam!"))
    (path / "program.json").write_bytes((path / "program.json").read_bytes().replace(b"Spam!", b"Altered"))
    altered = reload(running)
    save(Classify("text -> label: Literal['spam', 'other']", "Spam!"))
    other = reload(running)

    assert (altered.status_code, other.status_code) == (409, 409)
    assert "was altered since it was saved" in altered.json()["error"]["message"]
    assert "has other outputs than the served program" in other.json()["error"]["message"]
    assert asked(running) == "mail"
    assert b'preceptor_reloads_total{outcome="refused"} 2.0' in running.service.metrics.text()


def test_a_program_that_is_replaced_while_it_is_read_isnt_served(save: Save) -> None:
    def switching(path: Path) -> dspy.Module:
        loaded = load(path)
        save(Classify(SIGNATURE, "Spam!"))
        return loaded

    source = Source(save(), lm=lambda name: simulated(by_instruction), load=switching)
    with pytest.raises(ArtifactError, match=r"program was replaced while it was read; load it again\.$"):
        source.served(9)
    assert source.served(9).artifact.instructions == {"predict": "Spam!"}


def test_a_link_keeps_its_name_for_clients_when_it_is_switched_to_another_program(
    save: Save, serve: Serve, tmp_path: Path
) -> None:
    current = tmp_path / "current"
    current.symlink_to(save(name="v1"))
    running = serve(current, simulated(by_instruction), keys=Keys.of([TOKEN]))
    body = {"model": "current", "messages": [{"role": "user", "content": "a"}]}
    answers = list[str]()
    for version in ("v1", "v2"):
        assert [each["id"] for each in running.client.get("/v1/models", headers=headers()).json()["data"]] == [
            "current"
        ]
        response = running.post("/v1/chat/completions", body, headers=headers())
        answers.append(response.json()["choices"][0]["message"]["content"])
        if version == "v1":
            (tmp_path / "next").symlink_to(save(Classify(SIGNATURE, "Spam!"), "v2"))
            (tmp_path / "next").rename(current)
            assert reload(running).json()["changed"] is True
    assert answers == ["mail", "spam"]


class Shouting(Classify):
    """Overrides `forward`, and inherits `aforward`."""

    def forward(self, **inputs: Any) -> Any:
        found = super().forward(**inputs)
        return dspy.Prediction(label=found.label.upper())


class ShoutingBoth(Shouting):
    """Overrides both."""

    async def aforward(self, **inputs: Any) -> Any:
        found = await super().aforward(**inputs)
        return dspy.Prediction(label=f"{found.label}!")


@pytest.mark.parametrize(("kind", "label"), [(Shouting, "MAIL"), (ShoutingBoth, "mail!"), (Classify, "mail")])
def test_what_a_subclass_overrides_is_served(save: Save, tmp_path: Path, kind: Any, label: str) -> None:
    def made() -> Any:
        return kind(SIGNATURE, "Is this spam?")

    source = Source(
        save(made()), lm=lambda name: simulated(by_instruction), load=lambda path: load(path, student=made())
    )

    async def answer() -> Any:
        return (await Service(source).answer({"text": "a"})).outputs["label"]

    assert asyncio.run(answer()) == label


class Twofold(dspy.Module):
    """Two predictors with a model of their own, one of them frozen, and one without."""

    def __init__(self, own: dspy.LM) -> None:
        super().__init__()
        self.first, self.second, self.last = (Classify(SIGNATURE, "Is this spam?") for _ in range(3))
        self.first.predict.lm = self.second.predict.lm = own
        self.first._compiled = True

    def forward(self, text: str) -> Any:
        self.first(text=text)
        self.second(text=text)
        return self.last(text=text)


class Awaited(Twofold):
    """The same, awaited."""

    async def aforward(self, text: str) -> Any:
        await self.first.acall(text=text)
        await self.second.acall(text=text)
        return await self.last.acall(text=text)


@pytest.mark.parametrize("kind", [Twofold, Awaited])
def test_a_predictors_own_model_is_counted_and_bounded_too(save: Save, serve: Serve, kind: Any) -> None:
    own, lm = simulated(by_instruction, name="own"), simulated(by_instruction)
    limits = Limits(output_tokens=9, drain_seconds=1)
    running = serve(save(kind(own)), lm, limits=limits, load=lambda path: load(path, student=kind(own)))

    told = running.post("/predict", {"text": "a"}).json()

    assert (told["answer"], told["usage"]["calls"]) == ({"label": "mail"}, 3)
    assert (told["usage"]["input_tokens"], told["usage"]["output_tokens"]) == (36, 3)
    assert [request.config.max_tokens for request in (*asked_of(own), *asked_of(lm))] == [9, 9, 9]


class Legacy(dspy.BaseLM):
    """A model of DSPy's older kind."""


def test_a_model_that_cant_be_counted_isnt_served(save: Save) -> None:
    own: Any = Legacy("legacy")
    with pytest.raises(ConfigError, match=r"^The model of the predictor first\.predict is a Legacy, whose calls"):
        Service(Source(save(Twofold(own)), lm=lambda name: own, load=lambda path: load(path, student=Twofold(own))))


class AwaitedOnly(dspy.Module):
    """Has no `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = Classify(SIGNATURE, "Is this spam?")

    async def aforward(self, text: str) -> Any:
        return await self.sort.acall(text=text)


def test_a_program_that_can_only_be_awaited_is_served(save: Save, serve: Serve) -> None:
    running = serve(save(AwaitedOnly()), load=lambda path: load(path, student=AwaitedOnly()))

    assert running.post("/predict", {"text": "a prize"}).json()["answer"] == {"label": "spam"}
    assert running.post("/predict", {"texts": "a prize"}).status_code == 422


class Critic(dspy.Module):
    """Answers with the fields of two predictors, and with one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = Classify(SIGNATURE, "Is this spam?")
        self.check = Classify("text, label -> is_fine: Literal['spam', 'mail']", "Check.")

    def forward(self, text: str) -> Any:
        sorted_as = self.sort(text=text)
        checked = self.check(text=text, label=sorted_as.label)
        told = {"logprobs": {"spam": -1.0, "mail": -2.0}, "route": "by hand"}
        return dspy.Prediction(label=sorted_as.label, is_fine=checked.is_fine, sources=["a", "b"], **told)


def best_critic() -> dspy.Module:
    return dspy.BestOfN(Critic(), N=1, reward_fn=lambda given, answer: 1.0, threshold=1.0)


@pytest.mark.parametrize("make", [Critic, best_critic])
def test_every_field_that_a_class_of_the_users_returns_is_its_answer(save: Save, serve: Serve, make: Any) -> None:
    running = serve(save(make()), load=lambda path: load(path, student=make()))

    answer = running.post("/predict", {"text": "a prize"}).json()["answer"]

    assert answer == {"label": "spam", "is_fine": "spam", "sources": ["a", "b"]}


@pytest.mark.parametrize("kind", [dspy.BestOfN, dspy.Refine])
def test_a_program_that_picks_the_best_of_several_answers_is_served(save: Save, serve: Serve, kind: Any) -> None:
    def picking() -> Any:
        return kind(Classify(SIGNATURE, "Is this spam?"), N=2, reward_fn=lambda given, answer: 1.0, threshold=1.0)

    running = serve(save(picking()), load=lambda path: load(path, student=picking()))

    for text, label in (("a prize", "spam"), ("lunch", "mail")):
        assert running.post("/predict", {"text": text}).json()["answer"] == {"label": label}


class Tracing(dspy.Module):
    """Says how many answers there are in the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = Classify(SIGNATURE, "Is this spam?")

    def forward(self, text: str) -> Any:
        return dspy.Prediction(label=f"{self.sort(text=text).label} {len(dspy.settings.trace)}")


def test_a_trace_holds_the_answers_of_one_request(save: Save, serve: Serve) -> None:
    running = serve(save(Tracing()), load=lambda path: load(path, student=Tracing()))

    told = [running.post("/predict", {"text": text}).json()["answer"] for text in ("a prize", "lunch", "a prize")]

    assert told == [{"label": "spam 1"}, {"label": "mail 1"}, {"label": "spam 1"}]


@pytest.mark.parametrize("kind", [Twofold, Awaited])
def test_the_key_of_a_predictors_own_model_stays_out_of_a_refusal(save: Save, serve: Serve, kind: Any) -> None:
    def refusing(request: Any) -> str:
        raise dspy.LMServerError("no such key: opensesame")

    own = simulated(refusing, name="own")
    own.kwargs["api_key"] = "opensesame"
    running = serve(save(kind(own)), load=lambda path: load(path, student=kind(own)))

    told = running.post("/predict", {"text": "a"})

    assert (told.status_code, told.json()["error"]["code"]) == (502, "model_failed")
    assert "no such key" in told.text
    assert "sesame" not in told.text


def test_a_server_without_a_token_isnt_reloaded_over_http(save: Save, serve: Serve) -> None:
    response = serve(save()).client.post("/admin/reload")
    assert (response.status_code, response.json()["error"]["code"]) == (403, "no_keys")


def test_a_shadow_answers_a_sample_and_its_agreement_is_counted(save: Save, serve: Serve, eventually: Any) -> None:
    def answer(request: Any) -> str:
        if "Shadow." not in system(request):
            return "mail"
        return "neither" if "broken" in prompt(request) else "spam" if "prize" in prompt(request) else "mail"

    lm = simulated(answer)
    other = Source(save(Classify(SIGNATURE, "Shadow."), "other"), lm=lambda name: lm)
    running = serve(save(), lm, shadow=other, share=1.0, limits=Limits(drain_seconds=1))
    for text in ("prize", "broken", "hello", "good day"):
        assert running.post("/predict", {"text": text}).json()["answer"] == {"label": "mail"}
        rows = running.metric("rows_total")
        eventually(
            lambda rows=rows: sum(running.metric(f'shadow_total{{outcome="{each}"}}') for each in OUTCOMES) == rows
        )
    assert [running.metric(f'shadow_total{{outcome="{each}"}}') for each in OUTCOMES] == [2, 1, 1]
    assert running.metric('model_calls_total{program="served"}') == 4
    assert running.metric('model_calls_total{program="shadow"}') == 4


OUTCOMES = ("agrees", "differs", "failed")


def test_a_shadow_sees_its_share_and_never_holds_up_the_others(save: Save, serve: Serve) -> None:
    free = threading.Event()

    def answer(request: Any) -> str:
        assert "Shadow." not in system(request) or free.wait(60)
        return "mail"

    lm = simulated(answer)
    other = Source(save(Classify(SIGNATURE, "Shadow."), "other"), lm=lambda name: lm)
    running = serve(save(), lm, shadow=other, share=0.5, rng=random.Random(0))
    for _ in range(40):
        assert running.post("/predict", {"text": "a"}).status_code == 200
    drawn = random.Random(0)
    followed = sum(drawn.random() < 0.5 for _ in range(40))
    assert running.metric('shadow_total{outcome="left out"}') == followed - 8
    free.set()


def test_a_shadow_of_other_fields_is_refused(save: Save) -> None:
    lm = simulated(by_instruction)
    other = Source(save(Generate("text -> summary"), "other"), lm=lambda name: lm)
    with pytest.raises(ArtifactError, match="has other outputs than the served program"):
        Service(Source(save(), lm=lambda name: lm), shadow=other)


def test_a_shadow_whose_records_have_other_fields_is_refused(tmp_path: Path) -> None:
    def told(kind: Any) -> Source:
        path = tmp_path / kind.__module__ / "program"
        student = dspy.Predict(declare("text -> place").with_updated_fields("place", type_=kind))
        artifact.save(student, path, evidence={}, lm="simulated/model", replace=True)
        lm = simulated(by_instruction)
        return Source(path, lm=lambda name: lm, load=lambda path: artifact.load(path, student=student))

    make: Any = pydantic.create_model
    one, same, other = (
        make("Place", __module__=name, __doc__=name, **fields)
        for name, fields in (("a", {"city": str}), ("b", {"city": str}), ("c", {"city": str, "code": int}))
    )
    Service(told(one), shadow=told(same))
    with pytest.raises(ArtifactError, match="has other outputs than the served program"):
        Service(told(one), shadow=told(other))


def test_programs_of_one_model_share_it(save: Save) -> None:
    made = list[str]()

    def lm(name: str) -> dspy.LM:
        made.append(name)
        return simulated(by_instruction)

    source = Source(save(), lm=lm)
    first, second = source.served(10), source.served(10)
    assert made == ["simulated/model"]
    assert first.lm is second.lm
    assert first.digest == second.digest


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_manifest_that_is_no_file_of_its_own_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    (tmp_path / "program").mkdir()
    manifest = tmp_path / "program" / "manifest.json"
    os.mkfifo(manifest) if kind == "pipe" else manifest.symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="is no regular file" if kind == "pipe" else "is a symbolic link"):
        Service(Source(tmp_path / "program", lm=lambda name: simulated(by_instruction)))


def test_a_program_that_isnt_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is no saved program: it has no manifest\.json"):
        Service(Source(tmp_path / "nothing", lm=lambda name: simulated(by_instruction)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"queue": -1},
        {"seconds": 0.0},
        {"output_tokens": 0},
        {"drain_seconds": -1.0},
        {"drain_seconds": math.inf},
    ],
)
def test_limits_that_let_nobody_in_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"A server needs {next(iter(wrong))}"):
        Limits(**wrong)


def experts() -> Experts:
    """Return a program of two regions, the first with an expert of its own."""
    embedder = embedder_of("all-minilm-l6-v2")
    router = divided(embedder([*PETS, *TAXES]), 2, least_rows=2, seed=0).router(embedder, ("text",))
    return Experts(Classify(SIGNATURE, "Default."), {"region 1": Classify(SIGNATURE, "Spam!")}, router)


def test_several_experts_may_take_the_place_of_one_prompt_and_the_other_way_round(save: Save, serve: Serve) -> None:
    running = serve(save(), simulated(by_instruction), keys=Keys.of([TOKEN]))
    assert "/route" in running.client.get("/openapi.json", headers=headers()).json()["paths"]

    def places() -> list[Any]:
        asked = running.post("/predict", {"text": "My puppy barks."}, headers=headers()).json()
        placed = running.post("/route", {"text": "My puppy barks."}, headers=headers())
        told = placed.json()["expert"] if placed.status_code == 200 else placed.json()["error"]["code"]
        return [asked["answer"]["label"], placed.status_code, told]

    assert places() == ["mail", 404, "no_experts"]
    save(experts())
    assert reload(running).status_code == 200
    assert places() == ["spam", 200, "region 1"]
    save()
    assert reload(running).status_code == 200
    assert places() == ["mail", 404, "no_experts"]


def test_experts_say_who_answered_and_how_near_each_region_is(save: Save, serve: Serve) -> None:
    running = serve(save(experts()), simulated(by_instruction))

    pets = running.post("/predict", {"text": "My puppy barks and eats."}).json()
    taxes = running.post("/predict", {"text": "The invoice is due."}).json()
    place = running.post("/route", {"text": "The invoice is due."}).json()

    assert (pets["answer"]["label"], pets["route"]["expert"]) == ("spam", "region 1")
    assert (taxes["answer"]["label"], taxes["route"]["expert"]) == ("mail", "default")
    assert place["experts"] == {"region 1": "region 1", "region 2": "default"}
    assert place["distances"]["region 2"] == pytest.approx(taxes["route"]["distance"])
    assert place["distances"]["region 1"] > place["radius"] > place["distance"]
    assert running.metric('routes_total{expert="region 1",region="region 1"}') == 1
    assert running.metric('routes_total{expert="default",region="region 2"}') == 1
    assert running.metric("rows_total") == 2
    told = running.client.get("/program").json()
    assert told["instructions"] == {"default: predict": "Default.", "region 1: predict": "Spam!"}
    assert "region 1: its own expert" in told["router"]
