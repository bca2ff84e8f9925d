"""Options given as `name=value`, as often as there are names."""

from __future__ import annotations

from collections.abc import Iterable

from preceptor.errors import ConfigError


def pair(option: str, text: str) -> tuple[str, str]:
    """Read `name=value`.

    Raises:
        ConfigError: If there is no equals sign.
    """
    name, equals, value = text.rpartition("=") if option == "--price" else text.partition("=")
    if not equals:
        raise ConfigError(f"{option} {text!r} is not name=value.")
    return name, value


def pairs(option: str, texts: Iterable[str] | None) -> dict[str, str]:
    """Read `name=value`, as often as given.

    Raises:
        ConfigError: If one has no equals sign, or a name is given twice.
    """
    found: dict[str, str] = {}
    for name, value in (pair(option, text) for text in texts or ()):
        if name in found:
            raise ConfigError(f"{option} gives {name} twice, as {found[name]} and as {value}; give it once.")
        found[name] = value
    return found
