"""What a call costs in dollars, by litellm's table; a model in this process costs nothing."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import dspy
from dspy.lm15 import Response

from preceptor.errors import ConfigError


def is_free(lm: dspy.LM) -> bool:
    """Return True if the model runs on an engine object, which bills nobody."""
    return not isinstance(lm.engine, str)


def check(lm: dspy.LM) -> None:
    """Raise unless the model's price is known.

    Raises:
        ConfigError: If dollars can't be counted for this model.
    """
    if not is_free(lm) and _per_token(lm.model) is None:
        raise ConfigError(f"No price is known for {lm.model}; budget calls, tokens or minutes instead of dollars.")


def price(lm: dspy.LM, response: Response) -> float:
    """Return an answer's price in dollars; 0 where no price is known."""
    usage = response.usage
    return most(lm, usage.input_tokens or 0, usage.output_tokens or 0)


def most(lm: dspy.LM, input_tokens: int, output_tokens: int) -> float:
    """Return the price in dollars of so many tokens; 0 where no price is known."""
    rates = None if is_free(lm) else _per_token(lm.model)
    return 0.0 if rates is None else input_tokens * rates[0] + output_tokens * rates[1]


@cache
def _per_token(model: str) -> tuple[float, float] | None:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else the import asks the network
    import litellm

    table: dict[str, Any] = litellm.model_cost
    entry = table.get(model) or table.get(model.partition("/")[2]) or {}
    rates = entry.get("input_cost_per_token"), entry.get("output_cost_per_token")
    return None if None in rates else (float(rates[0]), float(rates[1]))  # type: ignore[arg-type]  # not None
