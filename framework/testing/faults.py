"""How a server fails, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from preceptor.errors import ConfigError
from preceptor.testing.draws import draw, number, uniform

Refusal: TypeAlias = Literal[
    "bad_request",
    "unauthorized",
    "forbidden",
    "not_found",
    "rate_limit",
    "rate_limit_after",
    "no_quota",
    "server_error",
    "unavailable",
]
"""A fault that is a status code."""

Kind: TypeAlias = (
    Refusal | Literal["dropped", "reset", "cut", "hang", "slow", "garbage", "misshapen", "empty", "truncated"]
)
"""A fault."""

REFUSALS: Final[dict[str, tuple[int, str, str, str | None]]] = {
    "bad_request": (400, "The request is malformed.", "invalid_request_error", None),
    "unauthorized": (401, "Incorrect API key provided.", "invalid_request_error", "invalid_api_key"),
    "forbidden": (403, "You are not allowed to use this model.", "invalid_request_error", "forbidden"),
    "not_found": (404, "The model does not exist.", "invalid_request_error", "model_not_found"),
    "rate_limit": (429, "Rate limit reached.", "requests", "rate_limit_exceeded"),
    "rate_limit_after": (429, "Rate limit reached.", "requests", "rate_limit_exceeded"),
    "no_quota": (429, "You exceeded your current quota.", "insufficient_quota", "insufficient_quota"),
    "server_error": (500, "The server had an error.", "server_error", None),
    "unavailable": (503, "The server is overloaded.", "server_error", None),
}
"""Kind of fault -> status code, message, type and code in OpenAI's error body."""

KINDS: Final[tuple[str, ...]] = tuple(kind for group in get_args(Kind) for kind in get_args(group))
"""All faults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Which requests fail, and how.

    Whether a request fails is drawn by a hash of `seed`, its body, and how often this very body was
    posted before. So a run meets the same faults with any number of threads, and a request that is sent
    again may succeed.

    Attributes:
        kinds: Drawn from evenly; at least one of `KINDS`.
        share: Of the requests that fail, in [0, 1].
        seed: Of the draws.
        retry_after: Seconds in the Retry-After header of `rate_limit_after`.
        slow_seconds: What a `slow` answer takes from its first byte to its last.

    Raises:
        ConfigError: If a kind is unknown, there is none, or a number is out of range.
    """

    kinds: tuple[Kind, ...]
    share: float = 1.0
    seed: int = 0
    retry_after: float = 0.05
    slow_seconds: float = 0.5

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ConfigError(f"Faults needs kinds among {', '.join(KINDS)}; got {list(self.kinds)}.")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"Faults needs a share in [0, 1], got {self.share}.")
        if min(self.retry_after, self.slow_seconds) < 0:
            raise ConfigError(
                f"Faults needs seconds >= 0, got retry_after={self.retry_after} and slow_seconds={self.slow_seconds}."
            )

    def drawn(self, body: object, seen: int) -> Kind | None:
        """Return how a request fails whose body was posted `seen` times before; None if it doesn't."""
        drawn = draw(self.seed, body, seen)
        return self.kinds[number(drawn[8:]) % len(self.kinds)] if uniform(drawn) < self.share else None
