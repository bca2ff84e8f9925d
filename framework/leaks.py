"""Training text in instructions: a proposer that is shown rows may copy them, or what a row orders it to write.

Such an instruction scores well for the wrong reason, tells whoever reads the program what the rows say, and lets
whoever wrote a row write the program. Here is what counts as a copy. Demonstrations are shown on purpose
and are not looked at.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args, get_origin

import dspy

logger = logging.getLogger(__name__)

WORDS: Final = 8
"""As many words in a row that an instruction shares with a training input are a copy."""

WHOLE: Final = 3
"""From so many words on, an instruction that stands whole in a training input is a copy too, and an input that stands
whole in an instruction, unless several rows have it: then it is no row's own."""

CJK: Final = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""The characters of Chinese and Japanese, for a regular expression: each is a word."""

_WORD: Final = re.compile(rf"[{CJK}]|[^\W{CJK}]+")
_SPACED: Final = re.compile(rf"[{CJK}]|[^\s{CJK}]+")

Words: TypeAlias = Sequence[str | None]
"""A text's words, case folded; None where an instruction says what it may say."""


@dataclass(frozen=True, slots=True)
class Guard:
    """Tells copies of training inputs from instructions.

    A word is what lies between spaces and punctuation; each character of Chinese or Japanese is one.
    Case is ignored.

    Attributes:
        rows: The words of every text among the training inputs.
        exempt: The words of texts that may be used: their runs of three words or more, and each as a whole.
        words: Words in a row that are a copy, at least 1.
    """

    rows: Sequence[Words]
    exempt: Sequence[Words] = ()
    words: int = WORDS

    @classmethod
    def of(cls, train: Iterable[dspy.Example], signatures: Mapping[str, Any]) -> Guard:
        """Return a guard of the inputs of `train` that lets the signatures' own instructions and labels pass."""
        inputs = [_words(str(value)) for row in train for value in row.inputs().toDict().values()]
        instructions = [_words(str(signature.instructions)) for signature in signatures.values()]
        fields = [field for signature in signatures.values() for field in signature.output_fields.values()]
        labels = [_words(label) for field in fields for label in _labels(field.annotation)]
        return cls(inputs, [*instructions, *(label for label in labels if len(label) >= WHOLE)])

    def copied(self, instruction: str) -> str:
        """Return the longest passage that `instruction` copies from one training input, "" if it copies none.

        Takes time proportional to the length of all texts.
        """
        text = unicodedata.normalize("NFKC", instruction)
        found = list(_WORD.finditer(text))
        own = _masked([match[0].casefold() for match in found], self.exempt)
        length, end = self._longest(own)
        return text[found[end - length].start() : found[end - 1].end()] if length else ""

    def _longest(self, words: Words) -> tuple[int, int]:
        """Return the length of the longest copy among `words`, and where in `words` it ends; (0, 0) if none is."""
        runs, own = _Runs(words), len(words) - words.count(None)
        held, longest = Counter(map(tuple, self.rows)), list[str | None]()
        for row, times in held.items():
            lengths = runs.lengths(row)
            most = max(lengths, default=0)
            is_whole = most >= WHOLE and (most == own or (most == len(row) and times == 1))
            if most > len(longest) and (most >= self.words or is_whole):
                end = lengths.index(most) + 1
                longest = list(row[end - most : end])
        if not longest:
            return 0, 0
        return len(longest), _Runs(longest).lengths(words).index(len(longest)) + 1

    def originals(self, texts: Iterable[str]) -> list[str]:
        """Return the texts that copy nothing, in the order they came."""
        kept: list[str] = []
        for text in texts:
            passage = self.copied(text)
            if passage:
                logger.info("A proposal was left out: it copies %r from a training input.", passage)
            else:
                kept.append(text)
        return kept


def copied(instruction: str, rows: Sequence[str], *, words: int = WORDS) -> str:
    """Return the longest run of words that `instruction` shares with one of `rows`, "" if it is no copy.

    A copy has `words` words or more; or it is the whole instruction or a whole row, of three words or more.

    Example:
        >>> row = "My order #4471 has not arrived, and nobody answers the phone."
        >>> copied("Say late if 'my order 4471 has not arrived and nobody' calls.", [row])
        'my order 4471 has not arrived and nobody'
        >>> copied("Say late if an order has not arrived.", [row])
        ''
        >>> copied("Nobody answers the phone!", [row])
        'Nobody answers the phone'
    """
    return Guard([_words(row) for row in rows], words=words).copied(instruction)


def count_words(text: str) -> int:
    """Return how many words a text has: what lies between spaces; each character of Chinese or Japanese is one.

    Example:
        >>> count_words("Don't guess."), count_words("请判断 spam")
        (2, 4)
    """
    return len(_SPACED.findall(text))


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(unicodedata.normalize("NFKC", text))]


def _labels(annotation: Any) -> list[str]:
    """Return the texts of the `Literal`s in a type."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [str(label) for label in inner]
    return [label for one in inner for label in _labels(one)]


def _masked(words: list[str], exempt: Sequence[Words]) -> Words:
    """Return the words with None for those that are taken from an exempt text."""
    is_taken = [False] * len(words)
    for text in exempt:
        lengths, left = _Runs(text).lengths(words), 0
        for at in reversed(range(len(words))):
            left = max(left - 1, lengths[at] if lengths[at] >= min(WHOLE, len(text)) else 0)
            is_taken[at] |= left > 0
    return [None if taken else word for word, taken in zip(words, is_taken, strict=True)]


class _Runs:
    """Every run of words of a text: a suffix automaton (Blumer et al. 1985), made and asked in linear time."""

    def __init__(self, words: Words) -> None:
        self._next: list[dict[str | None, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        last = 0
        for word in words:
            last = self._extended(last, word)

    def lengths(self, words: Words) -> list[int]:
        """Return, for each of `words`, how long the run of this text is that ends there."""
        found: list[int] = []
        state = length = 0
        for word in words:
            while state and word not in self._next[state]:
                state = self._link[state]
                length = self._length[state]
            if word in self._next[state]:
                state = self._next[state][word]
                length += 1
            found.append(length)
        return found

    def _extended(self, last: int, word: str | None) -> int:
        """Add a word behind the state `last`; return the state of the text so far."""
        fresh = self._state({}, self._length[last] + 1)
        while last >= 0 and word not in self._next[last]:
            self._next[last][word] = fresh
            last = self._link[last]
        if last >= 0:
            self._link[fresh] = self._split(last, word)
        else:
            self._link[fresh] = 0
        return fresh

    def _split(self, before: int, word: str | None) -> int:
        """Return the state of exactly the runs that end in `word` after `before`."""
        after = self._next[before][word]
        if self._length[after] == self._length[before] + 1:
            return after
        copy = self._state(dict(self._next[after]), self._length[before] + 1)
        self._link[copy] = self._link[after]
        self._link[after] = copy
        while before >= 0 and self._next[before].get(word) == after:
            self._next[before][word] = copy
            before = self._link[before]
        return copy

    def _state(self, following: dict[str | None, int], length: int) -> int:
        self._next.append(following)
        self._link.append(0)
        self._length.append(length)
        return len(self._length) - 1
