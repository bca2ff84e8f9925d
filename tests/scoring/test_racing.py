from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.scoring.metrics import mean
from preceptor.scoring.racing import Rung, affordable, best_so_far, cost, plan, race
from preceptor.scoring.trial import Candidate, Outcome, Trial


def named(text: str) -> Candidate:
    return Candidate({"p": text})


def name(candidate: Candidate) -> str:
    return candidate.instructions["p"]


class Scorer:
    """Scores by a function of name and row, and writes down what it was asked."""

    def __init__(self, score: Callable[[str, int], float]) -> None:
        self._score = score
        self.asked: list[tuple[list[str], list[int]]] = []

    def __call__(self, candidates: Sequence[Candidate], rows: Sequence[int]) -> list[Trial]:
        self.asked.append(([name(one) for one in candidates], list(rows)))
        return [self._trial(one, rows) for one in candidates]

    def _trial(self, candidate: Candidate, rows: Sequence[int]) -> Trial:
        outcomes = tuple(Outcome("scored", self._score(name(candidate), row)) for row in rows)
        return Trial(candidate, tuple(rows), outcomes, mean(outcomes))

    @property
    def calls(self) -> int:
        return sum(len(names) * len(rows) for names, rows in self.asked)


def test_a_race_is_planned_as_computed_by_hand() -> None:
    assert plan(40, 200) == [
        Rung(40, 0, 40),
        Rung(20, 40, 80),
        Rung(10, 80, 160),
        Rung(5, 160, 200),
    ]
    assert cost(40, 200) == 1600 + 800 + 800 + 200
    assert plan(5, 20) == [Rung(5, 0, 16), Rung(4, 16, 20)]
    assert plan(3, 10) == [Rung(3, 0, 10)]
    assert plan(1, 0) == []


def test_a_small_field_sees_every_row() -> None:
    assert cost(3, 100) == 300


@given(st.integers(1, 40), st.integers(1, 150))
def test_the_cost_is_the_number_of_scores_really_asked_for(candidates: int, rows: int) -> None:
    scorer = Scorer(lambda text, row: (int(text) * 7 + row * 3) % 5 / 4)
    trials = race([named(str(n)) for n in range(candidates)], scorer, range(rows), mean)

    assert scorer.calls == cost(candidates, rows)
    assert sorted(int(name(trial.candidate)) for trial in trials) == list(range(candidates))


@given(st.integers(1, 40), st.integers(1, 150))
def test_the_seed_is_never_dropped(candidates: int, rows: int) -> None:
    scorer = Scorer(lambda text, row: 0.0 if text == "0" else 1.0)
    trials = race([named(str(n)) for n in range(candidates)], scorer, range(rows), mean)

    assert all("0" in names for names, _ in scorer.asked)
    [seed] = [trial for trial in trials if name(trial.candidate) == "0"]
    assert seed.rows == tuple(range(rows))


@given(st.integers(1, 20), st.permutations(range(40)))
def test_every_candidate_sees_the_same_rows_in_the_order_given(candidates: int, order: list[int]) -> None:
    scorer = Scorer(lambda text, row: (int(text) + row) % 3 / 2)
    trials = race([named(str(n)) for n in range(candidates)], scorer, order, mean)

    assert all(list(trial.rows) == order[: len(trial.rows)] for trial in trials)
    assert [row for _, rows in scorer.asked for row in rows] == order


def test_the_best_comes_first_with_its_mean_over_all_rows() -> None:
    scorer = Scorer(lambda text, row: float(row % {"seed": 4, "good": 2, "poor": 8}[text] == 0))

    trials = race([named("seed"), named("good"), named("poor")], scorer, range(32), mean)

    assert [(name(trial.candidate), trial.score) for trial in trials] == [
        ("good", 0.5),
        ("seed", 0.25),
        ("poor", 0.125),
    ]
    assert all(len(trial.outcomes) == 32 for trial in trials)


