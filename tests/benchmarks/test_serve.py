"""`preceptor bench serve` at its smallest, in real processes."""

from __future__ import annotations

import json

import pytest

from preceptor.benchmarks.serve import Load, run
from preceptor.cli.tools import as_command


def test_a_served_program_is_measured_beside_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    as_command("serve", run, ["--part", "instant", "--clients", "2", "--requests", "20", "--repeats", "1", "--json"])
    told = json.loads(capsys.readouterr().out)

    assert [row["server"] for row in told["instant"]] == ["ours", "recipe"]
    ours, recipe = told["instant"]
    assert ours["ours / it"] == 1
    assert recipe["ours / it"] == pytest.approx(ours["requests/s"] / recipe["requests/s"])
    assert all(0 < row["p50 ms"] <= row["p99 ms"] for row in told["instant"])
    assert all(row["CPU us/request"] > 0 for row in told["instant"])


def test_percentiles_are_in_milliseconds() -> None:
    row = Load(2.0, [0.001 * n for n in range(1, 101)]).row
    assert row["requests/s"] == 50
    assert row["p50 ms"] == pytest.approx(50.5)
    assert row["p99 ms"] == pytest.approx(99.01)
