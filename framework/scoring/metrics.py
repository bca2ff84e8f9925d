"""Metrics: any DSPy metric, and the usual ones by name.

A metric scores one row in [0, 1]. Some (F1 over a data set) are not a mean of rows: they count over the rows
and score the counts. Text is compared without regard to case and surrounding white space.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import Any, Final, TypeAlias, cast

import dspy
import numpy as np
import numpy.typing as npt

from preceptor.canonical import CONSTANTS, without_addresses
from preceptor.errors import ConfigError, MetricError
from preceptor.scoring.texts import as_text, folded, members, normalize, references, spaced, token_f1
from preceptor.scoring.trial import Outcome

Scorer = Callable[..., Any]
"""A DSPy metric of 2, 3 or 5 arguments that returns a bool, a number or a `Prediction` with a score."""

Aggregate = Callable[[Sequence[Outcome]], float]

Array: TypeAlias = npt.NDArray[np.float64]

_ROUNDED: Final = 1e-9
"""How far outside [0, 1] a score is taken as its end: a sum of tenths needn't be 1."""


class OtherFields(MetricError):
    """A prediction hasn't the field that holds the label."""


@dataclass(frozen=True, slots=True)
class Sums:
    """A score of a whole set that depends on sums over its rows; statistics resample the rows of `terms`.

    Attributes:
        terms: Outcomes, none of them failed -> what each row adds, of shape (rows, sums).
        score: Sums, of shape (..., sums) -> scores in [0, 1], of shape (...).
        turns: Number of sums -> the terms, before and after, of made-up rows that turn right or wrong, of shape
            (rows, sums) each: they enter the standard errors (see `statistics`).
    """

    terms: Callable[[Sequence[Outcome]], Array]
    score: Callable[[Array], Array]
    turns: Callable[[int], tuple[Array, Array]]


def _scores(outcomes: Sequence[Outcome]) -> Array:
    return np.array([[cast("float", outcome.score), 1.0] for outcome in outcomes]).reshape(-1, 2)


def _quotient(sums: Array) -> Array:
    return _share(sums[..., 0], sums[..., 1])


def _share(part: Array, whole: Array) -> Array:
    """Return part / whole, 0 where the whole is 0."""
    return cast("Array", np.divide(part, whole, out=np.zeros_like(part), where=whole > 0))


def _turns(sums: int) -> tuple[Array, Array]:
    """Return a row that turns right and one that turns wrong."""
    del sums
    wrong, right = [0.0, 1.0], [1.0, 1.0]
    return np.array([wrong, right]), np.array([right, wrong])


MEAN: Final = Sums(_scores, _quotient, _turns)
"""The mean of the rows' scores."""


def mean(outcomes: Sequence[Outcome]) -> float:
    """Return the mean score of the outcomes that have one; 0 if none has."""
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    return fmean(scores) if scores else 0.0


