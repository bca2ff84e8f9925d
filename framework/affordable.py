"""What a compile takes, and whether its budget can pay it: before the first call."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from preceptor.demonstrated import LEFT
from preceptor.errors import Unaffordable
from preceptor.scoring.statistics import smallest_gain

if TYPE_CHECKING:
    from preceptor.teleprompter import Estimate, Teleprompter

FEWEST: Final = 6
"""Rows that have to change for the better, and none for the worse, for p < 0.05: 2 / 2 ** 5 is more."""
_SHARES: Final = 10_000


def affordable(method: Teleprompter, signatures: Mapping[str, Any], train: int, confirm: int) -> Estimate:
    """Return what a search takes that leaves enough for the confirmation.

    Args:
        method: With its budget.
        signatures: Of the predictors, by name.
        train: Rows to search on.
        confirm: Rows to confirm on.

    Raises:
        Unaffordable: If the budget has too few calls; with the number of rows that they are enough for.
    """
    kept, calls = confirming(method, confirm, len(signatures)), method.budget.calls
    if calls is None:
        return method.estimated(signatures, train, None)
    estimate = method.estimated(signatures, train, calls - kept)
    if calls < kept + estimate.least:
        raise Unaffordable(
            f"{type(method).__name__} needs at least {kept + estimate.least} calls here: {kept} to "
            f"confirm on {confirm} rows and {estimate.least} to search. The budget has {calls}. No call was made. "
            f"Raise the budget or give fewer rows{_payable(method, signatures, train, confirm, calls)}."
        )
    return estimate


def confirming(method: Teleprompter, rows: int, predictors: int) -> int:
    """Return the calls that a confirmation takes: of as many programs as are confirmed, every row, every predictor."""
    return method.confirmed * rows * predictors


def power(rows: int, programs: int = 2) -> str:
    """Return what so many confirmation rows can be expected to confirm.

    Args:
        rows: Of different inputs.
        programs: That are run on them; with more than two, half of the rows choose experts, and half measure them.
    """
    told = f"{rows} rows confirm {_least(rows)} in a score of 0 or 1, four times in five"
    return told if programs <= 2 else f"{told}; half of them measure a mixture: {_least(rows // 2)}"


def _least(rows: int) -> str:
    gain = smallest_gain(rows)
    return f"a gain of {100 * gain:.0f} points or more" if gain < 1 else "no gain"


def _payable(method: Teleprompter, signatures: Mapping[str, Any], train: int, confirm: int, calls: int) -> str:
    """Return how many rows, in these proportions, so many calls are enough for; "" if for none."""
    least = LEFT + method.demonstration_rows

    def is_too_many(share: int) -> bool:
        kept = confirming(method, confirm * share // _SHARES, len(signatures))
        return calls < kept + method.estimated(signatures, max(least, train * share // _SHARES), calls - kept).least

    share = bisect.bisect_left(range(_SHARES), x=True, key=is_too_many) - 1
    fewer, checked = train * share // _SHARES, confirm * share // _SHARES
    is_enough = fewer >= least and checked >= FEWEST
    return f": {fewer} to search on and {checked} to confirm on can be paid" if is_enough else ""
