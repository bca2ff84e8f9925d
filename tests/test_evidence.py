from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from preceptor.evidence import Evidence
from preceptor.lm.budget import Cost
from preceptor.scoring.statistics import Comparison

BETTER = Comparison(0.5, 0.75, 0.25, 0.1, 0.4, 0.004, 40, "exact McNemar")
EVIDENCE = Evidence(
    method="APE",
    metric="accuracy",
    comparison=BETTER,
    baseline_ci=(0.35, 0.65),
    compiled_ci=(0.6, 0.86),
    replaced=True,
    has_candidate=True,
    train_rows=60,
    smallest_gain=0.244,
    search_score=0.9,
    instructions={"predict": "Better."},
    seed_instructions={"predict": "Sort."},
    spent=Cost(300, 9_000, 0.25),
    billed=Cost(100, 3_000, 0.125),
    seconds=12.345,
    seed=7,
    lm="simulated/model",
    proposer="simulated/writer",
    stopped="",
    run="/runs/1",
    program="/runs/1/program",
)


def test_a_replaced_prompt_reports_the_score_and_gain_of_the_new_one() -> None:
    assert (EVIDENCE.baseline, EVIDENCE.compiled, EVIDENCE.gain) == (0.5, 0.75, 0.25)
    assert EVIDENCE.verdict == (
        "Replaced: accuracy 0.500 -> 0.750 on 40 rows no search step has seen "
        "(+25.0 points, 95 % interval +10.0 to +40.0, p = 0.004, exact McNemar)."
    )


def test_a_kept_prompt_claims_no_gain_whatever_the_candidate_scored() -> None:
    worse = Comparison(0.5, 0.55, 0.05, -0.08, 0.17, 0.62, 40, "exact McNemar")
    kept = dataclasses.replace(EVIDENCE, comparison=worse, replaced=False)

    assert (kept.baseline, kept.compiled, kept.gain) == (0.5, 0.5, 0.0)
    assert kept.verdict == (
        "Kept: no significant improvement on 40 untouched rows. The best candidate differs by +5.0 points, "
        "95 % interval -8.0 to +17.0, p = 0.62; so many rows can confirm 24 or more."
    )
    assert kept.stable()["tested_gain"] == 0.05


def test_what_is_told_can_be_read_again() -> None:
    further: dict[str, Any] = {
        "comparison": dataclasses.replace(BETTER, look=2, repeated=3),
        "regions": ({"region": "region 1", "rows": 7},),
        "principles": ({"principle": "Be kind.", "worth": 0.1},),
        "unpriced": ("openai/m",),
        "lost": Cost(1, 2, 0.5),
        "unparsable": 2,
        "own_metric": True,
        "demos": 3,
        "copied": "text",
        "seed_search_score": 0.4,
        "later": "Kept: nothing.",
        "seconds": 12.3,
    }
    for evidence in (dataclasses.replace(EVIDENCE, seconds=12.3), dataclasses.replace(EVIDENCE, **further)):
        assert Evidence.told(json.loads(json.dumps(evidence.as_dict()))) == evidence


@pytest.mark.parametrize(
    ("replaced", "told"),
    [
        (True, "0.500 -> 0.750 on 40 rows of 25 different inputs no search step has seen"),
        (False, "no significant improvement on 40 untouched rows of 25 different inputs. "),
    ],
)
def test_repeated_rows_are_told(replaced: bool, told: str) -> None:
    several = dataclasses.replace(EVIDENCE, comparison=dataclasses.replace(BETTER, repeated=15), replaced=replaced)

    assert told in several.verdict
    assert (several.stable()["rows"], several.stable()["repeated_rows"]) == (40, 15)
    assert "repeated_rows" not in EVIDENCE.stable()


def test_a_search_that_found_nothing_says_so() -> None:
    none = dataclasses.replace(EVIDENCE, replaced=False, has_candidate=False)
    assert none.verdict == "Kept: the search found nothing better than your instructions (accuracy 0.500)."
    early = dataclasses.replace(none, stopped="The budget ended.").verdict
    assert early.startswith("Kept: the search, which was stopped early, found nothing better than your instructions")


def test_experts_that_were_tried_and_not_confirmed_are_told() -> None:
    regions = ({"region": "1", "expert": "default", "p_value": 0.3}, {"region": "2", "expert": "default"})
    kept = dataclasses.replace(EVIDENCE, has_candidate=False, replaced=False, regions=regions)
    assert kept.verdict == (
        "Kept: the search found nothing better than your instructions, and no expert of the 1 found was confirmed in "
        "its region (accuracy 0.500). 0 of 2 regions have an expert of their own."
    )


def test_without_a_candidate_the_gain_is_none_for_sure() -> None:
    none = dataclasses.replace(EVIDENCE, comparison=Comparison(0.5, 0.5, 0.0, -0.09, 0.09, 1.0, 40, "exact McNemar"))
    assert none.stable()["ci"] == [-0.09, 0.09]
    assert dataclasses.replace(none, has_candidate=False).stable()["ci"] == [0.0, 0.0]


def test_the_printed_object_has_the_promised_fields() -> None:
    printed: dict[str, Any] = json.loads(json.dumps(EVIDENCE.as_dict()))

    promised = {
        "method": "APE",
        "baseline": 0.5,
        "compiled": 0.75,
        "gain": 0.25,
        "ci": [0.1, 0.4],
        "p_value": 0.004,
        "replaced": True,
        "rows": 40,
        "calls": 300,
        "billed_calls": 100,
        "tokens": 9_000,
        "seconds": 12.3,
        "instructions": {"predict": "Better."},
        "program": "/runs/1/program",
    }
    assert {name: printed[name] for name in promised} == promised


def test_what_goes_into_the_artifact_holds_nothing_of_this_process() -> None:
    later = dataclasses.replace(
        EVIDENCE, billed=Cost(), seconds=1.0, run="/elsewhere", program="/elsewhere/program", stopped="the clock"
    )
    assert later.stable() == EVIDENCE.stable()
    assert later.as_dict() != EVIDENCE.as_dict()


def test_evidence_cant_be_edited() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'replaced'"):
        EVIDENCE.replaced = False  # type: ignore[misc]  # that is the point