@dataclass(frozen=True, slots=True)
class Metric:
    """How rows are scored, and how their outcomes add up.

    Attributes:
        name: As users see it.
        scorer: Scores one row.
        arguments: How many arguments the scorer takes: 2, 3 or 5.
        sums: How outcomes add up; by default to the mean of their scores.
    """

    name: str
    scorer: Scorer
    arguments: int
    sums: Sums = MEAN

    @property
    def is_built_in(self) -> bool:
        """False for a function of the user's, whatever it is called."""
        return getattr(self.scorer, "__module__", "") == __name__

    @property
    def code(self) -> str:
        """What tells it from another of its name: 16 hexadecimal digits of its scorer's code and the constants it has.

        Of what is bound to the scorer, texts and numbers count; what else there is may change while it scores.
        """
        scorer, bound, named = cast("Any", self.scorer), list[Any](), dict[str, Any]()
        while isinstance(scorer, functools.partial):
            bound, named, scorer = [*bound, *scorer.args], {**scorer.keywords, **named}, scorer.func
        bound += [cell.cell_contents for cell in getattr(scorer, "__closure__", None) or ()]
        found = getattr(scorer, "__code__", None)
        own = [found.co_code, *map(_ordered, found.co_consts), found.co_names] if found else [type(scorer).__qualname__]
        named |= {} if found else getattr(scorer, "__dict__", {})
        constants = [each for each in [*bound, *sum(named.items(), ())] if isinstance(each, CONSTANTS)]
        told = without_addresses(repr([*own, constants]))
        return hashlib.blake2b(told.encode(errors="backslashreplace"), digest_size=8).hexdigest()

    @property
    def compares_labels(self) -> bool:
        """True if an answer is right that is the label, but for its case, and no other."""
        return self.is_built_in and self.name.partition(":")[0] in ("accuracy", "macro_f1", "f1")

    @property
    def is_mean(self) -> bool:
        """False for metrics over the whole set, such as F1."""
        return self.sums is MEAN

    def aggregate(self, outcomes: Sequence[Outcome]) -> float:
        """Return the score of the outcomes that did not fail, in [0, 1]; 0 if all did."""
        answered = [outcome for outcome in outcomes if outcome.kind != "failed"]
        if self.is_mean or not answered:
            return mean(answered)
        return float(self.sums.score(self.sums.terms(answered).sum(axis=0)))

    def __call__(self, example: dspy.Example, prediction: dspy.Prediction) -> float:
        """Return one row's score.

        Raises:
            MetricError: If the scorer raises, or returns what is no number in [0, 1].
        """
        extra = {2: (), 3: (None,), 5: (None, None, None)}[self.arguments]
        try:
            value = self.scorer(example, prediction, *extra)
        except MetricError:
            raise
        except Exception as error:
            raise MetricError(
                f"The metric {self.name} raised {type(error).__name__}: {error}, on {_brief(example)}."
            ) from error
        value = getattr(value, "score", value)
        value = value.item() if isinstance(value, np.generic) else value
        if not isinstance(value, (bool, int, float)) or not -_ROUNDED <= value <= 1 + _ROUNDED:
            raise MetricError(
                f"The metric {self.name} returned {value!r} on {_brief(example)}; "
                "it must return a bool, a number in [0, 1], or a Prediction with such a score."
            )
        return min(1.0, max(0.0, float(value)))


def _ordered(constant: Any) -> Any:
    """Return a constant of some code, a set's members in an order that is the same in every process."""
    return sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant


def wrap(metric: Scorer | Metric | str, output: str) -> Metric:
    """Return a `Metric` for a callable, or for the name of a built-in one on the field `output`.

    Raises:
        ConfigError: If there is no such metric, or the callable doesn't take 2, 3 or 5 arguments.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        family, _, label = metric.partition(":")
        if family == "f1" and label:
            return binary_f1(output, label)
        if metric not in BUILT_IN:
            raise ConfigError(f"No metric {metric!r}; choose one of {', '.join(BUILT_IN)}, or pass a function.")
        return BUILT_IN[metric](output)
    name = getattr(metric, "__name__", type(metric).__name__)
    return Metric(name, metric, _arguments(metric, name))


def _arguments(metric: Scorer, name: str) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = list(inspect.signature(metric).parameters.values())
    if isinstance(metric, dspy.Module) and hasattr(type(metric), "forward"):  # whose call takes anything
        _, *taken = inspect.signature(cast("Any", type(metric)).forward).parameters.values()
    parameters = [parameter for parameter in taken if parameter.kind in kinds]
    required = sum(parameter.default is inspect.Parameter.empty for parameter in parameters)
    is_open = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in taken)
    for count in (3, 5) if is_open else (5, 3, 2):
        if required <= count and (is_open or count <= len(parameters)):
            return count
    raise ConfigError(
        f"The metric {name} takes {len(parameters)} arguments; DSPy's take (example, prediction), "
        "(example, prediction, trace) or (gold, prediction, trace, pred_name, pred_trace)."
    )


def _brief(example: dspy.Example) -> str:
    text = repr(example.toDict())
    return text if len(text) <= 160 else f"{text[:157]}..."


def _accuracy(field: str) -> Metric:
    def score(gold: Any, answer: Any) -> bool:
        if all(type(each) in (int, float) for each in (gold, answer)):
            return bool(gold == answer)
        return folded(as_text(answer)) == folded(as_text(gold))

    return _row_metric("accuracy", score, field)


def _exact(field: str) -> Metric:
    def score(gold: Any, answer: Any) -> bool:
        accepted = [normalize(reference) for reference in references(gold)]
        if isinstance(answer, (set, frozenset)):
            return members(cast("Any", answer)) == set(accepted)
        if isinstance(answer, (list, tuple)):
            return [normalize(as_text(member)) for member in answer] == ([] if gold is None else accepted)
        return normalize(as_text(answer)) in (accepted or [""])

    return _row_metric("exact_match", score, field)


def _token_f1(field: str) -> Metric:
    def score(gold: Any, answer: Any) -> float:
        return max(token_f1(as_text(answer), reference) for reference in references(gold) or [""])

    return _row_metric("token_f1", score, field)


def _set_match(field: str) -> Metric:
    return _row_metric("set_match", lambda gold, answer: members(answer) == members(gold), field)


def _contains(field: str) -> Metric:
    def score(gold: Any, answer: Any) -> bool:
        accepted, said = filter(None, map(spaced, references(gold))), f" {spaced(as_text(answer))} "
        return any(f" {reference} " in said for reference in accepted)

    return _row_metric("contains", score, field)


def _row_metric(name: str, score: Callable[[Any, Any], float], field: str) -> Metric:
    def scorer(example: Any, prediction: Any) -> float:
        return score(example[field], _answer(prediction, field))

    return Metric(name, scorer, 2)


def _answer(prediction: Any, field: str) -> Any:
    """Return what is compared, "" where a program answers nothing at all.

    Raises:
        OtherFields: If it answers by other fields: the rows' column has another name, and all of them would be wrong.
    """
    others = list(prediction.keys()) if isinstance(prediction, dspy.Prediction) else []
    if others and field not in others:
        raise OtherFields(
            f"The rows' labels are in {field!r}, and the program answers with {', '.join(others)}. Let the column have "
            f"the answer's name: --column {others[-1]}=COLUMN, or another one in dspy.Example."
        )
    return getattr(prediction, field, "")


def _label_terms(outcomes: Sequence[Outcome], labels: Sequence[str]) -> Array:
    """Return each row's hits, errors and gold labels, label by label: shape (rows, 3 * labels).

    An answer that can't be read never hits, the empty label neither. A call that broke and counts as wrong answers a
    label where the gold one is none of them: "" would be right there.
    """
    golds = np.array([folded(outcome.gold) for outcome in outcomes])[:, None] == np.array(labels)
    answers = np.array([folded(outcome.answer) for outcome in outcomes])[:, None] == np.array(labels)
    answers &= ~golds | np.array([outcome.kind == "scored" for outcome in outcomes])[:, None]
    charged = np.array([outcome.is_charged for outcome in outcomes])[:, None]
    answers |= charged & ~golds.any(axis=1, keepdims=True)
    return np.hstack([golds & answers, golds != answers, golds]).astype(np.float64)


def _label_f1(sums: Array) -> tuple[Array, Array]:
    """Return each label's F1, 2 TP / (2 TP + FP + FN) and 0 where it never occurs, and its gold rows."""
    hits, errors, golds = np.split(sums, 3, axis=-1)
    return _share(2 * hits, 2 * hits + errors), golds


