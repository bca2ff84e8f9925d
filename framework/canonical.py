"""Values of any kind as JSON has them, equal for equal values: in another process, too."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from dspy.adapters.utils import serialize_for_json
from pydantic import TypeAdapter

_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")
CONSTANTS: Final = (str, bytes, bool, int, float, type(None))
"""What of an object tells it from another in every process."""


def plain(value: Any) -> Any:
    """Return a value as JSON has it, equal for equal values: a set sorted, an enumeration's value; `default` of `json`.

    Example:
        >>> plain({"b", "a"}), plain(frozenset({2, 1}))
        (['a', 'b'], [1, 2])
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, (set, frozenset)):
        members: Iterable[Any] = value
        return sorted(map(plain, members), key=lambda member: json.dumps(member, sort_keys=True, default=str))
    return value.tolist() if hasattr(value, "tolist") else serialize_for_json(value)


def keyed(value: Any, each: Callable[[Any], Any] | None = None) -> Any:
    """Return a value whose mappings can be written as JSON with their keys sorted, whatever the keys are.

    Args:
        value: Mappings and lists in one another, as far as they go.
        each: Called for what is in them and is neither.

    Example:
        >>> keyed([{(1, 2): "a"}, {1: "b", "2": "c"}, {10: "d", 9: "e"}])
        [{'[1, 2]': 'a'}, {'1': 'b', '2': 'c'}, {10: 'd', 9: 'e'}]
    """
    if isinstance(value, dict):
        known: dict[Any, Any] = value
        is_sortable = any(all(isinstance(key, kind) for key in known) for kind in (str, (int, float)))
        return {key if is_sortable else _text(key): keyed(inner, each) for key, inner in known.items()}
    if isinstance(value, (list, tuple)):
        members: Iterable[Any] = value
        return [keyed(inner, each) for inner in members]
    return value if each is None else each(value)


def _text(key: Any) -> str:
    return key if isinstance(key, str) else json.dumps(key, default=plain)


def lasting(value: Any) -> Any:
    """Return a value as JSON has it, equal for equal values in another process, too: to be fingerprinted.

    An object that only its address tells from others is told by its attributes that are texts and numbers.

    Example:
        >>> lasting({"tools": [len, lasting], "seen": {"b", "a"}})
        {'tools': ['<built-in function len>', '<function lasting>'], 'seen': ['a', 'b']}
    """
    return keyed(value, _lasting)


def _lasting(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (set, frozenset)):
        members: Iterable[Any] = value
        return sorted(map(lasting, members), key=lambda member: json.dumps(member, sort_keys=True, default=str))
    if hasattr(value, "tolist"):
        return value.tolist()
    try:
        return TypeAdapter(type(value)).dump_python(value, mode="json", fallback=_named)
    except Exception:  # noqa: BLE001  as DSPy's own: a value's type is the user's
        return _named(value)


def _named(value: Any) -> str:
    """Return what a value's text says without its address, which is another in every process."""
    told = str(value)
    name = without_addresses(told)
    own = {key: each for key, each in getattr(value, "__dict__", {}).items() if isinstance(each, CONSTANTS)}
    if name == told or not own:
        return name
    return f"{name} {hashlib.blake2b(repr(sorted(own.items())).encode(errors='replace'), digest_size=8).hexdigest()}"


def without_addresses(text: str) -> str:
    """Return a text without the places in memory of the objects it names.

    Example:
        >>> without_addresses("AfterValidator(func=<function check at 0x7f31c2a0>)")
        'AfterValidator(func=<function check>)'
    """
    return _ADDRESS.sub("", text)


def written(value: Mapping[str, Any]) -> bytes:
    r"""Return JSON for people to read, the fields in the order they have.

    Example:
        >>> written({"b": {2, 1}, "a": "é"}).decode()
        '{\n  "b": [\n    1,\n    2\n  ],\n  "a": "é"\n}\n'

    Raises:
        ValueError: If a text holds half a character.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, default=plain).encode() + b"\n"
