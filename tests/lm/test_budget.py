"""Budgets: read from text, reserved before every call, never passed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.errors import BudgetExhausted, ConfigError
from preceptor.lm.budget import Account, Budget, Cost, Purse


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("calls=2000", Budget(calls=2000)),
        ("calls=2k", Budget(calls=2000)),
        ("calls=1.5K", Budget(calls=1500)),
        ("tokens=1M", Budget(tokens=1_000_000)),
        ("tokens=2m , dollars=.5", Budget(tokens=2_000_000, dollars=0.5)),
        ("minutes=30", Budget(seconds=1800.0)),
        ("seconds=2.5", Budget(seconds=2.5)),
        (
            "calls=2000,tokens=1M,dollars=5,minutes=30",
            Budget(calls=2000, tokens=1_000_000, dollars=5.0, seconds=1800.0),
        ),
    ],
)
def test_a_budget_is_read_from_text(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget
    calls = Budget.parse(text).calls
    assert calls is None or type(calls) is int


@pytest.mark.parametrize(("text", "name"), [("calls=1000,calls=500", "calls"), ("minutes=10,seconds=5", "seconds")])
def test_a_bound_that_is_given_twice_is_refused(text: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--budget: {name} are bounded twice in '{text}'; give each bound once\.$"):
        Budget.parse(text)


@pytest.mark.parametrize(
    "part", ["", "calls", "calls=", "calls=many", "calls=-1", "calls=1.2.3", "calls=.", "calls=1G"]
)
def test_a_part_that_is_no_name_and_number_is_refused(part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Budget.parse(part)
    assert str(caught.value) == f"--budget: {part!r} is not name=number, as in calls=2000,tokens=1M."


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"--budget: no 'hours'; use calls, tokens, dollars, minutes or seconds\."):
        Budget.parse("calls=1,hours=2")


@pytest.mark.parametrize(
    ("text", "named"), [("calls=0", "calls"), ("calls=.5", "calls"), ("dollars=0", "dollars"), ("minutes=0", "seconds")]
)
def test_a_budget_of_nothing_is_refused(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"Budget needs {named} > 0, got 0"):
        Budget.parse(text)


def test_costs_add_and_subtract_part_by_part() -> None:
    assert Cost(1, 20, 0.5) + Cost(2, 30, 0.25) == Cost(3, 50, 0.75)
    assert Cost(3, 50, 0.75) - Cost(2, 30, 0.25) == Cost(1, 20, 0.5)


def test_a_call_that_could_pass_the_budget_is_refused_by_what_was_spent() -> None:
    account = Account(Budget(tokens=100))
    account.reserve(Cost(1, 60))
    account.settle(Cost(1, 60), Cost(1, 40), billed=True)
    with pytest.raises(
        BudgetExhausted,
        match=r"The next call could take tokens to 101, past the budget of 100; nothing was sent\. "
        r"Resume with a larger budget\.",
    ):
        account.reserve(Cost(1, 61))

    account.reserve(Cost(1, 60))

    assert account.spent == Cost(1, 40)


def test_a_reservation_counts_until_it_is_settled_and_who_needs_its_rest_waits_for_it() -> None:
    account = Account(Budget(tokens=100))
    account.reserve(Cost(1, 60))
    let_through: list[Cost] = []

    def want() -> None:
        account.reserve(Cost(1, 50))
        let_through.append(account.spent)

    waiting = threading.Thread(target=want)
    waiting.start()
    waiting.join(0.05)
    assert let_through == []  # 60 + 50 is too much

    account.settle(Cost(1, 60), Cost(1, 50), billed=True)
    waiting.join()

    assert let_through == [Cost(1, 50)]


def test_who_waits_for_a_reservation_is_let_through_by_a_failed_attempt_and_refused_by_a_dear_one() -> None:
    account = Account(Budget(dollars=1))
    account.reserve(Cost(1, 0, 0.75))
    refused: list[str] = []

    def want() -> None:
        try:
            account.reserve(Cost(1, 0, 0.5))
        except BudgetExhausted as error:
            refused.append(str(error))

    waiting = threading.Thread(target=want)
    waiting.start()
    account.lose(Cost(1, 0, 0.75), Cost(1, 0, 0.75))
    waiting.join()

    assert refused == [
        "The next call could take dollars to 1.25, past the budget of 1; nothing was sent. Resume with a larger budget."
    ]
    account.reserve(Cost(1, 0, 0.25))


def test_a_wait_for_calls_under_way_ends_with_the_time_budgeted() -> None:
    account = Account(Budget(tokens=100, seconds=1))
    account.reserve(Cost(1, 60))
    with pytest.raises(BudgetExhausted, match="past the budget of"):
        account.reserve(Cost(1, 50))


def test_a_call_that_was_not_made_says_nothing_of_what_calls_leave_unused() -> None:
    account = Account(Budget(tokens=1000))
    for actual in (Cost(1, 40), Cost()):
        account.reserve(Cost(1, 60))
        account.settle(Cost(1, 60), actual, billed=True)

    assert account.unused == Cost(0, 20)


def test_a_refused_reservation_sets_nothing_aside() -> None:
    account = Account(Budget(calls=3, tokens=10))
    with pytest.raises(BudgetExhausted, match="tokens to 11"):
        account.reserve(Cost(1, 11))
    assert account.calls_left == 3


def test_the_last_call_of_a_budget_may_use_it_up_exactly() -> None:
    account = Account(Budget(calls=1, tokens=10, dollars=0.5))
    account.reserve(Cost(1, 10, 0.5))
    assert account.calls_left == 0


def test_dollars_are_bounded_too() -> None:
    account = Account(Budget(dollars=1))
    account.reserve(Cost(1, 0, 0.75))
    account.settle(Cost(1, 0, 0.75), Cost(1, 0, 0.75), billed=True)
    with pytest.raises(BudgetExhausted, match=r"dollars to 1\.25, past the budget of 1;"):
        account.reserve(Cost(1, 0, 0.5))


def test_calls_held_back_are_out_of_reach_until_released() -> None:
    account = Account(Budget(calls=10))
    account.hold(4)
    assert account.calls_left == 6
    account.reserve(Cost(6))
    with pytest.raises(BudgetExhausted, match="calls to 11, past the budget of 10"):
        account.reserve(Cost(1))

    account.hold(0)
    account.reserve(Cost(4))

    assert account.calls_left == 0


def test_tokens_and_dollars_of_the_calls_held_back_are_reckoned_from_those_so_far() -> None:
    account = Account(Budget(tokens=1000, dollars=10))
    account.hold(4)
    account.reserve(Cost(2, 200, 2.0))
    account.settle(Cost(2, 200, 2.0), Cost(2, 200, 2.0), billed=True)
    with pytest.raises(BudgetExhausted, match="tokens to 1001, past the budget of 1000"):
        account.reserve(Cost(1, 361))  # 200 + 361 + 1.1 * 4 * 100
    with pytest.raises(BudgetExhausted, match=r"dollars to 10\.4, past the budget of 10"):
        account.reserve(Cost(1, 0, 4.0))
    account.reserve(Cost(1, 360, 3.6))
    account.settle(Cost(1, 360, 3.6), Cost(), billed=True)

    account.hold(0)
    account.reserve(Cost(1, 800, 8.0))


def test_an_unbounded_account_counts_and_never_refuses() -> None:
    account = Account(Budget())
    account.reserve(Cost(10**9, 10**12, 1e9))
    assert account.calls_left is None


def test_a_replayed_answer_is_spent_and_not_billed() -> None:
    account = Account(Budget(calls=2))
    for billed in (True, False):
        account.reserve(Cost(1, 5, 0.5), billed=billed)
        account.settle(Cost(1, 5, 0.5), Cost(1, 5, 0.5), billed=billed)
    assert account.spent == Cost(2, 10, 1.0)
    assert account.billed == Cost(1, 5, 0.5)
    with pytest.raises(BudgetExhausted, match="calls to 3"):
        account.reserve(Cost(1))


def test_time_runs_out_by_the_clock() -> None:
    now = [100.0]
    account = Account(Budget(seconds=60), clock=lambda: now[0])
    now[0] = 160.0
    account.reserve(Cost(1))
    assert account.seconds == 60.0

    now[0] = 161.0
    with pytest.raises(BudgetExhausted, match="seconds to 61, past the budget of 60"):
        account.reserve(Cost(1))


def test_time_is_kept_back_as_the_calls_so_far_took_it_but_no_more_than_half() -> None:
    now = [0.0]
    account = Account(Budget(seconds=60), clock=lambda: now[0])
    account.hold(20)
    account.reserve(Cost(1))
    now[0] = 10.0  # a slow start
    account.settle(Cost(1), Cost(1), billed=True)
    assert account.seconds_left == pytest.approx(60 - 30 - 10)

    for _ in range(19):
        account.reserve(Cost(1))
        account.settle(Cost(1), Cost(1), billed=True)
    now[0] = 20.0  # 20 calls: as many again may take 1.5 * 20, and a second more
    account.hold(10)
    assert account.seconds_left == pytest.approx(60 - 15 - 1 - 20)
    assert account.seconds_to_go == pytest.approx(40)
    account.hold(20)
    now[0] = 30.5
    with pytest.raises(BudgetExhausted, match="seconds to"):
        account.reserve(Cost(1))
    assert account.seconds_left == 0.0

    account.hold(0)
    assert account.seconds_left == pytest.approx(29.5)
    account.reserve(Cost(1))


def test_answers_from_the_ledger_take_no_time_to_go_by() -> None:
    now = [5.0]
    account = Account(Budget(seconds=60), clock=lambda: now[0])
    account.hold(1000)
    account.replay(Cost(1), Cost(1))
    now[0] = 10.0
    assert account.seconds_left == pytest.approx(55)


def test_sixty_four_racing_threads_never_pass_the_budget() -> None:
    account = Account(Budget(calls=1000, tokens=5000))
    start = threading.Barrier(64)
    sent: list[int] = []

    def race() -> None:
        start.wait()
        for _ in range(50):
            try:
                account.reserve(Cost(1, 7))
            except BudgetExhausted:
                return
            sent.append(1)
            account.settle(Cost(1, 7), Cost(1, 5), billed=True)

    threads = [threading.Thread(target=race) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert account.spent == Cost(len(sent), 5 * len(sent))
    assert account.spent.calls <= 1000
    assert account.spent.tokens <= 5000
    assert account.calls_left == 1000 - len(sent)  # nothing stays reserved


calls_made = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50), st.floats(0, 1), st.booleans()), max_size=60)


@given(calls_made, st.integers(1, 40), st.integers(1, 400))
def test_whatever_is_reserved_and_settled_the_bounds_hold(
    made: list[tuple[int, int, float, bool]], calls: int, tokens: int
) -> None:
    account = Account(Budget(calls=calls, tokens=tokens))
    open_ones: list[tuple[Cost, Cost]] = []
    for most_calls, most_tokens, share, settles in made:
        most = Cost(most_calls, most_tokens)

        def fits(most: Cost) -> bool:
            taken = sum((one for one, _ in open_ones), account.spent) + most
            return taken.calls <= calls and taken.tokens <= tokens

        while not fits(most) and open_ones:  # as calls under way end while this one waits
            account.settle(*open_ones.pop(0), billed=True)
        try:
            account.reserve(most)
            assert fits(most)
            open_ones.append((most, Cost(most_calls, int(share * most_tokens))))
        except BudgetExhausted:
            assert not fits(most)
        if settles and open_ones:
            account.settle(*open_ones.pop(0), billed=True)
        assert account.spent.calls <= calls
        assert account.spent.tokens <= tokens
    assert account.billed == account.spent


def test_a_bound_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^Budget needs dollars > 0, got nan\.$"):
        Budget(dollars=float("nan"))


def test_a_purse_counts_what_earlier_processes_paid_and_no_replayed_answer() -> None:
    purse = Purse(Budget(calls=3, tokens=100), Cost(2, 40), Cost(1, 20))
    for _ in range(5):
        purse.replay(Cost(1, 90), Cost(1, 30))
    assert (purse.spent, purse.billed, purse.lost) == (Cost(2, 40), Cost(), Cost(1, 20))
    with pytest.raises(BudgetExhausted):
        purse.reserve(Cost(1, 41))
    purse.reserve(Cost(1, 40))
    purse.settle(Cost(1, 40), Cost(1, 10), billed=True)
    assert (purse.spent, purse.billed) == (Cost(3, 50), Cost(1, 10))


def test_what_all_processes_of_a_run_pay_together_stays_in_the_budget_and_what_is_held_back_can_be_paid() -> None:
    account = Account(Budget(calls=10), paid=Cost(6))
    account.hold(2)
    for _ in range(2):
        account.reserve(Cost(1))
        account.settle(Cost(1), Cost(1), billed=True)
    refusal = "could take calls paid by all processes of this run to 11, past the budget of 10; nothing was sent"
    with pytest.raises(BudgetExhausted, match=refusal):
        account.reserve(Cost(1))
    for _ in range(5):
        account.replay(Cost(1), Cost(1))  # paid for already
    assert (account.spent, account.billed, account.calls_left) == (Cost(7), Cost(2), 1)
    account.hold(0)
    account.reserve(Cost(2))
    with pytest.raises(BudgetExhausted, match="calls paid by all"):
        account.reserve(Cost(1))
    account.lose(Cost(2), Cost(2))  # failed attempts are no answers
    account.reserve(Cost(2))


def test_tokens_and_dollars_of_earlier_processes_are_paid_for_too() -> None:
    account = Account(Budget(tokens=100, dollars=1.0), Cost(1, 10, 0.125), paid=Cost(3, 60, 0.5))
    with pytest.raises(BudgetExhausted, match="tokens paid by all processes of this run to 101"):
        account.reserve(Cost(1, 31, 0.25))
    with pytest.raises(BudgetExhausted, match=r"dollars paid by all processes of this run to 1\.125"):
        account.reserve(Cost(1, 30, 0.5))
    account.reserve(Cost(1, 30, 0.375))
    account.settle(Cost(1, 30, 0.375), Cost(1, 10, 0.125), billed=True)
    account.reserve(Cost(1, 20, 0.25))


def test_room_is_kept_back_beside_the_calls_held() -> None:
    account = Account(Budget(tokens=1000, dollars=100.0))
    account.hold(5)
    for _ in range(4):
        account.reserve(Cost(1, 50, 5.0))
        account.settle(Cost(1, 50, 5.0), Cost(1, 10, 1.0), billed=True)
    assert account.unused == Cost(0, 160, 16.0)
    account.hold(5, Cost(0, 120, 12.0))
    with pytest.raises(BudgetExhausted, match="tokens to 1001, past"):
        account.reserve(Cost(1, 786))  # 40 + 786 + 1.1 * 5 * 10 + 120
    account.reserve(Cost(1, 785))
    assert account.left[:2] == pytest.approx((0, 100 - 4 - 5.5 - 12))

    account.hold_more(6, Cost(0, 90, 13.0))
    assert account.left[:2] == pytest.approx((0, 100 - 4 - 6.6 - 13))
    account.hold(0)
    assert account.left == (175, 96.0, None)


def test_a_replayed_answer_is_let_through_as_its_call_was() -> None:
    account = Account(Budget(tokens=100))
    account.replay(Cost(1, 90), Cost(1, 20))
    with pytest.raises(BudgetExhausted, match="tokens to 110"):
        account.replay(Cost(1, 90), Cost(1, 20))
    assert account.spent == Cost(1, 20)


@pytest.mark.parametrize("name", ["calls", "tokens", "dollars", "seconds"])
def test_an_endless_bound_is_refused(name: str) -> None:
    endless: dict[str, Any] = {name: float("inf")}
    with pytest.raises(ConfigError, match=f"^Budget needs {name} > 0, got inf. Leave it out where there is no bound.$"):
        Budget(**endless)
