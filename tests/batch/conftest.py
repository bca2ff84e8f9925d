from __future__ import annotations

from collections.abc import Sequence

import pytest

from preceptor.lm.embedding import Embedder
from preceptor.regions import Router, divided


def by_prize(texts: Sequence[str]) -> list[list[float]]:
    """Embed a text by whether it is about a prize."""
    return [[1.0, 0.0] if "prize" in text else [0.0, 1.0] for text in texts]


@pytest.fixture
def two_regions() -> Router:
    """Prizes are region 1, all else is region 2."""
    embedder = Embedder("by-prize", by_prize)
    rows = [*["a prize"] * 6, *["lunch"] * 5]
    return divided(embedder(rows), 2, least_rows=2, seed=0).router(embedder, ("text",))
