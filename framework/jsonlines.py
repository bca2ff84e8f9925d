"""Rows of a JSON file, as they are written: nothing in a text that looks like a date or a number becomes one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast

from preceptor.errors import DataError

_TOLD: Final = 60
"""Characters of what was found in a row's place."""


def read_json(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a list of objects, or of a file with an object a line; a key that a row lacks is None there.

    Raises:
        DataError: If it is neither, with the line or the row, or isn't UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} isn't in UTF-8: {error}. Save it so.") from error
    rows = list(_listed(path, text) if text.lstrip().startswith("[") else _by_line(path, text))
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _listed(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, value in enumerate(_value(f"{path}", text), 1):
        yield _row(f"{path}, row {number}", value)


def _by_line(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold other ends of lines
        if line.strip():
            yield _row(f"{path}, line {number}", _value(f"{path}, line {number}", line))


def _value(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} can't be read as JSON: {error}. Rows are a list of objects, or an object a line."
        ) from error


def _row(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: expected an object, as in {{"text": "hi"}}, got {json.dumps(value)[:_TOLD]}.')
    row = cast("dict[str, Any]", value)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: it holds half a character, {error.object[error.start]!a}.") from error
    return row
