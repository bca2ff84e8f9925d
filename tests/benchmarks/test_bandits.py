from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preceptor.benchmarks import bandits
from preceptor.benchmarks.bandits import PUBLISHED, Simulation
from preceptor.cli.tools import as_command


class Order:
    """Draws rows and prompts in the order they stand."""

    def permutation(self, count: int) -> Any:
        return np.arange(count)


def test_every_rule_is_measured_on_the_same_tasks_with_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bandits.json"
    shape = ["--seeds", "40", "--arms", "9", "--budget", "12", "--budget", "50", "--jobs", "1"]
    as_command("bandits", bandits.run, [*shape, "--out", str(out), "--json"])

    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text(encoding="utf-8"))
    rules = ["ucb", "ucb-e", "successive-rejects", "successive-halving"]
    names = [*rules, "uniform", *(f"published {name}" for name in rules)]
    assert [(line["rows each"], line["rule"]) for line in result["measured"]] == [
        (rows, name) for rows in (12, 50) for name in names
    ]
    for line in result["measured"]:
        assert line["picked low"] < line["picked"] < line["picked high"]
        assert line["in beam"] >= line["picked"]
    uniform = {line["rows each"]: line for line in result["measured"] if line["rule"] == "uniform"}
    assert uniform[50]["picked"] > uniform[12]["picked"] > 1 / 9
    assert uniform[50]["over uniform"] == uniform[50]["over uniform high"] == 0.0


def test_the_table_has_a_line_per_rule(capsys: pytest.CaptureFixture[str]) -> None:
    as_command("bandits", bandits.run, ["--seeds", "2", "--arms", "5", "--budget", "3", "--jobs", "1"])
    title, header, *table = capsys.readouterr().out.splitlines()
    assert title == "How often the best prompt is picked, and kept in a beam of 4, in 2 simulated tasks"
    assert header.startswith("prompts  rows each  rule")
    assert [line.split()[0] for line in table] == ["5"] * 9


def test_a_simulated_task_has_the_accuracies_it_says() -> None:
    found = [Simulation(5, 12, seed).scores() for seed in range(300)]
    means = sorted(np.mean([sorted(scores.mean(axis=1)[arm] for arm in [best]) for scores, best in found], axis=0))
    assert means == [pytest.approx(0.75, abs=0.01)]
    others = np.mean([scores.mean(axis=1).sum() - scores[best].mean() for scores, best in found])
    assert others == pytest.approx(0.70 + 0.65 + 0.60 + 0.55, abs=0.02)
    assert {best for _, best in found} == set(range(5))
    pairs = [np.corrcoef(scores[0], scores[1])[0, 1] for scores, _ in found]
    assert np.mean(pairs) == pytest.approx(0.40, abs=0.03)  # of 0.80 if all rows shared their luck


def test_ties_of_ranks_are_broken_evenly() -> None:
    assert bandits._chance([1.0, 3.0, 3.0, 2.0], best=1, keep=1) == 0.5
    assert bandits._chance([1.0, 3.0, 3.0, 2.0], best=3, keep=2) == 0.0
    assert bandits._chance([1.0, 3.0, 3.0, 2.0], best=3, keep=3) == 1.0
    assert bandits._chance([math.inf] * 8, best=3, keep=4) == 0.5


def test_the_published_ucb_pulls_the_same_eight_again_in_its_second_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """ln(1) = 0: the ninth prompt, the best, waits for the third."""
    scores = np.vstack([np.full((8, 64), 0.5), np.ones((1, 64))])
    for rounds, seen in ((2, 0.0), (3, 1.0)):
        monkeypatch.setattr(bandits, "ROUNDS", rounds)
        assert PUBLISHED["ucb"](scores, 8 * rounds, 1, Order()) == [0.5] * 8 + [seen]
    monkeypatch.setattr(bandits, "ROUNDS", 2)
    assert PUBLISHED["ucb-e"](scores, 8 * 2, 1, Order()) == [0.5] * 8 + [1.0]


def test_the_published_rejects_judge_by_fresh_rows_alone() -> None:
    # budget 11, 3 prompts, until one is left: log_bar = 1/2 + 1/2 = 1, n = 9/2 and 9/1: 4 rows, then 4 others
    scores = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]])
    assert PUBLISHED["successive-rejects"](scores, 11, 1, Order()) == [math.inf, 2.0, 1.0]
    assert PUBLISHED["successive-rejects"](scores, 11, 2, Order()) == [math.inf, math.inf, 1.0]


def test_the_published_halving_drops_what_is_below_the_mean_however_many() -> None:
    # 4 prompts, 2 rounds: means 1, 0.75, 0, 0 of 0.44; then 1 and 0.75 of 0.875
    scores = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert PUBLISHED["successive-halving"](scores, 32, 1, Order()) == [math.inf, 1.0, 0.0, 0.0]
    equal = np.array([[1, 0, 1]] * 3)
    assert PUBLISHED["successive-halving"](equal, 24, 1, Order()) == [math.inf] * 3
