"""What methods that learn from errors show a proposer, and how they read what it writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from preceptor.scoring.texts import as_text
from preceptor.scoring.trial import Candidate, Outcome
from preceptor.task import Task

FIELD_CHARACTERS: Final = 2_000
"""Of one input or output as the proposer sees it."""

END: Final = ("<END>", "</END>", "</START>")
"""Where a text between the tags is over; a model that was asked for one needn't write on."""

RIGHT: Final = "Right answer"
"""Before what was expected, with which an error ends."""

_PREAMBLE: Final = re.compile(
    r"\A\s*(?:sure|certainly|okay|here(?:'s| is| are)|(?:the )?(?:rewritten|revised|improved|new|better) prompt)"
    r"[^\n]{0,80}:\s*\n+",
    re.IGNORECASE,
)
_ECHO: Final = re.compile(r"<\s*START\s*>[\"'`]?\s+and\b\s*[\"'`]?(?:<\s*/?\s*END\s*>|\Z)", re.IGNORECASE)
_TAG: Final = re.compile(r"<\s*(/?)\s*(START|END)\s*/?\s*>", re.IGNORECASE)


def errors(task: Task, name: str, candidate: Candidate, rows: Sequence[int]) -> list[str]:
    """Return the errors of a candidate on train rows as a predictor made them, as text; costs a task call a row.

    An error is a row with a score below 1, or an answer that can't be read. One the predictor had no part in is left
    out.
    """
    return errors_among(task, name, rows, [outcome for outcome, _ in task.steps(rows, candidate)])


def errors_among(task: Task, name: str, rows: Sequence[int], outcomes: Sequence[Outcome]) -> list[str]:
    """Return the same of outcomes that are known already; no call."""
    watched = zip(rows, outcomes, strict=True)
    shown = [_shown(task, name, row, outcome) for row, outcome in watched if _is_wrong(outcome)]
    return [text for text in shown if text]


def _is_wrong(outcome: Outcome) -> bool:
    return outcome.kind != "failed" and (outcome.score or 0.0) < 1.0


def _shown(task: Task, name: str, row: int, outcome: Outcome) -> str:
    """Return what a predictor was given and answered on a row, and what was expected of the program.

    "" if the program came to its answer without it.
    """
    signature, example = task.signatures[name], task.train[row]
    answer = outcome.answer or "something that can't be read"
    steps = [step for step in outcome.steps if step.predictor == name]
    if not steps and outcome.kind == "scored" and len(task.signatures) > 1:
        return ""
    pairs = [
        (_fields(step.inputs, signature.input_fields), _fields(step.outputs, signature.output_fields)) for step in steps
    ]
    inputs, labels = example.inputs(), example.labels()
    lines = [f"Input: {put}\nAnswer: {got}" for put, got in pairs or [(_fields(inputs, inputs), answer)]]
    lines += [f"Answer of the whole program: {cut(answer)}"] if len(task.signatures) > 1 or len(pairs) > 1 else []
    several = [label for label in labels if any(label in one.output_fields for one in task.signatures.values())]
    gold = _fields(labels, several) if len(several) > 1 else cut(outcome.gold) or _fields(labels, labels)
    return "\n".join([*lines, f"{RIGHT}: {gold}"])


def _fields(values: Any, names: Iterable[str]) -> str:
    return "\n".join(f"{name}: {cut(as_text(values[name]))}" for name in names if values.get(name) is not None)


def cut(text: str) -> str:
    """Return a text as a proposer sees it: what is long, cut."""
    return text if len(text) <= FIELD_CHARACTERS else f"{text[:FIELD_CHARACTERS]} ..."


def parse(text: str) -> list[str]:
    r"""Return what stands between the tags, or the whole text where there are none; without quotes and fences.

    A missing or misspelt closing tag is forgiven; the request's own words, "between <START> and <END>", are no text.

    Example:
        >>> parse("Sure!\n<START>Name the capital.<END> <START>\"Say where.\"</START>")
        ['Name the capital.', 'Say where.']
        >>> parse("Here is the prompt:\n\nName the capital.")
        ['Name the capital.']
    """
    pieces = list(_pieces(_ECHO.sub("", text))) or [_PREAMBLE.sub("", "" if _ECHO.search(text) else text)]
    return [piece for piece in map(_bare, pieces) if piece]


def _pieces(text: str) -> Iterator[str]:
    tags = list(_TAG.finditer(text))
    for at, tag in enumerate(tags):
        if tag[2].upper() == "START" and not tag[1]:
            yield text[tag.end() : tags[at + 1].start() if at + 1 < len(tags) else len(text)]


def _bare(text: str) -> str:
    """Return a text without leftover tags, and without the quotes or the fence around it."""
    body = _TAG.sub("", text).strip()
    fenced = re.fullmatch(r"```\w*\n(.*?)\n?```", body, flags=re.DOTALL)
    body = fenced[1].strip() if fenced else body
    quoted = re.fullmatch(r"[\"“](.*)[\"”]", body, flags=re.DOTALL)
    return quoted[1].strip() if quoted and '"' not in quoted[1] else body
