"""What a call costs in dollars: by hand, else by litellm's table; a model in this process costs nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Final, TypeAlias

import dspy

from preceptor.errors import ConfigError

MILLION: Final = 1_000_000

Prices: TypeAlias = Mapping[str, tuple[float, float]]
"""Model name -> dollars per million input tokens and per million output tokens."""


def is_free(lm: dspy.LM) -> bool:
    """Return True if the model runs on an engine object, which bills nobody."""
    return not isinstance(lm.engine, str)


def check(lm: dspy.LM, by_hand: Prices) -> None:
    """Raise unless the model's price is known.

    Raises:
        ConfigError: If dollars can't be counted for this model.
    """
    if unpriced([lm], by_hand):
        raise ConfigError(
            f"No price is known for {lm.model}. Give it by hand, in dollars per million input and output tokens: "
            f"Budget(dollars=..., prices={{{lm.model!r}: (0.5, 1.5)}}), or --price {lm.model}=0.5/1.5. "
            "Or budget calls, tokens or minutes."
        )


def unpriced(models: Iterable[dspy.LM], by_hand: Prices) -> tuple[str, ...]:
    """Return the names of those models whose price isn't known, each once."""
    found = [lm.model for lm in models if lm.model not in by_hand and not is_free(lm) and _per_token(lm.model) is None]
    return tuple(dict.fromkeys(found))


def price(lm: dspy.LM, input_tokens: int, output_tokens: int, by_hand: Prices) -> float:
    """Return the price in dollars of so many tokens; 0 where no price is known."""
    if lm.model in by_hand:
        rates = by_hand[lm.model]
        return (input_tokens * rates[0] + output_tokens * rates[1]) / MILLION
    known = None if is_free(lm) else _per_token(lm.model)
    return 0.0 if known is None else input_tokens * known[0] + output_tokens * known[1]


@cache
def _per_token(model: str) -> tuple[float, float] | None:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else the import asks the network
    import litellm

    table: dict[str, Any] = litellm.model_cost
    entry = table.get(model) or table.get(model.partition("/")[2]) or {}
    rates = entry.get("input_cost_per_token"), entry.get("output_cost_per_token")
    return None if None in rates else (float(rates[0]), float(rates[1]))  # type: ignore[arg-type]  # not None
