from __future__ import annotations

import enum
import operator
import os
import subprocess
import sys
from functools import partial
from typing import Any

import dspy
import numpy as np
import pydantic
import pytest
from dspy.evaluate import CompleteAndGrounded, SemanticF1

from preceptor.errors import ConfigError, MetricError
from preceptor.scoring.metrics import Metric, Scorer, binary_f1, mean, wrap
from preceptor.scoring.trial import Outcome
from preceptor.testing import simulated


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Place(pydantic.BaseModel):
    city: str
    code: int


def scored(metric: Metric | Scorer | str, gold: Any, answer: Any) -> float:
    row = dspy.Example(text="hi", label=gold).with_inputs("text")
    return wrap(metric, "label")(row, dspy.Prediction(label=answer))


def answered(*pairs: tuple[str, str]) -> list[Outcome]:
    """Outcomes from (gold, answer) pairs."""
    return [Outcome("scored", float(gold == answer), answer, gold) for gold, answer in pairs]


@pytest.mark.parametrize(
    ("name", "gold", "answer", "score"),
    [
        ("accuracy", "Spam", " spam\n", 1.0),
        ("accuracy", "spam", "spam.", 0.0),
        ("accuracy", 1, "1", 1.0),
        ("accuracy", True, True, 1.0),
        ("accuracy", "straße", "STRASSE", 1.0),
        ("exact_match", "The Eiffel Tower", "eiffel tower.", 1.0),
        ("exact_match", ["Paris", "City of Paris"], "the city of Paris", 1.0),
        ("exact_match", ["Paris", "City of Paris"], "Paris, France", 0.0),
        ("exact_match", ["a b", "c"], ["A b!", "C"], 1.0),  # a list is compared as a list
        ("exact_match", ["a b", "c"], ["a", "b c"], 0.0),
        ("exact_match", ["Paris", "Lyon"], ["Paris"], 0.0),
        ("exact_match", "-5", "5", 0.0),
        ("exact_match", -5, "-5.", 1.0),
        ("exact_match", "3.5", "35", 0.0),
        ("exact_match", "3.5", "It is 3.5", 0.0),
        ("exact_match", "1,000", "1000.0", 1.0),
        ("exact_match", "007", "7", 0.0),
        ("exact_match", "0.5", ".50", 1.0),
        ("exact_match", "+", "-", 0.0),
        ("exact_match", "C++", "C", 0.0),
        ("exact_match", "C#", "c#.", 1.0),
        ("exact_match", "A", "The", 0.0),
        ("exact_match", "A", "", 0.0),
        ("exact_match", "a", "A.", 1.0),
        ("set_match", "+, -", "-", 0.0),
        ("contains", "A", "B", 0.0),
        ("contains", "", "B", 0.0),
        ("contains", "-5", "the sum is 5", 0.0),
        ("accuracy", "good", Mood.GOOD, 1.0),
        ("accuracy", Mood.BAD, Mood.GOOD, 0.0),
        ("accuracy", None, None, 1.0),
        ("accuracy", None, "good", 0.0),
        ("accuracy", {"city": "Rome", "code": 1}, Place(code=1, city="Rome"), 1.0),
        ("accuracy", [{"code": 1, "city": "Rome"}], [Place(code=1, city="Rome")], 1.0),
        ("accuracy", Place(code=2, city="Rome"), Place(code=1, city="Rome"), 0.0),
        ("token_f1", "the red bus", "a red car", 0.5),  # one of two tokens each: 2 * 1 / (2 + 2)
        ("token_f1", ["blue", "the red bus"], "a red car", 0.5),
        ("token_f1", "big big dog", "big dog", 0.8),  # two shared: 2 * 2 / (2 + 3)
        ("token_f1", "", "", 1.0),
        ("token_f1", "dog", "the", 0.0),
        ("set_match", "cat, dog", "Dog,cat , cat", 1.0),
        ("set_match", ["cat", "dog"], "cat", 0.0),
        ("set_match", ["cat", "dog"], ["Dog", "a cat"], 1.0),
        ("contains", "Paris", "I think it is Paris, France.", 1.0),
        ("contains", ["London", "Paris"], "paris!", 1.0),
        ("contains", "Paris", "Lyon", 0.0),
        ("contains", "no", "I do not know", 0.0),
        ("contains", "1", "10", 0.0),
        ("contains", "1", "1.5", 0.0),
        ("contains", "art", "start", 0.0),
        ("contains", "C", "C++", 0.0),
        ("contains", "C++", "I like C++.", 1.0),
        ("contains", "York City", "New York City", 1.0),
        ("contains", "York City", "New York Citys", 0.0),
        ("contains", "Paris", "It is \u201cParis\u201d\u2014as ever", 1.0),
        ("contains", "\u5df4\u9ece", "\u7b54\u6848\u662f\u5df4\u9ece\u3002", 1.0),
        ("contains", [], "B", 0.0),
        ("token_f1", [], "", 1.0),
        ("token_f1", [], "B", 0.0),
        ("exact_match", [], "", 1.0),
        ("exact_match", [], "B", 0.0),
        ("exact_match", {"a1", "b1"}, {"B1", "a1"}, 1.0),
        ("exact_match", {"a1", "b1"}, frozenset({"a1"}), 0.0),
        ("exact_match", None, [], 1.0),
        ("exact_match", [], None, 1.0),
        ("set_match", None, [], 1.0),
        ("set_match", None, ["none"], 0.0),
        ("set_match", frozenset({"a", "cat"}), {"Cat", "a"}, 1.0),
        ("accuracy", {"a1", "b1"}, {"b1", "a1"}, 1.0),
        ("accuracy", 5, 5.0, 1.0),
        ("accuracy", 5, 5.5, 0.0),
        ("f1:spam", "spam", "SPAM", 1.0),
        ("macro_f1", "spam", "mail", 0.0),
    ],
)
def test_built_in_metrics_score_rows_as_computed_by_hand(name: str, gold: Any, answer: Any, score: float) -> None:
    assert scored(name, gold, answer) == pytest.approx(score)


