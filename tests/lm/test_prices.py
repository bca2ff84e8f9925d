"""Prices: what a call costs by hand or by litellm's table, nothing for a model in this process."""

from __future__ import annotations

import dspy
import pytest

from preceptor.errors import ConfigError
from preceptor.lm import prices
from preceptor.testing import simulated


def test_a_known_model_costs_its_tokens_at_the_table_s_rates() -> None:
    lm = dspy.LM("openai/gpt-4o-mini")  # 15 cents a million tokens read, 60 cents a million written
    assert prices.price(lm, 1_000_000, 0, {}) == pytest.approx(0.15)
    assert prices.price(lm, 0, 1_000_000, {}) == pytest.approx(0.60)
    assert prices.price(lm, 2000, 1000, {}) == pytest.approx(0.0009)


def test_a_price_by_hand_goes_before_the_table() -> None:
    lm = dspy.LM("openai/gpt-4o-mini")
    assert prices.price(lm, 2_000_000, 500_000, {"openai/gpt-4o-mini": (3.0, 8.0)}) == pytest.approx(10.0)
    assert prices.price(lm, 1_000_000, 0, {"openai/another": (3.0, 8.0)}) == pytest.approx(0.15)


def test_an_unknown_model_is_refused_by_name_and_told_how_to_give_its_price() -> None:
    lm = dspy.LM("openai/nobody-knows-this")
    with pytest.raises(
        ConfigError,
        match=r"No price is known for openai/nobody-knows-this\. Give it by hand, .*"
        r"prices=\{'openai/nobody-knows-this': \(0\.5, 1\.5\)\}\), or --price openai/nobody-knows-this=0\.5/1\.5\.",
    ):
        prices.check(lm, {})
    assert prices.price(lm, 1000, 1000, {}) == 0.0
    prices.check(lm, {"openai/nobody-knows-this": (1.0, 1.0)})
    assert prices.price(lm, 1_000_000, 1_000_000, {"openai/nobody-knows-this": (1.0, 2.0)}) == pytest.approx(3.0)


def test_models_without_a_price_are_named_once() -> None:
    nobodys = dspy.LM("openai/nobody-knows-this")
    models = [nobodys, dspy.LM("openai/gpt-4o-mini"), simulated(lambda request: "yes"), nobodys]

    assert prices.unpriced(models, {}) == ("openai/nobody-knows-this",)
    assert prices.unpriced(models, {nobodys.model: (1.0, 1.0)}) == ()


def test_a_model_in_this_process_is_free_unless_a_price_is_given() -> None:
    lm = simulated(lambda request: "yes")
    prices.check(lm, {})
    assert prices.is_free(lm)
    assert prices.price(lm, 10**9, 10**9, {}) == 0.0
    assert prices.price(lm, 10**6, 0, {lm.model: (2.0, 0.0)}) == pytest.approx(2.0)
    assert not prices.is_free(dspy.LM("openai/gpt-4o-mini"))
