"""The seam to DSPy: its inferred types are narrower or wider than what it does, so they are set right here."""

from __future__ import annotations

import asyncio
import re
from typing import Any, Final, Protocol, Self, cast

import dspy
from dspy.clients.backend_selection import CLIENT_KEYS
from dspy.lm15 import Message, Request, Response, TextPart

from preceptor.canonical import lasting
from preceptor.errors import ConfigError, ModelError

_ENDS: Final = re.compile(r"<\s*/?\s*END\s*>|</\s*START\s*>|\n", re.IGNORECASE)

_SETTINGS: Final = (str, int, float, bool, type(None))
"""What an adapter's settings are that tell it from another."""


def predictors(program: dspy.Module) -> list[tuple[str, Any]]:
    """Return a program's predictors by name; each has `signature`, `demos`, `config` and `lm`."""
    return cast("list[tuple[str, Any]]", program.named_predictors())


def every_predictor(program: dspy.Module) -> list[tuple[str, Any]]:
    """Return a program's predictors by name, with those of frozen parts, which no method changes."""
    found = cast("list[tuple[str, Any]]", list(program.named_sub_modules(dspy.Predict)))
    return [(name.removeprefix("self."), predictor) for name, predictor in found]


def frozen_predictors(program: dspy.Module) -> list[tuple[str, Any]]:
    """Return the predictors of a program's frozen parts by name."""
    known = {id(predictor) for _, predictor in predictors(program)}
    return [(name, predictor) for name, predictor in every_predictor(program) if id(predictor) not in known]


def own_models(program: dspy.Module) -> list[tuple[str, dspy.LM]]:
    """Return the models that predictors have of their own, by predictor; those of frozen parts, too."""
    return [(name, predictor.lm) for name, predictor in every_predictor(program) if predictor.lm is not None]


def answering(program: dspy.Module, lm: dspy.LM) -> dspy.LM:
    """Return the model that answers: one that all of a program's predictors have of their own, else `lm`."""
    own = [predictor.lm for _, predictor in every_predictor(program)]
    is_shared = own and all(each is not None and state_of(each) == state_of(own[0]) for each in own)
    return own[0] if is_shared else lm


def state_of(lm: dspy.LM) -> list[Any]:
    """Return what a model's answers depend on, to be fingerprinted: its name and settings."""
    return [lm.model, lasting(settings_of(lm))]


def adapter_state() -> list[Any]:
    """Return what the adapter in use adds to what answers depend on, to be fingerprinted: nothing if it is DSPy's own.

    That is its class and its settings that are texts, numbers and models.
    """
    found, usual = _adapted(dspy.settings.adapter), _adapted(dspy.ChatAdapter())
    return [] if found in (None, usual) else [found]


def _adapted(adapter: dspy.Adapter | None) -> list[Any] | None:
    if adapter is None:
        return None
    models = {name: state_of(value) for name, value in vars(adapter).items() if isinstance(value, dspy.LM)}
    settings = {name: value for name, value in vars(adapter).items() if isinstance(value, _SETTINGS)}
    return [type(adapter).__qualname__, settings | models]


def settings_of(lm: dspy.LM) -> dict[str, Any]:
    """Return the settings an LM sends with each call, without those of its connection."""
    return {name: value for name, value in lm.kwargs.items() if name not in CLIENT_KEYS}


def load_weights(lm: dspy.LM) -> None:
    """Have a model in this process read its weights now, and not when it is first asked.

    Raises:
        ModelError: If they can't be read.
    """
    load = getattr(lm.engine, "load", None)
    if callable(load):
        load()


def has_address(lm: dspy.LM) -> bool:
    """Return True for a model that is asked at an address of its own, not at its provider's."""
    return bool(lm.kwargs.get("api_base") or lm.kwargs.get("base_url"))


def given_settings(lm: dspy.LM) -> dict[str, Any]:
    """Return the settings of `settings_of` as they make another `dspy.LM` like it."""
    settings = settings_of(lm)
    if "max_completion_tokens" in settings:  # what dspy.LM makes of max_tokens for reasoning models
        settings["max_tokens"] = settings.pop("max_completion_tokens")
    return settings


def text_of_parts(parts: Any) -> str:
    """Return a message's or a system prompt's text, whether it came as one text or in parts."""
    if not parts:
        return ""
    return parts if isinstance(parts, str) else "".join(str(part.text) for part in parts)


def only_text(message: Message) -> str:
    """Return a message's text.

    Raises:
        ConfigError: If it holds something else, such as an image, which a model in this process can't read.
    """
    other = next((part.type for part in message.parts if not isinstance(part, TextPart)), None)
    if other is not None:
        raise ConfigError(f"A model in this process reads text only, and a message holds a part of type {other}.")
    return message.text or ""


def mean_log_probability(response: Response) -> float:
    """Return log P of the chosen text per token, at most 0, from an answer to a request with choices.

    Raises:
        ModelError: If the answer carries none.
    """
    logprobs, tokens = response.logprobs, response.usage.output_tokens
    if not logprobs or not tokens:
        raise ModelError("This answer carries no log-probability of a choice.")
    return float(logprobs[0].logprob / tokens)


def said(message: Message) -> str:
    """Return what a model answered, without what it thought before: a message's own `text` is None where it did.

    Half a character, as an answer that was cut off may end in, is left out: no request may hold one.
    """
    text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
    return text.encode("utf-8", "ignore").decode()


def sampled(model: str, engine: object, temperature: float, top_p: float) -> dict[str, float]:
    """Return the settings of a request whose answer is drawn so.

    A hosted model is sent `top_p` only where it leaves something out, and one of Anthropic's never: they refuse it
    beside a temperature.

    Args:
        model: Its name.
        engine: An object that answers in this process, or the name of DSPy's.
        temperature: Above 0 for a draw.
        top_p: Mass of the likeliest tokens to draw from.
    """
    is_anthropic = "anthropic" in model or "claude" in model
    if isinstance(engine, str) and (is_anthropic or top_p >= 1):
        return {"temperature": temperature}
    return {"temperature": temperature, "top_p": top_p}


def whole(response: Response) -> str | None:
    """Return an answer's text; of one cut at its bound what is whole, up to a closing tag or the end of a line."""
    text = said(response.message)
    if response.finish_reason != "length":
        return text
    ends = [end.end() for end in _ENDS.finditer(text)]
    return text[: ends[-1]] if ends else None


class Engine(Protocol):
    """What DSPy asks of an engine."""

    def complete(self, request: Request) -> Response:
        """Answer one request."""
        ...


class Around:
    """The part of an engine around another model that says what the model itself says.

    Args:
        lm: The model.
    """

    takes_requests = True

    def __init__(self, lm: dspy.LM) -> None:
        self.lm = lm
        self.supports_choices = bool(getattr(lm.engine, "supports_choices", False))

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    def supports_function_calling(self) -> bool:
        """As the model says."""
        return bool(self.lm.supports_function_calling)

    @property
    def supports_reasoning(self) -> bool:
        """As the model says."""
        return bool(self.lm.supports_reasoning)

    @property
    def supports_response_schema(self) -> bool:
        """As the model says."""
        return bool(self.lm.supports_response_schema)

    @property
    def supported_params(self) -> set[str]:
        """As the model says."""
        return set(self.lm.supported_params)


class InThread:
    """The asynchronous door to an engine: each request waits in a thread, not in the event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __deepcopy__(self, memo: dict[int, Any]) -> InThread:
        return self

    async def complete(self, request: Request) -> Response:
        """Answer one request."""
        return await asyncio.to_thread(self._engine.complete, request)
