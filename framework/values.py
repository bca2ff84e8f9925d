"""A row's values, each of its field's type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args, get_origin

import dspy
import pydantic

from preceptor.errors import DataError
from preceptor.lm.adapter import bare, takes_none

_LISTS: Final = (list, tuple, set, frozenset)


def typed(row: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a row's values of these fields (name -> type), each of its type; records are objects of their class.

    Raises:
        DataError: Naming `where` and the field: a missing or empty value, a wrong type, an unknown label.
    """
    plain = as_json(row, fields, where)
    return {name: _built(plain[name], kind, f"{where}, {name}") for name, kind in fields.items()}


def as_json(row: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what `typed` does, with records as JSON has them.

    Raises:
        DataError: As `typed`, but for records that aren't texts, which are left as they are.
    """
    return {name: _as_json(row.get(name), kind, f"{where}, {name}") for name, kind in fields.items()}


def _as_json(value: Any, kind: Any, where: str) -> Any:
    if takes_none(kind):
        return None if value is None or value == "" else _as_json(value, bare(kind), where)
    if value is None or value == "":
        raise DataError(f"{where}: the value is missing.")
    if get_origin(kind) is Literal:
        labels = {str(label): label for label in get_args(kind)}
        if str(value) not in labels:
            raise DataError(f"{where}: {value!r} is no label; expected one of {', '.join(labels)}.")
        return labels[str(value)]
    if kind in (int, float, bool):
        return _number(value, kind, where)
    if isinstance(value, str) and is_json(kind):
        return _parsed(value, kind, where)
    if kind is str and not isinstance(value, str):
        raise DataError(f"{where}: expected text, got {type(value).__name__} {value!r}.")
    return value


def is_json(kind: Any) -> bool:
    """Return True for lists, mappings and records, which a file of texts holds as JSON."""
    return _is_record(kind) or (get_origin(kind) or kind) in (*_LISTS, dict)


def _is_record(kind: Any) -> bool:
    plain = get_origin(kind) or kind
    return isinstance(plain, type) and issubclass(plain, pydantic.BaseModel) and not issubclass(plain, dspy.Type)


def _holds_record(kind: Any) -> bool:
    return _is_record(kind) or any(map(_holds_record, get_args(kind)))


def _built(value: Any, kind: Any, where: str) -> Any:
    """Return a value with its records as objects of the declared classes, as a program's code expects them."""
    if value is None or not is_json(bare(kind)) or not _holds_record(kind):
        return value
    try:
        return pydantic.TypeAdapter(kind).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{where}: {value!r:.80} is no {_name(kind)}: {place}: {first['msg']}.") from error


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)


def _parsed(text: str, kind: Any, where: str) -> Any:
    """Return what a text says in JSON, which must be of the type, as the plain values it would be in a JSON file."""
    try:
        value = json.loads(text)
        pydantic.TypeAdapter(kind).validate_python(value)
    except (ValueError, RecursionError) as error:
        example = '{"name": "value"}' if (get_origin(kind) or kind) not in _LISTS else '["a", "b"]'
        raise DataError(f"{where}: {text!r:.80} is no {_name(kind)}; write it in JSON, as in {example}.") from error
    return value


def _number(value: Any, kind: type, where: str) -> Any:
    text = str(value).strip()
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise DataError(f"{where}: expected True or False, got {value!r}.")
    try:
        return kind(text)
    except ValueError as error:
        raise DataError(f"{where}: expected {kind.__name__}, got {value!r}.") from error
