from __future__ import annotations

import pytest

from preceptor.report.errors import MOST, Fate, fate, groups
from preceptor.report.folder import Answer, Row


def row(before: float | None, after: float | None, *, measures: bool = True) -> Row:
    return Row({"text": "hi"}, "yes", Answer("no", before), Answer("yes", after), "", measures)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (1.0, 1.0, "right"),
        (0.0, 1.0, "mended"),
        (1.0, 0.0, "broken"),
        (0.0, 0.0, "wrong"),
        (0.5, 0.5, "wrong"),
        (0.2, 0.4, "mended"),
        (None, 1.0, "failed"),
        (1.0, None, "failed"),
    ],
)
def test_a_row_is_right_mended_broken_wrong_or_failed(
    before: float | None, after: float | None, expected: Fate
) -> None:
    assert fate(row(before, after)) == expected


def test_rows_are_counted_and_those_with_an_error_listed_with_their_numbers() -> None:
    rows = [row(1, 1), row(0, 1), row(1, 0), row(0, 0), row(0, 1)]
    assert [(one.fate, one.count, [at for at, _ in one.rows]) for one in groups(rows)] == [
        ("right", 1, []),
        ("mended", 2, [1, 4]),
        ("broken", 1, [2]),
        ("wrong", 1, [3]),
    ]


def test_rows_that_chose_an_expert_are_left_out() -> None:
    assert [one.count for one in groups([row(0, 1, measures=False), row(0, 1)])] == [0, 1, 0, 0]


def test_failed_rows_are_counted_where_there_are_any() -> None:
    assert [(one.fate, one.count) for one in groups([row(None, 1)])][-1] == ("failed", 1)


def test_graded_scores_are_better_or_worse_and_not_right_or_wrong() -> None:
    assert [one.name for one in groups([row(0.5, 0.75)])][1:3] == ["Better after", "Worse after"]
    assert [one.name for one in groups([row(0.0, 1.0)])][1] == "Mended: wrong before, right after"


def test_of_many_errors_the_first_are_listed() -> None:
    found = groups([row(0, 0)] * (MOST + 5))
    assert (found[3].count, len(found[3].rows)) == (MOST + 5, MOST)


def test_without_rows_there_is_nothing_to_count() -> None:
    assert groups([]) == []
