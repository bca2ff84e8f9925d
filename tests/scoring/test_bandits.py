from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.scoring import bandits
from preceptor.scoring.bandits import (
    RULES,
    Pull,
    Selection,
    successive_halving,
    successive_rejects,
    ucb,
    ucb_e,
    uniform,
)


class Walks:
    """Arms whose rewards on the rows of the shared order are known."""

    def __init__(self, *rewards: Sequence[float]) -> None:
        self.rewards = rewards
        self.pulled: list[dict[int, int]] = []
        self.seen = [0] * len(rewards)

    def pull(self, counts: Mapping[int, int]) -> Mapping[int, float]:
        self.pulled.append(dict(counts))
        for arm, count in counts.items():
            self.seen[arm] += count
        return {arm: sum(self.rewards[arm][: self.seen[arm]]) / self.seen[arm] for arm in counts}


def test_uniform_shows_every_arm_the_same_rows_and_what_is_left_over_to_the_first() -> None:
    walks = Walks([0, 1, 0], [1, 0, 1], [0, 0, 1])
    found = uniform(3, walks.pull, 3, 7)

    assert walks.pulled == [{0: 3, 1: 2, 2: 2}]
    assert found == Selection((1, 0, 2), (1 / 3, 0.5, 0.0), (3, 2, 2))


def test_ucb_pulls_as_computed_by_hand() -> None:
    # bounds at c = 1: pulls 1 and 2 go to the unseen. t = 3: 1 + sqrt(ln 3 / 1) > 0 + sqrt(ln 3 / 1): arm 0, mean 1/2.
    # t = 4: 1/2 + sqrt(ln 4 / 2) = 1.33 > sqrt(ln 4) = 1.18: arm 0, mean 1/3.
    # t = 5: 1/3 + sqrt(ln 5 / 3) = 1.07 < sqrt(ln 5) = 1.27: arm 1, mean 1/2.
    # t = 6: 1/3 + sqrt(ln 6 / 3) = 1.11 < 1/2 + sqrt(ln 6 / 2) = 1.45: arm 1, mean 2/3.
    walks = Walks([1, 0, 0, 0], [0, 1, 1, 1])
    found = ucb(2, walks.pull, 4, 6, c=1.0)

    assert walks.pulled == [{0: 1}, {1: 1}, {0: 1}, {0: 1}, {1: 1}, {1: 1}]
    assert found == Selection((1, 0), (1 / 3, 2 / 3), (3, 3))


def test_the_bonus_of_ucb_grows_with_time_and_has_its_weight() -> None:
    # c = 2, bounds of arm 0 and arm 1 at t = 3 to 10:
    # 3.10 > 2.10, 2.17 < 2.35, 2.29 > 1.79, 2.21 > 1.89, 2.15 > 1.97, 1.89 < 2.04, 1.93 > 1.71,
    # and 1/2 + 2 * sqrt(ln 10 / 6) = 1.74 < 0 + 2 * sqrt(ln 10 / 3) = 1.75
    walks = Walks([1, 0, 1, 1, 0, 0, 0, 0], [0] * 8)
    found = ucb(2, walks.pull, 8, 10)

    assert [arm for counts in walks.pulled for arm in counts] == [0, 1, 0, 1, 0, 0, 0, 1, 0, 1]
    assert found.pulls == (6, 4)


def test_ucb_e_pulls_as_computed_by_hand() -> None:
    # c = 1: after one pull each, 1 + 1 > 0 + 1: arm 0, mean 1/2. 1/2 + sqrt(1/2) = 1.21 > 1: arm 0, mean 1/3.
    # 1/3 + sqrt(1/3) = 0.91 < 1: arm 1, mean 1/2. 0.91 < 1/2 + sqrt(1/2): arm 1, mean 2/3.
    # 0.91 < 2/3 + sqrt(1/3): arm 1, mean 3/4; arm 1 has seen every row.
    walks = Walks([1, 0, 0, 0], [0, 1, 1, 1])
    found = ucb_e(2, walks.pull, 4, 8, c=1.0)

    assert walks.pulled == [{0: 1}, {1: 1}, {0: 1}, {0: 1}, {1: 1}, {1: 1}, {1: 1}, {0: 1}]
    assert found == Selection((1, 0), (0.25, 0.75), (4, 4))


