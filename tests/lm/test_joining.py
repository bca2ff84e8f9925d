"""Joining: texts that others join are those that each has alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from dspy.lm15 import Config, Message, Request, Response, TextPart

from preceptor.errors import InputTooLong
from preceptor.lm import attention, joining, local
from preceptor.lm.local import LocalEngine
from preceptor.lm.soft import with_soft_tokens

SHORT = "Name a colour."
LONG = "Here is a list of fruit: " + ", ".join(["apple", "pear", "plum"] * 30) + ". What is the first?"


def request(text: str, tokens: int, **settings: Any) -> Request:
    return Request(model="m", messages=(Message.user([TextPart(text)]),), config=Config(max_tokens=tokens, **settings))


def said(results: Mapping[Any, Any]) -> dict[Any, str]:
    return {
        key: (result.text or "") if isinstance(result, Response) else str(result) for key, result in results.items()
    }


def alone(engine: LocalEngine, asked: Request) -> str:
    return engine.complete(asked).text or ""


def until_all(several: joining.Joining[str]) -> list[dict[str, str]]:
    """Return what ended together, in turn, to the end."""
    found: list[dict[str, str]] = []
    while ended := several.ended():
        found.append(said(ended))
    return found


def test_texts_end_one_by_one_and_what_joins_later_is_what_it_is_alone(precise: LocalEngine) -> None:
    asked = {
        "one": request(LONG, 3),
        "two": request(SHORT, 12),
        "three": request("What is the capital of France?", 6, temperature=1.0, seed=7),
        "four": request(LONG, 9, temperature=0.7, seed=1),
    }
    several: Any = precise.joining()
    several.add({key: asked[key] for key in ("one", "two")})
    first = said(several.ended())
    several.add({"three": asked["three"]})
    second = said(several.ended())
    several.add({"four": asked["four"]})
    found = [first, second, *until_all(several)]
    assert [list(ended) for ended in found] == [["one"], ["three"], ["two"], ["four"]]
    assert {key: text for ended in found for key, text in ended.items()} == {
        key: alone(precise, one) for key, one in asked.items()
    }


def test_when_all_have_ended_others_begin_anew(precise: LocalEngine) -> None:
    several: Any = precise.joining()
    assert several.ended() == {}
    for key in ("a", "b"):
        several.add({key: request(SHORT, 4)})
        assert until_all(several) == [{key: alone(precise, request(SHORT, 4))}]


def test_a_request_that_cant_be_read_is_answered_at_once_by_its_error(precise: LocalEngine) -> None:
    several: Any = precise.joining()
    several.add({"good": request(SHORT, 2), "bad": request("word " * 9_000, 2)})
    [refused] = several.ended().items()
    assert refused[0] == "bad"
    assert isinstance(refused[1], InputTooLong)
    assert until_all(several) == [{"good": alone(precise, request(SHORT, 2))}]


def test_texts_wait_for_room(precise: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_DECODED_TOGETHER", 2)
    several: Any = precise.joining()
    several.add({key: request(SHORT, tokens) for key, tokens in (("a", 5), ("b", 2), ("c", 2), ("d", 1))})
    ended = until_all(several)
    assert [list(each) for each in ended] == [["b"], ["c"], ["a", "d"]]


def test_the_longest_of_those_on_their_way_counts_for_the_room(precise: LocalEngine) -> None:
    longest = precise.count_tokens(request(LONG, 4)) + 4
    narrow = LocalEngine(
        precise.load, precise._config, precise._tokenizer, precise.name, memory=2 * longest * precise._bytes_per_token
    )
    several: Any = narrow.joining()
    several.add({"a": request(LONG, 4), "b": request(SHORT, 4), "c": request(SHORT, 3)})
    assert [list(each) for each in until_all(several)] == [["a", "b"], ["c"]]


def test_soft_tokens_are_decoded_with_the_others(precise: LocalEngine) -> None:
    width = precise.embedding_space.width
    soft = with_soft_tokens(request(SHORT, 5), [[0.01] * width, [-0.01] * width])
    several: Any = precise.joining()
    several.add({"plain": request(LONG, 5), "soft": soft, "last": request(SHORT, 5)})
    [ended] = until_all(several)
    assert ended == {
        "plain": alone(precise, request(LONG, 5)),
        "soft": alone(precise, soft),
        "last": alone(precise, request(SHORT, 5)),
    }


def test_none_joins_where_attention_isnt_whole(precise: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_whole", lambda model: False)
    assert precise.joining() is None


def test_what_else_goes_wrong_is_no_answer(precise: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    several: Any = precise.joining()
    monkeypatch.setattr(precise, "_tokens", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        several.add({"a": request(SHORT, 1)})
