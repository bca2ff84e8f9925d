"""Secrets in texts from outside: servers repeat keys in their errors, and addresses hold passwords."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import dspy
from dspy.clients.backend_selection import CLIENT_KEYS

from preceptor.errors import ConfigError

HIDDEN: Final = "[hidden]"

_SETTINGS: Final = ("api_key", "api_base", "base_url", "headers", "extra_headers", "extra_query", "organization")
_VARIABLE: Final = re.compile("key|token|secret|passw|credential", re.IGNORECASE)
_TOKEN: Final = re.compile(r"\b(?:sk-[\w-]{6,}|(?<=bearer )[\w.~+/=-]{6,}|(?<=basic )[\w+/=]{6,})", re.IGNORECASE)
CONNECTION: Final = frozenset(CLIENT_KEYS)
"""Settings of `dspy.LM` that belong to the connection."""

_SECRET_NAME: Final = re.compile(r"key\b|key_|secret|passw|credential|token\b|authorization", re.IGNORECASE)
_NO_SECRETS: Final = {"prompt_cache_key"}
_SHORTEST: Final = 4
"""Characters of a secret; shorter ones would hide words that say what went wrong."""

_SHORTEST_VARIABLE: Final = 8
"""Characters of a variable of the environment that counts as a secret; switches like `true` are shorter."""


def hidden(text: str, lm: dspy.LM) -> str:
    """Return a text without anything that may be a secret of the model's connection.

    Looked for are what the model was given as key, address, headers and query, what the environment holds under
    names like those of keys, and what has the form of a key.

    Example:
        >>> lm = dspy.LM("openai/x", api_key="k-1234", api_base="http://me:pass@localhost/v1")
        >>> hidden("Wrong key k-1234, Bearer k-1234. No route to me:pass@localhost.", lm)
        'Wrong key [hidden], Bearer [hidden]. No route to [hidden]@localhost.'
    """
    for secret in sorted(_secrets(lm), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _TOKEN.sub(HIDDEN, text)


def refuse_secrets(owner: str, settings: Mapping[str, Any], kept: frozenset[str] = frozenset()) -> None:
    """Raise if a setting that is sent and recorded with every call is a secret, by its name.

    Args:
        owner: Whose settings these are, for the message.
        settings: As given to `dspy.LM` or to a predictor.
        kept: Settings that belong to the connection, which is recorded nowhere.

    Raises:
        ConfigError: Naming the setting and where its value belongs.
    """
    for name in _secret_names({name: value for name, value in settings.items() if name not in kept}):
        raise ConfigError(
            f"{owner} is given {name}, which would be recorded with every call. Put its value into the environment "
            "variable that the provider documents, or give it to dspy.LM as api_key or in extra_headers."
        )


def _secret_names(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if _SECRET_NAME.search(name) and name not in _NO_SECRETS and value is not None:
            yield name
        elif isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in _secret_names(value))


def without_address(name: str) -> str:
    """Return a model's name without an address in it.

    Example:
        >>> without_address("openai/gpt-4o-mini"), without_address("hf://org/model")
        ('openai/gpt-4o-mini', '')
    """
    return re.sub(r"\w+://.*", "", name)


def without_credentials(address: str) -> str:
    """Return an address without user, password and query.

    Example:
        >>> without_credentials("https://me:pass@host:8000/v1?key=k-1234")
        'https://host:8000/v1'
    """
    return re.sub(r"(?<=//)[^/?#]*@", "", address.partition("?")[0])


def _secrets(lm: dspy.LM) -> set[str]:
    kwargs: Mapping[str, Any] = lm.kwargs
    given = [text for name in _SETTINGS for text in _texts(kwargs.get(name))]
    for provider in getattr(lm, "_providers", ()):
        access = provider.definition.access
        given += [*_texts(dict(access.headers)), *(os.environ.get(name, "") for name in access.env_keys)]
    given += [
        value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= _SHORTEST_VARIABLE
    ]
    parts = {part for text in given for part in _parts(text)}
    parts |= set(map(unquote, parts))
    return parts | {quote(part, safe="") for part in parts}


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a setting: a text, a mapping of them, or an object that holds a credential."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _texts({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})


def _parts(text: str) -> Iterator[str]:
    """Yield a setting's text and the parts of it that are secrets by themselves."""
    kind, _, token = text.partition(" ")
    parts = [text, token if kind.casefold() in ("bearer", "basic") else ""]
    with contextlib.suppress(ValueError):  # no address
        address = urlsplit(text)
        user = address.netloc.rpartition("@")[0]
        parts += [user, address.password or "", base64.b64encode(unquote(user).encode()).decode()]
        parts += [value for _, value in parse_qsl(address.query)]
    yield from (part for part in parts if len(part) >= _SHORTEST)
