"""GSM8K: grade-school mathematics; the answer is a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import dspy

from preceptor.benchmarks.tasks.published import Hub, Parts, Published, parts
from preceptor.data import load_rows

SIZES: Final = (48, 48, 100)
HUB: Final = Hub("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", config="main")


def last_number(gold: Any, prediction: Any) -> bool:
    """Return True if the last number in the answer is the right one."""
    numbers = [word.strip(".,$%*()") for word in str(prediction.answer).replace(",", "").split()]
    found = [number for number in numbers if number.lstrip("-").replace(".", "", 1).isdigit()]
    return bool(found) and float(found[-1]) == float(gold.answer)


def _rows(data: Path | None, seed: int) -> Parts:
    train, test = (
        [_row(row) for row in (HUB.rows(part) if data is None else load_rows(data / "gsm8k" / f"{part}.jsonl"))]
        for part in ("train", "test")
    )
    return parts(train, test, SIZES, seed, "")


def _row(row: dict[str, Any]) -> dspy.Example:
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return dspy.Example(question=row["question"], answer=answer).with_inputs("question")


TASK: Final = Published(
    name="gsm8k",
    signature="question -> answer: str",
    instructions="Solve the problem.",
    metric=last_number,
    licence="MIT",
    citation="Cobbe et al., 2021",
    sizes=SIZES,
    hub=HUB,
    rows=_rows,
    max_tokens=320,
)
