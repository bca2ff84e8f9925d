"""One model for several processes: here threads stand for the processes that ask, and the model notes its batches."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import dspy
import pytest
from dspy.lm15 import Config, Message, Request, Response, TextPart, Usage

from preceptor.errors import InputTooLong
from preceptor.lm import elsewhere
from preceptor.lm.elsewhere import Result, asked_at
from preceptor.lm.shared import Answerer, Asker
from preceptor.lm.soft import EmbeddingSpace
from preceptor.testing import prompt


class Noting:
    """Says again what it is asked, but refuses "bad"; notes what it is asked together."""

    supports_choices = True
    supported_params = frozenset({"temperature", "seed"})
    embedding_space = EmbeddingSpace(8, 1.5)

    def __init__(self) -> None:
        self.noted: list[list[str]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Noting:
        return self

    def batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Result]]]:
        self.noted.append([prompt(request) for request in requests])
        for at in reversed(range(len(requests))):  # in any order, a batch each
            yield [(at, self._said(requests[at]))]

    def complete(self, request: Request) -> Response:
        raise AssertionError(request)

    def count_tokens(self, request: Request) -> int:
        return len(prompt(request))

    def _said(self, request: Request) -> Result:
        text = prompt(request)
        if text == "bad":
            return InputTooLong("no such luck")
        return Response("r", "m", Message.assistant([TextPart(text)]), "stop", Usage(1, 1))


def ask(text: str, *choices: str) -> Request:
    config = Config(extensions={"choices": list(choices)}) if choices else Config()
    return Request(model="m", messages=(Message.user([TextPart(text)]),), config=config)


def texts(results: Sequence[Result]) -> list[str]:
    return [each.text or "" if isinstance(each, Response) else f"{type(each).__name__}: {each}" for each in results]


class Open(Noting):
    """Takes a step for each letter of a text; others join between two steps, and each step's texts are noted."""

    def joining(self) -> Letters:
        return Letters(self)


class Letters:
    """The texts on their way."""

    def __init__(self, engine: Open) -> None:
        self._engine = engine
        self._live: dict[Any, tuple[Request, int]] = {}

    def add(self, requests: Mapping[Any, Request]) -> None:
        self._live |= {place: (request, len(prompt(request))) for place, request in requests.items()}

    def ended(self) -> dict[Any, Result]:
        ended: dict[Any, Result] = {}
        while not ended:
            self._engine.noted.append([prompt(request) for request, _ in self._live.values()])
            self._live = {place: (request, left - 1) for place, (request, left) in self._live.items()}
            ended = {place: self._engine._said(request) for place, (request, left) in self._live.items() if not left}
            self._live = {place: told for place, told in self._live.items() if place not in ended}
        return ended


def shared(*askers: Callable[[Asker], Any], engine: Noting | None = None) -> tuple[list[list[str]], list[Any]]:
    """Return what the model was asked together, and the last words of each asker, in their order."""
    engine = engine or Noting()
    lm = dspy.LM("m", engine=engine, cache=False)
    answerer, ends, facts = Answerer(lm), dict[Connection, Any](), elsewhere.facts(lm)
    with ThreadPoolExecutor() as pool:
        for does in askers:
            here, there = Pipe()
            ends[here] = None
            answerer.join(here)
            pool.submit(through, does, Asker(there, facts), there)
        for _ in askers:
            ended, end = answerer.until_one_is_through()
            ends[ended] = end
    return engine.noted, list(ends.values())


def through(does: Callable[[Asker], Any], asker: Asker, connection: Connection) -> None:
    try:
        end = does(asker)
    except Exception as error:  # noqa: BLE001  else the one that answers waits for ever
        end = error
    connection.send(("through", end))


def batch(asker: Asker, *requests: Request) -> list[str]:
    [pairs] = asker.batches(requests)
    assert [at for at, _ in pairs] == list(range(len(requests)))
    return texts([result for _, result in pairs])


def test_texts_are_decoded_together_in_the_order_of_those_who_ask() -> None:
    def first(asker: Asker) -> list[str]:
        return batch(asker, ask("a"), ask("b")) + batch(asker, ask("c"))

    def second(asker: Asker) -> list[str]:
        return batch(asker, ask("d")) + batch(asker, ask("e"), ask("f"))

    noted, ends = shared(first, second)
    assert noted == [["a", "b", "d"], ["c", "e", "f"]]
    assert ends == [["a", "b", "c"], ["d", "e", "f"]]


def test_texts_wait_until_nobody_asks_for_choices() -> None:
    def writes(asker: Asker) -> list[str]:
        return batch(asker, ask("text"))

    def chooses(asker: Asker) -> list[str]:
        return batch(asker, ask("x", "y", "n")) + batch(asker, ask("z", "y", "n")) + batch(asker, ask("more"))

    noted, ends = shared(writes, chooses)
    assert noted == [["x"], ["z"], ["text", "more"]]
    assert ends == [["text"], ["x", "z", "more"]]


