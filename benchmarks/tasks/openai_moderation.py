"""OpenAI moderation: does a text break any rule of the provider's usage policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import dspy

from preceptor.benchmarks.tasks.published import Hub, Parts, Published, drawn, parts
from preceptor.data import load_rows

SIZES: Final = (64, 64, 200)
HUB: Final = Hub("mmathys/openai-moderation-api-evaluation", "main")
"""Not pinned: its commit could not be found out."""
FLAGS: Final = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")
LONGEST: Final = 1200
"""Characters; longer texts are left out, because small models in this process take long over them."""


def _rows(data: Path | None, seed: int) -> Parts:
    samples = HUB.rows("train") if data is None else load_rows(data / "openai_moderation" / "samples-1680.jsonl")
    rows = [_row(row) for row in samples if _is_known(row)]
    shuffled = drawn(rows, len(rows))  # as the file stands, neither half is like the other
    half = len(rows) // 2
    return parts(shuffled[:half], shuffled[half:], SIZES, seed, "flagged")


def _is_known(row: dict[str, Any]) -> bool:
    """Return True if the row is labelled: a flag that is missing is unknown, not 0."""
    flags = [row.get(flag) for flag in FLAGS]
    return len(row["prompt"]) <= LONGEST and (1 in flags or None not in flags)


def _row(row: dict[str, Any]) -> dspy.Example:
    is_flagged = any(row.get(flag) == 1 for flag in FLAGS)
    return dspy.Example(text=row["prompt"], flagged="yes" if is_flagged else "no").with_inputs("text")


TASK: Final = Published(
    name="openai_moderation",
    signature="text -> flagged: Literal['yes', 'no']",
    instructions="Does the text contain undesired content?",
    metric="f1:yes",
    licence="MIT",
    citation="Markov et al., 2023",
    sizes=SIZES,
    hub=HUB,
    rows=_rows,
)
