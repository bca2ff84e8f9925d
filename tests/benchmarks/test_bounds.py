"""What could be reached at all: an oracle over the candidates of a group's compiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dspy
import pytest

from preceptor.benchmarks import bounds
from preceptor.benchmarks.bounds import bound, proposed
from preceptor.benchmarks.papers import _device
from preceptor.benchmarks.table import upper_bounds
from preceptor.benchmarks.tasks import Parts, Published
from preceptor.cli.tools import as_command
from preceptor.errors import DataError
from preceptor.scoring.metrics import wrap
from preceptor.scoring.trial import Outcome
from preceptor.testing import asked, graded


def outcomes(scores: str) -> list[Outcome]:
    return [Outcome("scored", float(score)) for score in scores]


def test_the_best_on_one_half_is_scored_on_the_other_both_ways() -> None:
    metric = wrap("accuracy", "side")
    scored = [outcomes("10101010"), outcomes("01010111"), outcomes("11001100")]
    found = bound(["even", "odd", "both"], outcomes("00000000"), scored, metric)
    # the first is best on rows 0, 2, 4, 6 and right on none of the others; the second is right on 1 of those 4
    assert found["oracle"] == pytest.approx((0.0 + 0.25) / 2)
    assert (found["oracle_biased"], found["instructions"]) == (5 / 8, "odd")
    assert (found["candidates"], found["test_rows"]) == (3, 8)


def test_rows_that_only_a_candidate_fails_with_count_against_it() -> None:
    failing = [*outcomes("11"), *[Outcome("failed", None)] * 4]
    found = bound(["failing", "fair"], outcomes("101010"), [failing, outcomes("101110")], wrap("accuracy", "side"))
    assert (found["instructions"], found["oracle_biased"]) == ("fair", 4 / 6)


def result(method: str, seed: int, best: str, *curve: str) -> dict[str, Any]:
    points = [{"calls": at, "instructions": {"predict": text}} for at, text in enumerate(curve)]
    return {
        "task": "toss", "method": method, "seed": seed, "best_candidate": {"predict": best},
        "instructions": {"predict": "Call it."}, "curve": points,
        "lm": "simulated/toss", "seed_score": 0.4, "compiled": 0.5,
    }  # fmt: skip


def test_candidates_come_from_results_and_run_folders_by_turns_the_best_first(tmp_path: Path) -> None:
    runs = [result("ape", 0, "a1", "Call it.", "a2", "a1"), result("gepa", 0, "g1", "Call it.")]
    trials = [
        {"candidate": "x", "instructions": {"predict": "few rows"}, "seen": 3, "so_far": 1.0},
        {"candidate": "y", "instructions": {"predict": "middling"}, "seen": 9, "so_far": 0.5},
        {"candidate": "z", "instructions": {"predict": "good"}, "seen": 9, "so_far": 0.7},
    ]
    (tmp_path / "toss-gepa-0").mkdir()
    (tmp_path / "toss-gepa-0" / "trials.jsonl").write_text("".join(json.dumps(each) + "\n" for each in trials))

    found = proposed(runs, tmp_path, 100)

    assert found == ["a1", "g1", "Call it.", "a2", "good", "middling", "few rows"]
    assert proposed(runs, tmp_path, 3) == found[:3]
    person = {"task": "toss", "method": "human", "seed": 0, "instructions": "Say it."}
    assert proposed([person], tmp_path, 9) == []  # no compile proposed it


def rows(start: int, count: int) -> list[dspy.Example]:
    return [
        dspy.Example(text=f"toss {n}", side=("tails", "heads")[n % 2]).with_inputs("text")
        for n in range(start, start + count)
    ]


TASK = Published(
    name="toss",
    signature="text -> side: Literal['heads', 'tails']",
    instructions="Call it.",
    metric="accuracy",
    licence="none",
    citation="none",
    sizes=(32, 32, 40),
    rows=lambda data, seed: Parts(rows(0, 32), rows(32, 32), rows(64, 40)),
)


def test_the_bounds_of_a_group_are_measured_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = graded({row.text: row.side for row in rows(0, 104)}, {"a1": 0.9, "a2": 1.0}, default=0.4, name="toss")
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bounds, "lm_of", lambda name: lm)
    monkeypatch.setattr("preceptor.benchmarks.tasks.find", lambda name: TASK)
    (tmp_path / "toss-300").mkdir()
    held = result("ape", 0, "a1", "Call it.", "a2", "a1") | {"lm": lm.model, "test_rows": 24}
    (tmp_path / "toss-300" / "toss-ape-0.json").write_text(json.dumps(held))

    as_command("bounds", bounds.run, ["--group", "toss-300", "--out", str(tmp_path), "--json"])

    [line] = json.loads(capsys.readouterr().out)["bounds"]
    assert (line["task"], line["candidates"], line["oracle"], line["oracle_biased"]) == ("toss", 3, 1.0, 1.0)
    assert (line["seed"], line["human"], line["compiled"]) == (0.4, None, 0.5)
    kept = json.loads((tmp_path / "toss-300" / "bounds" / "toss.json").read_text(encoding="utf-8"))
    assert kept["instructions"] == "a2"
    assert (kept["data"], kept["device"], kept["test_rows"]) == ("upstream", _device(), 24)

    for name, value in (("data", "owner/other-rows@abc"), ("device", "NVIDIA H300")):
        (tmp_path / "toss-300" / "toss-ape-0.json").write_text(json.dumps(held | {name: value}))
        with pytest.raises(DataError, match=rf"^toss-ape-0 was made with {name} {value}, not .*: bounds"):
            as_command("bounds", bounds.run, ["--group", "toss-300", "--out", str(tmp_path)])
    with pytest.raises(DataError, match="holds no results of"):
        as_command("bounds", bounds.run, ["--group", "nothing", "--out", str(tmp_path)])


def test_a_task_that_nothing_was_proposed_for_is_refused_before_a_row_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = graded({row.text: row.side for row in rows(0, 8)}, {"a1": 0.9}, default=0.4, name="toss")
    monkeypatch.setattr(bounds, "lm_of", lambda name: lm)
    place = tmp_path / "toss-300"
    place.mkdir()
    (place / "trec-ape-0.json").write_text(json.dumps(result("ape", 0, "a1") | {"task": "trec", "lm": lm.model}))
    person = {"task": "antonyms", "method": "human", "seed": 0, "instructions": "Say it.", "lm": lm.model}
    (place / "antonyms-human-0.json").write_text(json.dumps(person))
    for name in ("antonyms", "subj"):
        arguments = ["--group", "toss-300", "--out", str(tmp_path), "--task", "trec", "--task", name]
        with pytest.raises(DataError, match=rf"holds no candidates for {name}; there are some for trec"):
            as_command("bounds", bounds.run, arguments)
    assert asked(lm) == []


def test_bounds_that_no_run_stands_beside_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "bounds").mkdir()
    for task in ("toss", "gone"):
        told = {"task": task, "candidates": 9, "oracle": 0.8, "oracle_biased": 0.9}
        (tmp_path / "bounds" / f"{task}.json").write_text(json.dumps(told))
    (tmp_path / "toss-ape-0.json").write_text(json.dumps(result("ape", 0, "a1")))
    assert [line["task"] for line in upper_bounds(tmp_path)] == ["toss"]
