"""Soft tokens: made-up token embeddings that stand just before the text of a prompt.

They travel in the request, as `config.extensions["embeddings"]`: the ledger keeps them with the answer, and the
meter counts them. An engine that takes them says so by an attribute `embedding_space`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, cast

from dspy.lm15 import Request

from preceptor.errors import ConfigError

SoftTokens: TypeAlias = Sequence[Sequence[float]]
"""One vector a token, each as wide as the model's embeddings."""

_NAME: Final = "embeddings"


@dataclass(frozen=True, slots=True)
class EmbeddingSpace:
    """What a model's token embeddings look like.

    Attributes:
        width: Numbers in one embedding.
        norm: Median length of the embeddings of its vocabulary.
    """

    width: int
    norm: float


def takes_none(model: str) -> ConfigError:
    """Return the error of a proposer that takes no soft tokens."""
    return ConfigError(
        f"Soft tokens need a proposer in this process; {model} only reads text. "
        "Pass proposer=preceptor.LocalLM('qwen2.5-coder-1.5b'), or --proposer local/qwen2.5-coder-1.5b."
    )


def with_soft_tokens(request: Request, tokens: SoftTokens) -> Request:
    """Return a request with soft tokens just before its last message's text."""
    extensions = {**(request.config.extensions or {}), _NAME: [list(token) for token in tokens]}
    return dataclasses.replace(request, config=dataclasses.replace(request.config, extensions=extensions))


def soft_tokens(request: Request) -> tuple[tuple[float, ...], ...]:
    """Return a request's soft tokens, empty if it has none."""
    given = cast("SoftTokens", (request.config.extensions or {}).get(_NAME, ()))
    return tuple(tuple(token) for token in given)
