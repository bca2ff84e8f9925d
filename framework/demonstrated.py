"""Demonstrations before the search: the few-shot setting of APE's paper, for every method.

A search that shows some begins with the student's instructions above them. So all candidates have the same ones, and
the search sees to the instructions. What is confirmed in the end is both together, against the student as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import dspy

from preceptor.copies import apply
from preceptor.errors import ConfigError
from preceptor.lm.adapter import labels_of
from preceptor.lm.seam import predictors
from preceptor.scoring.trial import Candidate
from preceptor.splits import different, inputs_key

if TYPE_CHECKING:
    from preceptor.task import Task
    from preceptor.teleprompter import Teleprompter

    Method = TypeVar("Method", bound=Teleprompter)

LEFT: Final = 2
"""Train rows that a search needs beside those it shows."""

ROWS: Final = 32
"""Train rows from which on a method shows some where it isn't told to; the fewest that was measured with."""

_CHARACTERS: Final = 8_000
"""Of all rows that are shown where it isn't told to: they are paid for, and read, in every call."""


def demonstrated(task: Task, method: Teleprompter) -> Task:
    """Return the task of a search: with the first of its rows, in their stratified order, shown and not scored.

    Of rows with equal inputs one is shown, and none of them scored. A student's own demonstrations are replaced. Of
    several accepted labels, where one is written, the first is shown. No call.

    Args:
        task: The compile's, or a region's.
        method: With `few_shot`; 0 gives the task itself.

    Raises:
        ConfigError: As `refuse`.
    """
    count, rows = method.demonstration_rows, task.order
    if not count:
        return task
    refuse(method, [task.train[row] for row in rows], task.signatures)
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(inputs_key(task.train[row]), row)
    taken = dict(list(first.items())[:count])
    left = [row for row in rows if inputs_key(task.train[row]) not in taken]
    seed, shown = (
        showing(task.seed, task.signatures, [task.train[row] for row in taken.values()]),
        tuple(taken.values()),
    )
    return dataclasses.replace(task, student=apply(task.student, seed), seed=seed, demonstrated=shown, order=left)


def settled(method: Method, student: dspy.Module, train: Sequence[dspy.Example]) -> Method:
    """Return the method with its number of demonstrations: what it was given, else its own or none.

    Its own are shown as they were measured: to a program of one predictor, which has no others and answers by one of
    some labels; where `ROWS` or more have different inputs and all have its fields; and where any so many are short.
    With a number of regions there are `ROWS` for each: a region shows rows of its own, and searches on the others.
    """
    needed = ROWS * max(1, method.experts)
    asked, count = [predictor for _, predictor in predictors(student)], method.settled(is_able=True).demonstration_rows
    return method.settled(is_able=len(asked) == 1 and _is_able(asked[0], train, count, needed))


def _is_able(asked: Any, train: Sequence[dspy.Example], count: int, needed: int) -> bool:
    names = asked.signature.fields
    is_choice = all(labels_of(told.annotation) for told in asked.signature.output_fields.values())
    if asked.demos or not is_choice or different(train) < needed:
        return False
    lengths = sorted(sum(len(str(row.get(name))) for name in names) for row in train)
    return sum(lengths[-count:]) <= _CHARACTERS and all(row.get(name) is not None for row in train for name in names)


def showing(seed: Candidate, signatures: Mapping[str, type[dspy.Signature]], rows: Iterable[dspy.Example]) -> Candidate:
    """Return the candidate with these rows as the demonstrations of its only predictor."""
    [(name, signature)] = signatures.items()
    return Candidate(seed.instructions, {name: tuple(_shown(row, signature) for row in rows)}, seed.constitutions)


def refuse(method: Teleprompter, train: Sequence[dspy.Example], signatures: Mapping[str, type[dspy.Signature]]) -> None:
    """Raise if rows can't be shown to a program, or leave too few to search on.

    Raises:
        ConfigError: Saying which.
    """
    name, count = type(method).__name__, method.demonstration_rows
    if not count:
        return
    if len(signatures) > 1:
        raise ConfigError(f"{name} shows demonstrations (few_shot) to programs of one predictor only.")
    if (found := different(train)) < count + LEFT:
        told = f"{found} of different inputs" if found < len(train) else str(found)
        raise ConfigError(
            f"{name} needs {count + LEFT} train rows or more: {count} to show (few_shot), {LEFT} to search on. "
            f"There are {told}."
        )
    [signature] = signatures.values()
    for number, row in enumerate(train, 1):
        for fields in (signature.input_fields, signature.output_fields):
            if all(row.get(field) is None for field in fields):
                raise ConfigError(
                    f"{name} can't show train row {number} as a demonstration (few_shot): it has nothing for "
                    f"{', '.join(map(repr, fields))} of the predictor."
                )


def _shown(row: dspy.Example, signature: type[dspy.Signature]) -> Mapping[str, Any]:
    labels = {name: _first(row[name], info.annotation) for name, info in signature.output_fields.items() if name in row}
    return {name: row[name] for name in signature.input_fields if name in row} | labels


def _first(value: Any, kind: Any) -> Any:
    """Return the first of several accepted labels where a text is written, else the value.

    Example:
        >>> _first(["big", "large"], str), _first(["big", "large"], list[str])
        ('big', ['big', 'large'])
    """
    return value[0] if kind is str and isinstance(value, list | tuple) and value else value
