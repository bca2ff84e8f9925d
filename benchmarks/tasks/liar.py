"""LIAR: is a politician's statement a lie; the rows ProTeGi published."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import dspy

from preceptor.benchmarks.tasks.published import Parts, Published, parts
from preceptor.data import load_rows

SIZES: Final = (64, 64, 200)


def _rows(data: Path, seed: int) -> Parts:
    train, test = (
        [_row(row) for row in load_rows(data / "protegi_liar" / f"{part}.jsonl")] for part in ("train", "test")
    )
    return parts(train, test, SIZES, seed, "lie")


def _row(row: dict[str, Any]) -> dspy.Example:
    return dspy.Example(statement=row["text"], lie="yes" if row["label"] else "no").with_inputs("statement")


TASK: Final = Published(
    name="liar",
    signature="statement -> lie: Literal['yes', 'no']",
    instructions="Decide whether the politician's statement is a lie.",
    metric="f1:yes",
    licence="unknown (LIAR); the parts are MIT",
    citation="Wang, 2017; parts by Pryzant et al., 2023 (ProTeGi)",
    sizes=SIZES,
    rows=_rows,
)
