from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.scoring import statistics
from preceptor.scoring.metrics import wrap
from preceptor.scoring.statistics import Comparison, compare, interval, smallest_gain
from preceptor.scoring.trial import Outcome

Z = 1.959963984540054
ACCURACY = wrap("accuracy", "label")
BITS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def outcomes(scores: Sequence[float]) -> list[Outcome]:
    return [Outcome("scored", float(score)) for score in scores]


def changed(*, better: int, worse: int, same: int) -> Comparison:
    before = outcomes([0] * better + [1] * worse + [1] * same)
    after = outcomes([1] * better + [0] * worse + [1] * same)
    return compare(before, after, ACCURACY)


def tail(at_least: int, trials: int, share: float) -> float:
    """P(X >= at_least) of a binomial, summed term by term."""
    return sum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(at_least, trials + 1))


@pytest.mark.parametrize(
    ("better", "worse", "p_value"),
    [
        (6, 1, 2 * (7 + 1) / 2**7),
        (1, 6, 2 * (7 + 1) / 2**7),
        (8, 0, 2 / 2**8),
        (9, 1, 2 * (10 + 1) / 2**10),
        (3, 3, 1.0),
        (5, 4, 1.0),
    ],
)
def test_mcnemars_p_is_the_two_sided_binomial_of_the_rows_that_changed(better: int, worse: int, p_value: float) -> None:
    verdict = changed(better=better, worse=worse, same=10)

    assert verdict.p_value == pytest.approx(p_value)
    assert (verdict.test, verdict.rows) == ("exact McNemar", better + worse + 10)


def test_the_interval_of_a_published_example_is_tangos() -> None:
    """Fagerland et al. 2014, airway hyper-responsiveness before and after stem-cell transplantation: 1, 1, 7, 12."""
    verdict = changed(better=7, worse=1, same=13)

    assert verdict.gain == pytest.approx(6 / 21)
    assert verdict.p_value == pytest.approx(0.0703, abs=1e-4)
    assert not verdict.is_confirmed
    assert verdict.high == pytest.approx(0.517, abs=5e-4)
    assert verdict.low == 0.0  # 0.026, but the exact test doesn't confirm it
    assert statistics._tango(7, 1, 21) == pytest.approx(0.026, abs=5e-4)


@pytest.mark.parametrize(("rows", "least"), [(20, 0.935), (50, 0.94)])
@pytest.mark.parametrize(("better", "worse"), [(0.05, 0.05), (0.25, 0.25), (0.2, 0.1), (0.2, 0.0), (0.5, 0.02)])
def test_the_interval_of_a_gain_holds_the_truth_as_often_as_it_says(
    better: float, worse: float, rows: int, least: float
) -> None:
    """Summed over every way the rows can change, weighed by its probability."""
    covered = 0.0
    for b in range(rows + 1):
        for w in range(rows + 1 - b):
            chance = math.comb(rows, b) * math.comb(rows - b, w) * better**b * worse**w
            chance *= (1 - better - worse) ** (rows - b - w)
            if chance > 1e-9:
                verdict = changed(better=b, worse=w, same=rows - b - w)
                covered += chance * (verdict.low <= better - worse <= verdict.high)
    assert covered >= least


def test_a_gain_is_confirmed_exactly_where_p_is_below_five_percent_and_more_rows_got_better() -> None:
    for better in range(14):
        for worse in range(14):
            verdict = changed(better=better, worse=worse, same=5)
            expected = better > worse and 2 * tail(better, better + worse, 0.5) < 0.05
            assert verdict.is_confirmed == expected, f"{better} better, {worse} worse"


def test_five_changed_rows_confirm_nothing_and_six_do() -> None:
    assert not changed(better=5, worse=0, same=50).is_confirmed
    assert changed(better=6, worse=0, same=50).is_confirmed


