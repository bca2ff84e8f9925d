"""What is told of inputs that are no mistake; what is refused is tested where it is asked for."""

from __future__ import annotations

from typing import Any

import dspy
import pytest

from preceptor.checks import check_metric, is_plain, warn
from preceptor.errors import MetricError
from preceptor.modules import Classify
from preceptor.scoring.metrics import wrap
from preceptor.testing import toy


def test_labels_that_a_built_in_metric_does_not_compare_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        dspy.Example(text="x", tone=tone, label=label).with_inputs("text") for tone, label in (("calm", "a"), ("", "b"))
    ]
    student: Any = dspy.Predict("text -> tone, why, label")

    warn(wrap("exact_match", "label"), student, rows, rows, "label")
    warn(wrap(lambda example, prediction: 1.0, "label"), student, rows, rows, "label")
    warn(wrap("exact_match", "label"), dspy.Predict("text -> why, label"), rows, rows, "label")

    assert caplog.messages == [
        "exact_match compares 'label'; what the program says for 'tone' counts nowhere. To score several fields "
        "together give a metric of your own: on the command line --metric FILE.py:NAME."
    ]


def test_a_metric_may_read_what_only_the_users_own_code_answers_with() -> None:
    """`toy.Chain` is a class of the user's; what it returns beside the label isn't known before it runs."""
    row = dspy.Example(text="x", note="n", label="a").with_inputs("text")

    def reads(gold: Any, predicted: Any) -> bool:
        return bool(predicted.passages) and predicted.label == gold.label

    metric = wrap(reads, "label")
    check_metric(metric, toy.Chain(), row, "the trainset")
    with pytest.raises(MetricError, match=r"Tried on the first row of the trainset, .* 'passages'"):
        check_metric(metric, Classify("text -> label: Literal['a', 'b']"), row, "the trainset")


def test_plain_is_one_predictor_without_code_of_the_users() -> None:
    ours, theirs = Classify("text -> label: Literal['a', 'b']"), dspy.ChainOfThought("text -> label")
    assert [is_plain(program) for program in (ours, theirs, toy.Sorter(), toy.Chain())] == [True, True, False, False]
