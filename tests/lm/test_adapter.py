"""The direct adapter: no markers out, a bare reply in."""

from __future__ import annotations

import asyncio
import enum
import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any, Literal

import dspy
import pydantic
import pytest
from dspy.lm15 import request_from_openai_chat
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import AdapterParseError

from preceptor.lm.adapter import DirectAdapter, choices, declare, is_direct, predicted, takes_choices
from preceptor.lm.budget import Account, Budget
from preceptor.lm.ledger import Ledger
from preceptor.lm.meter import Meter
from preceptor.modules import Classify
from preceptor.testing import ChatServer, asked, prompt, scripted, simulated, system


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Rank(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Place(pydantic.BaseModel):
    city: str
    code: int


SENTIMENT = declare("text -> label: Literal['good', 'so so', 'bad']", "Judge the review.")
ADAPTER = DirectAdapter()


def of_type(annotation: Any) -> Any:
    return dspy.make_signature({"text": (str, dspy.InputField()), "out": (annotation, dspy.OutputField())})


def test_instructions_are_the_system_message_and_fields_the_users() -> None:
    signature = declare("title, text -> summary", "Sum up.")
    assert ADAPTER.format(signature, [], {"title": "Dune", "text": "Sand."}) == [
        {"role": "system", "content": "Sum up."},
        {"role": "user", "content": "title: Dune\ntext: Sand."},
    ]


def test_labels_are_listed_and_absent_fields_left_out() -> None:
    signature = declare("title, text -> label: Literal['a', 'b']", "Pick.")
    assert ADAPTER.format(signature, [], {"title": None, "text": "t"}) == [
        {"role": "system", "content": "Pick.\n\nAnswer with exactly one of: a, b."},
        {"role": "user", "content": "text: t"},
    ]


def test_lists_and_records_are_shown_as_json_and_enumerations_by_value() -> None:
    types = {"tags": list[str], "place": Place, "mood": Mood, "count": int}
    fields: dict[str, Any] = {name: (kind, dspy.InputField()) for name, kind in types.items()}
    signature = dspy.make_signature({**fields, "out": (Mood, dspy.OutputField())}, "Judge.")
    inputs = {"tags": ["a", "b"], "place": Place(city="Rome", code=1), "mood": Mood.BAD, "count": 3}
    shown = ADAPTER.format(signature, [{**inputs, "out": Mood.GOOD}], inputs)
    text = 'tags: ["a", "b"]\nplace: {"city": "Rome", "code": 1}\nmood: bad\ncount: 3'
    assert [message["content"] for message in shown[1:]] == [text, "good", text]


def test_demonstrations_are_turns_of_the_conversation() -> None:
    demos = [{"text": "Lovely.", "label": "good"}, {"text": "Awful.", "label": "bad"}]
    assert ADAPTER.format(SENTIMENT, demos, {"text": "Fine."})[1:] == [
        {"role": "user", "content": "text: Lovely."},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "text: Awful."},
        {"role": "assistant", "content": "bad"},
        {"role": "user", "content": "text: Fine."},
    ]


@pytest.mark.parametrize(
    "reply",
    ["good", "Good", "GOOD", " good \n", '"good"', "'Good'", "**good**", "`good`", "good.", '"Good."', "label: good",
     "Label: Good.", "The label is: good", "good\nBecause it praises."],
)  # fmt: skip
def test_a_reply_that_names_a_label_is_read(reply: str) -> None:
    assert ADAPTER.parse(SENTIMENT, reply) == {"label": "good"}


def test_a_label_of_two_words_is_read() -> None:
    assert ADAPTER.parse(SENTIMENT, "Label: So so.") == {"label": "so so"}


@pytest.mark.parametrize("reply", ["", "great", "good or bad", "not good", "I can't say."])
def test_a_reply_that_names_no_label_is_unparsable(reply: str) -> None:
    with pytest.raises(AdapterParseError, match=r"The reply is none of good, so so, bad\.") as caught:
        ADAPTER.parse(SENTIMENT, reply)
    assert caught.value.lm_response == reply