def test_where_no_row_changed_the_gain_may_still_be_what_so_few_rows_miss() -> None:
    verdict = changed(better=0, worse=0, same=96)
    end = Z**2 / (96 + Z**2)  # the share of changing rows that 96 rows without a change leave possible
    assert (verdict.gain, verdict.p_value, verdict.is_confirmed) == (0.0, 1.0, False)
    assert [verdict.low, verdict.high] == pytest.approx([-end, end])


@given(BITS)
def test_the_gain_lies_within_its_interval(pairs: list[tuple[bool, bool]]) -> None:
    verdict = compare(outcomes([a for a, _ in pairs]), outcomes([b for _, b in pairs]), ACCURACY)

    assert -1 <= verdict.low <= verdict.gain + 1e-12
    assert verdict.gain - 1e-12 <= verdict.high <= 1


@given(BITS)
def test_swapping_the_programs_turns_the_gain_round(pairs: list[tuple[bool, bool]]) -> None:
    first, second = outcomes([a for a, _ in pairs]), outcomes([b for _, b in pairs])
    there, back = compare(first, second, ACCURACY), compare(second, first, ACCURACY)

    assert back.gain == -there.gain
    assert back.p_value == pytest.approx(there.p_value)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=12))
def test_graded_gains_turn_round_too(pairs: list[tuple[float, float]]) -> None:
    first, second = outcomes([a for a, _ in pairs]), outcomes([b for _, b in pairs])

    assert compare(first, second, ACCURACY).gain == -compare(second, first, ACCURACY).gain


def test_graded_scores_are_tested_by_flipping_the_signs_of_their_differences() -> None:
    steps = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    verdict = compare(outcomes([0.0] * 8), outcomes(steps), wrap("token_f1", "label"))

    assert verdict.test == "permutation"
    assert verdict.p_value == pytest.approx(2 / 2**8)  # only all plus and all minus are as extreme
    assert verdict.gain == pytest.approx(0.45)
    assert verdict.is_confirmed


def test_graded_differences_that_cancel_out_confirm_nothing() -> None:
    verdict = compare(outcomes([0.5, 0.6, 0.5, 0.6]), outcomes([0.6, 0.5, 0.6, 0.5]), ACCURACY)

    assert verdict.gain == pytest.approx(0.0)
    assert verdict.p_value == 1.0
    assert verdict.low < 0 < verdict.high
    assert not verdict.is_confirmed


@pytest.mark.parametrize(("rows", "is_confirmed"), [(8, False), (20, True)])
def test_rows_that_all_say_the_same_are_as_certain_as_so_many_rows_of_right_and_wrong(
    rows: int, is_confirmed: bool
) -> None:
    graded = compare(outcomes([0.25] * rows), outcomes([0.5] * rows), ACCURACY)

    assert (graded.low, graded.high) == pytest.approx(
        (statistics._tango(rows / 4, 0, rows), -statistics._tango(0, rows / 4, rows))
    )
    assert graded.low < 0.25 < graded.high
    assert graded.p_value == pytest.approx(2.0 ** (1 - rows), abs=2e-4)
    assert graded.is_confirmed == is_confirmed
    back = compare(outcomes([0.5] * rows), outcomes([0.25] * rows), ACCURACY)
    assert (back.low, back.high) == pytest.approx((-graded.high, -graded.low))


def test_a_set_score_that_every_row_agrees_on_is_no_certainty() -> None:
    gold = "yes"
    wrong, right = [Outcome("scored", 0.0, "no", gold)] * 6, [Outcome("scored", 1.0, "yes", gold)] * 6

    verdict = compare(wrong, right, wrap("macro_f1", "label"))

    assert (verdict.gain, verdict.high) == (1.0, 1.0)
    assert verdict.low == pytest.approx(compare(wrong, right, ACCURACY).low)
    assert 0 < verdict.low < 0.3
    assert verdict.smallest_gain > 0.3


