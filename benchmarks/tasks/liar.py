"""LIAR: is a politician's statement a lie; the rows ProTeGi published."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import dspy

from preceptor.benchmarks.tasks.published import Hub, Parts, Published, parts
from preceptor.data import load_rows

SIZES: Final = (64, 64, 200)
HUB: Final = Hub("ucsbnlp/liar", "refs/convert/parquet")
"""Not pinned: a branch of the hub's own, whose commit could not be found out; `datasets` no longer runs the script
that the main branch holds."""
KEPT: Final = {0: 1, 3: 0}
"""What ProTeGi kept of the hub's labels, false and true, and its own number of each."""
FIELDS: Final = {
    "Statement": "statement",
    "Job title": "job_title",
    "State": "state_info",
    "Party": "party_affiliation",
    "Context": "context",
}
"""Of the text, and the hub's columns."""


def _rows(data: Path | None, seed: int) -> Parts:
    train, test = (
        [_row(row) for row in (_of_hub(part) if data is None else load_rows(data / "protegi_liar" / f"{part}.jsonl"))]
        for part in ("train", "test")
    )
    return parts(train, test, SIZES, seed, "lie")


def _of_hub(part: str) -> list[dict[str, Any]]:
    return [
        {
            "text": "\n".join(f"{name}: {row[column] or ''}" for name, column in FIELDS.items()),
            "label": KEPT[row["label"]],
        }
        for row in HUB.rows(part)
        if row["label"] in KEPT
    ]


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
    hub=HUB,
    rows=_rows,
)
