from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from preceptor.affordable import FEWEST, affordable, confirming, power
from preceptor.errors import Unaffordable
from preceptor.lm.budget import Budget
from preceptor.teleprompter import Estimate, Teleprompter

TWO = {"first": None, "second": None}


@dataclass(frozen=True, kw_only=True)
class Twice(Teleprompter):
    """Needs two calls a train row and predictor, and seven more."""

    def estimate(self, signatures: Mapping[str, Any], rows: int, calls: int | None) -> Estimate:
        least = 7 + 2 * rows * len(signatures)
        return Estimate(least=least, expected=least if calls is None else calls)


def method(calls: int | None) -> Twice:
    return Twice(metric="accuracy", budget=Budget(calls=calls))


def test_the_seed_and_a_candidate_are_confirmed_on_every_row_by_every_predictor() -> None:
    assert confirming(method(None), 30, 2) == 2 * 30 * 2


def test_a_search_has_what_the_confirmation_leaves() -> None:
    assert affordable(method(300), TWO, 20, 30) == Estimate(least=87, expected=180)
    assert affordable(method(None), TWO, 20, 30) == Estimate(least=87, expected=87)
    assert affordable(method(207), TWO, 20, 30).least == 87, "what it needs is enough"


@pytest.mark.parametrize("calls", [206, 150, 100, 60])
def test_as_many_rows_as_are_said_to_be_payable_are_and_more_arent(calls: int) -> None:
    """20 and 30 rows take 120 calls to confirm and 87 to search."""
    with pytest.raises(Unaffordable, match=r"^Twice needs at least 207 calls here: 120 to confirm on 30") as caught:
        affordable(method(calls), TWO, 20, 30)

    told = str(caught.value).partition("fewer rows: ")[2].split()
    train, confirm = int(told[0]), int(told[5])
    assert affordable(method(calls), TWO, train, confirm).least <= calls - 4 * confirm
    with pytest.raises(Unaffordable):
        affordable(method(calls), TWO, train + 1, confirm + 2)


def test_no_number_is_named_where_too_few_rows_would_be_left() -> None:
    with pytest.raises(Unaffordable, match=r"Raise the budget or give fewer rows\.$"):
        affordable(method(4 * FEWEST + 7 + 2 * 2 * 2), TWO, 20, 30)


def test_what_so_many_rows_confirm_is_told_in_points() -> None:
    assert power(200) == "200 rows confirm a gain of 11 points or more in a score of 0 or 1, four times in five"
    assert power(6).startswith("6 rows confirm no gain ")
    assert power(64, 3).endswith("four times in five; half of them measure a mixture: a gain of 38 points or more")
