"""What a published task is, and how its rows are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import dspy

from preceptor.data import load_rows, stratified
from preceptor.errors import DataError
from preceptor.modules import Classify, Generate
from preceptor.scoring.metrics import Metric, Scorer, wrap

SHOTS: Final = (13, 21, 42, 87, 100)
"""The published 16-shot draws (Gao et al. 2021, as rl-prompt publishes them); seed n uses the n-th."""


class Parts(NamedTuple):
    """The rows of one seed's compile, and the test rows, which are the same for every seed."""

    train: list[dspy.Example]
    val: list[dspy.Example]
    test: list[dspy.Example]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A task that others have published results on.

    Attributes:
        name: In commands and in the files of results.
        signature: Input and output fields.
        instructions: The seed: what a busy engineer would write.
        metric: Of every row, and of the tables.
        licence: Of the data.
        citation: Of the data.
        sizes: Rows for training, validation and testing.
        rows: Reads them from a folder in the upstream's own layout, for one seed.
        max_tokens: Of an answer.
        human: Reads an instruction that a person wrote, where the data has one.
    """

    name: str
    signature: str
    instructions: str
    metric: Scorer | str
    licence: str
    citation: str
    sizes: tuple[int, int, int]
    rows: Callable[[Path, int], Parts]
    max_tokens: int = 48
    human: Callable[[Path], str] | None = None

    @property
    def output(self) -> str:
        """The field that holds the label."""
        return self.signature.partition("->")[2].partition(":")[0].strip()

    @property
    def has_labels(self) -> bool:
        """True if an answer is one of a few labels."""
        return "Literal" in self.signature

    def student(self, instructions: str | None = None) -> dspy.Module:
        """Return the program with the seed instruction, or another one."""
        kind: Any = Classify if self.has_labels else Generate
        program: dspy.Module = kind(self.signature, instructions or self.instructions)
        return program

    def scorer(self) -> Metric:
        """Return the metric of a row."""
        return wrap(self.metric, self.output)


def shots(folder: str, labels: Sequence[str], *, test: int) -> Callable[[Path, int], Parts]:
    """Return a reader of `lmbff_16shot/FOLDER`: 16 rows a label to train on, 16 to validate on, and a test file.

    Of the test file a fixed draw of `test` rows is taken: some files are sorted by label.
    """

    def read(data: Path, seed: int) -> Parts:
        place = data / "lmbff_16shot" / folder
        if seed >= len(SHOTS):
            raise DataError(f"{folder} is published in {len(SHOTS)} draws: seeds 0 to {len(SHOTS) - 1}, not {seed}.")
        part = place / f"16-{SHOTS[seed]}"

        def rows(path: Path) -> list[dspy.Example]:
            return [
                dspy.Example(sentence=row.get("sentence", row.get("text")), kind=labels[int(row["label"])]).with_inputs(
                    "sentence"
                )
                for row in load_rows(path)
            ]

        return Parts(rows(part / "train.tsv"), rows(part / "dev.tsv"), drawn(rows(place / "test.tsv"), test))

    return read


def drawn(rows: Sequence[dspy.Example], count: int, seed: int = 0) -> list[dspy.Example]:
    """Return a random draw of so many rows, the same every time."""
    return random.Random(seed).sample(list(rows), min(count, len(rows)))


def parts(
    pool: Sequence[dspy.Example], test: Sequence[dspy.Example], sizes: tuple[int, int, int], seed: int, output: str
) -> Parts:
    """Return train and validation rows drawn from the pool anew for each seed, and the same test rows for all.

    Raises:
        DataError: If there are too few.
    """
    train, val, tested = sizes
    if train + val > len(pool):
        raise DataError(f"{train} and {val} rows are asked for, there are {len(pool)}.")
    order = stratified(list(pool), output, random.Random(seed))
    chosen = [pool[at] for at in order[: train + val]]
    return Parts(chosen[:train], chosen[train:], drawn(test, tested))
