from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preceptor.benchmarks import batch
from preceptor.cli.tools import as_command
from preceptor.errors import ConfigError


def measured(arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    as_command("batch", batch.run, [*arguments, "--out", str(out), "--json"])
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    return printed


def test_every_row_is_answered_once_however_often_the_process_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--kill-rows", "1200", "--kills", "1", "--shard-rows", "500", "--threads", "4", "--seed", "3"]
    [row] = measured(["--part", "kills", *small], tmp_path / "kills.json", capsys)["kills"]
    assert (row["rows"], row["answered"], row["recorded"], row["identical"]) == (1200, 1200, 1200, True)
    assert row["kills"] <= 1  # a process may be done before its kill comes
    assert row["recorded_and_asked_again"] == 0
    assert row["most_in_flight"] <= 4


def test_rate_and_memory_are_measured_at_each_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [row] = measured(["--part", "linear", "--rows", "100"], tmp_path / "linear.json", capsys)["linear"]
    assert (row["rows"], row["growth"]) == (100, 1.0)
    assert row["rows_a_second"] == pytest.approx(1e6 / row["microseconds_a_row"])
    assert 10 < row["peak_megabytes"] < 2000


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="No part 'speed'; there are linear, kills, ray"):
        as_command("batch", batch.run, ["--part", "speed"])
