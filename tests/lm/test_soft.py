"""Soft tokens: read as embeddings, kept in the ledger, counted by the meter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
import torch
from dspy.lm15 import Config, Message, Request, Response

from preceptor.errors import BudgetExhausted, ConfigError
from preceptor.lm.budget import Account, Budget
from preceptor.lm.ledger import Call, Ledger
from preceptor.lm.local import LocalEngine
from preceptor.lm.meter import Meter
from preceptor.lm.soft import SoftTokens, soft_tokens, with_soft_tokens
from preceptor.testing import simulated

OPENING = "What is the capital"
QUESTION = f"{OPENING} of France?"


def request(text: str = QUESTION, **config: Any) -> Request:
    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, **config}
    return Request(model="m", messages=(Message.user(text),), config=Config(**settings))


def embedded(engine: LocalEngine, text: str) -> SoftTokens:
    """Return the model's own embeddings of a text."""
    embed = engine._model.get_input_embeddings()
    found: SoftTokens = embed(torch.tensor(engine._tokens(text))).tolist()
    return found


def test_a_texts_own_embeddings_are_read_as_the_text(precise: LocalEngine) -> None:
    plain = precise.complete(request())
    rest = QUESTION.removeprefix(OPENING)
    soft = precise.generate(request("x" + rest), [])  # the same text but for its opening
    assert soft.message.text != plain.message.text

    opened = Request(model="m", messages=(Message.user(rest.strip()),), config=request().config)
    answer = precise.generate(opened, embedded(precise, f"{OPENING} "))

    assert "Paris" in (answer.message.text or "")
    assert answer.usage.input_tokens == precise.count_tokens(opened) + len(precise._tokens(f"{OPENING} "))


def test_requests_answered_together_are_answered_as_alone(precise: LocalEngine) -> None:
    torch.manual_seed(0)
    scale = precise.embedding_space.norm / precise.embedding_space.width**0.5
    softs = [(scale * torch.randn(3, precise.embedding_space.width)).tolist() for _ in range(3)]
    requests = [with_soft_tokens(request(), soft) for soft in softs]
    requests += [request(), with_soft_tokens(request("Name a colour that is not red."), softs[0])]

    found = {index: result for batch in precise.batches(requests) for index, result in batch}

    texts = [result.message.text for _, result in sorted(found.items()) if isinstance(result, Response)]
    assert texts == [precise.complete(one).message.text for one in requests]
    assert len(set(texts)) > 2


def test_the_space_is_as_wide_and_long_as_the_models_embeddings(engine: LocalEngine) -> None:
    weight = engine._model.get_input_embeddings().weight.detach().float()
    assert engine.embedding_space.width == 576
    assert engine.embedding_space.norm == pytest.approx(float(weight.norm(dim=1).median()), rel=1e-3)


def test_soft_tokens_of_another_width_are_refused_and_spoil_no_other_request(engine: LocalEngine) -> None:
    message = rf"^{engine.name} takes soft tokens of 576 numbers, not of \[2, 2\]\.$"
    with pytest.raises(ConfigError, match=message):
        engine.generate(request(), [[0.1, 0.2], [0.3, 0.4]])
    found = {
        index: result
        for batch in engine.batches([with_soft_tokens(request(), [[1.0]]), request()])
        for index, result in batch
    }
    assert isinstance(found[0], ConfigError)
    assert isinstance(found[1], Response)


def test_soft_tokens_beside_choices_are_refused(engine: LocalEngine) -> None:
    with pytest.raises(ConfigError, match=r"^A request has soft tokens or choices, not both"):
        engine.generate(request(extensions={"choices": ["a", "b"]}), [[0.0] * 576])


def test_what_a_request_carries_comes_back() -> None:
    carried = with_soft_tokens(request(extensions={"other": 1}), [[0.5, -1.0], [2.0, 0.25]])
    assert soft_tokens(carried) == ((0.5, -1.0), (2.0, 0.25))
    assert (carried.config.extensions or {})["other"] == 1
    assert soft_tokens(request()) == ()


def test_each_soft_prompt_is_asked_once_and_replayed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    lm = simulated(lambda asked: str(soft_tokens(asked)[0][0]))
    calls = [Call(with_soft_tokens(request(), [[value] * 8])) for value in (0.25, 0.5, 0.25)]
    for billed in (2, 0):
        account = Account(Budget(calls=3))
        answers = Meter(ledger, account, threads=1).ask(lm, calls)
        assert [one.message.text for one in answers if isinstance(one, Response)] == ["0.25", "0.5", "0.25"]
        assert (account.spent.calls, account.billed.calls) == (3, billed)
    ledger.close()


def test_a_budget_of_tokens_counts_soft_tokens(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    lm: dspy.LM = simulated(lambda asked: "one")
    account = Account(Budget(tokens=10_000))
    Meter(ledger, account).ask(lm, [Call(with_soft_tokens(request("a b c"), [[0.0] * 8] * 5))])
    assert account.spent.tokens == 3 + 5 + 1

    # reserved: 5 bytes of text, room for two templates of 64, 4 soft tokens, an answer of 12
    for tokens, calls in ((148, 0), (149, 1)):
        account = Account(Budget(tokens=tokens))
        try:
            Meter(ledger, account).ask(lm, [Call(with_soft_tokens(request("d e f"), [[float(tokens)] * 8] * 4))])
        except BudgetExhausted:
            assert tokens == 148
        assert account.spent.calls == calls
    ledger.close()
