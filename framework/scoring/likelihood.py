"""The score by likelihood: how probable the label is to a model in this process, not what the model answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dspy
from dspy.lm15 import Request, Response

from preceptor.errors import ConfigError
from preceptor.lm.adapter import DirectAdapter, is_direct, output_name
from preceptor.lm.seam import mean_log_probability
from preceptor.scoring.texts import references
from preceptor.scoring.trial import Candidate, Outcome


def refuse_program(signatures: Mapping[str, type[dspy.Signature]]) -> None:
    """Raise unless a program is one whose answer is one label.

    Raises:
        ConfigError: Saying what is needed.
    """
    if len(signatures) != 1 or not all(map(is_direct, signatures.values())):
        raise ConfigError("The likelihood score needs a program of one predictor with one plain output.")


def refuse(signatures: Mapping[str, type[dspy.Signature]], lm: dspy.LM, rows: Sequence[dspy.Example]) -> None:
    """Raise unless log-probabilities of the rows' answers can be had.

    Raises:
        ConfigError: Saying what is needed.
    """
    refuse_program(signatures)
    [field] = (output_name(signature) for signature in signatures.values())
    for number, row in enumerate(rows, 1):
        if not any(references(row.get(field))):
            raise ConfigError(
                f"The likelihood score is that of the predictor's own output: train row {number} has none in {field!r}."
            )
    if not getattr(lm.engine, "supports_choices", False):
        raise ConfigError(f"The likelihood score needs a model in this process; {lm.model} only writes text.")


def request(lm: dspy.LM, name: str, predictor: Any, candidate: Candidate, example: dspy.Example) -> Request:
    """Return what asks how probable a row's label is, the first of several, to a predictor with a candidate's texts."""
    signature = predictor.signature.with_instructions(candidate.instructions[name])
    demos = [dict(demo) for demo in candidate.demos.get(name, predictor.demos)]
    label = references(example[output_name(signature)])[0]
    return DirectAdapter().request(lm, {}, signature, demos, example.inputs().toDict(), [label])


def outcome(result: Response | Exception) -> Outcome:
    """Return what came of a request: log P per token of the label, at most 0."""
    if isinstance(result, Exception):
        return Outcome("failed", None, error=f"{type(result).__name__}: {result}")
    return Outcome("scored", mean_log_probability(result))