def test_f1_of_a_label_is_computed_from_hits_and_errors() -> None:
    outcomes = answered(("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), ("yes", "YES"))

    assert wrap("f1:yes", "label").aggregate(outcomes) == pytest.approx(2 * 2 / (2 * 2 + 2))


def test_f1_of_a_label_that_never_occurs_is_zero() -> None:
    assert binary_f1("label", "maybe").aggregate(answered(("yes", "yes"))) == 0.0
    assert binary_f1("label", "maybe").aggregate([]) == 0.0


def test_macro_f1_is_the_mean_over_the_gold_labels() -> None:
    outcomes = answered(("a", "a"), ("a", "b"), ("b", "b"), ("b", "c"), ("C", "c"))
    # a: 2/(2+1), b: 2/(2+2), c: 2/(2+1)
    assert wrap("macro_f1", "label").aggregate(outcomes) == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)


def test_an_unparsable_answer_counts_as_wrong_and_a_failed_row_is_left_out() -> None:
    right = Outcome("scored", 1.0, "yes", "yes")
    outcomes = [right, Outcome("unparsable", 0.0, "", "yes"), Outcome("failed", None, "", "yes")]

    assert mean(outcomes) == 0.5
    assert wrap("f1:yes", "label").aggregate(outcomes) == pytest.approx(2 / 3)
    assert wrap("macro_f1", "label").aggregate(outcomes) == pytest.approx(2 / 3)
    assert mean([Outcome("failed", None)]) == 0.0
    assert wrap("macro_f1", "label").aggregate([Outcome("failed", None)]) == 0.0


def test_an_unparsable_answer_never_hits_the_empty_label() -> None:
    wrong = [Outcome("unparsable", 0.0, "", ""), Outcome("unparsable", 0.0, "", "a")]

    assert wrap("macro_f1", "label").aggregate(wrong) == 0.0
    right = Outcome("scored", 1.0, "", "")
    assert wrap("macro_f1", "label").aggregate([right, *wrong]) == pytest.approx(
        (1 / 2 + 0) / 2
    )  # a hit, an error of each kind


def test_only_set_metrics_are_no_mean_of_rows() -> None:
    names = ("accuracy", "exact_match", "token_f1", "set_match", "contains", "f1:yes", "macro_f1")
    assert [wrap(name, "label").is_mean for name in names] == [True] * 5 + [False] * 2
    assert [wrap(name, "label").name for name in names] == list(names)


def two(example: Any, prediction: Any) -> bool:
    return bool(example.label == prediction.label)


def three(example: Any, prediction: Any, trace: Any = None) -> float:
    assert trace is None
    return 0.25


def five(gold: Any, prediction: Any, trace: Any, pred_name: Any, pred_trace: Any) -> Any:
    assert (trace, pred_name, pred_trace) == (None, None, None)
    return dspy.Prediction(score=0.75, feedback="nearly")


def one_or_two(example: Any, prediction: Any = None) -> int:
    return int(prediction is not None)


def any_number(*arguments: Any) -> bool:
    return len(arguments) == 3


@pytest.mark.parametrize(
    ("metric", "arguments", "score"),
    [(any_number, 3, 1.0), (two, 2, 1.0), (three, 3, 0.25), (five, 5, 0.75), (one_or_two, 2, 1.0)],
)
def test_any_dspy_metric_is_taken_whatever_its_arguments_and_its_result(
    metric: Scorer, arguments: int, score: float
) -> None:
    wrapped = wrap(metric, "label")

    assert (wrapped.name, wrapped.arguments, wrapped.is_mean) == (metric.__name__, arguments, True)
    assert scored(metric, "a", "a") == score


@pytest.mark.parametrize("judge", [SemanticF1(), CompleteAndGrounded()])
def test_a_metric_of_dspys_own_is_taken_and_scores_by_what_the_model_says(judge: Any) -> None:
    def verdict(request: Any) -> str:
        fields = ("reasoning", "precision", "recall", "completeness", "groundedness", "discussion")
        keys = ("ground_truth_key_ideas", "system_response_key_ideas", "system_response_claims")
        return "\n\n".join(f"[[ ## {field} ## ]]\n0.5" for field in (*fields, *keys)) + "\n\n[[ ## completed ## ]]"

    row = dspy.Example(question="Why?", response="So.").with_inputs("question")
    metric = wrap(judge, "response")
    with dspy.context(lm=simulated(verdict)):
        score = metric(row, dspy.Prediction(response="So.", context=["So."]))

    assert (metric.name, metric.arguments, score) == (type(judge).__name__, 3, 0.5)


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (np.bool_(True), 1.0),
        (np.float32(0.5), 0.5),
        (np.int64(1), 1.0),
        (1 + 1e-10, 1.0),
        (-1e-10, 0.0),
        (dspy.Prediction(score=np.float64(0.25)), 0.25),
    ],
)
def test_numbers_of_numpy_and_ends_missed_by_rounding_are_scores(value: Any, score: float) -> None:
    def odd(example: Any, prediction: Any) -> Any:
        return value

    assert scored(odd, "a", "a") == score


