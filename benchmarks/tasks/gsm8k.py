"""GSM8K: grade-school mathematics; the answer is a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import dspy

from preceptor.benchmarks.tasks.published import Parts, Published, parts
from preceptor.data import load_rows

SIZES: Final = (48, 48, 100)


def last_number(gold: Any, prediction: Any) -> bool:
    """Return True if the last number in the answer is the right one."""
    numbers = [word.strip(".,$%*()") for word in str(prediction.answer).replace(",", "").split()]
    found = [number for number in numbers if number.lstrip("-").replace(".", "", 1).isdigit()]
    return bool(found) and float(found[-1]) == float(gold.answer)


def _rows(data: Path, seed: int) -> Parts:
    train, test = ([_row(row) for row in load_rows(data / "gsm8k" / f"{part}.jsonl")] for part in ("train", "test"))
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
    rows=_rows,
    max_tokens=320,
)
