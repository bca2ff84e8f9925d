"""Demonstrations before the search: the few-shot setting of APE's paper, for every method.

A search that shows some begins with the student's instructions above them. So all candidates have the same ones, and
the search sees to the instructions. What is confirmed in the end is both together, against the student as it is.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from preceptor.copies import apply
from preceptor.errors import ConfigError
from preceptor.scoring.trial import Candidate

if TYPE_CHECKING:
    from preceptor.task import Task
    from preceptor.teleprompter import Teleprompter


def demonstrated(task: Task, method: Teleprompter) -> Task:
    """Return the task of a search: with the first of its rows, in their stratified order, shown and not scored.

    A student's own demonstrations are replaced. No call.

    Args:
        task: The compile's, or a region's.
        method: With `few_shot`; 0 gives the task itself.

    Raises:
        ConfigError: If no row is left to score, or the program has several predictors.
    """
    count, rows = method.few_shot, task.order
    if not count:
        return task
    refuse(method, len(rows), len(task.signatures))
    [(name, signature)] = task.signatures.items()
    fields = [*signature.input_fields, *signature.output_fields]
    shown = tuple(
        {field: task.train[row][field] for field in fields if field in task.train[row]} for row in rows[:count]
    )
    seed = Candidate(task.seed.instructions, {name: shown}, task.seed.constitutions)
    return dataclasses.replace(task, student=apply(task.student, seed), seed=seed, order=rows[count:])


def refuse(method: Teleprompter, train: int, predictors: int) -> None:
    """Raise if demonstrations leave nothing to search on, or it isn't clear whose they are.

    Raises:
        ConfigError: Saying which.
    """
    name = type(method).__name__
    if method.few_shot and predictors > 1:
        raise ConfigError(f"{name} shows demonstrations (few_shot) to programs of one predictor only.")
    if method.few_shot >= train:
        raise ConfigError(f"{name} needs more train rows than few_shot={method.few_shot}, got {train}.")
