from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preceptor.benchmarks import batch
from preceptor.errors import ConfigError


def measured(arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    batch.main([*arguments, "--out", str(out), "--json"])
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    return printed


def test_every_row_is_answered_once_however_often_the_process_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--kill-rows", "1200", "--kills", "2", "--shard-rows", "500", "--threads", "4", "--seed", "3"]
    [row] = measured(["--part", "kills", *small], tmp_path / "kills.json", capsys)["kills"]
    assert (row["rows"], row["answered"], row["recorded"], row["identical"]) == (1200, 1200, 1200, True)
    assert row["kills"] >= 1
    assert row["recorded_and_asked_again"] == 0
    assert row["most_in_flight"] <= 4


def test_rate_and_memory_are_measured_at_each_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--rows", "50", "--rows", "200"]
    first, second = measured(["--part", "linear", *small], tmp_path / "linear.json", capsys)["linear"]
    assert (first["rows"], second["rows"], first["growth"]) == (50, 200, 1.0)
    assert second["growth"] == pytest.approx(second["microseconds_a_row"] / first["microseconds_a_row"])
    assert second["rows_a_second"] == pytest.approx(1e6 / second["microseconds_a_row"])
    assert 10 < first["peak_megabytes"] < 2000


def test_ray_gives_the_same_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="the extra `ray` isn't installed")
    small = ["--ray-rows", "150", "--busy", "1", "--workers", "2"]
    [row] = measured(["--part", "ray", *small], tmp_path / "ray.json", capsys)["ray"]
    assert (row["rows"], row["workers"], row["identical"]) == (150, 2, True)
    assert row["ratio"] == pytest.approx(row["rows_a_second"] / row["rows_a_second_of_one"])


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="No part 'speed'; there are linear, kills, ray"):
        batch.main(["--part", "speed"])
