from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preceptor import ConfigError
from preceptor.benchmarks import samplers, samplers_made, samplers_real
from preceptor.benchmarks.samplers_made import FRESH, FUNCTIONS, FURTHER, ROWS, Problem, Search
from preceptor.cli.tools import as_command
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
    found = samplers_made.measure(search)
    again = samplers_made.measure(search)
    problem = Problem("plateaus", 3)
    scores = [
        problem.scores(point) for point in samplers_made._points(problem, samplers_real.SAMPLERS["random"](seed=3))
    ]
    best = max(scores, key=lambda one: one[:ROWS].mean())  # the first of several

    assert found["searched"] == best[:ROWS].mean()
    assert found["true"] == best[ROWS + FURTHER :].mean()
    assert found["distinct"] == len(scores) / 150 < 1
    assert max(found["true"], found["rescored"]) <= found["best"]
    assert {name: found[name] for name in found if name != "seconds"} == {
        name: again[name] for name in again if name != "seconds"
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that keeps searches, in a cache of this test's own."""
    monkeypatch.setenv("PRECEPTOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "samplers.jsonl"


def kept(cache: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in cache.read_text(encoding="utf-8").splitlines() if line]


def test_the_command_prints_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    out = tmp_path / "samplers.json"
    as_command(
        "samplers", samplers.run, ["--seeds", "2", "--jobs", "1", "--sampler", "random", "--out", str(out), "--json"]
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    assert [(row["function"], row["sampler"], row["searches"]) for row in printed["measured"]] == [
        *((function, "random", 2) for function in FUNCTIONS),
        ("all three", "random", 6),
    ]
    for row in printed["measured"]:
        assert row["true low"] <= row["true"] <= row["true high"]
    assert len(kept(cache)) == 6


def test_a_search_is_a_line_and_a_stopped_benchmark_makes_only_those_that_lack(
    capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    def printed(jobs: int) -> str:
        as_command("samplers", samplers.run, ["--seeds", "2", "--jobs", str(jobs), "--sampler", "random", "--json"])
        return capsys.readouterr().out

    whole = json.loads(printed(1))
    lines = cache.read_text(encoding="utf-8").splitlines()
    searches = [(line["function"], line["sampler"], line["seed"]) for line in kept(cache)]
    assert searches == [(function, "random", seed) for function in FUNCTIONS for seed in (0, 1)]

    last = max(at for at, line in enumerate(lines) if line)
    cache.write_text(
        "\n".join([*lines[: last - 3], lines[last][:40]]), encoding="utf-8"
    )  # killed in the midst of a line
    left = len([line for line in lines[: last - 3] if line])
    again = json.loads(printed(2))
    assert len(cache.read_text(encoding="utf-8").split('"key"')) - 1 == 6 + 1  # and the line that was cut short
    assert 0 < left < 6
    for row, other in zip(whole["measured"], again["measured"], strict=True):
        assert {name: row[name] for name in row if name != "seconds"} == {
            name: other[name] for name in other if name != "seconds"
        }

    text = cache.read_text(encoding="utf-8")
    printed(1)
    assert cache.read_text(encoding="utf-8") == text


def test_a_search_by_another_sampler_seed_or_optuna_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = [Search("bowl", name, seed) for name in samplers_real.SAMPLERS for seed in (0, 1)]
    keys = [samplers_made._key(search) for search in searches]
    assert len(set(keys)) == len(searches)
    monkeypatch.setattr("optuna.__version__", "0.1")
    assert samplers_made._key(searches[0]) not in keys


def test_each_sampler_is_compared_with_chance_on_the_same_searches() -> None:
    def found(*rescored: float) -> list[dict[str, float]]:
        rest = dict.fromkeys(("searched", "true", "best", "distinct", "seconds"), 0.5)
        return [{**rest, "rescored": one} for one in rescored]

    row = samplers._summary(found(0.6, 0.9), found(0.4, 0.8))
    # differences 0.2 and 0.1: mean 0.15, standard error 0.05, and Student's t is 12.706 with one degree of freedom
    assert (row["rescored"], row["over random"]) == (0.75, pytest.approx(0.15))
    assert row["over random low"] == pytest.approx(0.15 - 12.706 * 0.05, abs=1e-4)
    assert "over random" not in samplers._summary(found(0.6, 0.9), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "grid"], r"^No sampler 'grid'; there are coupled, "),
        (["--seeds", "1"], r"^An interval needs 2 seeds at least; --seeds 0 leaves the made-up searches out\.$"),
    ],
)
def test_what_cant_be_measured_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_command("samplers", samplers.run, arguments)


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
