"""What a call can cost at most, and what it did cost: tokens by each provider's rule, dollars by the model's price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, cast

import dspy
from dspy.clients.backend_selection import select_backend
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from preceptor.errors import ConfigError, InputTooLong
from preceptor.lm.budget import Cost
from preceptor.lm.prices import Prices, price
from preceptor.lm.seam import said
from preceptor.lm.soft import soft_tokens

_TEMPLATE_BYTES: Final = 64
"""Room per message for a chat template's own tokens, where the tokenizer isn't at hand."""

_THINKS_APART: Final = ("gemini", "vertex", "vertex-express", "xai")
"""Providers whose output tokens leave out what the model thought."""

_MEDIA: Final = ("image", "audio", "video", "document", "binary")


class Counting(Protocol):
    """An engine that counts a prompt's tokens itself."""

    supports_choices: bool

    def count_tokens(self, request: Request) -> int:
        """Return the length of a request's prompt in tokens."""
        ...


def bound(lm: dspy.LM, request: Request, engine: Counting | None, by_hand: Prices) -> Cost:
    """Return the most one call can cost.

    Prompt tokens are counted where the tokenizer is at hand, else bounded by the prompt's bytes: no
    tokenizer makes more tokens than that. Output is bounded by `max_tokens`, and a choice by its bytes.

    Args:
        lm: Who is asked.
        request: What.
        engine: The model's own, where it counts tokens.
        by_hand: Prices.

    Raises:
        ConfigError: If the prompt holds an image or the like, whose tokens no rule of ours bounds, or if neither
            `max_tokens` nor choices bound the answer.
    """
    try:
        prompt = most_tokens(request) if engine is None else engine.count_tokens(request)
    except InputTooLong:  # the engine refuses it, at no cost
        return Cost(1)
    answer = request.config.max_tokens
    if engine is not None and engine.supports_choices:
        choices = cast("Sequence[str]", (request.config.extensions or {}).get("choices") or ())
        answer = max((_bytes(choice) + 1 for choice in choices), default=answer)  # and what ends it
    if answer is None:
        raise ConfigError(
            f"A budget of tokens or dollars can't bound a call of {lm.model} that says no max_tokens. "
            "Say it, or budget calls or minutes."
        )
    return Cost(1, prompt + answer, price(lm, prompt, answer, by_hand))


def cost(lm: dspy.LM, request: Request, response: Response, by_hand: Prices) -> Cost:
    """Return what an answer took; the most it can have taken where the provider doesn't say.

    Tokens the provider cached cost as much as others here.
    """
    given, made = taken(lm, response.usage)
    if given is None:
        given = sum(map(_most, request.messages)) + _most_of_system(request)
    if made is None:
        made = request.config.max_tokens or len(said(response.message).encode())
    return Cost(1, given + made, price(lm, given, made, by_hand))


def taken(lm: dspy.LM, usage: Usage) -> tuple[int | None, int | None]:
    """Return the tokens read and written, each None where the provider doesn't say.

    DSPy hands on what the provider reports: Anthropic's input leaves out what was cached, Gemini's and xAI's output
    what the model thought.
    """
    given, made = usage.input_tokens, usage.output_tokens
    cached, thought = (usage.cache_read_tokens or 0) + (usage.cache_write_tokens or 0), usage.reasoning_tokens or 0
    provider = _provider(lm) if cached or thought else ""
    if given is not None and "anthropic" in provider:
        given += cached
    if made is not None and provider in _THINKS_APART:
        made += thought
    return given, made


def most_tokens(request: Request) -> int:
    """Return a bound on a prompt's tokens where the tokenizer isn't at hand: its bytes, and room for a template.

    Tools and the schema of the answer are part of it.

    Raises:
        ConfigError: If the prompt holds an image or the like.
    """
    media = [part.type for message in request.messages for part in message.parts if part.type in _MEDIA]
    if media:
        raise ConfigError(
            f"A budget of tokens or dollars can't bound what a prompt with {media[0]} input takes; "
            "budget calls or minutes."
        )
    beside = [*request.tools, request.config.response_format or ""]  # which providers count as they do the prompt
    return (
        sum(map(_most, request.messages))
        + _most_of_system(request)
        + sum(_bytes(str(each)) for each in beside)
        + len(soft_tokens(request))
    )


def _most(message: Message) -> int:
    texts = [
        part.text if isinstance(part, TextPart) else repr(part) for part in message.parts if part.type not in _MEDIA
    ]
    return sum(map(_bytes, texts)) + _TEMPLATE_BYTES


def _most_of_system(request: Request) -> int:
    return _bytes(str(request.system or "")) + _TEMPLATE_BYTES


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _provider(lm: dspy.LM) -> str:
    """Return whose counters a model's answers carry, "" where they are made alike on the way."""
    if not isinstance(lm.engine, str):
        return ""
    chosen = select_backend(lm)
    return str(getattr(chosen.resolution, "provider", "")) if chosen.native else ""
