"""Prices: what a call costs by litellm's table, nothing for a model in this process."""

from __future__ import annotations

import dspy
import pytest
from dspy.lm15 import Message, Response, TextPart, Usage

from preceptor.errors import ConfigError
from preceptor.lm import prices
from preceptor.testing import simulated


def response(usage: Usage) -> Response:
    return Response(id=None, model="m", message=Message.assistant([TextPart("a")]), finish_reason="stop", usage=usage)


def test_a_known_model_costs_its_tokens_at_the_table_s_rates() -> None:
    lm = dspy.LM("openai/gpt-4o-mini")  # 15 cents a million tokens read, 60 cents a million written
    assert prices.price(lm, response(Usage(1_000_000, 0))) == pytest.approx(0.15)
    assert prices.price(lm, response(Usage(0, 1_000_000))) == pytest.approx(0.60)
    assert prices.most(lm, 2000, 1000) == pytest.approx(0.0009)


def test_unreported_tokens_cost_nothing() -> None:
    assert prices.price(dspy.LM("openai/gpt-4o-mini"), response(Usage())) == 0.0


def test_an_unknown_model_is_refused_by_name() -> None:
    lm = dspy.LM("openai/nobody-knows-this")
    with pytest.raises(
        ConfigError,
        match=r"No price is known for openai/nobody-knows-this; "
        r"budget calls, tokens or minutes instead of dollars\.",
    ):
        prices.check(lm)
    assert prices.most(lm, 1000, 1000) == 0.0


def test_a_model_in_this_process_is_free() -> None:
    lm = simulated(lambda request: "yes")
    prices.check(lm)
    assert prices.is_free(lm)
    assert prices.most(lm, 10**9, 10**9) == 0.0
    assert not prices.is_free(dspy.LM("openai/gpt-4o-mini"))
