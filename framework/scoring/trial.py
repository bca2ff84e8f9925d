"""The nouns of scoring: candidates, outcomes and trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from preceptor.canonical import plain
from preceptor.constitution import Constitution

Kind = Literal["scored", "unparsable", "failed"]
Demos = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a method edits: the instructions of every predictor, and demonstrations where it sets them.

    Attributes:
        instructions: Predictor name -> text.
        demos: Predictor name -> demonstrations; a predictor without an entry keeps its own.
        constitutions: Predictor name -> the constitution its instructions render, where the method knows one.

    Example:
        >>> Candidate({"predict": "Sort the mail."}).key
        '{"demos": {}, "instructions": {"predict": "Sort the mail."}}'
    """

    instructions: Mapping[str, str]
    demos: Mapping[str, Demos] = field(default_factory=lambda: MappingProxyType({}))
    constitutions: Mapping[str, Constitution] = field(default_factory=lambda: MappingProxyType({}), compare=False)

    @property
    def key(self) -> str:
        """Equal for equal candidates."""
        demos = {name: [dict(demo) for demo in several] for name, several in self.demos.items()}
        return json.dumps({"instructions": dict(self.instructions), "demos": demos}, sort_keys=True, default=plain)

    @property
    def principles(self) -> list[dict[str, Any]]:
        """A row of a table for each principle of its constitutions: texts and numbers by name."""
        return [row for name, one in self.constitutions.items() for row in one.as_rows(name)]

    def with_instruction(self, predictor: str, text: str) -> Candidate:
        """Return a copy with one instruction replaced."""
        others = {name: one for name, one in self.constitutions.items() if name != predictor}
        return Candidate({**self.instructions, predictor: text}, self.demos, others)

    def with_constitution(self, predictor: str, constitution: Constitution) -> Candidate:
        """Return a copy with one instruction replaced by what a constitution renders."""
        fresh = self.with_instruction(predictor, constitution.text)
        return Candidate(fresh.instructions, self.demos, {**fresh.constitutions, predictor: constitution})


@dataclass(frozen=True, slots=True)
class Step:
    """One predictor's part in answering a row."""

    predictor: str
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one row.

    Attributes:
        kind: `scored`; `unparsable`, a wrong answer of its own kind; or `failed`: the call broke, no answer.
        score: In [0, 1], higher is better; None if failed, 0 if unparsable. A likelihood is at most 0.
        answer: The output as text, "" if there is none.
        gold: The label as text.
        error: What went wrong, if something did.
        steps: The predictors' inputs and outputs, where they were asked for.
        of: Equal for rows of equal inputs, whose answers aren't independent; "" is a row of its own.
        is_charged: A call that broke and is counted as a wrong answer, whatever the label is.
    """

    kind: Kind
    score: float | None
    answer: str = ""
    gold: str = ""
    error: str = ""
    steps: tuple[Step, ...] = ()
    of: str = field(default="", compare=False)
    is_charged: bool = False


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate and its outcomes on some rows.

    Attributes:
        candidate: What was scored.
        rows: Indices of the rows, in the order they were scored.
        outcomes: One per row.
        score: The metric over the rows that did not fail; higher is better.
    """

    candidate: Candidate
    rows: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    score: float