def test_rows_of_other_labels_add_no_certainty_to_a_gain_in_the_f1_of_one() -> None:
    others = [Outcome("scored", 1.0, "no", "no")] * 200
    missed, found = [Outcome("scored", 0.0, "no", "yes")] * 8, [Outcome("scored", 1.0, "yes", "yes")] * 8
    metric = wrap("f1:yes", "label")

    verdict = compare(missed + others, found + others, metric)

    alone = compare(missed, found, metric)
    assert (verdict.gain, verdict.low, verdict.high) == (1.0, alone.low, alone.high)
    assert verdict.low == pytest.approx(0.351, abs=1e-3)


def test_a_row_that_turns_right_and_one_that_turns_wrong_are_made_up_for_the_error_of_a_gain_in_f1() -> None:
    others = [Outcome("scored", 1.0, "no", "no")] * 2
    missed, found = [Outcome("scored", 0.0, "no", "yes")], [Outcome("scored", 1.0, "yes", "yes")]

    verdict = compare(missed * 8 + others, found * 7 + missed + others, wrap("f1:yes", "label"))

    turned = 7 * 2 / (7 * 2 + 2) - 2 / (2 + 8)  # without one that turned right, the made-up one among them
    still, other, back = 16 / 17 - 2 / 10, 16 / 18 - 2 / 11, 16 / 17 - 0.0
    without = [turned] * 8 + [still, other, other, back]
    mean = sum(without) / 12
    error = math.sqrt(11 / 12 * sum((one - mean) ** 2 for one in without))
    assert verdict.gain == pytest.approx(14 / 15)
    assert verdict.low == pytest.approx(14 / 15 - 2.2622 * error, abs=1e-4)  # Student's t of 9 degrees of freedom


def test_made_up_rows_never_narrow_the_interval_of_a_gain_in_f1() -> None:
    """Of one label three rows turn right and one turns wrong: two more that change would look like more certainty."""
    others = [Outcome("scored", 1.0, "no", "no")] * 46
    missed, found = [Outcome("scored", 0.0, "no", "yes")], [Outcome("scored", 1.0, "yes", "yes")]

    verdict = compare(missed * 3 + found + others, found * 3 + missed + others, wrap("f1:yes", "label"))

    turned, back = 4 / 5 - 2 / 4, 6 / 6 - 0.0  # without one that turned right, and without the one that turned wrong
    without = [turned] * 3 + [back] + [6 / 7 - 2 / 5] * 46
    mean = sum(without) / 50
    error = math.sqrt(49 / 50 * sum((one - mean) ** 2 for one in without))
    assert verdict.gain == pytest.approx(6 / 7 - 2 / 5)
    assert verdict.low == pytest.approx(
        6 / 7 - 2 / 5 - 2.0096 * error, abs=1e-4
    )  # Student's t of 49 degrees of freedom


def test_a_gain_in_f1_is_as_uncertain_with_each_input_ten_times_as_once() -> None:
    others = [Outcome("scored", 1.0, "no", "no")] * 2
    missed, found = [Outcome("scored", 0.0, "no", "yes")], [Outcome("scored", 1.0, "yes", "yes")]
    before, after = missed * 8 + others, found * 7 + missed + others
    metric = wrap("f1:yes", "label")

    once = compare(before, after, metric)
    often = compare(ten_times(before), ten_times(after), metric)

    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert often.p_value == once.p_value


def ten_times(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [dataclasses.replace(outcome, of=str(at)) for at, outcome in enumerate(outcomes) for _ in range(10)]


def test_a_graded_gain_has_students_interval_on_the_rows_and_two_made_up_ones() -> None:
    gains = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]  # mean 0.45; with 1 and -1 the squares add up to 4.04, mean 0.36
    half = 2.3646 * math.sqrt((4.04 - 10 * 0.36**2) / 9 / 10)  # Student's t of 7 degrees of freedom

    verdict = compare(outcomes([0.0] * 8), outcomes(gains), wrap("token_f1", "label"))

    assert [verdict.low, verdict.high] == pytest.approx([0.45 - half, 0.45 + half], abs=1e-4)


