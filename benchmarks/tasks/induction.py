"""The 24 instruction-induction tasks, each with its own metric: guess the instruction from inputs and outputs."""

from __future__ import annotations

import json
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import dspy

from preceptor.benchmarks.tasks.published import Parts, Published, on_disk, parts

SIZES: Final = (64, 64, 100)
METRICS: Final = {
    "active_to_passive": "exact_match",
    "antonyms": "exact_match",
    "cause_and_effect": "exact_match",
    "common_concept": "token_f1",
    "diff": "exact_match",
    "first_word_letter": "exact_match",
    "informal_to_formal": "token_f1",
    "larger_animal": "exact_match",
    "letters_list": "exact_match",
    "negation": "exact_match",
    "num_to_verbal": "exact_match",
    "orthography_starts_with": "set_match",
    "rhymes": "exact_match",
    "second_word_letter": "exact_match",
    "sentence_similarity": "exact_match",
    "sentiment": "exact_match",
    "singular_to_plural": "exact_match",
    "sum": "exact_match",
    "synonyms": "contains",
    "taxonomy_animal": "set_match",
    "translation_en-de": "exact_match",
    "translation_en-es": "exact_match",
    "translation_en-fr": "exact_match",
    "word_in_context": "exact_match",
}
"""Every task, and the metric of ours that is nearest to its upstream's, which reads an answer's first line up to the
first full stop and keeps articles; ours reads all of it and drops them."""

_ACCEPTED: Final = ("other_rhymes", "possible_translations", "possible_outputs")


def _rows(name: str, data: Path | None, seed: int) -> Parts:
    folder = on_disk(data, name) / "instruction_induction" / "raw"
    induce, execute = (_read(folder / part / f"{name}.json") for part in ("induce", "execute"))
    train, val, tested = SIZES
    if train + val > len(induce):
        train = val = len(induce) // 2
    return parts(induce, execute, (train, val, tested), seed, "")


def _human(name: str, data: Path) -> str:
    """Return the first of the instructions that people wrote for a task."""
    held = json.loads((data / "instruction_induction" / "annotations" / f"{name}.json").read_text(encoding="utf-8"))
    return str(held["annotations"][0])


def _read(path: Path) -> list[dspy.Example]:
    held = json.loads(path.read_text(encoding="utf-8"))["examples"]
    return [dspy.Example(input=text, output=wanted).with_inputs("input") for text, wanted in map(_pair, held.values())]


def _pair(row: dict[str, Any]) -> tuple[str, str | list[str]]:
    """Return what is shown, and the answer that counts as right, or all that do."""
    if "cause" in row:
        said = [row["cause"], row["effect"]]
        if sha256(said[0].encode()).digest()[0] % 2:  # the cause comes first in about half of the rows
            said.reverse()
        return " ".join(f"Sentence {number}: {text}" for number, text in enumerate(said, 1)), str(row["cause"])
    if "items" in row:
        return ", ".join(row["items"]), list(row["all_common_concepts"])
    accepted: list[str] = next((row[name] for name in _ACCEPTED if name in row), [])
    others = [text for text in accepted if text != row["output"]]
    return row["input"], [row["output"], *others] if others else str(row["output"])


TASKS: Final = [
    Published(
        name=name,
        signature="input -> output: str",
        instructions="Write the output for the input.",
        metric=metric,
        licence="Apache-2.0",
        citation="Honovich et al., 2022; used by Zhou et al., 2023 (APE) and Chen et al., 2023 (InstructZero)",
        sizes=SIZES,
        rows=partial(_rows, name),
        human=partial(_human, name),
    )
    for name, metric in METRICS.items()
]