@pytest.mark.parametrize("label", ["U.S.", "us", "US", "*", "'", "a: b"])
def test_every_label_names_itself_exactly(label: str) -> None:
    signature = of_type(Literal["U.S.", "us", "US", "*", "'", "a: b"])
    assert ADAPTER.parse(signature, label) == {"out": label}


@pytest.mark.parametrize("reply", ["u.s.", "U.S", '"U.S."'])
def test_a_label_with_stops_is_read_as_other_labels_are(reply: str) -> None:
    assert ADAPTER.parse(of_type(Literal["U.S.", "U.K."]), reply) == {"out": "U.S."}


def test_an_empty_reply_is_no_label_of_stars() -> None:
    with pytest.raises(AdapterParseError, match=r"The reply is none of \*, \*\*\."):
        ADAPTER.parse(of_type(Literal["*", "**"]), "")


@pytest.mark.parametrize(
    ("annotation", "reply", "value"),
    [
        (str, " As it is. ", "As it is."),
        (int, "42", 42),
        (int, "1,234.", 1234),
        (float, "2.5", 2.5),
        (float, "-3", -3.0),
        (bool, "True", True),
        (bool, "false.", False),
        (str | None, "text", "text"),
        (int | None, "7", 7),
        (bool | None, "True", True),
        (Literal[1, 2], "2", 2),
        (Literal["a", "b"] | None, "B", "b"),
        (Literal["a", "b"] | None, "None.", None),
        (Literal["none", "some"] | None, "none", "none"),
        (int | None, "null", None),
        (str | None, "None", None),
        (str, "None", "None"),
        (Mood, "Good.", Mood.GOOD),
        (Mood, "BAD", Mood.BAD),
        (Rank, "2", Rank.HIGH),
        (Rank, "LOW", Rank.LOW),
        (Rank | None, "none", None),
    ],
)
def test_a_reply_is_read_as_the_fields_type(annotation: Any, reply: str, value: object) -> None:
    parsed = ADAPTER.parse(of_type(annotation), reply)
    assert parsed == {"out": value}
    assert type(parsed["out"]) is type(value)


@pytest.mark.parametrize(("annotation", "reply"), [(int, "many"), (float, "2.5 or so"), (int, ""), (str, "  ")])
def test_a_reply_of_another_type_is_unparsable(annotation: Any, reply: str) -> None:
    with pytest.raises(AdapterParseError):
        ADAPTER.parse(of_type(annotation), reply)


@pytest.mark.parametrize(
    ("annotation", "direct", "options"),
    [
        (str, True, ()),
        (int, True, ()),
        (bool, True, ("True", "False")),
        (Literal["a", "b"], True, ("a", "b")),
        (Literal[1, 2], True, ("1", "2")),
        (Literal["a", "b"] | None, True, ("a", "b", "None")),
        (bool | None, True, ("True", "False", "None")),
        (int | None, True, ()),
        (Mood, True, ("good", "bad")),
        (Rank | None, True, ("1", "2", "None")),
        (list[str], False, ()),
        (str | int, False, ()),
    ],
)
def test_what_is_direct_and_what_has_choices(annotation: Any, direct: bool, options: tuple[str, ...]) -> None:
    assert is_direct(of_type(annotation)) is direct
    assert choices(of_type(annotation)) == options


def test_two_outputs_are_not_direct() -> None:
    assert not is_direct(declare("text -> label, reason"))


def test_declaring_keeps_the_callers_class_as_it_was() -> None:
    changed = declare(SENTIMENT, "Decide.")
    assert (changed.instructions, SENTIMENT.instructions) == ("Decide.", "Judge the review.")
    assert declare(SENTIMENT) is SENTIMENT


def predict(lm: dspy.LM, signature: Any, **inputs: str) -> dspy.Prediction:
    with dspy.context(lm=lm, adapter=DirectAdapter()):
        return dspy.Predict(signature)(**inputs)


def test_a_model_without_choices_is_asked_once_and_its_reply_read() -> None:
    lm = scripted(["Good."])
    assert predict(lm, SENTIMENT, text="Lovely.").label == "good"
    [request] = asked(lm)
    assert system(request) == "Judge the review.\n\nAnswer with exactly one of: good, so so, bad."
    assert prompt(request) == "text: Lovely."
    assert request.config.extensions is None
    assert not takes_choices(lm, SENTIMENT)


