"""Values of any kind as JSON has them, equal for equal values: in another process, too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dspy.adapters.utils import serialize_for_json


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


def written(value: Mapping[str, Any]) -> bytes:
    r"""Return JSON for people to read, the fields in the order they have.

    Example:
        >>> written({"b": {2, 1}, "a": "é"}).decode()
        '{\n  "b": [\n    1,\n    2\n  ],\n  "a": "é"\n}\n'

    Raises:
        ValueError: If a text holds half a character.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, default=plain).encode() + b"\n"
