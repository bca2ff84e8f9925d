from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.report.curves import FRAME, best_so_far, chart, ticks
from preceptor.report.folder import Scored, Search

RESULT: dict[str, Any] = {
    "baseline": 0.5,
    "baseline_ci": [0.4, 0.6],
    "compiled": 0.9,
    "compiled_ci": [0.8, 1.0],
    "tested_gain": 0.4,
    "replaced": True,
}


def scored(name: str, calls: int, seen: int, score: float) -> Scored:
    interval = (max(0.0, score - 0.1), score + 0.1) if score >= 0 else None
    return Scored(name, name, {"predict": name}, 0, calls, seen, score, interval)


RACE = [
    scored("seed", 20, 10, 0.5),
    scored("lucky", 20, 10, 1.0),
    scored("good", 20, 10, 0.8),
    scored("seed", 50, 25, 0.4),
    scored("good", 50, 25, 0.72),
]


def test_the_best_is_of_those_on_the_most_rows_so_far() -> None:
    assert best_so_far(RACE) == [(20, 1.0), (50, 0.72)]


def test_a_search_is_drawn_in_the_units_of_the_drawing() -> None:
    drawn = chart(Search("", RACE, {}), RESULT)
    assert drawn is not None
    # calls 0 to 50 from 62 to 488, as the last 200 units are for the untouched rows; scores 0.4 to 1 from 256 to 16
    assert [(tick.at, tick.text) for tick in drawn.x_ticks] == [
        *((62.0, "0"), (147.2, "10"), (232.4, "20")),
        *((317.6, "30"), (402.8, "40"), (488.0, "50")),
    ]
    assert [(tick.at, tick.text) for tick in drawn.y_ticks] == [
        *((256.0, "0.4"), (176.0, "0.6")),
        *((96.0, "0.8"), (16.0, "1")),
    ]
    assert drawn.best == "M232.4 16H488V128H488"
    assert drawn.seed == 256.0
    assert [(dot.x, dot.y, dot.radius, dot.is_seed) for dot in drawn.dots] == [
        (232.4, 216.0, 2.5, True),
        (232.4, 16.0, 2.5, False),
        (232.4, 96.0, 2.5, False),
        (488.0, 256.0, 4.0, True),
        (488.0, 128.0, 4.0, False),
    ]
    assert [(one.name, one.y, one.low, one.high) for one in drawn.whiskers] == [
        ("yours", 216.0, 256.0, 176.0),
        ("compiled", 56.0, 96.0, 16.0),
    ]
    assert drawn.told == (
        "3 candidates in 5 evaluations. After 20 calls the best scored 1.000, after 50 calls 0.720; what the search "
        "started from, 0.400."
    )


def test_a_candidate_that_wasnt_taken_up_has_a_score_without_an_interval() -> None:
    kept = {**RESULT, "replaced": False, "has_candidate": True, "tested_gain": 0.1}
    drawn = chart(Search("", RACE, {}), kept)
    assert drawn is not None
    assert [(one.name, one.y, one.low) for one in drawn.whiskers] == [
        ("yours", 216.0, 256.0),
        ("candidate", 176.0, None),
    ]


def test_without_a_candidate_yours_is_alone_and_without_a_result_the_search_has_all_the_width() -> None:
    alone = chart(Search("", RACE, {}), {**RESULT, "replaced": False, "has_candidate": False})
    searched = chart(Search("region 1", RACE, {}), {})
    assert alone is not None
    assert searched is not None
    assert [one.name for one in alone.whiskers] == ["yours"]
    assert (searched.whiskers, searched.right) == ([], FRAME.right)


def test_likelihoods_are_drawn_below_zero_and_not_beside_scores() -> None:
    drawn = chart(Search("", [scored("seed", 4, 4, -2.0), scored("other", 8, 4, -0.5)], {}), RESULT)
    assert drawn is not None
    assert [tick.text for tick in drawn.y_ticks] == ["-2", "-1.5", "-1", "-0.5"]
    assert drawn.whiskers == []


@pytest.mark.parametrize(("score", "ends"), [(1.0, ("0.95", "1")), (0.0, ("0", "0.05")), (0.5, ("0.45", "0.55"))])
def test_equal_scores_are_drawn_with_some_room(score: float, ends: tuple[str, str]) -> None:
    drawn = chart(Search("", [scored("seed", 4, 4, score)], {}), {})
    assert drawn is not None
    assert (drawn.y_ticks[0].text, drawn.y_ticks[-1].text) == ends


def test_a_search_that_scored_nothing_isnt_drawn() -> None:
    assert chart(Search("", [], {}), RESULT) is None


def test_of_very_many_evaluations_some_are_drawn() -> None:
    many = [scored("seed", calls, 1, 0.5) for calls in range(1, 2001)]
    drawn = chart(Search("", many, {}), {})
    assert drawn is not None
    assert len(drawn.dots) == 500


@given(st.floats(-100, 100), st.floats(0.01, 1e6))
def test_ticks_are_few_and_hold_the_range(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 6
    assert found[0] <= low + 1e-6 * span
    assert found[-1] >= low + span - 1e-6 * span


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_range_of_one_value_has_ticks_on_both_sides_or_at_it(value: float) -> None:
    found = ticks(value, value)
    assert len(found) >= 2
    assert found[0] <= value <= found[-1]