def test_the_bonus_of_ucb_e_is_c_times_the_root_of_c_over_n() -> None:
    # c = 2: 1 + 2 * sqrt(2 / 1) = 3.83 > 2.83: arm 0, mean 1. 1 + 2 * sqrt(2 / 2) = 3 > 2.83: arm 0, mean 1.
    # 1 + 2 * sqrt(2 / 3) = 2.63 < 2.83: arm 1.
    walks = Walks([1] * 9, [0] * 9)
    ucb_e(2, walks.pull, 9, 5)

    assert walks.pulled == [{0: 1}, {1: 1}, {0: 1}, {0: 1}, {1: 1}]


def test_a_batch_goes_to_the_highest_bounds_after_each_of_its_pulls() -> None:
    # c = 1, four pulls at once: one for each unseen arm, then bounds of 0 + sqrt(1/1), sqrt(1/1), sqrt(1/1): the first.
    # Means 1/2, 1, 0: bounds 1/2 + sqrt(1/2) = 1.21, 1 + 1, 0 + 1, then 1.71 and 1.58 for arm 1, and 1.21 again.
    walks = Walks([0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0])
    ucb_e(3, walks.pull, 5, 8, c=1.0, batch=4)

    assert walks.pulled == [{0: 2, 1: 1, 2: 1}, {1: 4}]


def test_a_batch_of_ucb_takes_the_time_of_its_last_pull() -> None:
    # After a batch of 2, t = 4: mean 1 with bonus sqrt(ln 4 / 1) = 1.18, sqrt(ln 4 / 2) = 0.83: 2.18, 1.83 > 0 + 1.18.
    walks = Walks([1] * 5, [0] * 5)
    ucb(2, walks.pull, 5, 4, c=1.0, batch=2)

    assert walks.pulled == [{0: 1, 1: 1}, {0: 2}]


def test_successive_rejects_pulls_and_drops_as_computed_by_hand() -> None:
    # K = 4, budget 24: log_bar = 1/2 + 1/2 + 1/3 + 1/4 = 19/12; 20 / log_bar = 12.63, over 4, 3 and 2: n = 4, 5, 7.
    walks = Walks([0] * 9, [1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0])
    found = successive_rejects(4, walks.pull, 9, 24)

    assert walks.pulled == [{0: 4, 1: 4, 2: 4, 3: 4}, {1: 1, 2: 1, 3: 1}, {1: 2, 2: 2}]
    assert found == Selection((2, 1, 3, 0), (0.0, 4 / 7, 5 / 7, 0.2), (4, 7, 7, 5))


def test_successive_rejects_judges_by_all_rows_an_arm_has_seen() -> None:
    # Two phases, n = 3 and 4 (K = 3, budget 12, log_bar = 4/3): on row 4 alone arm 0 would lose, over all four it wins.
    walks = Walks([1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0])
    assert successive_rejects(3, walks.pull, 9, 12).ranking == (0, 1, 2)
    assert walks.pulled == [{0: 3, 1: 3, 2: 3}, {0: 1, 1: 1}]


def test_successive_halving_pulls_and_halves_as_computed_by_hand() -> None:
    # K = 5, budget 30, 3 rounds of 10: floor(10 / 5) = 2, floor(10 / 3) = 3, floor(10 / 2) = 5 rows; 5, 3, 2, 1 arms.
    walks = Walks([0] * 10, [1] + [0] * 9, [1, 1, 0, 1, 1] + [1] * 5, [1, 0, 1, 1, 1] + [0] * 5, [0] * 10)
    found = successive_halving(5, walks.pull, 10, 30)

    assert walks.pulled == [{0: 2, 1: 2, 2: 2, 3: 2, 4: 2}, {1: 3, 2: 3, 3: 3}, {2: 5, 3: 5}]
    assert found == Selection((2, 3, 1, 0, 4), (0.0, 0.2, 0.9, 0.4, 0.0), (2, 5, 10, 10, 2))


