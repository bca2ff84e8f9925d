"""Budgets: what a compile may spend, reserved before every call and never passed."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from preceptor.errors import BudgetExhausted, ConfigError
from preceptor.lm.prices import Prices

BOUNDS: Final = ("calls", "tokens", "dollars", "seconds")
"""What a budget can bound."""

_SPARE_TIME: Final = 1.5
_SPARE: Final = 1.1
_UNITS: Final = {"": 1, "k": 1_000, "m": 1_000_000}
_FORM: Final = re.compile(r"(\w+)=(\d+(?:\.\d+)?|\.\d+)([kKmM]?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Upper bounds on what task and proposer models spend together; None means unbounded.

    Attributes:
        calls: Answers asked for, replayed ones included.
        tokens: Input and output tokens together, replayed ones included.
        dollars: By the price of each model.
        seconds: Wall-clock time of this process; a resumed run starts its clock anew.
        prices: Model name -> dollars per million input and output tokens, for models that litellm's table
            doesn't know or that cost you something else. No bound by itself.

    Raises:
        ConfigError: If a bound isn't above 0, or a price is below it.

    Example:
        >>> Budget.parse("calls=2k,minutes=30")
        Budget(calls=2000, tokens=None, dollars=None, seconds=1800.0, prices={})
    """

    calls: int | None = None
    tokens: int | None = None
    dollars: float | None = None
    seconds: float | None = None
    prices: Prices = field(default_factory=dict[str, tuple[float, float]])

    def __post_init__(self) -> None:
        for name in BOUNDS:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                endless = " Leave it out where there is no bound." if value == math.inf else ""
                raise ConfigError(f"Budget needs {name} > 0, got {value}.{endless}")
        for model, rates in self.prices.items():
            if len(rates) != 2 or not all(0 <= rate < math.inf for rate in rates):
                raise ConfigError(
                    f"Budget's price of {model} is (dollars per million input tokens, per million output tokens), "
                    f"both at least 0, not {rates!r}."
                )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `calls=2000,tokens=1M,dollars=5,minutes=30`; `seconds` works too.

        Raises:
            ConfigError: If a part isn't `name=number` with one of those names, or a bound is given twice.
        """
        given: dict[str, float] = {}
        for part in text.split(","):
            match = _FORM.fullmatch(part.strip())
            if match is None:
                raise ConfigError(f"--budget: {part.strip()!r} is not name=number, as in calls=2000,tokens=1M.")
            name, number = match[1], float(match[2]) * _UNITS[match[3].lower()]
            name, number = ("seconds", 60 * number) if name == "minutes" else (name, number)
            if name in given:
                raise ConfigError(f"--budget: {name} are bounded twice in {text!r}; give each bound once.")
            given[name] = number
        unknown = set(given) - set(BOUNDS)
        if unknown:
            raise ConfigError(f"--budget: no {sorted(unknown)[0]!r}; use calls, tokens, dollars, minutes or seconds.")
        whole = {name: int(given[name]) for name in ("calls", "tokens") if name in given}
        exact: dict[str, Any] = dict(given) | dict(whole)
        return cls(**exact)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call, or many, took."""

    calls: int = 0
    tokens: int = 0
    dollars: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.calls + other.calls, self.tokens + other.tokens, self.dollars + other.dollars)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.calls - other.calls, self.tokens - other.tokens, self.dollars - other.dollars)


