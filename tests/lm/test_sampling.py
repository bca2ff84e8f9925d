"""Drawing tokens: as often as they are likely, and whoever shares the batch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from preceptor.lm import sampling
from preceptor.lm.sampling import Draw

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def shares(count: int, logits: torch.Tensor = LOGITS, **settings: Any) -> dict[int, float]:
    """Return how often each token is drawn, by one generator a draw."""
    draws = [Draw((1,), max_tokens=1, temperature=1.0, **settings)] * count
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    found = Counter(token for token, _ in sampling.drawn(logits.expand(count, -1), draws, generators))
    return {token: found[token] / count for token in sorted(found)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}),
        ({"top_k": 2}, {0: 0.625, 1: 0.375}),
        ({"top_p": 0.9}, {0: 0.526, 1: 0.316, 2: 0.158}),
        ({"top_k": 3, "top_p": 0.7}, {0: 0.625, 1: 0.375}),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(settings: dict[str, Any], expected: dict[int, float]) -> None:
    assert shares(4000, **settings) == pytest.approx(expected, abs=0.03)


def test_temperature_sharpens_and_zero_takes_the_likeliest() -> None:
    draws = [Draw((1,), max_tokens=1, temperature=temperature) for temperature in (0.0, 0.1)]
    generators = [torch.Generator().manual_seed(1) for _ in draws]
    found = sampling.drawn(LOGITS.expand(2, -1), draws, generators)
    assert [token for token, _ in found] == [0, 0]
    assert [logprob for _, logprob in found] == pytest.approx([-0.693, -0.693], abs=1e-3)


def test_mass_beyond_the_first_tokens_in_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_LIKELIEST", 2)
    assert shares(4000, top_p=0.9) == pytest.approx({0: 0.526, 1: 0.316, 2: 0.158}, abs=0.03)


def test_a_row_draws_the_same_whoever_shares_its_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 50)
    draws = [
        Draw((1,), max_tokens=1, temperature=1.0, top_p=top_p, top_k=top_k)
        for top_p, top_k in ((1.0, 0), (0.9, 0), (1.0, 7), (0.5, 9), (1.0, 0))
    ]

    def drawn(rows: list[int]) -> list[tuple[int, float]]:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return sampling.drawn(logits[rows], [draws[row] for row in rows], generators)

    together = drawn([0, 1, 2, 3, 4])
    assert [drawn([row])[0][0] for row in range(5)] == [token for token, _ in together]