def test_successive_halving_judges_by_all_rows_an_arm_has_seen() -> None:
    # K = 3, budget 12, 2 rounds of 6: two rows of three arms, then three rows of two; of the last three arm 1 has more.
    walks = Walks([1, 1, 1, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0])
    assert successive_halving(3, walks.pull, 9, 12).ranking == (0, 1, 2)
    walks = Walks([1, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0])
    assert successive_halving(3, walks.pull, 9, 12) == Selection((0, 1, 2), (0.6, 0.6, 0.0), (5, 5, 2))


def test_a_budget_too_small_to_halve_or_reject_by_is_shared_evenly() -> None:
    walks = Walks(*[[1] * 9] * 5)
    assert successive_halving(5, walks.pull, 9, 14).pulls == (3, 3, 3, 3, 2)  # below a row each in 3 rounds
    assert len(walks.pulled) == 1
    assert successive_rejects(5, Walks(*[[1] * 9] * 5).pull, 9, 5).pulls == (1, 1, 1, 1, 1)


@pytest.mark.parametrize("name", RULES)
def test_ties_go_to_the_arm_that_came_first(name: str) -> None:
    found = bandits.rule(name)(3, Walks([1] * 9, [1] * 9, [1] * 9).pull, 9, 9)
    assert found.ranking == (0, 1, 2)


@pytest.mark.parametrize("name", RULES)
def test_a_single_arm_is_the_best(name: str) -> None:
    found = bandits.rule(name)(1, Walks([1, 0, 1, 0]).pull, 4, 4)
    assert found == Selection((0,), (0.5,), (4,))


@pytest.mark.parametrize("name", RULES)
def test_an_arm_that_was_never_pulled_comes_last(name: str) -> None:
    found = bandits.rule(name)(3, Walks([0, 0], [0, 0], [1, 1]).pull, 2, 2)
    assert found == Selection((0, 1, 2), (0.0, 0.0, 0.0), (1, 1, 0))


def test_the_rules_by_name_have_the_weight_they_are_given() -> None:
    for name, published in (("ucb", ucb), ("ucb-e", ucb_e)):
        light, itself, heavy = (Walks([1] * 99, [1, 1, 0, 1] * 25) for _ in range(3))
        found = bandits.rule(name, c=0.5)(2, light.pull, 99, 100)
        assert found == published(2, itself.pull, 99, 100, c=0.5, batch=bandits.BATCH)
        assert light.pulled == itself.pulled
        assert sum(light.pulled[0].values()) == 32
        assert bandits.rule(name)(2, heavy.pull, 99, 100).pulls[1] > found.pulls[1]


rewards = st.integers(1, 6).flatmap(
    lambda rows: st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=rows, max_size=rows), min_size=1, max_size=7
    )
)


@given(rewards, st.integers(1, 60), st.sampled_from([*RULES, "ucb one by one"]))
def test_no_rule_passes_its_budget_or_the_rows_and_all_tell_what_they_saw(
    table: list[list[float]], budget: int, name: str
) -> None:
    walks, arms, rows = Walks(*table), len(table), len(table[0])
    select = partial(ucb, c=1.0) if name == "ucb one by one" else bandits.rule(name)
    found = select(arms, walks.pull, rows, budget)

    assert sum(found.pulls) <= min(budget, arms * rows)
    assert max(found.pulls) <= rows
    assert list(found.pulls) == walks.seen
    assert sorted(found.ranking) == list(range(arms))
    for arm, seen in enumerate(found.pulls):
        assert found.means[arm] == pytest.approx(sum(table[arm][:seen]) / seen if seen else 0.0)
    if name in ("ucb", "ucb-e", "ucb one by one"):
        assert sum(found.pulls) == min(budget, arms * rows)


@given(rewards)
def test_with_rows_for_all_every_rule_that_keeps_all_arms_finds_the_highest_mean(table: list[list[float]]) -> None:
    rows = len(table[0])
    for name in ("uniform", "ucb", "ucb-e"):
        pull: Pull = Walks(*table).pull
        found = bandits.rule(name)(len(table), pull, rows, rows * len(table))
        assert math.isclose(found.means[found.ranking[0]], max(map(sum, table)) / rows)