def test_an_object_with_a_call_method_is_named_after_its_class() -> None:
    class Judge:
        def __call__(self, example: Any, prediction: Any) -> bool:
            return True

    assert (wrap(Judge(), "label").name, wrap(Judge(), "label").arguments) == ("Judge", 2)


def test_a_wrapped_metric_stays_what_it_is() -> None:
    metric = wrap("accuracy", "label")
    assert wrap(metric, "other") is metric


@pytest.mark.parametrize(
    "value",
    [None, float("nan"), np.float64("nan"), 1.5, 1 + 1e-8, -0.1, "right", float("inf"), dspy.Prediction(label="a")],
)
def test_a_result_that_is_no_score_is_refused_with_its_row(value: Any) -> None:
    def odd(example: Any, prediction: Any) -> Any:
        return value

    with pytest.raises(MetricError, match=r"(?s)The metric odd returned .* on \{'text': 'hi', 'label': 'a'\}; it must"):
        scored(odd, "a", "a")


def test_a_metric_that_raises_is_reported_with_its_error_and_its_row() -> None:
    def broken(example: Any, prediction: Any) -> float:
        return 1 / 0

    expected = r"^The metric broken raised ZeroDivisionError: division by zero, on \{'text': 'hi', 'label': 'a'\}\.$"
    with pytest.raises(MetricError, match=expected):
        scored(broken, "a", "a")


