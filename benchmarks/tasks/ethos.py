"""ETHOS: is a comment hate speech; the rows ProTeGi kept are those its annotators agreed on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final

import dspy

from preceptor.benchmarks.tasks.published import Parts, Published, drawn, parts

SIZES: Final = (64, 64, 200)
NO_HATE: Final = 0.0
HATE: Final = 0.7
"""Shares of annotators who saw hate; ProTeGi's bounds."""

TESTED: Final = 200
"""Rows set aside for testing, as many as ProTeGi's."""


def _rows(data: Path, seed: int) -> Parts:
    path = data / "ethos" / "Ethos_Dataset_Binary.csv"
    with path.open(encoding="utf-8", newline="") as file:
        _, *lines = csv.reader(file, delimiter=";")
    rated = [(text.strip(), float(share)) for text, share in lines if text.strip()]
    kept = [
        dspy.Example(comment=text, hate="yes" if share >= HATE else "no").with_inputs("comment")
        for text, share in rated
        if share <= NO_HATE or share >= HATE
    ]
    shuffled = drawn(kept, len(kept))  # the file is in the order of its sources
    return parts(shuffled[TESTED:], shuffled[:TESTED], SIZES, seed, "hate")


TASK: Final = Published(
    name="ethos",
    signature="comment -> hate: Literal['yes', 'no']",
    instructions="Decide whether the comment is hate speech.",
    metric="f1:yes",
    licence="GPL-3.0",
    citation="Mollas et al., 2022",
    sizes=SIZES,
    rows=_rows,
)