@pytest.mark.parametrize("rows", [10, 20, 40])
def test_a_little_more_on_all_rows_seen_is_no_gain_where_one_in_twenty_may_fall_to_nothing(rows: int) -> None:
    """Two thirds of sets of ten rows hold no such row: each row seen is ahead, and the truth isn't."""
    after = [0.84, 0.86] * (rows // 2)
    verdict = compare(outcomes([0.8] * rows), outcomes(after), wrap("token_f1", "label"))
    assert not verdict.is_confirmed
    assert verdict.low < 0

    low, _ = interval(outcomes(after), wrap("token_f1", "label"))
    assert low < 0.95 * 0.85


def test_many_rows_are_swapped_at_random_with_nearly_the_exact_p() -> None:
    gains = [0.5] * 12 + [-0.5] * 4  # as large a sum: at least 12, or at most 4, of 16 coin tosses

    verdict = compare(outcomes([0.5] * 16), outcomes([0.5 + gain for gain in gains]), ACCURACY, seed=1)

    assert verdict.p_value == pytest.approx(2 * tail(12, 16, 0.5), abs=0.015)
    assert verdict.p_value * 5_000 == pytest.approx(round(verdict.p_value * 5_000))  # 4,999 tosses and the one seen


def test_equal_seeds_give_equal_verdicts() -> None:
    first, second = outcomes([0.1, 0.9, 0.4, 0.3, 0.35] * 4), outcomes([0.3, 0.8, 0.6, 0.2, 0.4] * 4)

    assert compare(first, second, ACCURACY, seed=3) == compare(first, second, ACCURACY, seed=3)


def labelled(answers: str, gold: str) -> list[Outcome]:
    return [Outcome("scored", float(a == g), a, g) for a, g in zip(answers, gold, strict=True)]


def test_set_metrics_are_tested_by_swapping_rows() -> None:
    gold = "ab" * 12
    verdict = compare(labelled("a" * 24, gold), labelled(gold, gold), wrap("macro_f1", "label"))

    assert verdict.test == "permutation"
    assert verdict.before == pytest.approx((2 / 3 + 0) / 2)  # a: 24 / (24 + 12), b: 0
    assert verdict.after == 1.0
    assert verdict.gain == pytest.approx(2 / 3)
    assert 0.4 < verdict.low < 2 / 3 < verdict.high <= 1.0
    assert verdict.is_confirmed


def test_equal_set_scores_confirm_nothing() -> None:
    gold = "ab" * 6
    verdict = compare(labelled(gold, gold), labelled(gold, gold), wrap("f1:a", "label"))

    end = Z**2 / (6 + Z**2)  # six of the twelve rows have to do with the label a
    assert (verdict.gain, verdict.p_value, verdict.is_confirmed) == (0.0, 1.0, False)
    assert [verdict.low, verdict.high] == pytest.approx([-end, end])


def test_the_p_of_a_set_gain_is_counted_over_every_swap() -> None:
    """Three rows change, all for the better: of the eight ways to swap them only all and none are as good."""
    before, after = labelled("abba" + "ab" * 4, "baaa" + "ab" * 4), labelled("baaa" + "ab" * 4, "baaa" + "ab" * 4)

    assert compare(before, after, wrap("macro_f1", "label")).p_value == 2 / 8


@pytest.mark.parametrize("metric", ["f1:a", "macro_f1"])
def test_one_row_says_nothing_about_a_set_metric(metric: str) -> None:
    verdict = compare(labelled("b", "a"), labelled("a", "a"), wrap(metric, "label"))

    assert (verdict.gain, verdict.low, verdict.high, verdict.p_value) == (1.0, -1.0, 1.0, 1.0)
    assert interval(labelled("a", "a"), wrap(metric, "label")) == (0.0, 1.0)


def test_rows_where_either_failed_are_left_out() -> None:
    failed = Outcome("failed", None, error="timeout")
    before = [failed, *outcomes([0, 0, 1])]
    after = [*outcomes([1, 1]), failed, *outcomes([1])]

    verdict = compare(before, after, ACCURACY)

    assert (verdict.rows, verdict.before, verdict.after, verdict.gain) == (2, 0.5, 1.0, 0.5)


def repeated(scores: Sequence[float], times: int) -> list[Outcome]:
    return [Outcome("scored", float(score), of=str(at)) for at, score in enumerate(scores) for _ in range(times)]


def test_rows_of_equal_inputs_are_tested_as_one() -> None:
    """Of five inputs that change, four get better: of 32 ways to swap them, twelve are as far from none."""
    before, after = [0] * 4 + [1] * 16, [1] * 4 + [0] + [1] * 15

    verdict = compare(repeated(before, 10), repeated(after, 10), ACCURACY)

    assert verdict.p_value == 12 / 32
    assert (verdict.rows, verdict.repeated, verdict.test) == (200, 180, "permutation of inputs")
    assert verdict.smallest_gain == smallest_gain(20)
    assert verdict.gain == pytest.approx(3 / 20)
    assert not verdict.is_confirmed
    once = compare(outcomes(before), outcomes(after), ACCURACY)
    assert (once.p_value, once.repeated) == (12 / 32, 0), "as with each row once"
    assert verdict.low == pytest.approx(once.low, abs=0.05)
    assert verdict.high == pytest.approx(once.high, abs=0.05)


def test_an_input_that_comes_often_weighs_what_its_rows_weigh() -> None:
    before, after = repeated([0, 1], 1) + repeated([0], 2), repeated([1, 1], 1) + repeated([1], 2)

    verdict = compare(before, after, ACCURACY)

    assert (verdict.before, verdict.after, verdict.rows, verdict.repeated) == (0.25, 1.0, 4, 2)


def test_two_programs_rows_are_as_few_as_the_inputs_of_the_one_that_sees_less() -> None:
    before = [Outcome("scored", 0.0, of=str(at // 4)) for at in range(32)]
    after = [Outcome("scored", 1.0, of=f"more {at}") for at in range(32)]

    assert compare(before, after, ACCURACY).repeated == compare(after, before, ACCURACY).repeated == 24


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "f1:a"])
def test_the_interval_of_a_score_is_as_wide_with_each_input_ten_times_as_once(metric: str) -> None:
    measure = wrap(metric, "label")
    once = labelled("abba" * 10, "abaa" * 10)
    often = [dataclasses.replace(outcome, of=str(at)) for at, outcome in enumerate(once) for _ in range(10)]

    (low, high), (wide_low, wide_high) = interval(once, measure), interval(often, measure)

    assert wide_low == pytest.approx(low, abs=0.02)
    assert wide_high == pytest.approx(high, abs=0.02)


def test_nothing_in_common_compares_to_nothing() -> None:
    failed = [Outcome("failed", None)]
    assert compare(failed, outcomes([1]), ACCURACY) == Comparison(0.0, 0.0, 0.0, -1.0, 1.0, 1.0, 0, "none")


def wilson(share: float, rows: float) -> Any:
    middle = (share + Z**2 / (2 * rows)) / (1 + Z**2 / rows)
    half = Z / (1 + Z**2 / rows) * math.sqrt(share * (1 - share) / rows + Z**2 / (4 * rows**2))
    return pytest.approx(middle - half, abs=1e-6), pytest.approx(middle + half, abs=1e-6)


@pytest.mark.parametrize(("right", "rows"), [(8, 10), (0, 12), (30, 30)])
def test_a_programs_own_interval_is_wilsons(right: int, rows: int) -> None:
    assert interval(outcomes([1] * right + [0] * (rows - right)), ACCURACY) == wilson(right / rows, rows)


def test_graded_scores_have_wilsons_interval_at_the_rows_they_are_worth() -> None:
    scores = [0.2, 0.4, 0.6, 0.8] * 5  # mean 0.5; with a 0 and a 1, the squared distances add up to 1.5
    worth = (Z / 2.0930240544) ** 2 * 0.25 / (1.5 / 21 / 22)  # Student's t of 19 degrees of freedom

    assert interval(outcomes(scores), ACCURACY) == wilson(0.5, worth)


def test_equal_graded_scores_are_worth_their_rows() -> None:
    assert interval(outcomes([0.4] * 5), ACCURACY) == wilson(0.4, 5)
    assert interval(outcomes([0.4]), ACCURACY) == (0.0, 1.0)


def test_set_scores_have_an_interval_that_allows_for_what_was_not_seen() -> None:
    low, high = interval(labelled("a" * 12 + "b" * 12, "a" * 6 + "b" * 18), wrap("macro_f1", "label"))
    assert 0.4 < low < (2 / 3 + 0.8) / 2 < high < 1.0  # a: 12 / (12 + 6), b: 24 / (24 + 6)

    only_two = labelled("a" * 2 + "b" * 30, "a" * 2 + "b" * 30)
    assert interval(only_two, wrap("f1:a", "label")) == wilson(1.0, 2)
    assert interval(only_two, wrap("f1:c", "label")) == (0.0, 1.0)


def test_without_answers_a_score_could_be_anything() -> None:
    assert interval([Outcome("failed", None)], ACCURACY) == (0.0, 1.0)


def test_more_rows_confirm_smaller_gains() -> None:
    gains = [smallest_gain(rows) for rows in (5, 20, 21, 50, 100, 200, 500, 1000, 5000)]
    assert gains == sorted(gains, reverse=True)
    assert len(set(gains)) == len(gains)


def test_too_few_rows_confirm_no_gain() -> None:
    assert smallest_gain(5) == 1.0


@pytest.mark.parametrize("rows", [20, 50])
def test_the_smallest_gain_is_confirmed_four_times_in_five(rows: int) -> None:
    """Summed over every way the rows can change: p is below 5 % where the worse ones' tail is below 2.5 %."""
    worse, better = 0.1, 0.1 + smallest_gain(rows)
    power = 0.0
    for b in range(rows + 1):
        for w in range(rows + 1 - b):
            if b > w and 2 * tail(b, b + w, 0.5) < 0.05:
                chance = math.comb(rows, b) * math.comb(rows - b, w) * better**b * worse**w
                power += chance * (1 - better - worse) ** (rows - b - w)
    assert power == pytest.approx(0.8, abs=0.002)


def test_a_later_look_confirms_only_larger_gains() -> None:
    first = changed(better=6, worse=0, same=44)
    fifth = dataclasses.replace(first, look=5)
    assert first.smallest_gain < fifth.smallest_gain == smallest_gain(50, 0.01)
    assert smallest_gain(50, 0.01) == pytest.approx(0.358, abs=1e-3)
    graded = compare(outcomes([0.0] * 8), outcomes([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]), ACCURACY)
    again = dataclasses.replace(graded, look=2)
    assert again.smallest_gain == pytest.approx((graded.high - 0.45) * (2.2414 + 0.8416) / Z, abs=1e-4)


def test_other_metrics_take_the_smallest_gain_from_the_spread_they_saw() -> None:
    verdict = compare(outcomes([0.0] * 8), outcomes([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]), ACCURACY)
    assert verdict.smallest_gain == pytest.approx((verdict.high - 0.45) * (Z + 0.8416) / Z, abs=1e-4)
    assert changed(better=6, worse=0, same=44).smallest_gain == smallest_gain(50)


@pytest.mark.parametrize("metric", ["token_f1", "macro_f1"])
def test_chance_is_confirmed_less_than_once_in_twenty(metric: str) -> None:
    rng = random.Random(0)
    confirmed = 0
    for seed in range(200):
        gold = [rng.choice("abc") for _ in range(30)]
        first, second = (
            [Outcome("scored", rng.random(), rng.choice((label, "a")), label) for label in gold] for _ in range(2)
        )
        confirmed += compare(first, second, wrap(metric, "label"), seed=seed).is_confirmed
    assert confirmed <= 10
