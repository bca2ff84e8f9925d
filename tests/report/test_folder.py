from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preceptor.errors import RunError
from preceptor.lineage import key_of
from preceptor.report import page
from preceptor.report.folder import Answer, Row, Scored, findings

SEED = {"predict": "Sort."}
TRIAL: dict[str, Any] = {
    "candidate": "c1",
    "instructions": SEED,
    "rows": [0, 1],
    "scores": [1.0, 0.0],
    "demos": 2,
    "calls": 12,
    "seen": 2,
    "so_far": 0.5,
    "interval": [0.1, 0.9],
}
CONFIRMED: dict[str, Any] = {
    "candidates": {"": {"predict": "Sort well."}},
    "rows": [
        {
            "inputs": {"text": "hi"},
            "gold": "yes",
            "before": {"kind": "failed", "score": None, "answer": ""},
            "after": {"kind": "scored", "score": 1.0, "answer": "yes"},
        }
    ],
}
PLACED: dict[str, Any] = {
    "regions": ["region 1"],
    "centroids": [[0.0, 1.0]],
    "train": [[0.0, 1.0]],
    "members": ["region 1"],
    "confirm": [],
    "routes": [],
    "explained": 0.5,
    "embedder": "topics",
}
RESULT: dict[str, Any] = {
    "verdict": "Kept.",
    "metric": "accuracy",
    "baseline": 0.5,
    "baseline_ci": [0.1, 0.9],
    "compiled": 0.5,
    "compiled_ci": [0.1, 0.9],
    "gain": 0.0,
    "replaced": False,
    "rows": 1,
    "search_score": None,
    "calls": 14,
    "tokens": 100,
    "dollars": 0.0,
    "instructions": SEED,
    "seed_instructions": SEED,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    files = {"run": {}, "confirmation": CONFIRMED, "regions": PLACED, "result": RESULT}
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    (tmp_path / "trials.jsonl").write_text(json.dumps(TRIAL) + "\n", encoding="utf-8")
    return tmp_path


def test_a_run_folder_is_read(run: Path) -> None:
    found = findings(run)
    [search] = found.searches
    assert search.scored == [Scored("c1", key_of(SEED), SEED, 2, 12, 2, 0.5, (0.1, 0.9))]
    assert found.candidates == {"": {"predict": "Sort well."}}
    assert found.rows == [Row({"text": "hi"}, "yes", Answer("", None), Answer("yes", 1.0), "", measures=True)]
    assert found.plan is not None
    assert found.plan.centroids == [(0.0, 1.0)]


def test_the_searches_of_regions_are_read_from_their_folders(run: Path) -> None:
    (run / "region-1").mkdir()
    (run / "region-1" / "trials.jsonl").write_text(json.dumps(TRIAL) + "\n", encoding="utf-8")
    assert [search.name for search in findings(run).searches] == ["", "region 1"]


def test_without_a_result_the_rows_of_an_earlier_confirmation_dont_count(run: Path) -> None:
    (run / "result.json").unlink()
    assert findings(run).rows == []


def test_a_run_that_has_done_nothing_yet_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    found = findings(tmp_path)
    assert (found.result, found.searches, found.rows, found.plan) == ({}, [], [], None)


def test_trials_of_an_older_version_are_left_out(run: Path) -> None:
    older = {name: TRIAL[name] for name in ("instructions", "rows", "scores")}
    (run / "trials.jsonl").write_text(json.dumps(older) + "\n", encoding="utf-8")
    assert findings(run).searches[0].scored == []


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no run folder: run\.json is missing or unreadable\.$"):
        findings(tmp_path)


Spoil = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("result.json", lambda value: value.pop("verdict")),
        ("result.json", lambda value: value.update(baseline="high")),
        ("result.json", lambda value: value.update(compiled_ci=[0.0, float("inf")])),
        ("result.json", lambda value: value.update(regions=[{"region": ["x"]}])),
        ("confirmation.json", lambda value: value.update(rows=[{}])),
        ("confirmation.json", lambda value: value.update(rows=3)),
        ("confirmation.json", lambda value: value.update(candidates=["x"])),
        ("confirmation.json", lambda value: value["rows"][0]["after"].update(score="high")),
        ("regions.json", lambda value: value.update(centroids=[[0.0]])),
        ("regions.json", lambda value: value.update(centroids=[])),
        ("regions.json", lambda value: value.update(train=[[0.0, float("nan")]])),
        ("regions.json", lambda value: value.update(regions=["../../elsewhere"])),
        ("trials.jsonl", lambda value: value.update(interval=[0.5])),
        ("trials.jsonl", lambda value: value.update(calls=1e300)),
        ("trials.jsonl", lambda value: value.update(instructions="Sort.")),
    ],
)
def test_a_damaged_file_is_named(run: Path, name: str, spoil: Spoil) -> None:
    value: dict[str, Any] = json.loads((run / name).read_text(encoding="utf-8"))
    spoil(value)
    (run / name).write_text(json.dumps(value) + "\n", encoding="utf-8")
    with pytest.raises(RunError, match=rf"{re.escape(name)}.* Compile into the folder again"):
        page(run)


@pytest.mark.parametrize("name", ["result.json", "confirmation.json", "regions.json"])
@pytest.mark.parametrize("text", ["{oops", "[]", "3", "[" * 100_000])
def test_what_is_no_json_object_is_damaged(run: Path, name: str, text: str) -> None:
    (run / name).write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"is damaged\. Compile into the folder again"):
        findings(run)
