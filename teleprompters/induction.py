"""Instruction induction: a proposer sees demonstrations and is asked for the instruction that led to them.

Honovich et al., "Instruction Induction", arXiv:2205.10782; the question of APE and of InstructZero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any, Final

from preceptor.errors import LMFailed
from preceptor.scoring.texts import as_text
from preceptor.scoring.trial import Step
from preceptor.task import Task
from preceptor.teleprompters.reading import cut

FORWARD: Final = Template("""\
I gave a friend an instruction and some inputs. The friend read the instruction and wrote an output for \
every one of the inputs. Here are the input-output pairs:

$demos

What was the instruction? Write the instruction only.""")
"""The paper's forward template nearly word for word, but for the last line, which is ours: there the model goes on."""

_LEADING: Final = r"^(?:the )?(?:instruction|output)(?:(?: was| is)?\s*:|(?: was| is)\s*(?=[\"“]))\s*"
"""A label before a proposal; "Output the capital." has none."""


def demonstrations(task: Task, rows: Sequence[int], shown: int) -> Mapping[str, list[str]]:
    """Return each predictor's demonstrations as text, in the order of `rows`; none for one that never answered.

    A single predictor's are the rows themselves, where they have its fields. Else they are what the seed's
    predictor was given and answered on the rows that it had a part in and the program got right. Where fewer are right
    than `shown` at once, they are those of the better half by score, and of `shown` at least, but for rows scored 0;
    where all are, they are all.

    Raises:
        LMFailed: If no predictor ever answered.
    """
    signatures = task.signatures
    [(name, signature), *others] = signatures.items()
    if not others and all(_has_fields(task.train[row], signature) for row in rows):
        return {name: [_pair(task.train[row], task.train[row], signature) for row in rows]}
    watched = task.steps(rows)
    found: dict[str, list[str]] = {}
    for name, signature in signatures.items():
        own = [(outcome.score or 0.0, [step for step in steps if step.predictor == name]) for outcome, steps in watched]
        best = _best([(score, steps) for score, steps in own if steps], shown)
        found[name] = [_pair(step.inputs, step.outputs, signature) for steps in best for step in steps]
    silent = [name for name, pairs in found.items() if not pairs]
    if len(silent) == len(found):
        raise LMFailed(f"The predictor {silent[0]} never answered on {len(rows)} rows; nothing to infer from.")
    for name in silent:
        task.report(f"{name} never answered on {len(rows)} rows: its instruction is left alone", 0, 0)
    return found


def _best(scored: Sequence[tuple[float, list[Step]]], shown: int) -> list[list[Step]]:
    """Return the steps of the rows that are demonstrated, of all that a predictor had a part in."""
    scores = [score for score, _ in scored]
    ranked = sorted(scores, reverse=True)[: max(shown, math.ceil(len(scores) / 2))]
    least = 1.0 if scores.count(1.0) >= shown else min(ranked, default=0.0)
    best = [steps for score, steps in scored if score >= least and score > 0]
    return best or [steps for _, steps in scored]


def _has_fields(row: Any, signature: Any) -> bool:
    """Return True if a row holds an input and an output of the predictor itself."""
    return any(name in row for name in signature.input_fields) and any(name in row for name in signature.output_fields)


def _pair(inputs: Any, outputs: Any, signature: Any) -> str:
    given = "\n".join(
        f"{field}: {cut(as_text(inputs[field]))}" for field in signature.input_fields if inputs.get(field) is not None
    )
    answer = ", ".join(
        cut(as_text(outputs[field])) for field in signature.output_fields if outputs.get(field) is not None
    )
    return f"Input: {given}\nOutput: {answer}"


def clean(text: str) -> str:
    r"""Return a proposal without quotes, a leading label, and demonstrations the model went on to write.

    Example:
        >>> clean('The instruction was: "Name the capital."\n\nInput: France')
        'Name the capital.'
    """
    body = re.split(r"(?:^Input|\n\s*(?:Input|Output))\s*:", text.strip())[0].strip()
    body = re.sub(_LEADING, "", body, flags=re.IGNORECASE).strip()
    quoted = re.fullmatch(r"([\"'`“]+)(.*?)[\"'`”]+", body, flags=re.DOTALL)
    return quoted[2].strip() if quoted and quoted[1][0] not in quoted[2] else body
