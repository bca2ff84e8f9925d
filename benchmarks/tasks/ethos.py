"""ETHOS: is a comment hate speech; the rows ProTeGi kept are those its annotators agreed on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final

import dspy

from preceptor.benchmarks.tasks.published import Hub, Parts, Published, drawn, parts

SIZES: Final = (64, 64, 200)
NO_HATE: Final = 0.0
HATE: Final = 0.7
"""Shares of annotators who saw hate; ProTeGi's bounds."""

TESTED: Final = 200
"""Rows set aside for testing, as many as ProTeGi's."""


HUB: Final = Hub("iamollas/ethos", "refs/convert/parquet", folder="binary")
"""Not pinned: a branch of the hub's own, whose commit could not be found out. It has labels, yes from half of the
annotators on, but no shares: from the hub, comments that they disagreed on are in."""


def _rows(data: Path | None, seed: int) -> Parts:
    kept = _of_hub() if data is None else _agreed_on(data)
    shuffled = drawn(kept, len(kept))  # the file is in the order of its sources
    return parts(shuffled[TESTED:], shuffled[:TESTED], SIZES, seed, "hate")


def _of_hub() -> list[dspy.Example]:
    return [_row(row["text"].strip(), bool(row["label"])) for row in HUB.rows("train") if row["text"].strip()]


def _agreed_on(data: Path) -> list[dspy.Example]:
    path = data / "ethos" / "Ethos_Dataset_Binary.csv"
    with path.open(encoding="utf-8", newline="") as file:
        _, *lines = csv.reader(file, delimiter=";")
    rated = [(text.strip(), float(share)) for text, share in lines if text.strip()]
    return [_row(text, share >= HATE) for text, share in rated if share <= NO_HATE or share >= HATE]


def _row(comment: str, is_hate: bool) -> dspy.Example:
    return dspy.Example(comment=comment, hate="yes" if is_hate else "no").with_inputs("comment")


TASK: Final = Published(
    name="ethos",
    signature="comment -> hate: Literal['yes', 'no']",
    instructions="Decide whether the comment is hate speech.",
    metric="f1:yes",
    licence="GPL-3.0",
    citation="Mollas et al., 2022",
    sizes=SIZES,
    hub=HUB,
    rows=_rows,
)
