"""What a published task is, and how its rows are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import dspy

from preceptor.data import load_rows
from preceptor.errors import ConfigError, DataError
from preceptor.modules import Classify, Generate
from preceptor.scoring.metrics import Metric, Scorer, wrap
from preceptor.splits import inputs_key, stratified

SHOTS: Final = (13, 21, 42, 87, 100)
"""The published 16-shot draws (Gao et al. 2021, as rl-prompt publishes them); seed n uses the n-th."""

SHOTS_A_LABEL: Final = 16


@dataclass(frozen=True, slots=True)
class Hub:
    """A data set on the Hugging Face hub.

    Attributes:
        id: Owner and name.
        revision: A commit; or the name of a branch, and then the rows may change.
        config: Its configuration, "" if it has one only.
        folder: Of the repository, "" if all of it is meant.
    """

    id: str
    revision: str
    config: str = ""
    folder: str = ""

    def rows(self, part: str) -> list[dict[str, Any]]:
        """Return the rows of one of its splits.

        Raises:
            DataError: If they can't be had.
        """
        where = {"revision": self.revision, "name": self.config, "data_dir": self.folder}
        return load_rows(self.id, part=part, where={name: value for name, value in where.items() if value})


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
        rows: Reads them from a folder in the upstream's own layout, or from the hub if it is None, for one seed.
        hub: Where it is there; None if it isn't, as its upstream has it, under a name that is known here.
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
    rows: Callable[[Path | None, int], Parts]
    hub: Hub | None = None
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

    def source(self, data: Path | None) -> str:
        """Return where the rows come from, as it is written into results."""
        return f"{self.hub.id}@{self.hub.revision}" if data is None and self.hub else "upstream"

    def student(self, instructions: str | None = None) -> dspy.Module:
        """Return the program with the seed instruction, or another one."""
        kind: Any = Classify if self.has_labels else Generate
        program: dspy.Module = kind(self.signature, instructions or self.instructions)
        return program

    def scorer(self) -> Metric:
        """Return the metric of a row."""
        return wrap(self.metric, self.output)


def on_disk(data: Path | None, name: str) -> Path:
    """Return the folder of the data sets.

    Raises:
        ConfigError: If there is none, for a task that the hub has not.
    """
    if data is None:
        raise ConfigError(f"The task {name} is read from its upstream's files only; pass --data-dir.")
    return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Shots:
    """Reads 16 rows a label to train on, 16 to validate on, and a fixed draw of the test rows.

    From `lmbff_16shot/FOLDER` come the published draws; from the hub, whose data set is the whole corpus, draws of
    its train split of the same sizes, and another draw of its test split: the rows differ, the columns don't.
    subj's published rows to validate on are its train rows again (`dev.tsv` is `train.tsv`), so that they confirm
    nothing: its are drawn from the test rows that aren't drawn to test on.

    Attributes:
        folder: Of the published draws.
        labels: As the published files number them.
        hub: The whole corpus.
        numbered: Labels as the hub numbers them.
        label: The hub's column.
        test: Rows drawn; some files are sorted by label.
    """

    folder: str
    labels: Sequence[str]
    hub: Hub
    numbered: Sequence[str]
    label: str = "label"
    test: int = 200

    def __call__(self, data: Path | None, seed: int) -> Parts:
        """Return the rows of one seed."""
        return self._of_hub(seed) if data is None else self._published(data / "lmbff_16shot" / self.folder, seed)

    def _published(self, place: Path, seed: int) -> Parts:
        if seed >= len(SHOTS):
            raise DataError(
                f"{self.folder} is published in {len(SHOTS)} draws: seeds 0 to {len(SHOTS) - 1}, not {seed}."
            )
        part = place / f"16-{SHOTS[seed]}"

        def rows(path: Path) -> list[dspy.Example]:
            return [
                _labelled(row.get("sentence", row.get("text")), self.labels[int(row["label"])])
                for row in load_rows(path)
            ]

        train, val, test = rows(part / "train.tsv"), rows(part / "dev.tsv"), rows(place / "test.tsv")
        tested = drawn(test, self.test)
        return Parts(train, self._kept_back(test, [*train, *tested], seed) if val == train else val, tested)

    def _kept_back(self, pool: Sequence[dspy.Example], used: Sequence[dspy.Example], seed: int) -> list[dspy.Example]:
        """Return rows to validate on from those that aren't used, where the published ones are the train rows again."""
        texts = {row.sentence for row in used}
        free = [row for row in pool if row.sentence not in texts]
        return [
            row
            for label in self.labels
            for row in drawn([row for row in free if row.kind == label], SHOTS_A_LABEL, seed)
        ]

    def _of_hub(self, seed: int) -> Parts:
        pool, test = (
            [_labelled(row["text"], self.numbered[int(row[self.label])]) for row in self.hub.rows(part)]
            for part in ("train", "test")
        )
        tested = drawn(test, self.test)
        free = _untested(pool, tested)
        train: list[dspy.Example] = []
        val: list[dspy.Example] = []
        for label in self.labels:
            chosen = drawn([row for row in free if row.kind == label], 2 * SHOTS_A_LABEL, seed)
            train += chosen[:SHOTS_A_LABEL]
            val += chosen[SHOTS_A_LABEL:]
        return Parts(train, val, tested)


def _labelled(text: Any, label: str) -> dspy.Example:
    return dspy.Example(sentence=text, kind=label).with_inputs("sentence")


def _untested(pool: Sequence[dspy.Example], tested: Sequence[dspy.Example]) -> list[dspy.Example]:
    """Return the rows whose inputs no test row has."""
    held = set(map(inputs_key, tested))
    return [row for row in pool if inputs_key(row) not in held]


def drawn(rows: Sequence[dspy.Example], count: int, seed: int = 0) -> list[dspy.Example]:
    """Return a random draw of so many rows, the same every time."""
    return random.Random(seed).sample(list(rows), min(count, len(rows)))


def parts(
    pool: Sequence[dspy.Example], test: Sequence[dspy.Example], sizes: tuple[int, int, int], seed: int, output: str
) -> Parts:
    """Return train and validation rows drawn from the pool anew for each seed, and the same test rows for all.

    Rows of the pool whose inputs a test row has are left out.

    Raises:
        DataError: If there are too few.
    """
    train, val, count = sizes
    tested = drawn(test, count)
    free = _untested([pool[at] for at in stratified(list(pool), output, random.Random(seed))], tested)
    if train + val > len(free):
        raise DataError(f"{train} and {val} rows are asked for, there are {len(free)} that aren't tested on.")
    return Parts(free[:train], free[train : train + val], tested)