def test_a_long_row_is_cut_in_the_message() -> None:
    def broken(example: Any, prediction: Any) -> float:
        raise ValueError("no")

    row = dspy.Example(text="x" * 500, label="a").with_inputs("text")
    with pytest.raises(MetricError, match=r"on \{'text': 'x{147}\.\.\.\.$"):
        wrap(broken, "label")(row, dspy.Prediction(label="a"))


def test_no_answer_is_a_wrong_one_and_an_answer_by_another_name_is_an_error() -> None:
    row = dspy.Example(text="hi", annotator="a").with_inputs("text")
    assert wrap("accuracy", "annotator")(row, dspy.Prediction()) == 0.0
    message = (
        r"^The rows' labels are in 'annotator', and the program answers with why, label\. Let the column have the "
        r"answer's name: --column label=COLUMN, or another one in dspy\.Example\.$"
    )
    with pytest.raises(MetricError, match=message):
        wrap("accuracy", "annotator")(row, dspy.Prediction(why="so", label="a"))


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"No metric 'acuracy'; choose one of accuracy, f1, macro_f1, exact_match"):
        wrap("acuracy", "label")


@pytest.mark.parametrize("name", ["f1", "f1:"])
def test_f1_without_its_label_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"No metric 'f1:'|The metric f1 needs the positive label: f1:yes"):
        wrap(name, "label")


def test_a_metric_of_four_required_arguments_is_refused() -> None:
    def four(a: Any, b: Any, c: Any, d: Any) -> float:
        return 1.0

    with pytest.raises(ConfigError, match=r"The metric four takes 4 arguments; DSPy's take \(example, prediction\),"):
        wrap(four, "label")


def _judged(gold: Any, told: Any, least: float = 0.5, given: Any = None) -> bool:
    return bool(told == gold and given and least)


class Judge:
    """A metric that is an object, with what it has been set to and what it remembers."""

    def __init__(self, least: float) -> None:
        self.least = least
        self.seen: list[Any] = []

    def __call__(self, gold: Any, told: Any) -> bool:
        return bool(told == gold and self.least)


def test_a_metrics_code_tells_it_from_another_of_its_name_and_not_from_itself() -> None:
    def code(scorer: Any) -> str:
        return wrap(scorer, "label").code

    def closed(least: float) -> Any:
        return lambda gold, told: told == gold and least

    kinds: list[Any] = [lambda least: partial(_judged, least=least), closed, Judge]
    for made in kinds:
        assert code(made(0.5)) == code(made(0.5)) != code(made(0.9))
    assert code(lambda gold, told: told == gold) != code(lambda gold, told: told != gold)
    judge = Judge(0.5)
    judge.seen.append(1)
    assert code(judge) == code(Judge(0.5)), "what it remembers doesn't count"
    assert code(partial(_judged, given=())) == code(partial(_judged, given=[])), "nor what may change"
    assert code(operator.eq) == code(operator.eq)


def test_a_metrics_code_is_the_same_in_every_process() -> None:
    told = (
        "from preceptor.scoring.metrics import wrap\n"
        "print(wrap(lambda gold, told: told.label in {'spam', 'mail', 'other', 'none'}, 'label').code)"
    )
    codes = {
        subprocess.run(
            [sys.executable, "-c", told],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(codes) == 1
