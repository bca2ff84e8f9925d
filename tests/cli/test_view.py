"""What a compile's result looks like, line by line."""

from __future__ import annotations

import dataclasses

import pytest

from preceptor.cli.view import print_table, print_verdict
from preceptor.evidence import Evidence
from preceptor.lm.budget import Cost
from preceptor.scoring.statistics import Comparison

REPLACED = Evidence(
    method="APE",
    metric="accuracy",
    comparison=Comparison(0.287, 0.547, 0.26, 0.158, 0.337, 1.2e-6, 150, "exact McNemar"),
    baseline_ci=(0.22, 0.364),
    compiled_ci=(0.467, 0.624),
    replaced=True,
    has_candidate=True,
    train_rows=96,
    smallest_gain=0.136,
    search_score=0.729,
    seed_search_score=0.292,
    instructions={"predict": "Sort by queue."},
    seed_instructions={"predict": "Sort."},
    spent=Cost(300, 9_000, 0.25),
    billed=Cost(100, 3_000, 0.125),
    seconds=12.3,
    seed=7,
    lm="simulated/model",
    proposer="simulated/writer",
    stopped="",
    run="/runs/1",
    program="/runs/1/program",
)
KEPT = dataclasses.replace(
    REPLACED,
    comparison=Comparison(0.54, 0.553, 0.013, -0.06, 0.086, 0.86, 150, "exact McNemar"),
    replaced=False,
    instructions={"predict": "Sort."},
)