class Account:
    """What has been spent of a budget, safe to share between threads.

    A call reserves the most it can cost, then settles for what it did cost. Replayed answers count
    like fresh ones, so that a resumed run takes the same path; `billed` is what was paid now. `lost` is
    what failed attempts may have cost: it counts against tokens and dollars, but is no answer and so no call.

    What all processes of a run pay together doesn't pass the budget either: threads may ask for other rows
    before the budget ends than they did in an earlier process, whose answers are then paid for and not replayed.

    Args:
        budget: The bounds.
        lost: By earlier processes of the same run.
        clock: Seconds, for tests.
        paid: For answers, by earlier processes of the same run.
    """

    def __init__(
        self,
        budget: Budget,
        lost: Cost | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        paid: Cost | None = None,
    ) -> None:
        self.budget = budget
        self.spent = Cost()
        self.billed = Cost()
        self.lost = lost or Cost()
        self._paid = paid or Cost()
        self._reserved = Cost()
        self._paying = Cost()
        self._bounded = Cost()
        self._held = 0
        self._room = Cost()
        self._fixed: tuple[float, float] | None = None
        self.clock = clock
        self._start = clock()
        self._lock = threading.Lock()
        self._given_back = threading.Condition(self._lock)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the account was opened."""
        return self.clock() - self._start

    @property
    def seconds_left(self) -> float | None:
        """Seconds that may still be spent, those held back excluded, at least 0; None if unbounded."""
        left = self.seconds_to_go
        return None if left is None else max(0.0, left - self._seconds_held())

    @property
    def seconds_to_go(self) -> float | None:
        """Seconds until the budget ends, what is held back included, at least 0; None if unbounded."""
        return None if self.budget.seconds is None else max(0.0, self.budget.seconds - self.seconds)

    @property
    def calls_left(self) -> int | None:
        """Calls that may still be dispatched, those held back excluded; None if unbounded."""
        if self.budget.calls is None:
            return None
        return max(0, self.budget.calls - self.spent.calls - self._reserved.calls - self._held)

    @property
    def left(self) -> tuple[float | None, float | None, float | None]:
        """Tokens, dollars and seconds that may still be spent, what is held back excluded; None if unbounded."""
        with self._lock:
            used, bounds = self.spent + self.lost + self._reserved, (self.budget.tokens, self.budget.dollars)
            held = self._held_back()
        tokens, dollars = (
            None if bound is None else max(0.0, bound - taken - kept)
            for bound, taken, kept in zip(bounds, (used.tokens, used.dollars), held, strict=True)
        )
        return tokens, dollars, self.seconds_left

    @property
    def unused(self) -> Cost:
        """What the calls so far might have taken beyond what they did; no count of calls."""
        with self._lock:
            return self._bounded - self.spent

    def hold_more(self, calls: int, room: Cost | None = None) -> None:
        """Keep `calls` and `room` back, unless more are kept back already, or that is fixed."""
        room = room or Cost()
        with self._lock:
            if self._fixed is not None:
                return
            self._held = max(self._held, calls)
            self._room = Cost(0, max(self._room.tokens, room.tokens), max(self._room.dollars, room.dollars))

    def fix(self, spare: float = 1.0) -> None:
        """Keep back what is kept back now of calls, tokens and dollars, whatever is seen from now on, until `hold`.

        Args:
            spare: So many times the tokens and dollars, for what is fixed doesn't grow with dearer calls.
        """
        with self._lock:
            tokens, dollars = self._held_back()
            self._fixed = (spare * tokens, spare * dollars)

    def hold(self, calls: int, room: Cost | None = None) -> None:
        """Keep `calls` back for later, so that a search can't spend what the confirmation needs.

        Of tokens and dollars, as much is kept back as so many calls have taken so far, and a tenth more; of seconds,
        which vary more, half as much again and one, but no more than half of the budget, for a first call may be slow.

        Args:
            calls: How many.
            room: Tokens and dollars kept back besides, for a call is let through by the most it can take.
        """
        with self._lock:
            self._held = calls
            self._room = room or Cost()
            self._fixed = None

    def reserve(self, most: Cost, *, billed: bool = True) -> None:
        """Set aside the most the next calls can cost; wait for calls under way if what they give back may do.

        A call takes fewer tokens than it might, so many at once reserve far more than they spend.

        Args:
            most: What they can cost.
            billed: False if their answers are paid for already.

        Raises:
            BudgetExhausted: If that might pass the budget; nothing is set aside then.
        """
        with self._lock:
            while self._reserved.calls and self._refusal(most, billed) and not self._refusal(most, billed, alone=True):
                self._given_back.wait(self.seconds_to_go)
            refusal = self._refusal(most, billed)
            if refusal:
                raise BudgetExhausted(f"{refusal} Resume with a larger budget.")
            self._reserved += most
            if billed:
                self._paying += most

    def settle(self, most: Cost, actual: Cost, *, billed: bool) -> None:
        """Turn a reservation into what the calls really cost."""
        with self._lock:
            self._reserved -= most
            self.spent += actual
            self._bounded += most if actual.calls else Cost()
            if billed:
                self._paying -= most
                self.billed += actual
            self._given_back.notify_all()

    def replay(self, most: Cost, cost: Cost) -> None:
        """Count an answer that is in the ledger already, and let through as the call was that it answered.

        Raises:
            BudgetExhausted: If that might pass the budget.
        """
        self.reserve(most, billed=False)
        self.settle(most, cost, billed=False)

    def lose(self, most: Cost, cost: Cost) -> None:
        """Give a reservation back after a failed attempt that may have cost something."""
        with self._lock:
            self._reserved -= most
            self._paying -= most
            self.lost += cost
            self._given_back.notify_all()

    def _held_back(self) -> tuple[float, float]:
        """Return the tokens and dollars kept back: what the calls held will take, if a tenth more than those so far."""
        if self._fixed is not None:
            return self._fixed
        a_call = _SPARE * self._held / self.spent.calls if self.spent.calls else 0.0
        return a_call * self.spent.tokens + self._room.tokens, a_call * self.spent.dollars + self._room.dollars

    def _seconds_held(self) -> float:
        sent = self.billed.calls + self._paying.calls
        if self.budget.seconds is None or not self._held or not sent:
            return 0.0
        return min(_SPARE_TIME * self._held * self.seconds / sent + 1, self.budget.seconds / 2)

    def _refusal(self, most: Cost, billed: bool, *, alone: bool = False) -> str:
        """Return which bound the next calls could pass, "" if none; `alone`: once all others have given back the rest.

        A call under way counts as a call whatever it gives back.
        """
        known = [("", self.spent, self._reserved)]
        if billed:
            known.append((" paid by all processes of this run", self._paid + self.billed, self._paying))
        for whose, taken, reserved in known:
            after = taken + self.lost + most + (Cost() if alone else reserved)
            passed = self._passed(whose, (taken + reserved + most).calls, after)
            if passed:
                return passed
        return ""

    def _passed(self, whose: str, calls: int, after: Cost) -> str:
        """Return which bound so much would pass, "" if none."""
        budget, (held_tokens, held_dollars) = self.budget, self._held_back()
        bounds = [
            ("calls", calls + self._held, budget.calls),
            ("tokens", after.tokens + held_tokens, budget.tokens),
            ("dollars", after.dollars + held_dollars, budget.dollars),
            ("seconds", self.seconds + self._seconds_held(), budget.seconds),
        ]
        for what, taken, bound in bounds:
            if bound is not None and taken > bound:
                return (
                    f"The next call could take {what}{whose} to {taken:g}, past the budget of {bound:g}; "
                    "nothing was sent."
                )
        return ""


class Purse(Account):
    """An account of what is paid by all processes of a job together; answers that are in the ledger are free.

    A job whose rows are answered in any order needs this: counted anew, the answers of an earlier process could
    come after others in this one, which would be paid beyond the budget.

    Args:
        budget: The bounds.
        paid: For answers, by earlier processes.
        lost: By earlier processes.
    """

    def __init__(self, budget: Budget, paid: Cost, lost: Cost) -> None:
        super().__init__(budget, lost)
        self.spent = paid

    def replay(self, most: Cost, cost: Cost) -> None:
        """Count nothing."""
