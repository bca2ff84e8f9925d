"""Lineage: which candidate came from which, how, and because of what text.

A method tells of each candidate it makes (`Task.made`); the run folder keeps one line each in
`lineage.jsonl`, rewritten from its beginning when the run is resumed. Candidates are told apart by their
instructions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from preceptor.errors import RunError
from preceptor.scoring.trial import Candidate

LINEAGE: Final = "lineage.jsonl"
_TEXTS: Final = ("key", "parent", "predictor", "how", "because")


@dataclass(frozen=True, slots=True)
class Birth:
    """How one candidate was made.

    Attributes:
        candidate: The new one.
        parent: What it was made of.
        predictor: Whose instruction differs.
        how: In a word: `gradient`, `paraphrase`, ...
        because: The text that led to it, such as a criticism of the parent; "" if there is none.
    """

    candidate: Candidate
    parent: Candidate
    predictor: str
    how: str
    because: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the line of `lineage.jsonl`."""
        return {
            "key": key_of(self.candidate.instructions),
            "parent": key_of(self.parent.instructions),
            "predictor": self.predictor,
            "how": self.how,
            "because": self.because,
            "instructions": dict(self.candidate.instructions),
        }


@dataclass(frozen=True, slots=True)
class Descendant:
    """One candidate of a finished or interrupted run.

    Attributes:
        key: Of its instructions; see `key_of`.
        parent: Key of what it was made of, "" if it wasn't made by the search.
        predictor: Whose instruction differs from the parent's, "" without a parent.
        how: In a word; "seed" without a parent.
        because: The text that led to it.
        instructions: Predictor name -> text.
        rows: Different train rows it was scored on.
        score: Mean score of all its scored rows, higher is better; None if there are none.
        is_kept: True if the compiled program has these instructions.
    """

    key: str
    parent: str
    predictor: str
    how: str
    because: str
    instructions: Mapping[str, str]
    rows: int
    score: float | None
    is_kept: bool


def key_of(instructions: Mapping[str, str]) -> str:
    """Return 12 hexadecimal digits that differ where the instructions differ.

    Example:
        >>> key_of({"predict": "Sort."}), key_of({"predict": "Sort!"})
        ('f093a6ceee50', '8e86fbd4bf9d')
    """
    text = json.dumps(dict(instructions), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def folder_of(place: Path) -> Path:
    """Return the run folder that `place` is, or in which it is the saved program.

    Raises:
        RunError: If neither kept its lineage.
    """
    for folder in (place, place.parent):
        if (folder / LINEAGE).is_file():
            return folder
    raise RunError(
        f"{place} is no run folder with a {LINEAGE}, nor a program saved in one. Methods that keep "
        "their lineage write it while they search; name the run folder (`compile` prints it)."
    )


def descendants(folder: Path) -> list[Descendant]:
    """Return every candidate of a run: those the search began with first, then the others as they were made.

    Raises:
        RunError: If a file of the run is damaged.
    """
    return descended(read_lines(folder / LINEAGE), read_lines(folder / "trials.jsonl"), _kept(folder / "result.json"))


def descended(births: Sequence[Mapping[str, Any]], trials: Sequence[Mapping[str, Any]], kept: str) -> list[Descendant]:
    """Return what `descendants` does, of the lines of both files and the key of the compiled program's instructions."""
    made = {key_of(line["instructions"]): line for line in births}
    seen: dict[str, list[tuple[int, float | None]]] = {}
    roots: dict[str, Mapping[str, Any]] = {}
    for line in trials:
        key = key_of(line["instructions"])
        seen.setdefault(key, []).extend(zip(line.get("rows", []), line.get("scores", []), strict=False))
        if key not in made:
            roots.setdefault(key, {"instructions": line["instructions"], "how": "seed"})
    return [_descendant(key, line, seen.get(key, []), kept) for key, line in {**roots, **made}.items()]


def _descendant(key: str, line: Mapping[str, Any], seen: Sequence[tuple[int, float | None]], kept: str) -> Descendant:
    scores = [score for score in dict(seen).values() if score is not None]  # a row counts once
    return Descendant(
        key=key,
        parent=str(line.get("parent", "")),
        predictor=str(line.get("predictor", "")),
        how=str(line.get("how", "")),
        because=str(line.get("because", "")),
        instructions=line["instructions"],
        rows=len(dict(seen)),
        score=sum(scores) / len(scores) if scores else None,
        is_kept=key == kept,
    )


def _kept(result: Path) -> str:
    """Return the key of the compiled program's instructions, "" before there is one."""
    try:
        found: Any = json.loads(result.read_text(encoding="utf-8"))
        return key_of(found["instructions"])
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{result} is damaged. Compile into the folder again: its ledger is used.") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a run's file with one a line; a last line that was cut off by a kill is left out.

    Raises:
        RunError: If the file is missing or damaged.
    """
    try:
        texts = path.read_text(encoding="utf-8").split("\n")[:-1]
        lines: list[Any] = [json.loads(text) for text in texts]
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is missing or damaged. Compile into the folder again: its ledger is used.") from error
    for number, line in enumerate(lines, start=1):
        if not _is_whole(line):
            raise RunError(f"{path}, line {number}, isn't what a run writes. Compile into the folder again.")
    return lines


def _is_whole(line: Any) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("instructions"), dict):
        return False
    rows, scores = line.get("rows", []), line.get("scores", [])
    if not isinstance(rows, list) or not isinstance(scores, list):
        return False
    texts = [*line["instructions"].values(), *(line[name] for name in _TEXTS if name in line)]
    numbers = [*rows, *(score for score in scores if score is not None)]
    return all(isinstance(text, str) for text in texts) and all(isinstance(one, int | float) for one in numbers)
