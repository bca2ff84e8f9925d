"""Whether a hosted model's key is there: told before anything is asked of any model."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Final

import dspy
from dspy.clients.backend_selection import select_backend
from dspy.lm15 import LMRouter, MissingCredentialError

from preceptor.errors import ConfigError

_CALLS: Final = ("__call__", "forward")
"""What a model of the user's own class answers by; it may bring a key of its own to each call."""

_BY_KEY: Final = "key"
"""The policy of providers that take a key; clouds may have other credentials, which only a call can try."""


def check_key(lm: dspy.LM) -> None:
    """Raise if a hosted model needs a key and none is set, or nobody hosts such a model; nothing is sent.

    Models in this process, servers of one's own that need none, classes with calls of their own, and providers that
    DSPy reaches through LiteLLM or that have other credentials than keys pass.

    Raises:
        ConfigError: Naming the variables, or the provider that isn't known.
    """
    is_own = any(getattr(type(lm), name) is not getattr(dspy.LM, name) for name in _CALLS)
    if is_own or not isinstance(lm.engine, str):
        return
    chosen = select_backend(lm)
    route = chosen.resolution
    if not (chosen.native or (route is not None and route.declared)):
        _check_provider(lm, chosen.clients.get("custom_llm_provider"))
    if not chosen.native or route is None or route.declared or route.credential_policy != _BY_KEY:
        return
    if chosen.clients.get("api_key"):
        return
    try:
        with LMRouter() as router:
            router.lm(f"{route.provider}:{route.model}")
    except MissingCredentialError as error:
        names = " or ".join(error.env_keys)
        raise ConfigError(
            f"{lm.model} needs a key. Set {names} in the environment; for a server of your own that needs none, to any "
            "word. No call was made."
        ) from error


def _check_provider(lm: dspy.LM, told: str | None) -> None:
    """Raise if LiteLLM, which asks where DSPy doesn't, knows no provider by the name's first part."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else the import asks the network
    from litellm import get_llm_provider, provider_list
    from litellm.exceptions import BadRequestError

    if lm.model.partition("/")[0] in provider_list:  # some of whom are asked to log in by what is below
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where it prints a list's address
            get_llm_provider(lm.model, custom_llm_provider=told, api_base=lm.kwargs.get("api_base"))
    except BadRequestError as error:
        raise ConfigError(
            f"{lm.model}: no provider {lm.model.partition('/')[0]!r} is known. Write it as openai/gpt-4o-mini; a "
            "server of your own as openai/NAME with its address. No call was made."
        ) from error
