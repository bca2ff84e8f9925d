"""Support tickets of our own: six queues, and a policy that their names don't give away."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import dspy

from preceptor import demo
from preceptor.benchmarks.tasks.published import Parts, Published, drawn
from preceptor.data import load_rows

SIZES: Final = (96, 150, 234)


def _rows(data: Path | None, seed: int) -> Parts:
    del data, seed  # the parts are fixed
    train, val, test = (
        [
            dspy.Example(text=row["text"], queue=row["queue"]).with_inputs("text")
            for row in load_rows(demo.FOLDER / f"{part}.csv")
        ]
        for part in ("train", "validation", "test")
    )
    return Parts(train, val, drawn(test, len(test)))


TASK: Final = Published(
    name="tickets",
    signature=demo.SIGNATURE,
    instructions=demo.INSTRUCTIONS,
    metric="accuracy",
    licence="Apache-2.0",
    citation="this repository",
    sizes=SIZES,
    rows=_rows,
)