def printed(evidence: Evidence, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_verdict(evidence.as_dict())
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_search_and_confirmed_scores_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(REPLACED, capsys)[1:] == [
        "",
        "                     train rows  untouched rows   95 % interval",
        "your instructions         0.292           0.287  0.220 to 0.364",
        "compiled program          0.729           0.547  0.467 to 0.624",
        "difference         +43.7 points    +26.0 points  +15.8 to +33.7",
        "",
        "The search chose its winner for the 0.729 on the train rows, so that score is partly luck: of +43.7 points "
        "there, +26.0 points were left on untouched rows.",
        "",
        "gain claimed  +26.0 points, on 150 rows no search step has seen",
        "calls         300, 100 billed now; 9,000 tokens; $0.2500",
        "time          12 s",
        "",
        "Instructions, before and after:",
        "--- predict",
        "+++ predict",
        "@@ -1 +1 @@",
        "-Sort.",
        "+Sort by queue.",
        "",
        "Program  /runs/1/program",
        "Run      /runs/1",
    ]


def test_dollars_say_what_they_are_without(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(dataclasses.replace(REPLACED, unpriced=("openai/m", "openai/w")), capsys)
    told = "$0.2500, but for openai/m, openai/w: no price is known, give it with --price"
    assert lines[10].endswith(told)
    assert dataclasses.replace(REPLACED, unpriced=("openai/m",)).stable()["unpriced"] == ["openai/m"]
    assert "unpriced" not in REPLACED.stable()


def test_a_candidate_that_was_not_confirmed_is_shown_beside_what_the_search_promised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = printed(KEPT, capsys)
    assert lines[2:6] == [
        "                     train rows  untouched rows   95 % interval",
        "your instructions         0.292           0.540  0.220 to 0.364",
        "best candidate            0.729           0.553",
        "difference         +43.7 points     +1.3 points    -6.0 to +8.6",
    ]
    assert lines[9] == "gain claimed  none; your instructions stay"


@pytest.mark.parametrize(
    ("seed", "winner", "sentence"),
    [
        (0.292, 0.729, "of +43.7 points there, +26.0 points were left on untouched rows."),
        (0.5, 0.6, "only the untouched rows, which no search step has seen, give an estimate."),
        (None, 0.729, "only the untouched rows, which no search step has seen, give an estimate."),
        (-0.9, -0.4, "On the train rows the search went by log-likelihoods, which are no estimate of the score."),
    ],
)
def test_a_sentence_says_what_the_winners_search_score_is_worth(
    seed: float | None, winner: float, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(dataclasses.replace(REPLACED, seed_search_score=seed, search_score=winner), capsys)
    assert lines[7].endswith(sentence)
    assert lines[5].count("points") == (2 if seed is not None and seed >= 0 else 1)  # no points of likelihood


@pytest.mark.parametrize(
    "evidence",
    [
        dataclasses.replace(REPLACED, seed_search_score=None, search_score=0.547),
        dataclasses.replace(REPLACED, seed_search_score=None, search_score=None),
        dataclasses.replace(KEPT, has_candidate=False),
    ],
    ids=["equal", "no search", "no candidate"],
)
def test_no_sentence_where_there_is_nothing_to_say(evidence: Evidence, capsys: pytest.CaptureFixture[str]) -> None:
    assert not any("partly luck" in line for line in printed(evidence, capsys))


def test_without_a_candidate_only_the_users_instructions_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(dataclasses.replace(KEPT, has_candidate=False), capsys)
    assert lines[3:5] == ["your instructions       0.292           0.540  0.220 to 0.364", ""]


def test_principles_are_listed_with_what_they_are_worth_whoever_wrote_them(capsys: pytest.CaptureFixture[str]) -> None:
    principles = (
        {"predictor": "predict", "principle": "Red is yes.", "worth": 0.125, "rows": 32, "history": "add, revise"},
        {"predictor": "predict", "principle": "\x1b[2JBe kind.", "worth": None, "rows": 0},
        {"worth": "much"},
    )
    lines = printed(dataclasses.replace(REPLACED, principles=principles), capsys)

    at = lines.index("Principles (worth is on the train rows that decided to keep them, so partly luck)")
    assert lines[at + 1].split() == ["predictor", "principle", "worth", "train", "rows", "history"]
    assert lines[at + 2].split() == ["predict", "Red", "is", "yes.", "+12.5", "points", "32", "add,", "revise"]
    assert lines[at + 3].split() == ["predict", "\\x1b[2JBe", "kind.", "not", "measured", "0"]
    assert lines[at + 4].split() == ["not", "measured"]


def test_regions_are_listed_with_what_chose_their_experts(capsys: pytest.CaptureFixture[str]) -> None:
    regions = (
        {
            **{"region": "region 1", "train_rows": 40, "choosing_rows": 16, "gain": 0.5, "low": 0.2, "high": 0.7},
            **{"p_value": 0.0078, "measuring_rows": 15, "seed": 0.4, "compiled": 1.0, "expert": "its own"},
        },
        {
            **{"region": "region 2", "train_rows": 7, "choosing_rows": 0, "measuring_rows": 0},
            "expert": "default: fewer than 10 train rows",
        },
    )
    lines = printed(dataclasses.replace(REPLACED, regions=regions), capsys)

    assert lines[0].endswith(" 1 of 2 regions have an expert of their own.")
    at = lines.index("Regions")
    assert [line.split("  ")[0] for line in lines[at + 1 : at + 4]] == ["region", "region 1", "region 2"]
    assert lines[at + 2].split() == [
        "region",
        "1",
        "40",
        "16",
        "+50.0",
        "points",
        "0.0078",
        "15",
        "0.400",
        "1.000",
        "its",
        "own",
    ]
    assert lines[at + 3].split() == ["region", "2", "7", "0", "0", "default:", "fewer", "than", "10", "train", "rows"]


def test_evidence_of_an_older_version_is_shown_as_far_as_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    old = REPLACED.stable()
    for name in ("seed_search_score", "has_candidate", "tested_gain", "ci"):
        del old[name]
    print_verdict(old)
    assert "difference                       +26.0 points" in capsys.readouterr().out


def test_labels_in_square_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("", ["[bold]", "n"], [["[red]spam[/red]", 1.0]])
    assert capsys.readouterr().out.split() == ["[bold]", "n", "[red]spam[/red]", "1.000"]
