"""Who may ask: tokens, and addresses that need them."""

from __future__ import annotations

from pathlib import Path

import pytest

from preceptor.errors import ConfigError
from preceptor.serving.settings import Keys, refuse_exposed

TOKENS = ["first-token-of-tests", "second-token-of-tests"]


def test_a_key_opens_with_any_of_its_tokens_as_a_bearer() -> None:
    keys = Keys.of(TOKENS)
    assert [keys.open(f"Bearer {token}") for token in TOKENS] == [True, True]
    assert keys.open(f"bearer  {TOKENS[0]} ")
    wrong = [
        "",
        TOKENS[0],
        f"Basic {TOKENS[0]}",
        "Bearer ",
        f"Bearer {TOKENS[0][:-1]}",
        f"Bearer {TOKENS[0]}x",
        "Bearer \udcff",
    ]
    assert not any(keys.open(header) for header in wrong)
    assert not Keys().open(f"Bearer {TOKENS[0]}")
    assert TOKENS[0] not in repr(keys)


def test_tokens_come_from_a_file_and_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"{TOKENS[0]}\n\n{TOKENS[1]}\n", encoding="utf-8")
    assert Keys.found(file) == Keys.of(TOKENS)
    file.write_text(f"{TOKENS[0]}\r\n{TOKENS[1]}\r\n", encoding="utf-8-sig")  # as some editors write it
    monkeypatch.setenv("PRECEPTOR_TOKEN", "third-token-of-tests")
    assert Keys.found(file) == Keys.of(["third-token-of-tests", *TOKENS])
    assert Keys.found() == Keys.of(["third-token-of-tests"])
    monkeypatch.delenv("PRECEPTOR_TOKEN")
    assert not Keys.found()


def test_tokens_that_cant_be_read_or_can_be_guessed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Can't read the tokens in .*gone: FileNotFoundError"):
        Keys.found(tmp_path / "gone")
    (tmp_path / "empty").write_text(" \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no token"):
        Keys.found(tmp_path / "empty")
    with pytest.raises(ConfigError, match="fewer than 16 characters") as caught:
        Keys.of(["hunter2"])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "has_token", "is_told_twice", "is_let"),
    [
        ("127.0.0.1", False, False, True),
        ("127.0.0.2", False, False, True),
        ("::1", False, False, True),
        ("localhost", False, False, True),
        ("0.0.0.0", False, False, False),
        ("::", False, False, False),
        ("example.org", False, False, False),
        ("0.0.0.0", True, False, True),
        ("0.0.0.0", False, True, True),
    ],
)
def test_a_wider_address_needs_a_token_or_to_be_told_twice(
    host: str, has_token: bool, is_told_twice: bool, is_let: bool
) -> None:
    keys = Keys.of(TOKENS) if has_token else Keys()
    if is_let:
        refuse_exposed(host, keys, is_told_twice=is_told_twice)
        return
    with pytest.raises(ConfigError, match="twice: --no-token --anyone-may-ask"):
        refuse_exposed(host, keys, is_told_twice=is_told_twice)
