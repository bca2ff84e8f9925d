"""Texts as metrics compare them: answers and labels without regard to case, white space and how a number is written."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from preceptor.canonical import plain
from preceptor.leaks import CJK

_ARTICLES: Final = frozenset({"a", "an", "the"})
_PUNCTUATION: Final = re.compile(
    rf"(?<![a-z+])\+|(?<![a-z])#|[{re.escape(string.punctuation.translate({43: None, 35: None}))}]"
)
_NUMBER: Final = re.compile(
    r"""[("'$€£]*([-\u2212+]?)[$€£]?(\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.(\d+))?[)%"'.,;:!?]*"""
)
"""A number, with what may stand around it: its sign, its whole part, its decimals."""

_SEVERAL: Final = (list, tuple, set, frozenset)

_WORDS: Final = re.compile(rf"(?:[-.+#]|[^\W{CJK}])+|\S")
"""The words of a normalized text: of Chinese or Japanese each character is one, as of other signs."""


def text_of(row: Any, field: str) -> str:
    """Return a field of an example or a prediction as text, "" if it is absent."""
    return as_text(row.get(field) if hasattr(row, "get") else getattr(row, field, None))


def as_text(value: Any) -> str:
    """Return a value as text that is equal for equal values: records and lists as JSON, an enumeration by its value.

    Example:
        >>> as_text({"b": 1, "a": ["x"]}), as_text(True), as_text(None)
        ('{"a": ["x"], "b": 1}', 'True', '')
    """
    told = plain(value)
    if isinstance(told, (list, dict)):
        return json.dumps(told, sort_keys=True, ensure_ascii=False, default=plain)
    return "" if told is None else str(told)


def normalize(text: str) -> str:
    """Return text without case, articles, punctuation and extra white space (SQuAD's rule).

    Unlike there, a number keeps its sign and its decimals and loses its thousands separators, `+` and `#` behind a
    letter stay, and a text that is nothing but articles or punctuation stays as it is.

    Example:
        >>> [normalize(text) for text in ("The  Eiffel Tower.", "It's -1,234.50!", "C++", "A", "+")]
        ['eiffel tower', 'its -1234.5', 'c++', 'a', '+']
    """
    words = list(filter(None, map(_word, text.lower().split())))
    return " ".join([word for word in words if word not in _ARTICLES] or words) or folded(text)


def _word(raw: str) -> str:
    """Return a lower-case word without its punctuation; a number in one way of writing it."""
    number = _NUMBER.fullmatch(raw)
    if number is not None:
        whole, decimals = number[2].replace(",", "") or "0", (number[3] or "").rstrip("0")
        sign = "-" if number[1] in ("-", "\u2212") and (decimals or whole.strip("0")) else ""
        return f"{sign}{whole}{'.' if decimals else ''}{decimals}"
    return _PUNCTUATION.sub("", raw)


def references(gold: Any) -> list[str]:
    """Return the accepted answers: a list's members, or the one text. An empty list has none: an empty answer is right.

    Example:
        >>> references(["Paris", "City of Paris"]), references("Paris")
        (['Paris', 'City of Paris'], ['Paris'])
    """
    return [as_text(member) for member in gold] if isinstance(gold, _SEVERAL) else [as_text(gold)]


def token_f1(answer: str, gold: str) -> float:
    """Return the F1 of shared tokens, after `normalize`.

    Example:
        >>> round(token_f1("a red car", "the red bus"), 2)
        0.5
    """
    ours, theirs = normalize(answer).split(), normalize(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def members(text: Any) -> set[str]:
    """Return the normalized members of a list, or of a text separated by commas.

    Example:
        >>> sorted(members("cat, Dog ,cat"))
        ['cat', 'dog']
    """
    parts: Iterable[Any] = text if isinstance(text, _SEVERAL) else as_text(text).split(",")
    return {normalize(as_text(part)) for part in parts} - {""}


def folded(text: str) -> str:
    """Return a label as labels are compared: without its case and the space around it."""
    return text.strip().casefold()


def spaced(text: str) -> str:
    """Return a normalized text with exactly one space between any two words."""
    return " ".join(_WORDS.findall(normalize(text)))