def test_an_unparsable_reply_is_not_asked_for_again() -> None:
    lm = scripted(["Who knows?"])
    with pytest.raises(AdapterParseError, match="The reply is none of good, so so, bad"):
        predict(lm, SENTIMENT, text="Lovely.")
    assert len(asked(lm)) == 1


class Listener(BaseCallback):
    """Notes the models that are asked."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.heard.append(instance.model)


def test_callbacks_and_history_see_the_calls_of_a_metered_model(tmp_path: Path) -> None:
    listener, ledger = Listener(), Ledger(tmp_path / "ledger.sqlite")
    lm = Meter(ledger, Account(Budget())).wrap(scripted(["Good.", "Bad.", "Good."]))
    with dspy.context(disable_history=True):
        assert predict(lm, SENTIMENT, text="Lovely.").label == "good"
        assert lm.history == []
        with dspy.context(callbacks=[listener]):
            assert predict(lm, SENTIMENT, text="Awful.").label == "bad"
    assert predict(lm, SENTIMENT, text="Fine.").label == "good"
    ledger.close()
    assert (listener.heard, len(lm.history)) == (["simulated/script"], 1)


@pytest.mark.parametrize("text", ["Lovely.", "", 7, None])
@pytest.mark.parametrize("demos", [[], [{"text": "Bad soup.", "label": "bad"}]])
@pytest.mark.parametrize("is_awaited", [False, True])
def test_the_short_way_to_a_prediction_is_the_long_one(
    tmp_path: Path, text: Any, demos: list[dict[str, str]], is_awaited: bool
) -> None:
    def ask(name: str, callbacks: list[BaseCallback]) -> tuple[Any, ...]:
        lm, ledger = scripted(["Good."]), Ledger(tmp_path / name)
        program, trace = Classify(SENTIMENT), list[Any]()
        program.predict.demos = [dspy.Example(**demo) for demo in demos]
        metered = Meter(ledger, Account(Budget())).wrap(lm)
        with dspy.context(lm=metered, disable_history=True, callbacks=callbacks, trace=trace):
            prediction = asyncio.run(program.acall(text=text)) if is_awaited else program(text=text)
        ledger.close()
        [(predict, inputs, traced)] = trace
        return asked(lm), dict(prediction), predict is program.predict, inputs, traced is prediction

    listener = Listener()
    short, long = ask("short", []), ask("long", [listener])
    assert short == long
    assert short[1:] == ({"label": "good"}, True, {"text": text}, True)
    assert listener.heard == ["simulated/script"]


def test_two_outputs_are_asked_for_as_json() -> None:
    lm = scripted([json.dumps({"label": "good", "reason": "It praises."})])
    signature = declare("text -> label: Literal['good', 'bad'], reason", "Judge.")
    prediction = predict(lm, signature, text="Lovely.")
    assert (prediction.label, prediction.reason) == ("good", "It praises.")
    assert len(asked(lm)) == 1


def predict_async(lm: dspy.LM, signature: Any, path: Path, **inputs: str) -> dspy.Prediction:
    """Ask through a meter, which gives every engine an asynchronous door."""
    ledger = Ledger(path)

    async def ask() -> dspy.Prediction:
        with dspy.context(lm=Meter(ledger, Account(Budget())).wrap(lm), adapter=DirectAdapter()):
            return await dspy.Predict(signature).acall(**inputs)

    prediction = asyncio.run(ask())
    ledger.close()
    return prediction


def test_every_way_to_ask_works_without_blocking(tmp_path: Path) -> None:
    lm = scripted(["Good.", json.dumps({"label": "good", "reason": "It praises."})])
    both = declare("text -> label: Literal['good', 'bad'], reason", "Judge.")
    assert predict_async(lm, SENTIMENT, tmp_path / "a", text="Lovely.").label == "good"
    assert predict_async(lm, both, tmp_path / "b", text="Lovely.").reason == "It praises."


def test_choices_go_to_the_engine_and_log_probabilities_come_back(smollm: dspy.LM) -> None:
    prediction = predict(smollm, SENTIMENT, text="A masterpiece, I loved every minute.")
    logprobs = prediction.logprobs
    assert takes_choices(smollm, SENTIMENT)
    assert set(logprobs) == {"good", "so so", "bad"}
    assert prediction.label == max(logprobs, key=logprobs.__getitem__)
    assert 0 < sum(map(math.exp, logprobs.values())) < 1


def test_choices_go_to_the_engine_without_blocking_too(smollm: dspy.LM, tmp_path: Path) -> None:
    waited = predict_async(smollm, SENTIMENT, tmp_path / "ledger", text="Boring.")
    assert waited.logprobs == predict(smollm, SENTIMENT, text="Boring.").logprobs


@pytest.mark.parametrize(
    ("settings", "inputs", "demos"),
    [
        ({}, {"text": "Lovely."}, []),
        ({"temperature": 0.5, "max_tokens": 9, "stop": ["."]}, {"text": "Löv\nely."}, []),
        ({}, {"text": "Lovely."}, [{"text": "Dull.", "label": "bad"}]),
        ({}, {"text": ["one", "two"]}, []),
    ],
)
def test_a_request_built_by_hand_is_the_one_dspy_builds(
    settings: dict[str, Any], inputs: dict[str, Any], demos: list[dict[str, Any]]
) -> None:
    lm = dspy.LM("openai/x", **settings)
    given = {name: value for name, value in lm.kwargs.items() if value is not None}
    messages = ADAPTER.format(SENTIMENT, demos, inputs)

    request = ADAPTER.request(lm, {}, SENTIMENT, demos, inputs)

    assert request == request_from_openai_chat({"model": "openai/x", "messages": messages, **given})


def test_the_signatures_of_a_long_search_are_let_go() -> None:
    first = weakref.ref(declare("text -> label: Literal['a', 'b']", "Candidate 0."))
    signature: Any = first()
    assert is_direct(signature)
    assert choices(signature) == ("a", "b")
    del signature

    for number in range(1, 300):
        other = declare("text -> label: Literal['a', 'b']", f"Candidate {number}.")
        assert is_direct(other)
        assert choices(other) == ("a", "b")
    gc.collect()

    assert first() is None


def test_a_metered_model_is_sent_the_request_itself(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    lm = simulated(lambda request: " Good. ")
    metered = Meter(ledger, Account(Budget())).wrap(lm)

    assert predict(metered, SENTIMENT, text="Lovely.").label == "good"
    assert asked(lm) == [ADAPTER.request(lm, {}, SENTIMENT, [], {"text": "Lovely."})]
    ledger.close()


def test_the_request_carries_settings_choices_and_no_connection() -> None:
    lm = dspy.LM("openai/x", api_key="sk-1", api_base="http://127.0.0.1:1", temperature=0.5, max_tokens=9)
    request = ADAPTER.request(lm, {"rollout_id": 3}, SENTIMENT, [], {"text": "t"})
    assert (request.model, request.config.temperature, request.config.max_tokens) == ("openai/x", 0.5, 9)
    assert request.config.extensions is None  # no provider takes them; the system message lists them
    asked_for = ADAPTER.request(lm, {}, SENTIMENT, [], {"text": "t"}, ["good"])
    assert asked_for.config.extensions == {"choices": ["good"]}


def test_a_setting_of_none_leaves_the_models_own() -> None:
    lm = dspy.LM("openai/x", temperature=0.5, max_tokens=9)
    request = ADAPTER.request(lm, {"max_tokens": None, "temperature": None}, SENTIMENT, [], {"text": "t"})
    assert (request.config.temperature, request.config.max_tokens) == (0.5, 9)


def thoughtful(completion: dict[str, Any]) -> None:
    completion["choices"][0]["message"]["reasoning_content"] = "It says lovely, so it is good."


def test_the_answer_of_a_model_that_also_sends_its_thoughts_is_read(server: ChatServer, tmp_path: Path) -> None:
    server.answer, server.shape = (lambda body: "Good"), thoughtful
    plain = server.lm()
    ledger = Ledger(tmp_path / "ledger.sqlite")
    metered = Meter(ledger, Account(Budget())).wrap(plain)
    for lm in (plain, metered):
        with dspy.context(lm=lm):
            assert predicted(dspy.Predict(SENTIMENT), {"text": "Lovely."}).label == "good"
    ledger.close()
