"""What `eval` tells of a program's answers, and of two programs' on the same rows: as values, and for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import dspy

from preceptor.cli.view import out, plain, print_table
from preceptor.scoring.evaluate import held_against
from preceptor.scoring.metrics import Metric
from preceptor.scoring.statistics import Comparison, compare, interval
from preceptor.scoring.trial import Outcome

_LARGEST_TABLE: Final = 20
"""Answers up to which they are tabled against the labels."""

_CERTAIN: Final = {(1, 1): "both right", (0, 0): "both wrong", (0, 1): "wrong -> right", (1, 0): "right -> wrong"}
_GRADED: Final = {0: "same score", 1: "higher", -1: "lower"}
_CHANGES: Final = ("wrong -> right", "right -> wrong", "higher", "lower")
_FAILED: Final = "failed"

_MOST_FAILURES: Final = 20
"""Rows that failed, of which the reason is told."""


def even(one: Sequence[Outcome], other: Sequence[Outcome], measure: Metric) -> Comparison:
    """Compare two programs; a row that one of them fails with counts against that one."""
    return compare(held_against(other, one), held_against(one, other), measure)


def evaluated(outcomes: Sequence[Outcome], metric: Metric) -> dict[str, Any]:
    """Return a program's score with its interval, and which answers it gave to which labels."""
    kinds = Counter(outcome.kind for outcome in outcomes)
    pairs = Counter((outcome.gold, _answer(outcome)) for outcome in outcomes)
    return {
        "metric": metric.name,
        "score": metric.aggregate(outcomes),
        "ci": list(interval(outcomes, metric)),
        "rows": len(outcomes),
        "unparsable": kinds["unparsable"],
        "failed": kinds["failed"],
        "failures": list(islice(_failures(outcomes), _MOST_FAILURES)),
        "confusion": [
            {"label": gold, "answer": answer, "rows": count} for (gold, answer), count in sorted(pairs.items())
        ],
    }


def _failures(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    for number, outcome in enumerate(outcomes, 1):
        if outcome.kind == _FAILED:
            yield {"row": number, "reason": outcome.error}


def _print_first_failure(result: Mapping[str, Any], whose: str = "") -> None:
    for first in result["failures"][:1]:
        out().print(plain(f"row {first['row']} failed{whose}: {first['reason']}"), soft_wrap=True)


def _answer(outcome: Outcome) -> str:
    return outcome.answer or ("(none)" if outcome.kind == "scored" else f"({outcome.kind})")


def print_evaluation(result: dict[str, Any]) -> None:
    """Print what `evaluated` returned of one program."""
    low, high = result["ci"]
    console = out()
    console.print(
        plain(f"{result['metric']} {result['score']:.3f}, 95 % interval {low:.3f} to {high:.3f}, {result['rows']} rows")
    )
    failed = f"{result['failed']}, left out of the score" if result["failed"] else "0"
    console.print(f"unparsable answers: {result['unparsable']}, failed calls: {failed}")
    _print_first_failure(result)
    console.print()
    labels = sorted({cell["label"] for cell in result["confusion"]})
    answers = sorted({cell["answer"] for cell in result["confusion"]})
    if len(answers) > _LARGEST_TABLE:
        return
    counts = {(cell["label"], cell["answer"]): cell["rows"] for cell in result["confusion"]}
    rows = [[label, *(counts.get((label, answer), 0) for answer in answers)] for label in labels]
    print_table("Rows by label (down) and answer (across)", ["", *answers], rows)


def kinds_of(before: Sequence[Outcome], after: Sequence[Outcome]) -> list[str]:
    """Return what became of each row."""
    pairs = list(zip(before, after, strict=True))
    is_certain = all(outcome.score in (0, 1, None) for pair in pairs for outcome in pair)
    kinds: list[str] = []
    for old, new in pairs:
        if old.score is None or new.score is None:
            kinds.append(_FAILED)
        elif is_certain:
            kinds.append(_CERTAIN[int(old.score), int(new.score)])
        else:
            kinds.append(_GRADED[(new.score > old.score) - (new.score < old.score)])
    return kinds


def changed(
    rows: Sequence[dspy.Example], scored: Sequence[Sequence[Outcome]], kinds: Sequence[str], most: int
) -> Iterator[dict[str, Any]]:
    """Yield up to `most` rows that changed, each way."""
    for change in _CHANGES:
        for at in islice((at for at, kind in enumerate(kinds) if kind == change), most):
            first, second = scored[0][at], scored[1][at]
            yield {
                "change": change,
                "row": at + 1,
                "inputs": rows[at].inputs().toDict(),
                "label": first.gold,
                "first": _answer(first),
                "second": _answer(second),
            }


def comparison(results: Sequence[dict[str, Any]], verdict: Comparison, kinds: Sequence[str]) -> dict[str, Any]:
    """Return what two programs' results and their comparison come to."""
    counts = Counter(kinds)
    order = [*_CERTAIN.values()] if set(kinds) <= {*_CERTAIN.values(), _FAILED} else [*_GRADED.values()]
    return {
        "metric": results[0]["metric"],
        "rows": verdict.rows,
        "first": results[0],
        "second": results[1],
        "gain": verdict.gain,
        "ci": [verdict.low, verdict.high],
        "p_value": verdict.p_value,
        "test": verdict.test,
        "better": "second" if verdict.is_confirmed else "first" if verdict.is_refuted else None,
        "smallest_gain": verdict.smallest_gain,
        "changes": {kind: counts[kind] for kind in [*order, *([_FAILED] if counts[_FAILED] else [])]},
    }


def print_comparison(result: dict[str, Any]) -> None:
    """Print a comparison, with the rows that changed."""
    sides = [(name, result[name]) for name in ("first", "second")]
    header = ["", result["metric"], "95 % interval", "unparsable", "failed", "program", "model"]
    columns = ("unparsable", "failed", "program", "lm")
    rows = [
        [name, side["score"], "{:.3f} to {:.3f}".format(*side["ci"]), *(side[column] for column in columns)]
        for name, side in sides
    ]
    print_table("", header, rows)
    for name, side in sides:
        _print_first_failure(side, f" with the {name} program")
    low, high = result["ci"]
    lines = (
        f"\ngain {100 * result['gain']:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, "
        f"p = {result['p_value']:.2g} ({result['test']}, {result['rows']} rows)",
        *(["A row that only one program fails with counts against it.\n"] if _FAILED in result["changes"] else []),
        f"The {result['better']} program is better." if result["better"] else "Neither program is shown to be better.",
        f"Four times in five, so many rows confirm a true gain of {100 * result['smallest_gain']:.0f} points.\n",
    )
    for line in lines:
        out().print(plain(line), soft_wrap=True)
    print_table("", ["rows", "count"], [[kind, count] for kind, count in result["changes"].items()])
    for example in result["examples"]:
        _print_example(example)


def _print_example(example: dict[str, Any]) -> None:
    given = ", ".join(f"{name}: {value}" for name, value in example["inputs"].items())
    text = f"\nrow {example['row']}, {example['change']}: {given}\n  label {example['label']}"
    out().print(plain(f"{text}, first {example['first']}, second {example['second']}"), soft_wrap=True)
