from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preceptor import ConfigError
from preceptor.benchmarks import samplers, samplers_real
from preceptor.benchmarks.samplers import FRESH, FUNCTIONS, FURTHER, ROWS, Problem, Search
from preceptor.teleprompters import InstructZero
from preceptor.testing import scripted, simulated, toy


def points(count: int) -> Any:
    return np.random.default_rng(0).uniform(-1, 1, (count, 10))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_problem_is_the_same_again_and_no_two_seeds_share_one(function: str) -> None:
    first, again, other = (
        [Problem(function, seed).scores(point).tolist() for point in points(5)] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert {len(one) for one in first} == {ROWS + FURTHER + FRESH}
    assert {value for one in first for value in one} == {0.0, 1.0}


def test_only_on_the_plateaus_do_points_share_an_instruction_and_then_its_scores() -> None:
    assert Problem("bowl", 0).instruction(points(1)[0]) is None
    problem = Problem("plateaus", 0)
    here = points(1)[0]
    there = here + 1e-6
    assert problem.instruction(here) == problem.instruction(there)
    assert problem.scores(here).tolist() == problem.scores(there).tolist()


def test_the_pick_is_judged_on_rows_the_search_has_not_seen() -> None:
    search = Search("plateaus", "random", 3)
    found = samplers.measure(search)
    again = samplers.measure(search)
    problem = Problem("plateaus", 3)
    scores = [problem.scores(point) for point in samplers._points(problem, samplers_real.SAMPLERS["random"](seed=3))]
    best = max(scores, key=lambda one: one[:ROWS].mean())  # the first of several

    assert found["searched"] == best[:ROWS].mean()
    assert found["true"] == best[ROWS + FURTHER :].mean()
    assert found["distinct"] == len(scores) / 150 < 1
    assert max(found["true"], found["rescored"]) <= found["best"]
    assert {name: found[name] for name in found if name != "seconds"} == {
        name: again[name] for name in again if name != "seconds"
    }


def test_the_command_prints_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "samplers.json"
    samplers.main(["--seeds", "2", "--jobs", "1", "--sampler", "random", "--out", str(out), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    assert [(row["function"], row["sampler"], row["seeds"]) for row in printed["measured"]] == [
        (function, "random", 2) for function in FUNCTIONS
    ]
    for row in printed["measured"]:
        assert row["true_low"] <= row["true"] <= row["true_high"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "grid"], r"^No sampler 'grid'; there are coupled, "),
        (["--seeds", "1"], r"^An interval needs 2 seeds at least; --seeds 0 leaves the made-up searches out\.$"),
    ],
)
def test_what_cant_be_measured_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        samplers.main(arguments)


def test_scores_of_a_compile_are_read_from_its_study(tmp_path: Path) -> None:
    method = InstructZero(
        metric="accuracy",
        lm=simulated(toy.answer),
        proposer=scripted(["Guess.", toy.RIGHT]),
        run_dir=tmp_path,
        start=2,
        iterations=0,
        finalists=1,
        rows=6,
        threads=1,
    )
    method.compile(toy.Sorter(), trainset=toy.rows(20), valset=toy.rows(24, 20))

    found = samplers_real._searched(tmp_path)

    assert (found["best_searched"], found["best_rescored"], found["seed_rescored"]) == (1.0, 1.0, 0.5)
    assert found["seed_searched"] in {0.5, 2 / 6, 4 / 6}  # of 6 rows
