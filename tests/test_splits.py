from __future__ import annotations

import random
from collections import Counter

import dspy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.errors import DataError
from preceptor.splits import different, drawn, half, inputs_key, split, stratified, unseen

LABELS = st.lists(st.sampled_from("abc"), min_size=1, max_size=60)


def labelled(labels: list[str]) -> list[dspy.Example]:
    return [dspy.Example(x=at, y=label).with_inputs("x") for at, label in enumerate(labels)]


@given(LABELS, st.integers(0, 100))
def test_a_split_gives_every_row_to_one_half_in_the_order_they_came(labels: list[str], seed: int) -> None:
    train, validation = split(labelled(labels), "y", seed=seed)
    first, second = [row.x for row in train], [row.x for row in validation]

    assert sorted(first + second) == list(range(len(labels)))
    assert (first, second) == (sorted(first), sorted(second))
    assert len(first) - len(second) in (0, 1)


@given(LABELS, st.integers(0, 100))
def test_a_split_shares_out_every_label(labels: list[str], seed: int) -> None:
    train, validation = split(labelled(labels), "y", seed=seed)
    first, second = Counter(row.y for row in train), Counter(row.y for row in validation)

    assert all(abs(first[label] - second[label]) <= 3 for label in set(labels))


@given(LABELS, st.integers(0, 100), st.integers(1, 60))
def test_every_beginning_has_about_the_labels_shares(labels: list[str], seed: int, size: int) -> None:
    order = stratified(labelled(labels), "y", random.Random(seed))
    begun = Counter(labels[at] for at in order[:size])

    assert sorted(order) == list(range(len(labels)))
    for label, count in Counter(labels).items():
        fair = count * min(size, len(labels)) / len(labels)
        assert abs(begun[label] - fair) <= 3


def test_equal_seeds_split_equally_and_others_do_not() -> None:
    rows = labelled(["a", "b"] * 20)
    assert split(rows, "y", seed=1) == split(rows, "y", seed=1)
    assert split(rows, "y", seed=1) != split(rows, "y", seed=2)


def test_rows_without_a_label_are_split_all_the_same() -> None:
    rows = [dspy.Example(x=at).with_inputs("x") for at in range(5)]
    train, validation = split(rows, "", seed=0)
    assert (len(train), len(validation)) == (3, 2)


@given(LABELS, st.integers(0, 100), st.integers(1, 20))
def test_a_split_keeps_rows_of_equal_inputs_together(labels: list[str], seed: int, texts: int) -> None:
    rows = [dspy.Example(x=at % texts, y=label).with_inputs("x") for at, label in enumerate(labels)]
    train, validation = split(rows, "y", seed=seed)

    assert len(train) + len(validation) == len(rows)
    assert not {row.x for row in train} & {row.x for row in validation}
    assert len(train) <= (len(rows) + 1) // 2


@given(LABELS, st.integers(0, 100), st.integers(1, 40))
def test_rows_are_drawn_in_their_order_with_about_the_labels_shares(labels: list[str], seed: int, most: int) -> None:
    rows = labelled(labels)

    some = drawn(rows, "y", most, seed=seed)

    assert [row.x for row in some] == sorted(row.x for row in some)
    assert len({row.x for row in some}) == len(some) == min(most, len(rows))
    for label in set(labels):
        share = labels.count(label) * len(some) / len(labels)
        assert abs(sum(row.y == label for row in some) - share) < 2


def test_all_rows_are_drawn_where_no_number_is_given() -> None:
    rows = labelled(["a", "b", "a"])
    assert drawn(rows, "y", None, seed=0) == drawn(rows, "y", 3, seed=5) == rows


def test_rows_that_the_search_has_seen_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = labelled(["a"] * 6)

    assert [row.x for row in unseen(rows[1:], [rows[0], rows[2], rows[4]], name="valset")] == [1, 3, 5]
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "valset: 2 of 5 rows are left out, having the inputs of rows of the trainset; "
        "the first is row 2, equal to row 2 there."
    )


def test_rows_that_are_all_seen_are_refused() -> None:
    rows = labelled(["a"] * 6)
    message = (
        r"^valset: all 2 rows have the inputs of rows of the trainset; the first is row 1, equal to row 3 there\. "
    )
    with pytest.raises(DataError, match=message):
        unseen(rows[2:4], rows, name="valset")


def test_the_larger_half_is_a_half_or_less_where_equal_inputs_are_kept_together() -> None:
    rows = [dspy.Example(x=at // 3, y="a").with_inputs("x") for at in range(9)]

    assert len(half(labelled(["a"] * 5), "y", random.Random(0))) == 3
    assert len(half(rows, "y", random.Random(0))) == 3


def test_inputs_are_equal_whatever_the_label_and_the_order_of_the_fields() -> None:
    one = dspy.Example(x=1, z=["a"], y="a").with_inputs("x", "z")
    same = dspy.Example(z=["a"], y="b", x=1).with_inputs("z", "x")
    other = dspy.Example(x="1", z=["a"], y="a").with_inputs("x", "z")

    assert inputs_key(one) == inputs_key(same) != inputs_key(other)
    for first, second in (
        (np.zeros(5000), np.array([*np.zeros(4000), 1.0, *np.zeros(999)])),
        (dspy.Image(f"data:image/png;base64,{'A' * 99}B"), dspy.Image(f"data:image/png;base64,{'A' * 98}BB")),
    ):
        rows = [dspy.Example(x=value, y="a").with_inputs("x") for value in (first, second, first)]
        assert different(rows) == 2
    assert different([one, same, other, other]) == 2


def test_inputs_are_told_apart_whatever_keys_their_mappings_have() -> None:
    rows = [dspy.Example(x=value).with_inputs("x") for value in ({1: 1, "a": 2}, {1: 1, "a": 3}, {(1, 2): 3}, {2: 1})]
    assert different([*rows, dspy.Example(x={"a": 2, 1: 1}).with_inputs("x")]) == 4
