"""Metrics: any DSPy metric, and the usual ones by name.

A metric scores one row in [0, 1]. Some (F1 over a data set) are not a mean of rows: they count over the rows
and score the counts. Text is compared without regard to case and surrounding white space.
"""

from __future__ import annotations

import inspect
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import Any, Final, TypeAlias, cast

import dspy
import numpy as np
import numpy.typing as npt
from dspy.adapters.utils import serialize_for_json

from preceptor.errors import ConfigError, MetricError
from preceptor.leaks import CJK
from preceptor.scoring.trial import Outcome

Scorer = Callable[..., Any]
"""A DSPy metric of 2, 3 or 5 arguments that returns a bool, a number or a `Prediction` with a score."""

Aggregate = Callable[[Sequence[Outcome]], float]

Array: TypeAlias = npt.NDArray[np.float64]

_ARTICLES: Final = frozenset({"a", "an", "the"})
_PUNCTUATION: Final = re.compile(
    rf"(?<![a-z+])\+|(?<![a-z])#|[{re.escape(string.punctuation.translate({43: None, 35: None}))}]"
)
_NUMBER: Final = re.compile(
    r"""[("'$€£]*([-\u2212+]?)[$€£]?(\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.(\d+))?[)%"'.,;:!?]*"""
)
"""A number, with what may stand around it: its sign, its whole part, its decimals."""

_WORDS: Final = re.compile(rf"(?:[-.+#]|[^\W{CJK}])+|\S")
"""The words of a normalized text: of Chinese or Japanese each character is one, as of other signs."""

_ROUNDED: Final = 1e-9
"""How far outside [0, 1] a score is taken as its end: a sum of tenths needn't be 1."""


def _no_turns(sums: int) -> tuple[Array, Array]:
    return np.zeros((0, sums)), np.zeros((0, sums))


@dataclass(frozen=True, slots=True)
class Sums:
    """A score of a whole set that depends on sums over its rows; statistics resample the rows of `terms`.

    Attributes:
        terms: Outcomes, none of them failed -> what each row adds, of shape (rows, sums).
        score: Sums, of shape (..., sums) -> scores in [0, 1], of shape (...).
        turns: Number of sums -> the terms, before and after, of made-up rows that turn right or wrong, of shape
            (rows, sums) each: they enter the standard error of a gain (see `statistics`).
    """

    terms: Callable[[Sequence[Outcome]], Array]
    score: Callable[[Array], Array]
    turns: Callable[[int], tuple[Array, Array]] = _no_turns


def _scores(outcomes: Sequence[Outcome]) -> Array:
    return np.array([[cast("float", outcome.score), 1.0] for outcome in outcomes]).reshape(-1, 2)


def _quotient(sums: Array) -> Array:
    return _share(sums[..., 0], sums[..., 1])


def _share(part: Array, whole: Array) -> Array:
    """Return part / whole, 0 where the whole is 0."""
    return cast("Array", np.divide(part, whole, out=np.zeros_like(part), where=whole > 0))


MEAN: Final = Sums(_scores, _quotient)
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


def text_of(row: Any, field: str) -> str:
    """Return a field of an example or a prediction as text, "" if it is absent."""
    return as_text(row.get(field) if hasattr(row, "get") else getattr(row, field, None))


def as_text(value: Any) -> str:
    """Return a value as text that is equal for equal values: records and lists as JSON, an enumeration by its value.

    Example:
        >>> as_text({"b": 1, "a": ["x"]}), as_text(True), as_text(None)
        ('{"a": ["x"], "b": 1}', 'True', '')
    """
    plain = value if type(value) in (str, int, float, bool) else serialize_for_json(value)
    if isinstance(plain, (list, dict)):
        return json.dumps(plain, sort_keys=True, ensure_ascii=False, default=str)
    return "" if plain is None else str(plain)


def normalize(text: str) -> str:
    """Return text without case, articles, punctuation and extra white space (SQuAD's rule).

    Unlike there, a number keeps its sign and its decimals and loses its thousands separators, `+` and `#` behind a
    letter stay, and a text that is nothing but articles or punctuation stays as it is.

    Example:
        >>> [normalize(text) for text in ("The  Eiffel Tower.", "It's -1,234.50!", "C++", "A", "+")]
        ['eiffel tower', 'its -1234.5', 'c++', 'a', '+']
    """
    words = list(filter(None, map(_word, text.lower().split())))
    return " ".join([word for word in words if word not in _ARTICLES] or words) or folded(text)


def _word(raw: str) -> str:
    """Return a lower-case word without its punctuation; a number in one way of writing it."""
    number = _NUMBER.fullmatch(raw)
    if number is not None:
        whole, decimals = number[2].replace(",", "") or "0", (number[3] or "").rstrip("0")
        sign = "-" if number[1] in ("-", "\u2212") and (decimals or whole.strip("0")) else ""
        return f"{sign}{whole}{'.' if decimals else ''}{decimals}"
    return _PUNCTUATION.sub("", raw)


def references(gold: Any) -> list[str]:
    """Return the accepted answers: a list's members, or the one text. An empty list has none: an empty answer is right.

    Example:
        >>> references(["Paris", "City of Paris"]), references("Paris")
        (['Paris', 'City of Paris'], ['Paris'])
    """
    return [as_text(member) for member in gold] if isinstance(gold, (list, tuple, set)) else [as_text(gold)]


def token_f1(answer: str, gold: str) -> float:
    """Return the F1 of shared tokens, after `normalize`.

    Example:
        >>> round(token_f1("a red car", "the red bus"), 2)
        0.5
    """
    ours, theirs = normalize(answer).split(), normalize(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def members(text: Any) -> set[str]:
    """Return the normalized members of a list, or of a text separated by commas.

    Example:
        >>> sorted(members("cat, Dog ,cat"))
        ['cat', 'dog']
    """
    parts: Iterable[Any] = text if isinstance(text, (list, tuple, set)) else str(text).split(",")
    return {normalize(as_text(part)) for part in parts} - {""}


def folded(text: str) -> str:
    """Return a label as labels are compared: without its case and the space around it."""
    return text.strip().casefold()


def _accuracy(field: str) -> Metric:
    return _row_metric("accuracy", lambda gold, answer: folded(as_text(answer)) == folded(as_text(gold)), field)


def _exact(field: str) -> Metric:
    def score(gold: Any, answer: Any) -> bool:
        accepted = [normalize(reference) for reference in references(gold)]
        if isinstance(answer, (list, tuple)):
            return [normalize(as_text(member)) for member in answer] == accepted
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
        accepted, said = filter(None, map(_spaced, references(gold))), f" {_spaced(as_text(answer))} "
        return any(f" {reference} " in said for reference in accepted)

    return _row_metric("contains", score, field)


def _spaced(text: str) -> str:
    """Return a normalized text with exactly one space between any two words."""
    return " ".join(_WORDS.findall(normalize(text)))


def _row_metric(name: str, score: Callable[[Any, Any], float], field: str) -> Metric:
    def scorer(example: Any, prediction: Any) -> float:
        return score(example[field], getattr(prediction, field, ""))

    return Metric(name, scorer, 2)


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
