"""Values of any kind as JSON has them, equal for equal values: in another process, too."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from dspy.adapters.utils import serialize_for_json


def plain(value: Any) -> Any:
    """Return what JSON has no word for as it can be written there, equal for equal values: for `default` of `json`.

    Example:
        >>> plain({"b", "a"}), plain(frozenset({2, 1}))
        (['a', 'b'], [1, 2])
    """
    if isinstance(value, (set, frozenset)):
        members: Iterable[Any] = value
        return sorted(map(plain, members), key=lambda member: json.dumps(member, sort_keys=True, default=str))
    return value.tolist() if hasattr(value, "tolist") else serialize_for_json(value)
