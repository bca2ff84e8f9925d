"""Results are read from files and averaged over runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from preceptor.benchmarks.table import main, methods
from preceptor.errors import DataError


def result(method: str, gain: float, seed: int = 0) -> dict[str, object]:
    return {
        "task": "subj",
        "method": method,
        "seed": seed,
        "metric": "accuracy",
        "test_rows": 200,
        "seed_score": 0.5,
        "compiled": 0.5 + gain,
        "gain": gain,
        "low": gain - 0.1,
        "high": gain + 0.1,
        "replaced": gain > 0,
        "calls": 600,
        "seconds": 9,
    }


def test_the_mean_gain_has_students_interval_over_runs() -> None:
    found = methods([result("ape", 0.1), result("ape", 0.2, 1), result("ape", 0.3, 2), result("gepa", 0.1)])

    ape, gepa = found
    assert (ape["method"], ape["runs"], ape["replaced"], ape["gain"]) == ("ape", 3, 3, pytest.approx(0.2))
    assert ape["high"] - ape["gain"] == pytest.approx(4.302653 * 0.1 / 3**0.5)  # t of 2 degrees of freedom
    assert gepa["gain"] == 0.1
    assert math.isnan(gepa["low"])


def test_the_table_prints_every_group_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "smollm-600").mkdir()
    (tmp_path / "smollm-600" / "subj-ape-0.json").write_text(json.dumps(result("ape", 0.25)))

    main(["--folder", str(tmp_path)])
    told = capsys.readouterr().out
    main(["--folder", str(tmp_path), "--json"])

    assert "smollm-600 Scores on test rows" in told
    assert "0.750" in told
    assert json.loads(capsys.readouterr().out)["smollm-600"]["methods"][0]["gain"] == 0.25


def test_an_empty_folder_is_told_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no results; make some with: preceptor bench papers"):
        main(["--folder", str(tmp_path)])
