"""How answers and labels are compared; most of it is tested by the metrics that use it."""

from __future__ import annotations

import enum

import pytest

from preceptor.scoring.texts import as_text, folded, members, normalize, references, spaced, token_f1


def test_token_f1_counts_a_token_as_often_as_both_have_it() -> None:
    assert token_f1("yes yes yes", "yes") == 0.5  # one shared: 2 * 1 / (3 + 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Ça va, the  Ünïon?", "ça va ünïon"), ("$1,000.00", "1000"), ("-.5", "-0.5"), ("-0.0", "0"), ("The", "the")],
)
def test_case_articles_and_ways_to_write_a_number_dont_count(text: str, expected: str) -> None:
    assert normalize(text) == expected


def test_of_chinese_each_character_is_a_word() -> None:
    assert spaced("我是 C++") == "我 是 c++"


def test_values_are_equal_texts_where_they_are_equal() -> None:
    mood = enum.Enum("mood", {"GOOD": "good"})
    assert (as_text(mood.GOOD), as_text({"b": [1], "a": None})) == ("good", '{"a": null, "b": [1]}')
    words = [f"w{number}" for number in range(10)]
    assert as_text(set(words)) == as_text(frozenset(reversed(words))) == as_text(words)
    assert (members([mood.GOOD, "Bad"]), references((1, "x")), folded(" Yes ")) == ({"good", "bad"}, ["1", "x"], "yes")
