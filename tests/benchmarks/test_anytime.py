"""Curves are read from a run folder as a compile that is stopped would choose; what is said of them, by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from preceptor.benchmarks.anytime import Point, curve, held_last, ratios, reached, scored_on_test, speeds, steps
from preceptor.run import fingerprint
from preceptor.scoring.trial import Candidate


def trial(name: str, calls: int, seen: int, so_far: float, demos: int = 0) -> dict[str, Any]:
    told = {"candidate": name, "instructions": {"predict": name}, "demos": demos}
    return told | {"calls": calls, "seen": seen, "so_far": so_far}


def folder(place: Path, trials: Sequence[Mapping[str, Any]], winner: str = "") -> Path:
    place.mkdir(exist_ok=True)
    (place / "trials.jsonl").write_text("".join(json.dumps(each) + "\n" for each in trials))
    (place / "result.json").write_text(json.dumps({"seed_instructions": {"predict": "seed"}}))
    told = {"": {"predict": winner}} if winner else {}
    (place / "confirmation.json").write_text(json.dumps({"candidates": told}))
    return place


RACE = (
    trial("seed", 30, 10, 0.5),
    trial("lucky", 30, 10, 0.9),
    trial("good", 30, 10, 0.8),
    trial("seed", 60, 20, 0.5),
    trial("lucky", 60, 20, 0.6),
    trial("good", 60, 20, 0.75),
    trial("late", 70, 5, 1.0),
)


def test_a_curve_holds_the_best_of_those_that_saw_the_most_rows_when_each_evaluation_ended(tmp_path: Path) -> None:
    assert curve(folder(tmp_path, RACE, "good")) == [
        Point(0, {"predict": "seed"}, None),
        Point(30, {"predict": "lucky"}, 0.9),
        Point(60, {"predict": "good"}, 0.75),
        Point(70, {"predict": "good"}, 0.75),  # where the search ended
    ]


def test_a_curve_ends_with_the_winner_that_was_confirmed_whoever_led(tmp_path: Path) -> None:
    assert curve(folder(tmp_path, RACE, "late"))[-1] == Point(70, {"predict": "late"}, 1.0)
    assert curve(folder(tmp_path, RACE))[-1] == Point(70, {"predict": "seed"}, 0.5)


def test_a_method_that_tells_what_it_held_is_believed(tmp_path: Path) -> None:
    place = folder(tmp_path, RACE, "late")
    held = [("seed", 0.4, 30), ("seed", 0.4, 45), ("late", 0.6, 65)]
    told = [
        {"candidate": name, "instructions": {"predict": name}, "score": score, "calls": calls}
        for name, score, calls in held
    ]
    (place / "held.jsonl").write_text("".join(json.dumps(each) + "\n" for each in told))
    assert curve(place) == [
        Point(0, {"predict": "seed"}, None),
        Point(30, {"predict": "seed"}, 0.4),
        Point(65, {"predict": "late"}, 0.6),
        Point(70, {"predict": "late"}, 0.6),
    ]


def test_there_is_a_point_where_the_search_first_could_have_returned_anything(tmp_path: Path) -> None:
    first, second, *_ = curve(folder(tmp_path, [trial("seed", 16, 16, 0.5), trial("other", 33, 16, 0.4)]))
    assert (first.calls, second.calls, second.instructions, second.search_score) == (0, 16, {"predict": "seed"}, 0.5)


DEMOS = {"predict": ({"text": "a", "label": "b"}, {"text": "c", "label": "d"})}


def shown(name: str, calls: int, so_far: float) -> dict[str, Any]:
    return trial(name, calls, 9, so_far, demos=2) | {
        "candidate": fingerprint(Candidate({"predict": name}, DEMOS).key),
        "instructions": {"predict": name},
    }


def confirmed(place: Path, winner: str) -> Path:
    told = {"candidates": {"": {"predict": winner}}, "demos": {"": {"predict": list(DEMOS["predict"])}}}
    (place / "confirmation.json").write_text(json.dumps(told))
    return place


def test_demonstrations_that_all_candidates_show_are_part_of_the_curve_but_not_of_the_seed(tmp_path: Path) -> None:
    place = confirmed(folder(tmp_path, [shown("seed", 9, 0.5), shown("good", 18, 0.9)]), "good")
    assert curve(place) == [
        Point(0, {"predict": "seed"}, None),
        Point(9, {"predict": "seed"}, 0.5, demos=2),
        Point(18, {"predict": "good"}, 0.9, demos=2),
        Point(18, {"predict": "good"}, 0.9, demos=2),
    ]
    asked: list[Candidate] = []

    def score(held: Candidate) -> float:
        asked.append(held)
        return 0.1 * len(asked)

    found = scored_on_test(place, score)

    assert asked == [
        Candidate({"predict": "seed"}),
        Candidate({"predict": "good"}, DEMOS),
        Candidate({"predict": "seed"}, DEMOS),
    ]
    assert [each["test"] for each in found] == pytest.approx([0.1, 0.3, 0.2, 0.2])


def test_mixtures_and_candidates_with_demonstrations_of_their_own_have_no_curve(tmp_path: Path) -> None:
    assert curve(folder(tmp_path / "demos", [trial("seed", 9, 9, 0.5), trial("shown", 18, 9, 0.9, demos=4)])) == []
    other = [shown("seed", 9, 0.5), trial("other", 18, 9, 0.9, demos=2)]
    assert curve(confirmed(folder(tmp_path / "own", other), "seed")) == []
    assert curve(confirmed(folder(tmp_path / "some", [trial("bare", 9, 9, 0.5), shown("good", 18, 0.9)]), "good")) == []
    place = folder(tmp_path / "mixture", RACE, "good")
    assert held_last(place) == Candidate({"predict": "good"})
    (place / "regions.json").write_text("{}")
    assert curve(place) == []
    assert held_last(place) is None


def test_what_was_held_last_is_the_winner_with_its_demonstrations_or_the_seed(tmp_path: Path) -> None:
    assert held_last(folder(tmp_path / "none", RACE)) == Candidate({"predict": "seed"})
    place = folder(tmp_path / "demos", [trial("shown", 18, 9, 0.9, demos=2)], "shown")
    assert held_last(place) is None, "as in runs made before demonstrations were written down"
    assert held_last(confirmed(place, "shown")) == Candidate({"predict": "shown"}, DEMOS)


def test_six_instructions_of_a_curve_are_scored_the_first_and_the_last_among_them(tmp_path: Path) -> None:
    better = [trial(f"n{n}", 10 * (n + 2), 10, 0.5 + n / 100) for n in range(1, 12)]
    place = folder(tmp_path, [trial("seed", 10, 10, 0.5), *better], "n11")
    asked: list[str] = []

    def score(held: Candidate) -> float:
        asked.append(held.instructions["predict"])
        return 0.25

    found = scored_on_test(place, score)

    assert sorted(asked) == sorted(["seed", "n1", "n4", "n7", "n10", "n11"])
    assert [each["instructions"]["predict"] for each in found if each["test"] is not None] == [
        "seed", "seed", "n1", "n4", "n7", "n10", "n11", "n11"
    ]  # fmt: skip
    assert len(found) == 14
    assert json.loads(json.dumps(found)) == found


def run(method: str, places: Sequence[tuple[int, float | None]], task: str = "subj", seed: int = 0) -> dict[str, Any]:
    points: list[dict[str, Any]] = [
        {"calls": calls, "instructions": {}, "search_score": None, "test": score} for calls, score in places
    ]
    return {"task": task, "method": method, "seed": seed, "budget": 600, "curve": points}


def test_what_is_reached_is_counted_from_the_first_evaluation_on() -> None:
    one = run("ape", [(0, 0.5), (20, 0.5), (100, None), (200, 0.68), (300, 0.7), (400, 0.7)])
    assert steps(one) == [(0, 0.5), (20, 0.5), (200, 0.68), (300, 0.7), (400, 0.7)]
    assert (reached(one, of_gain=False), reached(one, of_gain=True)) == (200, 300)
    level = run("ape", [(0, 0.5), (20, 0.5), (400, 0.5)])
    assert (reached(level, of_gain=False), reached(level, of_gain=True)) == (20, None)
    assert reached({"task": "subj", "method": "ape"}, of_gain=True) is None


def test_calls_are_averaged_over_tasks_and_runs_without_a_gain_are_counted() -> None:
    runs = [
        run("ape", [(0, 0.5), (100, 0.7)]),
        run("ape", [(0, 0.5), (200, 0.7)], seed=1),
        run("ape", [(0, 0.5), (350, 0.9)], "trec"),
        run("ape", [(0, 0.5), (40, 0.5)], "ethos"),
        {"task": "subj", "method": "gepa", "seed": 0},  # made before curves were recorded
    ]
    [line] = speeds(runs)
    assert (line["method"], line["runs"], line["gained"]) == ("ape", 4, 3)
    assert line["final"] == pytest.approx(0.7)
    assert line["calls_to_gain"] == pytest.approx((150 + 350) / 2)
    assert line["calls_to_score"] == pytest.approx((150 + 350 + 40) / 3)
    assert line["calls_to_gain_high"] - 250 == pytest.approx(12.7062 * 141.42136 / 2**0.5, rel=1e-4)


def test_a_ratio_is_the_geometric_mean_over_tasks_of_ours_against_the_peers() -> None:
    runs = [
        run("ape", [(0, 0.5), (50, 0.9)], "a"),
        run("ape", [(0, 0.5), (200, 0.9)], "a", seed=1),  # 100 on average
        run("gepa", [(0, 0.5), (400, 0.9)], "a"),
        run("gepa", [(0, 0.5), (400, 0.9)], "a", seed=1),
        run("ape", [(0, 0.5), (100, 0.9)], "b"),
        run("gepa", [(0, 0.5), (100, 0.9)], "b"),
        run("ape", [(0, 0.5), (100, 0.9)], "c"),  # no peer there
        run("copro", [(0, 0.5), (200, 0.9)], "b"),
    ]
    lines = {(line["ours"], line["peers"]): line for line in ratios(runs)}
    assert list(lines) == [("ape", "copro"), ("ape", "gepa"), ("all 1", "all 2")] or len(lines) == 3
    gepa = lines["ape", "gepa"]
    assert (gepa["gain_tasks"], gepa["ratio_to_gain"]) == (2, pytest.approx((1 / 4 * 1) ** 0.5))
    assert gepa["gain_low"] < gepa["ratio_to_gain"] < gepa["gain_high"]
    copro = lines["ape", "copro"]
    assert (copro["ratio_to_score"], math.isnan(copro["score_low"])) == (pytest.approx(0.5), True)
    assert ratios([run("ape", [(0, 0.5), (50, 0.9)])]) == []


def test_a_ratio_pairs_runs_by_seed() -> None:
    runs = [
        run("ape", [(0, 0.5), (100, 0.9)]),
        run("gepa", [(0, 0.5), (200, 0.9)]),
        run("ape", [(0, 0.5), (500, 0.9)], seed=1),  # the peer gained nothing
        run("gepa", [(0, 0.5), (250, 0.5)], seed=1),
        run("ape", [(0, 0.5), (600, 0.9)], seed=2),  # no peer there
    ]
    [line] = ratios(runs)
    assert line["ratio_to_gain"] == pytest.approx(100 / 200)
    assert line["ratio_to_score"] == pytest.approx((100 / 200 * 500 / 250) ** 0.5)
