from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.scoring.metrics import wrap
from preceptor.scoring.statistics import Comparison, compare, interval, smallest_gain
from preceptor.scoring.trial import Outcome

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


def bound(successes: int, trials: int) -> float:
    """Clopper-Pearson's lower bound, by halving: the share under which so many successes have 2.5 %."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(successes, trials, middle) < 0.025 else (low, middle)
    return low


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


@pytest.mark.parametrize(("better", "worse"), [(8, 0), (6, 1), (9, 3), (2, 7)])
def test_the_interval_is_clopper_pearsons_scaled_to_all_rows(better: int, worse: int) -> None:
    verdict = changed(better=better, worse=worse, same=20)
    n, rows = better + worse, better + worse + 20
    high = 1 - bound(worse, n) if worse else 1.0

    assert verdict.low == pytest.approx(n / rows * (2 * bound(better, n) - 1), abs=1e-9)
    assert verdict.high == pytest.approx(n / rows * (2 * high - 1), abs=1e-9)
    assert verdict.gain == pytest.approx((better - worse) / rows)


def test_a_gain_is_confirmed_exactly_where_p_is_below_five_percent_and_more_rows_got_better() -> None:
    for better in range(14):
        for worse in range(14):
            verdict = changed(better=better, worse=worse, same=5)
            expected = better > worse and 2 * tail(better, better + worse, 0.5) < 0.05
            assert verdict.is_confirmed == expected, f"{better} better, {worse} worse"


def test_five_changed_rows_confirm_nothing_and_six_do() -> None:
    assert not changed(better=5, worse=0, same=50).is_confirmed
    assert changed(better=6, worse=0, same=50).is_confirmed


def test_nothing_changed_is_no_gain_for_sure() -> None:
    assert changed(better=0, worse=0, same=7) == Comparison(1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 7, "exact McNemar")


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
    assert 0.25 < verdict.low < 0.45 < verdict.high < 0.65
    assert verdict.is_confirmed


def test_graded_differences_that_cancel_out_confirm_nothing() -> None:
    verdict = compare(outcomes([0.5, 0.6, 0.5, 0.6]), outcomes([0.6, 0.5, 0.6, 0.5]), ACCURACY)

    assert verdict.gain == pytest.approx(0.0)
    assert verdict.p_value == 1.0
    assert verdict.low < 0 < verdict.high
    assert not verdict.is_confirmed


@pytest.mark.parametrize(("rows", "is_confirmed"), [(5, False), (6, True)])
def test_equal_graded_differences_need_six_rows(rows: int, is_confirmed: bool) -> None:
    verdict = compare(outcomes([0.25] * rows), outcomes([0.5] * rows), ACCURACY)

    assert (verdict.low, verdict.high) == (0.25, 0.25)
    assert verdict.p_value == 2.0 ** (1 - rows)
    assert verdict.is_confirmed == is_confirmed


def test_equal_seeds_give_equal_verdicts() -> None:
    first, second = outcomes([0.1, 0.9, 0.4, 0.3, 0.35] * 4), outcomes([0.3, 0.8, 0.6, 0.2, 0.4] * 4)

    assert compare(first, second, ACCURACY, seed=3) == compare(first, second, ACCURACY, seed=3)


def labelled(answers: str, gold: str) -> list[Outcome]:
    return [Outcome("scored", float(a == g), a, g) for a, g in zip(answers, gold, strict=True)]


def test_set_metrics_are_bootstrapped_over_rows() -> None:
    gold = "ab" * 12
    verdict = compare(labelled("a" * 24, gold), labelled(gold, gold), wrap("macro_f1", "label"))

    assert verdict.test == "paired bootstrap"
    assert verdict.before == pytest.approx((2 / 3 + 0) / 2)  # a: 24 / (24 + 12), b: 0
    assert verdict.after == 1.0
    assert verdict.gain == pytest.approx(2 / 3)
    assert 0.4 < verdict.low < 2 / 3 < verdict.high <= 1.0
    assert verdict.is_confirmed


def test_equal_set_scores_confirm_nothing() -> None:
    gold = "ab" * 6
    verdict = compare(labelled(gold, gold), labelled(gold, gold), wrap("f1:a", "label"))

    assert (verdict.gain, verdict.low, verdict.high, verdict.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert not verdict.is_confirmed


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


def test_nothing_in_common_compares_to_nothing() -> None:
    failed = [Outcome("failed", None)]
    assert compare(failed, outcomes([1]), ACCURACY) == Comparison(0.0, 0.0, 0.0, -1.0, 1.0, 1.0, 0, "none")


@pytest.mark.parametrize(("right", "rows"), [(8, 10), (0, 12), (30, 30)])
def test_a_programs_own_interval_is_wilsons(right: int, rows: int) -> None:
    z, share = 1.959963984540054, right / rows
    middle = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))

    found = interval(outcomes([1] * right + [0] * (rows - right)), ACCURACY)

    assert found == pytest.approx((middle - half, middle + half), abs=1e-9)


def test_graded_scores_have_a_bootstrap_interval_around_their_mean() -> None:
    low, high = interval(outcomes([0.2, 0.4, 0.6, 0.8] * 5), ACCURACY)

    assert 0.35 < low < 0.5 < high < 0.65
    assert interval(outcomes([0.4] * 5), ACCURACY) == (0.4, 0.4)


def test_set_scores_have_a_bootstrap_interval_too() -> None:
    low, high = interval(labelled("a" * 12 + "b" * 12, "a" * 6 + "b" * 18), wrap("macro_f1", "label"))

    assert 0.4 < low < (2 / 3 + 0.8) / 2 < high < 1.0  # a: 12 / (12 + 6), b: 24 / (24 + 6)


def test_without_answers_a_score_could_be_anything() -> None:
    assert interval([Outcome("failed", None)], ACCURACY) == (0.0, 1.0)


@given(st.integers(2, 5_000))
def test_more_rows_confirm_smaller_gains(rows: int) -> None:
    assert 0 < smallest_gain(rows + 1) <= smallest_gain(rows) <= 1
    if rows >= 20:
        assert smallest_gain(rows + 1) < smallest_gain(rows)


def test_the_smallest_gain_solves_its_equation() -> None:
    gain = smallest_gain(200)
    assert gain == pytest.approx(2.8 * math.sqrt((0.2 + gain - gain**2) / 200))
