"""A missing key is told before the first call."""

from __future__ import annotations

from typing import Any

import dspy
import pytest

from preceptor.errors import ConfigError
from preceptor.lm.credentials import check_key
from preceptor.testing.models import Simulated

HOSTED = {
    "openai/gpt-4o-mini": "OPENAI_API_KEY",
    "anthropic/claude-3-5-haiku-20241022": "ANTHROPIC_API_KEY",
    "groq/llama-3.1-8b-instant": "GROQ_API_KEY",
    "gemini/gemini-2.0-flash": "GEMINI_API_KEY or GOOGLE_API_KEY",
}


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in HOSTED.values():
        for name in names.split(" or "):
            monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("model", "names"), HOSTED.items())
def test_a_hosted_model_without_its_key_is_refused_with_the_name_of_the_variable(model: str, names: str) -> None:
    with pytest.raises(ConfigError) as told:
        check_key(dspy.LM(model))
    assert str(told.value) == (
        f"{model} needs a key. Set {names} in the environment; for a server of your own that needs none, to any word. "
        "No call was made."
    )


def test_a_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "OPENAI_API_KEY" in refused(dspy.LM("openai/gpt-4o-mini"))
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert refused(dspy.LM("openai/gpt-4o-mini")) == ""


def test_any_of_a_providers_variables_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_API_KEY", "k")
    assert refused(dspy.LM("gemini/gemini-2.0-flash")) == ""


def test_an_empty_variable_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        check_key(dspy.LM("openai/gpt-4o-mini"))


def refused(lm: dspy.LM) -> str:
    """Return what is said against a model, "" if nothing is."""
    try:
        check_key(lm)
    except ConfigError as error:
        return str(error)
    return ""


class Gateway(dspy.LM):
    """Brings a key to each call."""

    def forward(self, *given: Any, **settings: Any) -> Any:
        return super().forward(*given, api_key="k", **settings)


def test_a_class_with_calls_of_its_own_may_bring_a_key_to_them() -> None:
    assert refused(Gateway("openai/gpt-4o-mini")) == ""


def test_a_server_of_ones_own_under_openais_name_needs_one_too() -> None:
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        check_key(dspy.LM("openai/mine", api_base="http://127.0.0.1:9/v1"))


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "openai/gpt-4o-mini", "api_key": "k"},
        {"model": "hosted_vllm/mine"},
        {"model": "ollama_chat/mine"},
        {"model": "azure/mine"},
        {"model": "bedrock/mine"},
        {"model": "github_copilot/gpt-4o"},
        {"model": "mine", "api_base": "http://127.0.0.1:9/v1", "custom_llm_provider": "openai"},
        {"model": "custom/mine", "api_base": "http://127.0.0.1:9/v1"},
        {"model": "mistral/mistral-large-latest"},
        {"model": "none/none", "engine": Simulated(lambda request: "", "none")},
    ],
    ids=lambda settings: settings["model"],
)
def test_others_pass_as_a_key_was_passed_or_none_is_needed_or_only_a_call_can_tell(settings: dict[str, Any]) -> None:
    assert refused(dspy.LM(**settings)) == ""


def test_a_provider_that_nobody_knows_is_refused_at_once() -> None:
    told = "opena/gpt-4o: no provider 'opena' is known. Write it as openai/gpt-4o-mini; a server of your own as "
    assert refused(dspy.LM("opena/gpt-4o")).startswith(told)
