"""What runs say of the papers' claims, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from preceptor.benchmarks.claims import CLAIMS, Claim, Untested, checked, verdict


def runs(*scores: tuple[str, str, float], **more: float) -> list[dict[str, Any]]:
    return [
        {"task": task, "method": method, "compiled": score, "compiled_f1": score, "gain": score - 0.5, **more}
        for task, method, score in scores
    ]


def line(told: list[dict[str, Any]], beginning: str) -> dict[str, Any]:
    [found] = [one for one in told if one["claim"].startswith(beginning)]
    return found


def test_each_claim_is_measured_on_the_runs_it_is_about() -> None:
    scores = [
        ("antonyms", "ape", 0.8),
        ("antonyms", "human", 0.7),
        ("antonyms", "instruct_zero", 0.75),
        ("ethos", "protegi", 0.7),
        ("ethos", "ape", 0.65),
        ("ethos", "constitutional_experts:few_shot=0", 0.8),
        ("ethos", "constitutional_experts:few_shot=0+mixture", 0.9),
        ("subj", "protegi", 0.9),
    ]
    told = checked(runs(*scores))
    expected = {
        "as good as a person's instruction": (0.1, "undecided", "one task decides nothing"),
        "at a person's level or above": (0.1, "undecided", "so in 1 of 1; it takes 24"),
        "15.3 % above": (0.2, "undecided", "one task decides nothing"),
        "3.9 % above": (0.05, "undecided", "one task decides nothing"),
        "1 to 2 points above": (0.05, "undecided", "one task decides nothing"),
        "better than APE": (-0.05, "not reproduced", "so in 0 of 1"),
        "10.9 % F1": (0.8 - 0.675, "undecided", "one task decides nothing"),
        "a mixture improves all": (0.1, "undecided", "so in 1 of 1; it takes 6"),
        "the mixture adds": (0.1, "undecided", "one task decides nothing"),
    }
    assert len(expected) == sum(isinstance(claim, Claim) for claim in CLAIMS)
    for beginning, (value, said, why) in expected.items():
        found = line(told, beginning)
        assert (found["ours"], found["verdict"], found["why"]) == (pytest.approx(value), said, why)


def test_every_line_says_what_there_is_to_be_said_and_why_before_anything_was_run() -> None:
    told = checked([])
    assert len(told) == len(CLAIMS)
    assert {one["verdict"] for one in told} == {"undecided", "not testable here"}
    assert all(one["why"] for one in told)
    assert line(told, "10.9 % F1")["why"] == "no runs of it yet"
    assert {claim.verdict for claim in CLAIMS if isinstance(claim, Untested)} == {"undecided", "not testable here"}
    assert {one["paper"] for one in told} == {"APE", "ProTeGi", "InstructZero", "ConstitutionalExperts"}


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ([0.15, 0.16, 0.17], "reproduced"),
        ([0.0, 0.16, 0.3], "undecided"),
        ([0.04, 0.05, 0.06], "not reproduced"),
        ([-0.3, -0.2, -0.1], "not reproduced"),
        ([0.2], "undecided"),
        ([0.0, 0.0, 0.0], "undecided"),
        ([0.2, 0.2], "undecided"),
    ],
)
def test_a_figure_is_reproduced_if_the_interval_holds_it_and_not_zero(gaps: list[float], said: str) -> None:
    [claim] = [claim for claim in CLAIMS if isinstance(claim, Claim) and claim.figure == 0.153]
    assert verdict(claim, gaps)[0] == said


def test_equal_differences_have_no_interval_to_hold_a_figure() -> None:
    [claim] = [claim for claim in CLAIMS if isinstance(claim, Claim) and claim.figure == 0.02]
    assert verdict(claim, [0.0, 0.0, 0.0]) == ("undecided", "equal differences tell nothing of their spread")


@pytest.mark.parametrize(
    ("gaps", "said"),
    [([0.0] * 24, "reproduced"), ([0.1] * 23, "undecided"), ([0.1] * 23 + [-0.01], "not reproduced")],
)
def test_what_is_said_of_every_task_needs_them_all_and_is_refuted_by_one(gaps: list[float], said: str) -> None:
    [claim] = [claim for claim in CLAIMS if claim.says.startswith("at a person's level")]
    assert isinstance(claim, Claim)
    assert verdict(claim, gaps)[0] == said


@pytest.mark.parametrize(
    ("says", "said"), [("a mixture improves all methods", "not reproduced"), ("at a person's level", "undecided")]
)
def test_no_difference_is_no_improvement_but_is_as_good(says: str, said: str) -> None:
    [claim] = [claim for claim in CLAIMS if claim.says.startswith(says)]
    assert isinstance(claim, Claim)
    assert verdict(claim, [0.1, 0.1, 0.0])[0] == said


def test_seeds_that_cancel_out_are_no_difference() -> None:
    gains = {"gain": 0.1 + 0.2}, {"gain": -0.3, "seed": 1}
    told = checked(
        [
            {**one, **seed}
            for seed, scores in zip(gains, ((0.8, 0.7), (0.2, 0.3)), strict=True)
            for task in ("antonyms", "ethos")
            for one in runs(
                (task, "human", scores[0]),
                (task, "ape", scores[1]),
                (task, "ape+mixture", scores[0]),
                (task, "instruct_zero", scores[0]),
                (task, "protegi", scores[1]),
            )
        ]
    )
    for beginning in ("at a person's level", "15.3 % above", "better than APE", "a mixture improves", "the mixture"):
        assert line(told, beginning)["ours"] == 0.0
    assert line(told, "better than APE")["why"] == "so in 0 of 1"
    assert line(told, "at a person's level")["why"] == "so in 1 of 1; it takes 24"
