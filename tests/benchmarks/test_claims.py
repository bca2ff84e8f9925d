"""Methods against each other and against the papers' claims, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from preceptor.benchmarks.claims import CLAIMS, Measured, checked, duels, means, measured, ranks, verdict


def runs(*scores: tuple[str, str, float], **more: float) -> list[dict[str, Any]]:
    return [
        {"task": task, "method": method, "compiled": score, "compiled_f1": score, "gain": score - 0.5, **more}
        for task, method, score in scores
    ]


def test_seeds_of_a_task_are_averaged_first() -> None:
    found = means(runs(("subj", "ape", 0.5), ("subj", "ape", 0.7), ("trec", "ape", 0.9)))
    assert found == {("subj", "ape"): pytest.approx(0.6), ("trec", "ape"): 0.9}


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


def test_ranks_are_over_the_tasks_that_all_methods_ran_on_and_shared_by_ties() -> None:
    scores = [("a", "x", 0.5), ("a", "y", 0.7), ("a", "z", 0.7), ("b", "x", 0.9), ("b", "y", 0.8), ("b", "z", 0.1)]
    assert ranks(runs(*scores, ("c", "x", 1.0))) == [
        {"method": "y", "rank": 1.75, "tasks": 2},
        {"method": "x", "rank": 2.0, "tasks": 2},
        {"method": "z", "rank": 2.25, "tasks": 2},
    ]
    assert ranks(runs(("a", "x", 0.5), ("b", "y", 0.5))) == []


def test_each_claim_is_measured_on_the_runs_it_is_about() -> None:
    scores = [
        ("antonyms", "ape", 0.8),
        ("antonyms", "human", 0.7),
        ("antonyms", "instruct_zero", 0.75),
        ("ethos", "protegi", 0.7),
        ("ethos", "ape", 0.65),
        ("ethos", "constitutional_experts", 0.8),
        ("ethos", "constitutional_experts+mixture", 0.9),
        ("subj", "protegi", 0.9),
    ]
    found = [line["ours"] for line in checked(runs(*scores))]
    # above a person; over the first prompt, of its own tasks; over APE; IZ over APE; F1 over the mean; the mixture
    assert found == pytest.approx([0.1, 0.2, 0.05, -0.05, 0.8 - 0.675, 0.1])
    assert {line["verdict"] for line in checked(runs(*scores))} == {"one task decides nothing"}


def test_nothing_is_said_of_what_was_not_measured() -> None:
    lines = checked([])
    assert len(lines) == len(CLAIMS)
    assert {(line["ours"], line["verdict"]) for line in lines} == {(None, "not measured")}
    assert measured([]) is None


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.2, "reproduced"),
        (-0.01, 0.2, "undecided"),
        (0.01, 0.05, "not reproduced"),
        (-0.3, 0.1, "not reproduced"),
    ],
)
def test_a_claim_is_reproduced_if_the_interval_holds_its_figure_and_not_zero(
    low: float, high: float, said: str
) -> None:
    claim = next(claim for claim in CLAIMS if claim.figure == 0.153)
    assert verdict(claim, Measured((low + high) / 2, low, high, 4)) == said
