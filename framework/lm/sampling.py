"""Drawing tokens: each text by its own seed, whoever shares its batch, on whatever device the logits are.

Every text has a generator on the processor that gives one uniform number a token. The number falls somewhere in
the cumulative distribution of the tokens, and that is the token: so a GPU draws as a processor does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

Tokens = tuple[int, ...]

_LIKELIEST: Final = 4096
"""Tokens that are put in order first; sorting a whole vocabulary takes longer than a small model's own work."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One text to decode.

    Attributes:
        suffix: The prompt's tokens after the shared prefix, at least one.
        soft: Embeddings that stand before the suffix, in place of tokens.
        max_tokens: Most tokens to decode.
        temperature: 0 takes the likeliest token.
        top_p: Mass of the likeliest tokens to sample from, in (0, 1].
        top_k: Number of likeliest tokens to sample from; 0 means all.
        stop: Texts that end the answer; they are not part of it.
        seed: Of this request's own generator.
    """

    suffix: Tokens
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0
    soft: tuple[tuple[float, ...], ...] = ()

    @property
    def length(self) -> int:
        """How many places of the sequence it takes, soft tokens included."""
        return len(self.soft) + len(self.suffix)


def drawn(logits: Any, draws: Sequence[Draw], generators: Sequence[Any]) -> list[tuple[int, float]]:
    """Return a token a row, and its natural log-probability at temperature 1.

    Args:
        logits: In float32, shape (rows, vocabulary).
        draws: One a row: how to draw.
        generators: One a row, on the processor; those of rows at temperature 0 are left alone.
    """
    tokens = logits.argmax(-1)
    for is_whole in (True, False):
        rows = [at for at, draw in enumerate(draws) if draw.temperature > 0 and _is_whole(draw) == is_whole]
        if rows:
            warmth = torch.tensor([draws[at].temperature for at in rows], device=logits.device)
            luck = torch.cat([torch.rand(1, generator=generators[at], dtype=torch.float64) for at in rows])
            sample = _of_all if is_whole else _of_likeliest
            probabilities = (logits[rows] / warmth[:, None]).softmax(-1)
            tokens[rows] = sample(probabilities, [draws[at] for at in rows], luck.to(logits.device))
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return list(zip(tokens.tolist(), logprobs.tolist(), strict=True))


def _is_whole(draw: Draw) -> bool:
    return draw.top_p >= 1 and not draw.top_k


def _of_all(probabilities: Any, draws: Sequence[Draw], luck: Any) -> Any:
    del draws
    return _fallen(probabilities, luck)


def _of_likeliest(probabilities: Any, draws: Sequence[Draw], luck: Any) -> Any:
    """Draw from the likeliest tokens: first from `top_k` of them, of these from the mass of `top_p`."""
    return torch.cat([_of_one(probabilities[at : at + 1], draw, luck[at : at + 1]) for at, draw in enumerate(draws)])


def _of_one(probabilities: Any, draw: Draw, luck: Any) -> Any:
    size = probabilities.shape[-1]
    ordered, order = probabilities.topk(min(draw.top_k or _LIKELIEST, size))
    if draw.top_k:
        ordered = ordered / ordered.sum()
    elif float(ordered.sum()) < draw.top_p:
        ordered, order = probabilities.sort(descending=True, stable=True)
    kept = ordered.cumsum(-1) - ordered < draw.top_p
    return order.gather(-1, _fallen(ordered * kept, luck)[:, None])[:, 0]


def _fallen(mass: Any, luck: Any) -> Any:
    """Return where in each row's cumulative mass its luck falls; tokens without mass are never drawn."""
    reached = mass.double().cumsum(-1)
    return torch.searchsorted(reached, luck[:, None] * reached[:, -1:], right=True)[:, 0]
