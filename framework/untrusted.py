"""Files somebody else may have made: read within bounds, links not followed, nothing in them run.

What they hold is parsed as text: JSON of bounded size and depth, and types from a closed list.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Optional, Union

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

MOST_BYTES: Final = 16_000_000
"""Of one file."""

MOST_VALUES: Final = 1_000_000
"""In one JSON text."""

MOST_DEPTH: Final = 32
"""Of values in values, and of types in types."""

MOST_TYPE: Final = 1_000_000
"""Characters of a type; most are labels."""

MOST_NAMES: Final = 1_000
"""Types in a type."""

MOST_LABELS: Final = 10_000
"""Values of one Literal."""

MOST_SHOWN: Final = 80
"""Characters of a foreign text that go into a message."""

_HOW: Final = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Malformed(ValueError):
    """A file or a text isn't what it should be; the message says how."""


_UNSEEN: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that steer a terminal, that HTML doesn't take or that turn the direction of writing, and half ones."""


def spelt_out(text: str) -> str:
    r"""Return a text that may be anybody's, with the characters spelt out that would not be seen, or steer a terminal.

    Example:
        >>> spelt_out("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    return _UNSEEN.sub(lambda found: repr(found[0])[1:-1], text)


def shown(value: object) -> str:
    r"""Return a foreign value for a message: on one line, cut if long.

    Example:
        >>> print(shown("two\nlines"), shown("x" * 1000)[-6:], shown({"a": 1}))
        'two\nlines' xxx... a dict
    """
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        text = repr([each[:MOST_SHOWN] for each in value[:MOST_SHOWN]])
    elif isinstance(value, str | int | float) or value is None:
        text = repr(value[:MOST_SHOWN] if isinstance(value, str) else value)
    else:
        return f"a {type(value).__name__}"
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def content(path: Path) -> bytes:
    """Return what is in a regular file.

    Raises:
        Malformed: If it is anything else, a link or a pipe say, or larger than `MOST_BYTES`.
        OSError: If it can't be read.
    """
    _refuse_irregular(path.lstat())
    with os.fdopen(os.open(path, _HOW), "rb") as file:
        _refuse_irregular(os.fstat(file.fileno()))  # it may be another one by now
        read = file.read(MOST_BYTES + 1)
    if len(read) > MOST_BYTES:
        raise Malformed(f"has more than {MOST_BYTES:,} bytes")
    return read


def _refuse_irregular(status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise Malformed("is a symbolic link, which isn't followed; copy the folder with the files themselves")
    if not stat.S_ISREG(status.st_mode):
        raise Malformed("is no regular file")
    if status.st_size > MOST_BYTES:
        raise Malformed(f"has {status.st_size:,} bytes, more than {MOST_BYTES:,}")


def json_object(text: bytes) -> dict[str, Any]:
    """Return a JSON object whose every name is given once and whose every text can be written again.

    Raises:
        Malformed: If it is something else, or larger or deeper than the bounds.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise Malformed(f"holds more than {MOST_VALUES:,} values")
    try:
        value: Any = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except Malformed:
        raise
    except ValueError as error:
        raise Malformed(f"is no JSON: {error}") from error
    except RecursionError as error:
        raise Malformed(f"is nested deeper than {MOST_DEPTH} levels") from error
    if not isinstance(value, dict):
        raise Malformed(f"holds a {type(value).__name__}, not an object")
    _refuse_deep_or_unwritable(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, inner in pairs:
        if name in value:
            raise Malformed(f"names {shown(name)} twice")
        value[name] = inner
    return value


def _refuse_deep_or_unwritable(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(MOST_DEPTH):
        objects = [each for each in level if isinstance(each, dict)]
        for text in (each for each in level if isinstance(each, str)):
            _refuse_surrogates(text)
        for name in (name for each in objects for name in each):
            _refuse_surrogates(name)
        level = [inner for each in level if isinstance(each, list) for inner in each]
        level += [inner for each in objects for inner in each.values()]
        if not level:
            return
    raise Malformed(f"is nested deeper than {MOST_DEPTH} levels")


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"holds half a character in {shown(text)}") from error


def tensors(content: bytes) -> dict[str, Any]:
    """Return the arrays of a safetensors file by name: finite numbers of 32 bits, and nothing else.

    Raises:
        Malformed: If it is something else.
    """
    try:
        found = load(content)
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise Malformed(f"is no safetensors file: {shown(str(error))}") from error
    for name, array in found.items():
        if array.dtype != np.float32:
            raise Malformed(f"holds {shown(name)} of type {array.dtype}, not float32")
        if not np.isfinite(array).all():
            raise Malformed(f"holds {shown(name)} with numbers that aren't finite")
    return found


_PLAIN: Final[Mapping[str, Any]] = {
    "Any": Any,
    "None": type(None),
    "bool": bool,
    "bytes": bytes,
    "complex": complex,
    "dict": dict,
    "float": float,
    "frozenset": frozenset,
    "int": int,
    "list": list,
    "set": set,
    "str": str,
    "tuple": tuple,
}
_UNION: Final[Any] = Union
_TUPLE: Final[Any] = tuple
_OF_OTHERS: Final[Mapping[str, tuple[Any, int]]] = {
    "Iterable": (Iterable, 1),
    "Mapping": (Mapping, 2),
    "Optional": (Optional, 1),
    "Sequence": (Sequence, 1),
    "dict": (dict, 2),
    "frozenset": (frozenset, 1),
    "list": (list, 1),
    "set": (set, 1),
}
"""Name -> generic type and the number of its parameters; tuples and unions take any number."""

_ESCAPE: Final = r"""\\(?:[\\'"nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})"""
_TOKEN: Final = re.compile(
    r"\s*(?:(?P<name>[^\W\d][\w.]*)|(?P<number>-?\d{1,40}(?!\w))|(?P<mark>\.\.\.|[][,|])"
    rf"""|(?P<text>'[^'\\\n]*(?:{_ESCAPE}[^'\\\n]*)*'|"[^"\\\n]*(?:{_ESCAPE}[^"\\\n]*)*"))\s*"""
)


def annotation(text: str) -> Any:
    """Return the type that a text names; nothing is imported or evaluated.

    Known are str, int, float, bool, complex, bytes, Any and None; list, tuple, dict, set, frozenset, Sequence,
    Mapping and Iterable of others; Literal, of 10,000 labels at most; and unions.

    Raises:
        Malformed: If it names no such type.

    Example:
        >>> annotation("dict[str, list[int]] | None"), annotation("Literal['yes', 1]")
        (typing.Optional[dict[str, list[int]]], typing.Literal['yes', 1])
    """
    if len(text) > MOST_TYPE:
        raise Malformed(f"A type of {len(text):,} characters; {MOST_TYPE:,} is the most")
    reader = _Reader(text)
    found = reader.union(MOST_DEPTH)
    if reader.token:
        raise Malformed(f"Unexpected {shown(reader.token)} in a type")
    return found


class _Reader:
    """Reads a type's text from left to right, one token ahead."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._names = text, 0, 0
        self.token, self.kind = "", ""
        self._next()

    def _next(self) -> str:
        """Step to the next token; return the one before it."""
        before = self.token
        found = _TOKEN.match(self._text, self._at)
        if found is not None:
            self.kind, self._at = found.lastgroup or "", found.end()
            self.token = found[self.kind]
        elif self._at < len(self._text):
            raise Malformed(f"Unexpected {shown(self._text[self._at :])} in a type")
        else:
            self.token, self.kind = "", ""
        return before

    def _takes(self, mark: str) -> bool:
        if self.kind != "mark" or self.token != mark:
            return False
        self._next()
        return True

    def _must_take(self, mark: str) -> None:
        if not self._takes(mark):
            raise Malformed(f"{shown(self.token)} in a type, where {mark!r} must be")

    def union(self, depth: int) -> Any:
        if depth == 0:
            raise Malformed(f"A type is nested deeper than {MOST_DEPTH} levels")
        kinds = [self._single(depth)]
        while self._takes("|"):
            kinds.append(self._single(depth))
        return kinds[0] if len(kinds) == 1 else _UNION[tuple(kinds)]

    def _single(self, depth: int) -> Any:
        if self.kind != "name":
            raise Malformed(f"{shown(self.token)} in a type, where a name must be")
        name = self._next()
        self._names += 1
        if self._names > MOST_NAMES:
            raise Malformed(f"A type of more than {MOST_NAMES:,} types")
        if not self._takes("["):
            if name not in _PLAIN:
                raise Malformed(f"Unknown name: {name[:MOST_SHOWN]}")
            return _PLAIN[name]
        made = Literal[tuple(self._listed(self._value))] if name == "Literal" else self._of_others(name, depth - 1)
        self._must_take("]")
        return made

    def _listed(self, read: Any) -> list[Any]:
        values = [read()]
        while self._takes(","):
            if len(values) == MOST_LABELS:
                raise Malformed(f"A type of more than {MOST_LABELS:,} labels")
            values.append(read())
        return values

    def _value(self) -> Any:
        known = {"True": True, "False": False, "None": None}
        kind, token = self.kind, self._next()
        if kind == "text":
            return _unquoted(token)
        if kind == "number":
            return int(token)
        if kind == "name" and token in known:
            return known[token]
        raise Malformed(f"{shown(token)} in a Literal, where a text, a whole number, True, False or None must be")

    def _of_others(self, name: str, depth: int) -> Any:
        if name == "tuple":
            return self._tuple(depth)
        kinds = self._listed(lambda: self.union(depth))
        if name == "Union":
            return _UNION[tuple(kinds)]
        if name not in _OF_OTHERS:
            raise Malformed(f"Unknown name: {name[:MOST_SHOWN]}")
        generic: Any
        generic, count = _OF_OTHERS[name]
        if len(kinds) != count:
            raise Malformed(f"{name} of {len(kinds)} types; it must be {count}")
        return generic[tuple(kinds)] if count > 1 else generic[kinds[0]]

    def _tuple(self, depth: int) -> Any:
        kinds = [self.union(depth)]
        while self._takes(","):
            if self.token in ("...", "Ellipsis"):
                self._next()
                return _TUPLE[(*kinds, ...)]
            kinds.append(self.union(depth))
        return _TUPLE[tuple(kinds)]


def _unquoted(token: str) -> str:
    """Return the text of a quoted one, whose escapes are those that `repr` makes."""
    text = token[1:-1]
    try:
        if "\\" in text:
            text = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise Malformed(f"{shown(token)} is no text") from error
    _refuse_surrogates(text)
    return text
