"""A share of a budget: one part of a compile spends no more than its own, however many parts run at once."""

from __future__ import annotations

from typing import Final

from preceptor.errors import BudgetExhausted
from preceptor.lm.budget import Account, Budget, Cost

_SMALLEST: Final = 1e-9
"""A budget is more than nothing."""


class Share(Account):
    """An account whose spending is another's, too; neither's bound is passed.

    What may be spent is fixed when it is made. Of shares that add up to the whole, no one's calls, tokens and dollars
    depend on what the others spend, if what the whole keeps back is fixed too (`Account.fix`). Seconds run from a
    share's first call, and end with the whole's.

    Args:
        whole: The account it is a share of.
        part: Of what is left of tokens, dollars and seconds, in (0, 1].
        calls: Of what is left of calls, at least 1; None where the whole has no bound.
    """

    def __init__(self, whole: Account, part: float, calls: int | None) -> None:
        tokens, dollars, seconds = whole.left
        super().__init__(
            Budget(
                calls=calls,
                tokens=None if tokens is None else max(1, int(part * tokens)),
                dollars=None if dollars is None else max(_SMALLEST, part * dollars),
                seconds=None if seconds is None else max(_SMALLEST, part * seconds),
                prices=whole.budget.prices,
            ),
            clock=whole.clock,
        )
        self._whole = whole
        self._is_begun = False

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the first call: a part that waits for others loses no time to them."""
        return super().seconds if self._is_begun else 0.0

    def hold(self, calls: int, room: Cost | None = None) -> None:
        """Keep `calls` and `room` back in the whole, if it keeps back less and that isn't fixed."""
        self._whole.hold_more(calls, room)

    def reserve(self, most: Cost, *, billed: bool = True) -> None:
        """Set aside the most the next calls can cost, here and in the whole.

        Raises:
            BudgetExhausted: If that might pass either bound; nothing is set aside then.
        """
        self._begin()
        super().reserve(most, billed=billed)
        try:
            self._whole.reserve(most, billed=billed)
        except BudgetExhausted:
            super().settle(most, Cost(), billed=billed)
            raise

    def settle(self, most: Cost, actual: Cost, *, billed: bool) -> None:
        """Turn a reservation into what the calls really cost."""
        super().settle(most, actual, billed=billed)
        self._whole.settle(most, actual, billed=billed)

    def lose(self, most: Cost, cost: Cost) -> None:
        """Give a reservation back after a failed attempt that may have cost something."""
        super().lose(most, cost)
        self._whole.lose(most, cost)

    def _begin(self) -> None:
        with self._lock:
            if not self._is_begun:
                self._start, self._is_begun = self.clock(), True
