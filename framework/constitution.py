"""A constitution: principles below the user's own words, that together are one instruction.

A principle keeps its identity when it is revised, and remembers what made it so. An edit is a value: it adds,
revises or removes one principle, or merges two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Final, Literal

from preceptor.errors import ConfigError

HEAD: Final = "Principles:"
"""The line between the user's words and the principles."""

_LINE: Final = re.compile(r"\d+\. (.+)")

Kind = Literal["add", "revise", "remove", "merge"]


@dataclass(frozen=True, slots=True)
class Change:
    """One event in a principle's life.

    Attributes:
        kind: What was done.
        because: The explanation of an error that led to it.
    """

    kind: Kind
    because: str = ""


@dataclass(frozen=True, slots=True)
class Principle:
    """One rule of a constitution.

    Attributes:
        identity: The same through revisions; numbers are not used again.
        text: One line.
        history: What made it what it is, the first first; empty for what the user wrote and no edit touched.
        worth: Score lost without it, in [-1, 1]; None if it wasn't measured in this constitution.
        rows: Train rows its worth was measured on.

    Raises:
        ConfigError: If the text is empty or of several lines.
    """

    identity: int
    text: str
    history: tuple[Change, ...] = ()
    worth: float | None = None
    rows: int = 0

    def __post_init__(self) -> None:
        if not self.text.strip() or "\n" in self.text:
            raise ConfigError(f"A principle is one line of text, got {self.text!r}.")

    @property
    def is_users(self) -> bool:
        """True if it comes from one that the user wrote, revised or merged since.

        A merger makes one of two: what `n` of them are in the history of was `n + 1` principles once, and those that no
        addition made are the user's.
        """
        kinds = [change.kind for change in self.history]
        return kinds.count("add") <= kinds.count("merge")


@dataclass(frozen=True, slots=True)
class Edit:
    """One change of a constitution.

    Attributes:
        kind: What to do.
        of: Identities of the principles it is done to: none, one, or two to be merged.
        text: Of the principle it makes; "" for a removal.
    """

    kind: Kind
    of: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class Constitution:
    """Principles in order, below a preamble.

    Attributes:
        preamble: The user's own words; edits leave them as they are.
        principles: Empty at first, unless the user wrote some.

    Example:
        >>> first = Constitution("Sort the mail.").edited(Edit("add", text="A broken item goes to returns."), 1)
        >>> print(first.text)
        Sort the mail.
        <BLANKLINE>
        Principles:
        1. A broken item goes to returns.
        >>> first.edited(Edit("remove", (1,))).text
        'Sort the mail.'
    """

    preamble: str
    principles: tuple[Principle, ...] = ()

    @classmethod
    def parsed(cls, instruction: str) -> Constitution:
        """Return the constitution that an instruction is; `text` is that instruction again, letter by letter.

        What doesn't end in a numbered list below the line `Principles:` is all preamble.
        """
        preamble, _, listed = f"\n\n{instruction}".rpartition(f"\n\n{HEAD}\n")
        lines = [_LINE.fullmatch(line) for line in listed.split("\n")]
        texts = [line[1] for line in lines if line and line[1].strip()]
        found = cls(preamble[2:], tuple(Principle(at, text) for at, text in enumerate(texts, start=1)))
        return found if found.text == instruction else cls(instruction)

    @property
    def text(self) -> str:
        """The instruction a model is given."""
        lines = [f"{number}. {principle.text}" for number, principle in enumerate(self.principles, start=1)]
        listed = "\n".join([HEAD, *lines]) if lines else ""
        return "\n\n".join(part for part in (self.preamble, listed) if part)

    @property
    def newest(self) -> int:
        """The largest identity in use, 0 if there are no principles."""
        return max((principle.identity for principle in self.principles), default=0)

    def principle(self, identity: int) -> Principle:
        """Return a principle by its identity.

        Raises:
            ConfigError: If there is none.
        """
        for principle in self.principles:
            if principle.identity == identity:
                return principle
        known = ", ".join(str(principle.identity) for principle in self.principles) or "none"
        raise ConfigError(f"The constitution has no principle {identity}; it has {known}.")

    def edits(self, most: int) -> list[Edit]:
        """Return what can be done to it, without the texts that are still to be written.

        A principle is added to fewer than `most` only; the two that share the most words may be merged.
        """
        added = [Edit("add")] if len(self.principles) < most else []
        each = [(principle.identity,) for principle in self.principles]
        pairs = sorted(combinations(self.principles, 2), key=lambda pair: -_alike(*pair))
        merged = [Edit("merge", (one.identity, other.identity)) for one, other in pairs[:1]]
        return [*added, *(Edit("revise", of) for of in each), *(Edit("remove", of) for of in each), *merged]

    def edited(self, edit: Edit, identity: int = 0, because: str = "") -> Constitution:
        """Return the constitution after an edit; what its principles are worth in it isn't measured yet.

        Args:
            edit: With its text. A revised principle stays in its place; so does the first of two that are merged,
                in both its place and its identity. A new one comes last.
            identity: Of a new principle.
            because: Goes to the principle's history.

        Raises:
            ConfigError: If the edit is of a principle that isn't there, or its text can't be one.
        """
        return replace(self, principles=tuple(self._principles(edit, identity, because))).measured({}, 0)

    def _principles(self, edit: Edit, identity: int, because: str) -> list[Principle]:
        change = Change(edit.kind, because)
        if edit.kind == "add":
            return [*self.principles, Principle(identity, edit.text, (change,))]
        first, *others = [self.principle(of) for of in edit.of]
        if edit.kind == "remove":
            return [one for one in self.principles if one is not first]
        history = tuple(event for one in (first, *others) for event in one.history)
        changed = replace(first, text=edit.text, history=(*history, change))
        return [changed if one is first else one for one in self.principles if one not in others]

    def measured(self, worths: Mapping[int, float], rows: int) -> Constitution:
        """Return it with what its principles are worth on so many rows, by identity; those left out aren't measured."""
        told = [
            replace(one, worth=worths.get(one.identity), rows=rows if one.identity in worths else 0)
            for one in self.principles
        ]
        return replace(self, principles=tuple(told))

    def as_rows(self, predictor: str) -> list[dict[str, Any]]:
        """Return a row of a table for each principle: texts and numbers by name."""
        return [
            {
                "predictor": predictor,
                "identity": one.identity,
                "principle": one.text,
                "worth": one.worth,
                "rows": one.rows,
                "history": ", ".join(["the user's own"] * one.is_users + [change.kind for change in one.history]),
                "because": one.history[-1].because if one.history else "",
            }
            for one in self.principles
        ]


def _alike(one: Principle, other: Principle) -> float:
    """Return the share of their words that two principles have in common (Jaccard), in [0, 1]."""
    first, second = (set(re.findall(r"\w+", principle.text.casefold())) for principle in (one, other))
    return len(first & second) / max(1, len(first | second))
