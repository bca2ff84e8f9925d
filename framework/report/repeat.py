"""How a run is repeated: the command it was started by, as it would be typed."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any, Final

_NAMES: Final = {"validation": "val", "columns": "column", "prices": "price", "knobs": "set"}
"""Of options that are called otherwise in `run.json`."""


def command(asked: Mapping[str, Any]) -> str:
    r"""Return the command line of what `run.json` keeps of it, an option a line.

    Example:
        >>> print(command({"target": "text -> label", "data": "rows.csv", "knobs": {"candidates": "20"}, "lm": None}))
        preceptor compile 'text -> label' \
          --data rows.csv \
          --set candidates=20
    """
    given = {name: value for name, value in asked.items() if name != "target"}
    options = [
        f"--{_NAMES.get(name, name.replace('_', '-'))} {shlex.quote(each)}"
        for name, value in given.items()
        for each in _values(value)
    ]
    return " \\\n  ".join([f"preceptor compile {shlex.quote(str(asked.get('target', '')))}", *options])


def _values(value: Any) -> Iterable[str]:
    if isinstance(value, Mapping):
        return [f"{name}={each}" for name, each in value.items()]
    if isinstance(value, (list, tuple)):
        return map(str, value)
    return [] if value is None else [str(value)]