def test_who_has_all_its_texts_goes_on_and_what_it_asks_next_joins_those_on_their_way() -> None:
    def long(asker: Asker) -> list[str]:
        return batch(asker, ask("abcdef"))

    def short(asker: Asker) -> list[str]:
        return batch(asker, ask("g"), ask("hi")) + batch(asker, ask("x", "y", "n")) + batch(asker, ask("jkl"))

    noted, ends = shared(long, short, engine=Open())
    both = [["abcdef", "g", "hi"], ["abcdef", "hi"]]
    assert noted == [*both, ["x"], *[["abcdef", "jkl"]] * 3, ["abcdef"]]
    assert ends == [["abcdef"], ["g", "hi", "x", "jkl"]]


def test_choices_beside_texts_are_answered_while_the_texts_wait() -> None:
    def mixed(asker: Asker) -> list[str]:
        return batch(asker, ask("ab"), ask("x", "y", "n"), ask("c"))

    noted, ends = shared(mixed, lambda asker: batch(asker, ask("d")), engine=Open())
    assert noted == [["x"], ["ab", "c", "d"], ["ab"]]
    assert ends == [["ab", "x", "c"], ["d"]]


def test_who_is_gone_while_its_texts_are_decoded_holds_up_nobody() -> None:
    lm = dspy.LM("m", engine=Open(), cache=False)
    facts, answerer = elsewhere.facts(lm), Answerer(lm)
    (here, there), (own, other) = Pipe(), Pipe()
    answerer.join(here)
    answerer.join(own)
    there.send(("batches", [ask("abc")]))
    there.close()
    with ThreadPoolExecutor() as pool:
        pool.submit(through, lambda asker: batch(asker, ask("d")) + batch(asker, ask("e")), Asker(other, facts), other)
        ends = dict(answerer.until_one_is_through() for _ in range(2))
    assert ends == {here: None, own: ["d", "e"]}


def test_who_is_through_is_not_waited_for() -> None:
    noted, ends = shared(lambda asker: "nothing to ask", lambda asker: batch(asker, ask("a")) + batch(asker, ask("b")))
    assert noted == [["a"], ["b"]]
    assert ends == ["nothing to ask", ["a", "b"]]


def test_who_is_gone_without_a_last_word_is_none_and_not_waited_for() -> None:
    def gone(asker: Asker) -> None:
        asker._connection.close()

    lm = dspy.LM("m", engine=Noting(), cache=False)
    answerer, (here, there) = Answerer(lm), Pipe()
    answerer.join(here)
    gone(Asker(there, elsewhere.facts(lm)))
    assert answerer.until_one_is_through() == (here, None)


def test_an_error_is_the_answer_of_its_request_alone() -> None:
    noted, ends = shared(lambda asker: batch(asker, ask("good"), ask("bad")), lambda asker: batch(asker, ask("other")))
    assert noted == [["good", "bad", "other"]]
    assert ends == [["good", "InputTooLong: no such luck"], ["other"]]


def test_prompts_are_measured_and_soft_tokens_described_without_waiting_for_anyone() -> None:
    def measures(asker: Asker) -> Any:
        return asker.count_tokens(ask("four")), asker.embedding_space, asker.supports_choices, asker.supported_params

    def asks(asker: Asker) -> list[str]:
        return batch(asker, ask("a"))

    noted, ends = shared(asks, measures)
    assert noted == [["a"]]
    assert ends[1] == (4, EmbeddingSpace(8, 1.5), True, frozenset({"temperature", "seed"}))


def test_a_program_asks_it_as_it_asks_the_model_itself() -> None:
    def asks(asker: Asker) -> Any:
        lm = asked_at(asker, {"model": "m", "settings": {"max_tokens": 7}})
        return lm("hello")[0], lm.copy().engine is asker, lm.kwargs["max_tokens"]

    assert shared(asks)[1] == [("hello", True, 7)]


def test_an_error_is_raised_where_one_request_is_asked() -> None:
    def asks(asker: Asker) -> str:
        with pytest.raises(InputTooLong, match="no such luck"):
            asker.complete(ask("bad"))
        return "raised"

    assert shared(asks)[1] == ["raised"]


def test_the_process_ends_when_the_one_that_answers_is_gone() -> None:
    script = (
        "from multiprocessing import Pipe\n"
        "from preceptor.lm.shared import Asker\n"
        "here, there = Pipe()\n"
        "here.close()\n"
        "facts = dict.fromkeys(('supports_choices', 'supports_function_calling', 'supports_reasoning',"
        " 'supports_response_schema'), True)\n"
        "asker = Asker(there, {**facts, 'supported_params': ()})\n"
        "try:\n"
        "    asker.count_tokens(None)\n"
        "except BaseException:\n"
        "    print('goes on')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
