from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preceptor.report.errors import Fate
from preceptor.report.folder import Answer, Findings, Plan, Row
from preceptor.report.places import HUES, mapped

SCORES: dict[Fate, tuple[float | None, float | None]] = {
    "right": (1.0, 1.0),
    "mended": (0.0, 1.0),
    "broken": (1.0, 0.0),
    "wrong": (0.0, 0.0),
    "failed": (None, 0.0),
}


def row(fate: Fate) -> Row:
    before, after = SCORES[fate]
    return Row({"text": "hi"}, "yes", Answer("no", before), Answer("yes", after), "", measures=True)


PLAN = Plan(
    regions=["region 1", "region 2"],
    centroids=[(-1.0, 0.0), (1.0, 0.0)],
    train=[(-1.0, 0.5), (-1.0, -0.5), (1.0, 0.5)],
    members=["region 1", "region 1", "region 2"],
    confirm=[(-1.0, 0.0), (1.0, 0.0), (0.0, 0.0), (1.0, 0.5)],
    routes=["region 1", "region 2", "", "region 2"],
    explained=0.41,
    embedder="topics",
)
RESULT: dict[str, Any] = {
    "regions": [{"region": "region 1", "expert": "its own"}, {"region": "region 2", "expert": "default: too few rows"}]
}


def findings(plan: Plan | None, fates: list[Fate]) -> Findings:
    return Findings(Path("run"), {}, RESULT, [], {}, [row(fate) for fate in fates], plan)


def test_colour_is_the_region_and_the_mark_what_became_of_the_row() -> None:
    drawn = mapped(findings(PLAN, ["mended", "wrong", "right", "broken"]))
    assert drawn is not None
    # 2 wide and 1 high in 672 by 412: 336 units each, the middle at (360, 230)
    assert [(marks.hue, marks.kind, marks.path) for marks in drawn.marks] == [
        ("r0", "train", "M24 62h0M24 398h0"),
        ("r1", "train", "M696 62h0"),
        ("outside", "right", "M360 230h0"),
        ("r1", "wrong", "M696 230m-4.5 -4.5h9v9h-9z"),
        ("r0", "mended", "M24 230m0 -6l6 10.5h-12z"),
        ("r1", "broken", "M696 62m-4.5 -4.5l9 9m0 -9l-9 9"),
    ]
    assert [(one.x, one.y, one.number, one.hue, one.is_own) for one in drawn.centroids] == [
        (24.0, 230.0, 1, "r0", True),
        (696.0, 230.0, 2, "r1", False),
    ]
    assert drawn.has_outside
    assert [kind for kind, _, _ in drawn.fates] == ["right", "mended", "broken", "wrong"]


def test_the_map_is_told_in_words() -> None:
    drawn = mapped(findings(PLAN, ["mended", "wrong", "right", "broken"]))
    assert drawn is not None
    assert drawn.told == (
        "region 1: 2 train rows; mended: wrong before, right after 1. region 2: 1 train rows; broken: right before, "
        "wrong after 1, wrong before and after 1. beyond every region: 0 train rows; right before and after 1."
    )


def test_before_the_confirmation_only_train_rows_are_drawn() -> None:
    drawn = mapped(findings(PLAN, []))
    assert drawn is not None
    assert {marks.kind for marks in drawn.marks} == {"train"}
    assert drawn.fates == []


def test_without_regions_there_is_no_map() -> None:
    assert mapped(findings(None, [])) is None


def test_rows_in_one_place_are_drawn_in_the_middle() -> None:
    one = replace(PLAN, regions=["region 1"], centroids=[(0.5, 0.5)], train=[(0.5, 0.5)], members=["region 1"])
    drawn = mapped(findings(replace(one, confirm=[], routes=[]), []))
    assert drawn is not None
    assert drawn.marks[0].path == "M360 230h0"


def test_more_regions_than_colours_have_the_first_colour_again() -> None:
    names = [f"region {number}" for number in range(1, HUES + 2)]
    places = [(float(at), 0.0) for at in range(len(names))]
    drawn = mapped(findings(replace(PLAN, regions=names, centroids=places, train=places, members=names), []))
    assert drawn is not None
    assert [one.hue for one in drawn.centroids] == ["r0", "r1", "r2", "r3", "r4", "r5", "r6", "r7", "r0"]


@pytest.mark.parametrize(("rows", "drawn"), [(1500, 1500), (1501, 751), (2999, 1500), (3001, 1001), (6000, 1500)])
def test_of_very_many_rows_some_are_drawn_and_their_share_is_told(rows: int, drawn: int) -> None:
    many = replace(PLAN, train=[(0.0, float(n)) for n in range(rows)], members=["region 1"] * rows)
    found = mapped(findings(many, []))
    assert found is not None
    assert found.marks[0].path.count("M") == drawn
    assert found.drawn == drawn / rows
