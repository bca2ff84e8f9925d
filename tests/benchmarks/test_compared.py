"""Methods against each other, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scipy import stats

from preceptor.benchmarks.compared import (
    comparisons,
    duels,
    interval,
    is_ours,
    measured,
    mixed,
    over_rows,
    ranks,
    scored,
    together,
)


def runs(*scores: tuple[str, str, float], **more: float) -> list[dict[str, Any]]:
    return [
        {"task": task, "method": method, "compiled": score, "compiled_f1": score, "gain": score - 0.5, **more}
        for task, method, score in scores
    ]


def test_scores_are_kept_by_task_method_and_seed() -> None:
    found = scored([*runs(("subj", "ape", 0.5), ("trec", "ape", 0.9)), *runs(("subj", "ape", 0.7), seed=1)])
    assert found == {("subj", "ape"): {0: 0.5, 1: 0.7}, ("trec", "ape"): {0: 0.9}}


def test_only_seeds_that_all_methods_have_are_compared() -> None:
    both = [*runs(("a", "ape", 0.5), ("a", "gepa", 0.4), ("b", "gepa", 0.4)), *runs(("a", "ape", 0.9), seed=1)]
    assert together(both, ["ape", "gepa"]) == {"a": {"ape": 0.5, "gepa": 0.4}}
    assert [duel["gain"] for duel in duels(both)] == [pytest.approx(0.1)]
    assert [line["rank"] for line in ranks(both)] == [1.0, 2.0]


def test_a_mixture_with_fewer_seeds_is_compared_on_those() -> None:
    found = [*runs(("a", "ape", 0.5), ("a", "ape+mixture", 0.5)), *runs(("a", "ape", 0.1), seed=1)]
    assert mixed(found, "compiled") == {"ape": {"a": 0.0}}


def test_a_refused_compile_is_no_measurement() -> None:
    held = runs(("a", "ape", 0.7), ("b", "ape", 0.7), ("a", "ape+mixture", 0.9), ("a", "gepa", 0.6), ("b", "gepa", 0.7))
    refused = [
        {**one, "refused": "600 calls don't pay for 450"}
        for one in runs(("b", "ape+mixture", 0.5), ("a", "protegi", 0.5), ("b", "copro", 0.5))
    ]
    assert scored([*held, *refused]) == scored(held)
    assert mixed([*held, *refused], "compiled") == {"ape": {"a": pytest.approx(0.2)}}
    assert [duels([*held, *refused]), ranks([*held, *refused])] == [duels(held), ranks(held)]
    assert ranks(held) != []
    assert comparisons([*held, *refused]) == comparisons(held)
    assert "best of 2 of ours, against gepa, best of 1 peers" in comparisons(held)[0]["comparison"]


def test_a_pair_of_methods_meets_on_the_tasks_both_ran_on() -> None:
    scores = [(f"task {at}", "ape", 0.6) for at in range(6)] + [(f"task {at}", "gepa", 0.5) for at in range(5)]
    [duel] = duels(runs(*scores))
    assert (duel["method"], duel["against"], duel["tasks"], duel["wins"], duel["losses"]) == ("ape", "gepa", 5, 5, 0)
    assert duel["gain"] == pytest.approx(0.1)
    assert duel["p_value"] == pytest.approx(2 / 2**5)  # all five signs alike, two-sided


def test_ties_have_no_p_value() -> None:
    [duel] = duels(runs(("subj", "ape", 0.5), ("subj", "gepa", 0.5)))
    assert (duel["wins"], duel["losses"], duel["p_value"]) == (0, 0, None)
    assert math.isnan(duel["low"])


def of_equal_means(one: str, other: str) -> list[dict[str, Any]]:
    """Return runs on six tasks that differ by seed, not in the mean: .8 and .2 against .7 and .3."""
    first = runs(*((task, name, score) for task in "abcdef" for name, score in ((one, 0.8), (other, 0.7))))
    return first + runs(
        *((task, name, score) for task in "abcdef" for name, score in ((one, 0.2), (other, 0.3))), seed=1
    )


def test_equal_means_over_seeds_are_ties() -> None:
    [duel] = duels(of_equal_means("ape", "gepa"))
    assert (duel["wins"], duel["losses"], duel["gain"], duel["p_value"]) == (0, 0, 0.0, None)
    assert [line["rank"] for line in ranks(of_equal_means("ape", "gepa"))] == [1.5, 1.5]
    assert [line["gain"] for line in comparisons(of_equal_means("ape", "gepa"))] == [0.0, 0.0]


def test_gaps_that_differ_by_how_they_were_subtracted_share_a_rank_in_the_signed_rank_test() -> None:
    scores = [("a", 0.9, 0.8), ("b", 0.3, 0.4), ("c", 0.6, 0.5), ("d", 0.1, 0.2), ("e", 0.9, 0.5)]
    told = [(task, name, score) for task, *both in scores for name, score in zip(("ape", "gepa"), both, strict=True)]
    [duel] = duels(runs(*told))
    expected: Any = stats.wilcoxon([1, -1, 1, -1, 4])
    assert duel["p_value"] == pytest.approx(expected.pvalue)


def test_p_values_of_several_pairs_are_told_corrected_too() -> None:
    """All six signs of each pair are alike: p = 2 / 2^6, three times."""
    told = [(str(task), name, (level + task) / 10) for task in range(6) for level, name in enumerate("xyz")]
    found = duels(runs(*told))
    assert [(duel["p_value"], duel["holm"]) for duel in found] == [(pytest.approx(1 / 32), pytest.approx(3 / 32))] * 3
    tied = duels(runs(*told, *((task, "w", level) for task, name, level in told if name == "x")))
    assert {duel["holm"] for duel in tied if duel["p_value"] is None} == {None}


def test_equal_values_are_no_certainty() -> None:
    assert all(map(math.isnan, interval([0.0, 0.0, 0.0])))
    assert all(map(math.isnan, interval([0.9 - 0.5, 0.7 - 0.3, 0.4])))  # apart by how they were subtracted
    assert interval([0.0, 0.0, 0.01])[1] > 0.01


def test_ranks_are_over_the_tasks_that_all_methods_ran_on_and_shared_by_ties() -> None:
    scores = [("a", "x", 0.5), ("a", "y", 0.7), ("a", "z", 0.7), ("b", "x", 0.9), ("b", "y", 0.8), ("b", "z", 0.1)]
    assert ranks(runs(*scores, ("c", "x", 1.0))) == [
        {"method": "y", "rank": 1.75, "tasks": 2, "runs": 2},
        {"method": "x", "rank": 2.0, "tasks": 2, "runs": 2},
        {"method": "z", "rank": 2.25, "tasks": 2, "runs": 2},
    ]
    assert ranks(runs(("a", "x", 0.5), ("b", "y", 0.5))) == []


def test_settings_tried_on_one_seed_take_no_part_in_the_ranks_and_no_seed_from_the_others() -> None:
    first = runs(("a", "x", 0.5), ("a", "y", 0.7), ("a", "x:few_shot=8", 0.9), ("b", "x", 0.5), ("b", "y", 0.7))
    second = runs(("a", "x", 0.9), ("a", "y", 0.6), seed=1)
    assert ranks([*first, *second]) == [
        {"method": "x", "rank": 1.5, "tasks": 2, "runs": 3},
        {"method": "y", "rank": 1.5, "tasks": 2, "runs": 3},
    ]


def test_a_persons_instructions_take_no_part_in_the_ranks() -> None:
    scores = [("a", "x", 0.5), ("a", "y", 0.7), ("b", "x", 0.9), ("b", "y", 0.8), ("a", "human", 0.9)]
    assert [line["tasks"] for line in ranks(runs(*scores))] == [2, 2]


def test_the_best_of_ours_and_of_the_peers_are_chosen_on_half_of_the_tasks_and_tested_on_the_others() -> None:
    table = {  # a and c choose
        "a": {"ape": 0.9, "protegi": 0.5, "gepa": 0.4, "copro": 0.3},
        "b": {"ape": 0.2, "protegi": 0.9, "gepa": 0.3, "copro": 0.9},
        "c": {"ape": 0.8, "protegi": 0.5, "gepa": 0.4, "copro": 0.3},
        "d": {"ape": 0.5, "protegi": 0.9, "gepa": 0.4, "copro": 0.9},
        "e": {"ape": 0.0},  # not all ran
    }
    other, same = comparisons(runs(*((task, name, score) for task in table for name, score in table[task].items())))
    assert other["comparison"] == "ape, best of 2 of ours, against gepa, best of 2 peers; chosen on the other 2 tasks"
    assert (other["tasks"], other["gain"]) == (2, pytest.approx((-0.1 + 0.1) / 2))
    assert (
        same["comparison"] == "protegi, best of 2 of ours, against copro, best of 2 peers; chosen on the same 4 tasks"
    )
    assert (same["tasks"], same["gain"]) == (4, pytest.approx((0.2 + 0.0 + 0.2 + 0.0) / 4))


def test_what_was_held_for_best_is_compared_though_all_kept_the_prompt() -> None:
    kept = runs(*((task, method, 0.5) for task in "ab" for method in ("ape", "gepa", "ape:few_shot=8", "ape+mixture")))
    held = [0.7, 0.6, 0.9, 0.9, 0.8, 0.5, 0.9, 0.9]
    told = [{**run, "candidate": score, "best_candidate": {}} for run, score in zip(kept, held, strict=True)]
    lucky = runs(("c", "ape", 0.9), ("c", "gepa", 0.5))  # scored, because it was confirmed
    told += [{**lucky[0], "candidate": 0.9}, {**lucky[1], "candidate": 0.5, "best_candidate": {}}]
    [line] = [line for line in comparisons(told) if "held for best" in line["comparison"]]
    assert line["comparison"] == "ape against gepa, what each held for best, confirmed or not"
    assert (line["tasks"], line["gain"]) == (2, pytest.approx((0.1 + 0.3) / 2))


def test_an_interval_over_rows_is_that_of_both_programs_and_narrower_with_more_tasks() -> None:
    """Below: (0.1 + 0.3) and 0.2, the root of 0.16 + 0.04; above: (0.2 + 0.1) and 0.1, of 0.09 + 0.01; both by 2."""
    made = runs(("a", "ape", 0.9), ("a", "gepa", 0.6), ("b", "ape", 0.7), ("b", "gepa", 0.5))
    arms = ((0.1, 0.2), (0.1, 0.3), (0.2, 0.1), (0.8, 0.8))
    told = [
        {**run, "gain": 0.2, "low": 0.2 - below, "high": 0.2 + above, "replaced": at < 3}
        for at, (run, (below, above)) in enumerate(zip(made, arms, strict=True))
    ]
    expected = pytest.approx((0.2**0.5 / 2, 0.1**0.5 / 2))
    assert over_rows(told, "ape", "gepa", {"a": [0], "b": [0]}) == expected
    [other, same] = comparisons(told)
    assert (same["gain"] - same["rows_low"], same["rows_high"] - same["gain"]) == expected
    assert (other["tasks"], other["gain"] - other["rows_low"]) == (1, pytest.approx(0.2)), "the last one is the prompt"
    [duel] = duels(told)
    assert (duel["gain"] - duel["rows_low"], duel["rows_high"] - duel["gain"]) == expected


def test_seeds_share_their_rows_and_only_those_count_that_both_methods_have() -> None:
    first, second = (runs(("a", "ape", 0.9), ("a", "gepa", 0.6), seed=seed) for seed in (0, 1))
    made = [*first, *second, *runs(("a", "ape", 0.9), seed=2)]
    wide = zip(made, (0.1, 0.2, 0.3, 0.4, 0.9), strict=True)
    told = [{**run, "gain": 0.0, "low": -half, "high": half, "replaced": True} for run, half in wide]
    [duel] = duels(told)
    assert duel["rows_high"] - duel["gain"] == pytest.approx(((0.1 + 0.2) + (0.3 + 0.4)) / 2)
    assert math.isnan(duels(first)[0]["rows_low"]), "their files tell no interval"


def test_mixtures_are_compared_with_what_they_are_of_and_experts_with_the_mean_peer_in_f1() -> None:
    scores = [
        ("a", "ape", 0.5),
        ("a", "ape+mixture", 0.6),
        ("b", "ape", 0.5),
        ("b", "ape+mixture", 0.8),
        ("a", "gepa", 0.4),
        ("a", "gepa+mixture", 0.2),
        ("a", "copro", 0.6),
        ("a", "constitutional_experts", 0.9),
    ]
    lines = {(line["comparison"], line["of"]): line for line in comparisons(runs(*scores))}
    expected = {
        ("constitutional_experts against the mean of the peers", "F1"): (1, 0.4),
        ("a mixture against none, mean of 2 methods", "score"): (2, ((0.1 - 0.2) / 2 + 0.3) / 2),
        ("ape+mixture against ape", "F1"): (2, 0.2),
        ("gepa+mixture against gepa", "score"): (1, -0.2),
    }
    for key, (count, gain) in expected.items():
        assert (lines[key]["tasks"], lines[key]["gain"]) == (count, pytest.approx(gain))


def test_a_mixture_of_a_peer_is_not_ours() -> None:
    assert all(map(is_ours, ("ape", "ape+mixture", "ape:few_shot=8", "ape:few_shot=8+mixture")))
    assert not any(
        map(is_ours, ("gepa", "gepa+mixture", "gepa:auto=light", "copro:breadth=3,depth=2+mixture", "human"))
    )
    assert measured([]) is None
