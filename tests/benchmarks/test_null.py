from __future__ import annotations

import json
from pathlib import Path

import pytest

from preceptor.benchmarks import null


def test_the_null_benchmark_counts_replacements_and_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "null.json"
    null.main(["--seeds", "2", "--rows", "12", "--candidates", "2", "--out", str(out), "--json"])

    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    [row] = printed["measured"]
    assert (printed["seeds"], row["rows"], row["replaced"], row["claimed"]) == (2, 12, 0, 0.0)
    assert abs(row["tested"]) <= 1
