"""An engine whose model is in another process: what it says of itself, and how it is asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Self, TypeAlias, cast

import dspy
from dspy.lm15 import Request, Response

from preceptor.lm.meter import batching_engine
from preceptor.lm.seam import InThread
from preceptor.lm.soft import EmbeddingSpace
from preceptor.lm.usage import most_tokens

Result: TypeAlias = Response | Exception

_FLAGS: Final = ("supports_choices", "supports_function_calling", "supports_reasoning", "supports_response_schema")


class Elsewhere(ABC):
    """A DSPy engine that passes on what it is asked; deep copies are the engine itself.

    Args:
        facts: What the model says of itself (`facts`).
    """

    supports_choices: bool
    supports_function_calling: bool
    supports_reasoning: bool
    supports_response_schema: bool

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.supported_params = frozenset(facts["supported_params"])
        for name in _FLAGS:
            setattr(self, name, bool(facts[name]))

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def complete(self, request: Request) -> Response:
        """Answer one request."""
        [[(_, result)]] = self.batches([request])
        if isinstance(result, Exception):
            raise result
        return result

    @abstractmethod
    def batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Result]]]:
        """Yield (index, answer or error) pairs after each batch that the model has executed."""


def facts(lm: dspy.LM) -> dict[str, Any]:
    """Return what a model says of itself, to be sent to who asks it from elsewhere."""
    flags = {name: getattr(lm.engine, name, False) for name in _FLAGS}
    known = {"model": lm.model, "settings": dict(lm.kwargs)}
    return {**flags, **known, "supported_params": set(getattr(lm.engine, "supported_params", ()))}


def count_tokens(lm: dspy.LM, request: Request) -> int:
    """Return the length of a request's prompt in tokens, or a bound on it."""
    engine = batching_engine(lm)
    return most_tokens(request) if engine is None else engine.count_tokens(request)


def embedding_space(lm: dspy.LM) -> EmbeddingSpace | None:
    """Return what soft tokens for a model have to look like; None if it takes none."""
    return getattr(lm.engine, "embedding_space", None)


def asked_at(engine: Elsewhere, facts: Mapping[str, Any]) -> dspy.LM:
    """Return a `dspy.LM` on such an engine; its name and settings are the model's own."""
    settings = cast("dict[str, Any]", facts["settings"])
    return dspy.LM(facts["model"], engine=engine, async_engine=InThread(engine), cache=False, num_retries=0, **settings)
