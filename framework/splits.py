"""Splitting rows: halves, draws and orders that keep the labels' shares, and equal inputs together."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import defaultdict
from collections.abc import Sequence

import dspy

from preceptor.canonical import keyed, plain
from preceptor.errors import DataError

logger = logging.getLogger(__name__)


def split(rows: Sequence[dspy.Example], output: str, *, seed: int) -> tuple[list[dspy.Example], list[dspy.Example]]:
    """Return (train, validation) halves, stratified by the field `output` where it is there.

    Rows of equal inputs stay together: validation rows are rows that nobody has seen.

    Example:
        >>> rows = [dspy.Example(x=n, y="ab"[n % 2]).with_inputs("x") for n in range(8)]
        >>> train, validation = split(rows, "y", seed=0)
        >>> sorted(row.y for row in train), len(validation)
        (['a', 'a', 'b', 'b'], 4)
    """
    taken = half(rows, output, random.Random(seed))
    return [row for at, row in enumerate(rows) if at in taken], [row for at, row in enumerate(rows) if at not in taken]


def half(rows: Sequence[dspy.Example], output: str, rng: random.Random) -> set[int]:
    """Return which rows make the larger half, stratified; rows of equal inputs stay together."""
    twins: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        twins[inputs_key(row)].append(at)
    taken = set[int]()
    for at in stratified(rows, output, rng):
        group = twins[inputs_key(rows[at])]
        if at not in taken and len(taken) + len(group) <= (len(rows) + 1) // 2:
            taken.update(group)
    return taken


def drawn(rows: Sequence[dspy.Example], output: str, most: int | None, *, seed: int) -> list[dspy.Example]:
    """Return at most so many rows, drawn at random, stratified by the field `output`, in the order they came."""
    if most is None or most >= len(rows):
        return list(rows)
    return [rows[at] for at in sorted(stratified(rows, output, random.Random(seed))[:most])]


def unseen(rows: Sequence[dspy.Example], train: Sequence[dspy.Example], *, name: str) -> list[dspy.Example]:
    """Return the rows whose inputs no train row has; those left out are counted in the log, as a warning.

    Raises:
        DataError: If none is left.
    """
    first: dict[str, int] = {}
    for number, row in enumerate(train, 1):
        first.setdefault(inputs_key(row), number)
    seen = {number: first.get(inputs_key(row), 0) for number, row in enumerate(rows, 1)}
    kept = [row for number, row in enumerate(rows, 1) if not seen[number]]
    if len(kept) == len(rows):
        return kept
    at = next(number for number in seen if seen[number])
    told = f"the inputs of rows of the trainset; the first is row {at}, equal to row {seen[at]} there."
    if not kept:
        raise DataError(
            f"{name}: all {len(rows)} rows have {told} A gain is confirmed on rows the search hasn't seen: "
            f"leave the {name} out, and half of the trainset is kept back."
        )
    logger.warning("%s: %d of %d rows are left out, having %s", name, len(rows) - len(kept), len(rows), told)
    return kept


def different(rows: Sequence[dspy.Example]) -> int:
    """Return how many different inputs the rows have."""
    return len(set(map(inputs_key, rows)))


def inputs_key(row: dspy.Example) -> str:
    """Return 16 hexadecimal digits that are equal for equal inputs."""
    text = json.dumps(keyed(row.inputs().toDict()), sort_keys=True, default=plain)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def stratified(rows: Sequence[dspy.Example], output: str, rng: random.Random) -> list[int]:
    """Return a random order of the rows in which every beginning has about the labels' shares."""
    groups: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        label = row.get(output, "") if output else ""
        groups[str(plain(label))].append(at)
    placed: list[tuple[float, float, int]] = []
    for label in sorted(groups):
        members = groups[label]
        rng.shuffle(members)
        offset = rng.random()
        placed += [((rank + offset) / len(members), rng.random(), at) for rank, at in enumerate(members)]
    return [at for _, _, at in sorted(placed)]
