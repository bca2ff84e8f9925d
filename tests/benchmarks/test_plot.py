"""The drawing shows each method's mean curve, and nothing that is not in the results."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from preceptor.benchmarks import plot
from preceptor.benchmarks.plot import FRAME, drawing
from preceptor.cli.tools import as_command
from preceptor.errors import DataError


def run(task: str, method: str, places: Sequence[tuple[int, float]], seed: int = 0) -> dict[str, Any]:
    points: list[dict[str, Any]] = [
        {"calls": calls, "instructions": {}, "search_score": None, "test": score} for calls, score in places
    ]
    return {"task": task, "method": method, "seed": seed, "budget": 100, "metric": "accuracy", "curve": points}


RUNS = [
    run("subj", "ape", [(0, 0.5), (40, 0.7), (80, 0.7)]),
    run("subj", "ape", [(0, 0.5), (60, 0.9), (80, 0.9)], seed=1),
    run("subj", "gepa", [(0, 0.5), (100, 0.5)]),
    run("trec", "ape", [(0, 0.2), (50, 0.4)]),
    run("trec", "gepa", [(0, 0.2), (100, 0.3)]),
]


def texts(svg: str) -> list[str]:
    return [one.text or "" for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def paths(svg: str) -> list[str]:
    return re.findall(r'<path d="([^"]+)" fill="none" stroke="[^"]+" stroke-width="2.2"', svg)


def test_a_line_is_the_mean_over_seeds_of_what_was_held(tmp_path: Path) -> None:
    first, *_ = paths(drawing("model-100", RUNS[:3]))
    # 0.5 to 0.8 on a scale of 0.5 to 0.8: at 40 calls one of two has 0.7, at 60 the other 0.9
    x = [FRAME.left + calls / 100 * (FRAME.right - FRAME.left) for calls in (0, 40, 60, 80)]
    y = [FRAME.bottom - (score - 0.5) / 0.3 * (FRAME.bottom - FRAME.top) for score in (0.5, 0.6, 0.8, 0.8)]
    drawn = [float(number) for number in re.findall(r"[\d.]+", first)]
    assert drawn == pytest.approx([x[0], y[0], x[1], y[1], x[2], y[2], x[3], y[3]], abs=0.06)
    assert len(drawn) == 8


def test_the_drawing_says_of_how_many_seeds_a_line_is() -> None:
    assert "mean over up to 2 seeds." in " ".join(texts(drawing("model-100", RUNS)))
    assert "mean over 2 seeds." in " ".join(texts(drawing("model-100", RUNS[:2])))
    assert "mean over 1 seed." in " ".join(texts(drawing("model-100", RUNS[2:])))


def test_each_task_has_a_panel_and_so_has_the_mean_gain_over_tasks_that_all_methods_ran_on() -> None:
    said = texts(drawing("model-100", RUNS))
    for text in ("subj, accuracy", "trec, accuracy", "gain in points, mean of 2 tasks", "ape", "gepa"):
        assert text in said
    assert len(paths(drawing("model-100", RUNS))) == 6
    assert not any("gain in points" in text for text in texts(drawing("model-100", RUNS[:4])))


def test_a_persons_instruction_is_a_level_line_on_its_task() -> None:
    person = {"task": "trec", "method": "human", "compiled": 0.35}
    svg = drawing("model-100", RUNS, [person])
    assert "a person's instruction" in texts(svg)
    assert len(paths(svg)) == 7
    assert paths(drawing("model-100", RUNS)) != paths(svg)


def test_peers_are_dashed_and_names_are_escaped() -> None:
    svg = drawing("a <b> & c", RUNS)
    assert svg.count('stroke-dasharray="7 4"') == 4  # in the legend and in three panels
    assert "Score on test rows against calls: a <b> & c" in texts(svg)


def test_the_drawing_is_written_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "model-100"
    place.mkdir()
    for at, each in enumerate(RUNS):
        (place / f"{at}.json").write_text(json.dumps(each))
    (place / "old.json").write_text(json.dumps({"task": "old", "method": "ape", "seed": 0, "budget": 100}))

    group = ["--group", "model-100", "--folder", str(tmp_path)]
    as_command("plot", plot.run, group)
    as_command("plot", plot.run, [*group, "--task", "subj", "--out", str(tmp_path / "one.svg")])

    assert capsys.readouterr().out.split() == [str(place / "anytime.svg"), str(tmp_path / "one.svg")]
    assert "trec, accuracy" in texts((place / "anytime.svg").read_text(encoding="utf-8"))
    assert "trec, accuracy" not in texts((tmp_path / "one.svg").read_text(encoding="utf-8"))
    with pytest.raises(DataError, match=r"holds no curves of such runs\. Runs made before .* have none"):
        as_command("plot", plot.run, ["--group", "model-100", "--folder", str(tmp_path), "--task", "old"])