def _label_turns(sums: int) -> tuple[Array, Array]:
    """Return a row of each label that turns right, then one of each that turns wrong."""
    one, none = np.eye(sums // 3), np.zeros((sums // 3, sums // 3))
    missed, hit = np.hstack([none, one, one]), np.hstack([one, none, one])
    return np.vstack([missed, hit]), np.vstack([hit, missed])


def _macro_terms(outcomes: Sequence[Outcome]) -> Array:
    return _label_terms(outcomes, sorted({folded(outcome.gold) for outcome in outcomes}))


def _macro_score(sums: Array) -> Array:
    """Return the mean F1 over the labels that occur among the gold ones."""
    f1, golds = _label_f1(sums)
    occurs = golds > 0
    return _share((f1 * occurs).sum(axis=-1), occurs.sum(axis=-1).astype(np.float64))


MACRO_F1: Final = Sums(_macro_terms, _macro_score, _label_turns)


def _macro(field: str) -> Metric:
    return Metric("macro_f1", _accuracy(field).scorer, 2, MACRO_F1)


def binary_f1(field: str, positive: str) -> Metric:
    """Return the F1 of the label `positive` in `field`; any other answer counts as negative."""
    own = [folded(positive)]
    sums = Sums(lambda rows: _label_terms(rows, own), lambda sums: _label_f1(sums)[0][..., 0], _label_turns)
    return Metric(f"f1:{positive}", _accuracy(field).scorer, 2, sums)


def _binary(field: str) -> Metric:
    del field
    raise ConfigError("The metric f1 needs the positive label: f1:yes, or metrics.binary_f1(field, 'yes').")


BUILT_IN: Final[Mapping[str, Callable[[str], Metric]]] = MappingProxyType(
    {
        "accuracy": _accuracy,
        "f1": _binary,
        "macro_f1": _macro,
        "exact_match": _exact,
        "token_f1": _token_f1,
        "set_match": _set_match,
        "contains": _contains,
    }
)
