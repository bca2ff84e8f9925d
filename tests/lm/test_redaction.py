"""Secrets are taken out of texts that servers send."""

from __future__ import annotations

import re
from typing import Any

import dspy
import pytest
from dspy._vendor.lm15.credentials import AwsCredentials, BearerToken

from preceptor.errors import ConfigError
from preceptor.lm.redaction import CONNECTION, hidden, refuse_secrets, without_credentials

SECRET = "correct-horse/battery+staple"


def lm(**settings: Any) -> dspy.LM:
    return dspy.LM("openai/x", cache=False, **settings)


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"api_key": SECRET},
        {"api_key": BearerToken(SECRET)},
        {"api_key": AwsCredentials("id", SECRET)},
        {"headers": {"Authorization": SECRET}},
        {"extra_headers": {"Authorization": f"Bearer {SECRET}"}},
        {"extra_query": {"key": SECRET}},
        {"api_base": f"https://host/v1?key={SECRET.replace('+', '%2B')}"},
        {"api_base": f"https://me:{SECRET.replace('/', '%2F')}@host/v1"},
    ],
    ids=["key", "token", "credentials", "header", "bearer", "query", "address query", "password"],
)
@pytest.mark.parametrize("said", [SECRET, "correct-horse%2Fbattery%2Bstaple"], ids=["plain", "quoted"])
def test_a_secret_in_a_setting_is_hidden_as_it_is_and_quoted(settings: dict[str, Any], said: str) -> None:
    assert hidden(f"Wrong key {said}!", lm(**settings)) == "Wrong key [hidden]!"


def test_a_password_is_hidden_in_the_form_of_basic_authorization() -> None:
    assert hidden("You sent Basic bWU6cGFzcw==.", lm(api_base="http://me:pass@host/v1")) == "You sent Basic [hidden]."


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "HF_TOKEN", "DB_PASSWORD"])
def test_what_the_environment_keeps_under_the_name_of_a_secret_is_hidden(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, SECRET)
    assert hidden(f"Wrong key {SECRET}!", lm()) == "Wrong key [hidden]!"


@pytest.mark.parametrize("text", ["Bearer eyJhbGciOi.abc-def_x", "bearer abcdefg", "Basic dXNlcjpwYXNz"])
def test_what_looks_like_a_token_is_hidden_wherever_it_came_from(text: str) -> None:
    assert hidden(text, lm()) == f"{text.split()[0]} [hidden]"
    assert hidden("key sk-ant-REDACTED.", lm()) == "key [hidden]."


def test_everything_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    message = "[openai/x] 429: rate limit of 10 tokens is false at http://host/v1, ask-me about basics and bearers."
    assert hidden(message, lm(api_key="x", timeout=10, api_version="429")) == message


@pytest.mark.parametrize(
    ("address", "rest"),
    [
        ("https://me:pass@host:8000/v1?key=k#x", "https://host:8000/v1"),
        ("https://token@host", "https://host"),
        ("http://127.0.0.1:80/a@b", "http://127.0.0.1:80/a@b"),
        ("http://a@b:c@host/", "http://host/"),
    ],
)
def test_an_address_keeps_host_port_and_path(address: str, rest: str) -> None:
    assert without_credentials(address) == rest


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"aws_secret_access_key": SECRET}, "aws_secret_access_key"),
        ({"aws_access_key_id": "AKIA"}, "aws_access_key_id"),
        ({"aws_session_token": SECRET}, "aws_session_token"),
        ({"vertex_credentials": SECRET}, "vertex_credentials"),
        ({"extra_body": {"auth": {"apikey": SECRET}}}, "extra_body.auth.apikey"),
    ],
)
def test_a_secret_that_would_be_recorded_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^The model is given {re.escape(named)}, which would be recorded"):
        refuse_secrets("The model", settings)


def test_settings_of_the_connection_and_numbers_of_tokens_are_no_secrets_to_refuse() -> None:
    settings = {"api_key": SECRET, "max_tokens": 9, "max_completion_tokens": 9, "prompt_cache_key": "a", "top_k": 3}
    refuse_secrets("The model", settings, CONNECTION)
    with pytest.raises(ConfigError, match="is given api_key,"):
        refuse_secrets("The predictor", settings)