def test_ties_go_to_the_candidate_that_came_first() -> None:
    scorer = Scorer(lambda text, row: 0.5)
    trials = race([named(text) for text in "sabcdefg"], scorer, range(40), mean)

    assert [name(trial.candidate) for trial in trials] == list("sabcdefg")
    assert [names for names, _ in scorer.asked] == [list("sabcdefg"), list("sabc"), list("sabc")]


def test_a_dropped_candidate_ranks_below_those_that_saw_more_rows() -> None:
    def score(text: str, row: int) -> float:
        return 0.1 if row >= 16 or text == "seed" else {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6, "e": 0.5}[text]

    trials = race([named(text) for text in ("seed", "a", "b", "c", "d", "e")], Scorer(score), range(64), mean)

    assert [name(trial.candidate) for trial in trials] == ["a", "b", "c", "seed", "d", "e"]
    assert [len(trial.rows) for trial in trials] == [64, 64, 64, 64, 16, 16]


def test_the_aggregate_decides_not_the_mean_of_rows() -> None:
    def last(outcomes: Sequence[Outcome]) -> float:
        return outcomes[-1].score or 0.0

    scorer = Scorer(lambda text, row: float((text == "b") == (row == 19)))
    trials = race([named("a"), named("b")], scorer, range(20), last)

    assert [(name(trial.candidate), trial.score) for trial in trials] == [("b", 1.0), ("a", 0.0)]


@given(st.integers(1, 30), st.integers(1, 100), st.integers(0, 2_000))
def test_the_affordable_field_is_the_largest_that_fits(candidates: int, rows: int, scores: int) -> None:
    count = affordable(candidates, rows, scores)

    assert count == 0 or cost(count, rows) <= scores
    assert count == candidates or cost(count + 1, rows) > scores
    assert affordable(candidates, rows, None) == candidates


def test_an_interrupted_race_knows_the_best_of_those_that_saw_the_most_rows() -> None:
    scorer = Scorer(lambda text, row: {"seed": 0.2, "a": 0.5, "b": 0.9}[text])
    first = scorer([named("seed"), named("a"), named("b")], range(4))
    second = scorer([named("seed"), named("a")], range(4, 8))

    best = best_so_far([*first, *second], mean)

    assert [(name(trial.candidate), trial.rows) for trial in best] == [
        ("a", tuple(range(8))),
        ("seed", tuple(range(8))),
    ]
    assert [trial.score for trial in best] == pytest.approx([0.5, 0.2])


def test_a_row_that_was_scored_twice_counts_once_and_as_it_was_last() -> None:
    first = Scorer(lambda text, row: 0.0)([named("seed")], range(4))
    again = Scorer(lambda text, row: 1.0)([named("seed")], range(3))
    longer = Scorer(lambda text, row: 0.5)([named("a")], range(5))

    assert [name(trial.candidate) for trial in best_so_far([*first, *again, *longer], mean)] == ["a"]
    [seed] = best_so_far([*first, *again], mean)
    assert seed.rows == (0, 1, 2, 3)
    assert seed.score == pytest.approx(0.75)


def test_a_race_interrupted_before_its_first_score_knows_nothing() -> None:
    assert best_so_far([], mean) == []


def test_those_dropped_later_come_before_those_dropped_earlier() -> None:
    scorer = Scorer(lambda name, row: int(name) / 12)

    trials = race([named(str(n)) for n in range(12)], scorer, range(96), mean)

    assert [name(trial.candidate) for trial in trials] == ["11", "10", "9", "0", "8", "7", "6", "5", "4", "3", "2", "1"]
    assert [len(trial.rows) for trial in trials] == [96] * 4 + [38] * 2 + [19] * 6


def test_of_known_candidates_a_race_may_drop_all_but_the_first() -> None:
    # 10 candidates on 20, 5 on 20 and 4 on 60 more rows: 6 are new, then all but the first may be
    assert cost(10, 100, known=4) == 6 * 20 + 4 * 20 + 3 * 60
    assert cost(10, 100, known=0) == cost(10, 100) == 10 * 20 + 5 * 20 + 4 * 60
