"""A share of a budget: neither its own bound nor the whole's is passed, and what is spent counts in both."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import dspy
import pytest

from preceptor.errors import BudgetExhausted
from preceptor.lm.budget import Account, Budget, Cost
from preceptor.lm.ledger import Ledger
from preceptor.lm.meter import Meter
from preceptor.lm.share import Share
from preceptor.testing import asked, prompt, simulated


def spend(account: Account, most: Cost, actual: Cost | None = None) -> None:
    account.reserve(most)
    account.settle(most, actual or most, billed=True)


def test_what_a_share_spends_is_spent_by_the_whole() -> None:
    whole = Account(Budget(calls=10))
    share = Share(whole, 0.5, 5)

    spend(share, Cost(1, 7, 0.5))
    share.reserve(Cost(1, 2, 0.25))
    share.lose(Cost(1, 2, 0.25), Cost(1, 1, 0.125))

    for account in (share, whole):
        assert (account.spent, account.billed, account.lost) == (
            Cost(1, 7, 0.5),
            Cost(1, 7, 0.5),
            Cost(1, 1, 0.125),
        )
    assert (share.calls_left, whole.calls_left) == (4, 9)


def test_a_share_ends_before_the_whole_and_the_whole_before_its_shares() -> None:
    whole = Account(Budget(calls=3))
    first, second = Share(whole, 0.5, 2), Share(whole, 0.5, 2)

    spend(first, Cost(2))
    with pytest.raises(BudgetExhausted, match="past the budget of 2"):
        first.reserve(Cost(1))
    spend(second, Cost(1))
    with pytest.raises(BudgetExhausted, match="past the budget of 3"):
        second.reserve(Cost(1))
    assert second.calls_left == 1, "what the whole refused is set aside nowhere"


def test_what_a_share_may_spend_doesnt_depend_on_what_others_have_spent_since() -> None:
    whole = Account(Budget(calls=100, tokens=1000, dollars=8.0, seconds=60.0), clock=lambda: 0.0)
    spend(whole, Cost(10, 200, 2.0))
    first, second = Share(whole, 0.25, 20), Share(whole, 0.25, 20)
    spend(first, Cost(5, 100, 1.0))

    assert (second.budget.tokens, second.budget.dollars, second.budget.seconds) == (200, 1.5, 15.0)
    assert second.calls_left == 20


def test_a_share_holds_nothing_back_of_its_own_and_as_much_of_the_whole_as_was_ever_asked() -> None:
    whole = Account(Budget(calls=100))
    share = Share(whole, 0.5, 40)

    share.hold(30)
    share.hold(10)

    assert (share.calls_left, whole.calls_left) == (40, 70)


def test_tokens_kept_for_the_confirmation_are_in_no_share() -> None:
    whole = Account(Budget(tokens=1000))
    spend(whole, Cost(10, 100))
    whole.hold(20)
    assert Share(whole, 1.0, None).budget.tokens == 680  # 1000 - 100 - 1.1 * 20 calls of 10 tokens


def test_a_whole_without_bounds_has_shares_without() -> None:
    share = Share(Account(Budget()), 0.5, None)
    assert (share.budget, share.calls_left, share.seconds_left) == (Budget(), None, None)


@pytest.fixture
def ledger(tmp_path: Path) -> Generator[Ledger]:
    made = Ledger(tmp_path / "ledger.sqlite")
    yield made
    made.close()


def test_a_meter_on_a_share_counts_in_both_and_asks_no_question_that_was_answered(ledger: Ledger) -> None:
    lm = simulated(lambda request: prompt(request).upper())
    meter = Meter(ledger, Account(Budget(calls=10)))
    first, second = (meter.within(Share(meter.account, 0.5, 3)) for _ in range(2))
    metered = meter.wrap(lm)

    assert first.wrap(metered)("a") == second.wrap(first.wrap(metered))("a") == ["A"]

    assert [prompt(request) for request in asked(lm)] == ["a"]
    assert (first.account.billed.calls, second.account.billed.calls, second.account.spent.calls) == (1, 0, 1)
    assert (meter.account.billed.calls, meter.account.spent.calls) == (1, 2)
    assert meter.wrap(metered) is metered


def test_a_share_that_is_spent_ends_its_own_calls_only(ledger: Ledger) -> None:
    meter = Meter(ledger, Account(Budget(calls=10)))
    lm = meter.wrap(simulated(lambda request: "yes"))
    small = meter.within(Share(meter.account, 0.5, 1)).wrap(lm)

    small("a")
    with pytest.raises(dspy.LMError) as caught:
        small("b")
    assert isinstance(caught.value.__cause__, BudgetExhausted)
    assert lm("b") == ["yes"]


def test_the_seconds_of_shares_that_are_spent_one_after_the_other_begin_with_the_first_call_of_each() -> None:
    now = [0.0]
    whole = Account(Budget(seconds=4.0), clock=lambda: now[0])
    first, second = Share(whole, 0.5, None), Share(whole, 0.25, None)

    spend(first, Cost(1))
    now[0] = 1.5
    assert (first.seconds, first.seconds_left, second.seconds, second.seconds_left) == (1.5, 0.5, 0.0, 1.0)
    now[0] = 2.5
    with pytest.raises(BudgetExhausted, match=r"seconds to 2\.5, past the budget of 2"):
        first.reserve(Cost(1))
    spend(second, Cost(1))
    now[0] = 3.0
    assert (second.seconds_left, whole.seconds_left) == (0.5, 1.0)


def test_dear_calls_of_one_share_take_nothing_from_another_for_what_is_kept_back_is_fixed() -> None:
    whole = Account(Budget(tokens=10_000, calls=1000))
    spend(whole, Cost(30, 900))
    whole.hold(100)  # 1.1 * 100 calls of 30 tokens
    whole.fix()
    first, second = Share(whole, 0.5, 435), Share(whole, 0.5, 435)

    for share in (first, second):
        share.hold(200, Cost(0, 500))
        for _ in range(29):
            spend(share, Cost(15, 100))
        assert (share.budget.tokens, share.left[0], share.calls_left) == (2900, 0, 0)
    assert whole.left[0] == 0
    whole.hold(0)
    assert (whole.left[0], whole.calls_left) == (3300, 100)
