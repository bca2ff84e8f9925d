"""What a server allows, and whom."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from preceptor.errors import ConfigError

VARIABLE: Final = "PRECEPTOR_TOKEN"
"""Of the environment: tokens, separated by white space."""

SHORTEST: Final = 16
"""Characters of a token; shorter ones can be guessed."""

_LEAST: Final = {"queue": 0.0, "seconds": 0.001, "drain_seconds": 0.0}
"""Of a limit, where it isn't 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one server takes on.

    Attributes:
        concurrency: Rows that are being answered at a time.
        queue: Requests that wait for that; further ones get 429.
        body_bytes: Of one request; more gets 413.
        batch_rows: Of one request; more gets 422.
        seconds: From a request's arrival to its answer, for each row of a batch from its turn; longer gets 504.
            Sending the request may take as long (408).
        output_tokens: Most tokens a model may write in one call.
        drain_seconds: How long requests in flight are waited for when the server is told to stop.

    Raises:
        ConfigError: If a bound is out of range.
    """

    concurrency: int = 64
    queue: int = 256
    body_bytes: int = 1_000_000
    batch_rows: int = 256
    seconds: float = 60.0
    output_tokens: int = 2048
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            least, value = _LEAST.get(name, 1), getattr(self, name)
            if not math.inf > value >= least:
                raise ConfigError(f"A server needs {name} >= {least:g} and finite, got {value:g}.")


@dataclass(frozen=True, slots=True)
class Keys:
    """The tokens that open a server; only their hashes are kept.

    Attributes:
        digests: SHA-256 of each token; none, and anybody may ask.
    """

    digests: tuple[bytes, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.digests)

    @classmethod
    def of(cls, tokens: list[str]) -> Keys:
        """Return the keys for these tokens.

        Raises:
            ConfigError: If one is shorter than 16 characters; it isn't repeated.
        """
        if any(len(token) < SHORTEST for token in tokens):
            raise ConfigError(
                f"A token has fewer than {SHORTEST} characters. Make one: "
                'python -c "import secrets; print(secrets.token_urlsafe(32))".'
            )
        return cls(tuple(hashlib.sha256(token.encode()).digest() for token in tokens))

    @classmethod
    def found(cls, file: Path | None = None) -> Keys:
        """Return the keys of a file, one token a line, and of the environment variable `PRECEPTOR_TOKEN`.

        Raises:
            ConfigError: If the file can't be read or holds no token, or a token is too short.
        """
        tokens = os.environ.get(VARIABLE, "").split()
        if file is not None:
            try:
                lines = file.read_text(encoding="utf-8-sig").split()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"Can't read the tokens in {file}: {type(error).__name__}.") from error
            if not lines:
                raise ConfigError(f"{file} holds no token; write one a line.")
            tokens += lines
        return cls.of(tokens)

    def open(self, authorization: str) -> bool:
        """Return True if an `Authorization` header holds one of the tokens; takes equally long for all wrong ones."""
        scheme, _, token = authorization.partition(" ")
        given = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self.digests]
        return scheme.lower() == "bearer" and any(matches)


def is_loopback(host: str) -> bool:
    """Return True if a name or an address is this machine's own, which nobody else can reach.

    Example:
        >>> [is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1", "0.0.0.0", "example.org")]
        [True, True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refuse_exposed(host: str, keys: Keys, *, is_told_twice: bool) -> None:
    """Raise if strangers could ask a model at the owner's expense.

    Raises:
        ConfigError: If the host isn't loopback, there is no token, and the user didn't say twice that it is meant.
    """
    if is_loopback(host) or keys or is_told_twice:
        return
    raise ConfigError(
        f"On {host} anybody who reaches this machine could use your model. Set a token, {VARIABLE}=... or "
        "--token-file FILE; or say that it is meant, twice: --no-token --anyone-may-ask."
    )
