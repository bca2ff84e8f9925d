from __future__ import annotations

import json
from pathlib import Path

import pytest

from preceptor.benchmarks import coverage
from preceptor.cli.tools import as_command


def test_every_metric_and_size_is_measured_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(coverage, "SIZES", {"accuracy": (50,), "macro_f1": (50,), "token_f1": (20,)})
    monkeypatch.setattr(coverage, "REPEATED", {"accuracy": (50,), "f1:bug": (50,)})
    monkeypatch.setattr(coverage, "RARE", {"f1:bug": (100,), "token_f1": (50,)})
    monkeypatch.setattr(coverage, "RARE_AND_REPEATED", {"f1:bug": (50,)})
    monkeypatch.setattr(coverage, "LARGE", 20_000)
    as_command("coverage", coverage.run, ["--repeats", "60", "--out", str(tmp_path / "coverage.json")])

    result = json.loads((tmp_path / "coverage.json").read_text(encoding="utf-8"))
    assert [(line["metric"], line["rows"], line["inputs"]) for line in result["measured"]] == [
        ("accuracy", 50, 50),
        ("macro_f1", 50, 50),
        ("token_f1", 20, 20),
        ("accuracy", 500, 50),
        ("f1:bug", 500, 50),
        ("f1:bug", 100, 100),
        ("token_f1", 50, 50),
        ("f1:bug", 500, 50),
    ]
    assert [line["rare"] for line in result["measured"]] == [False] * 5 + [True] * 3
    for line in result["measured"]:
        assert min(line["score covered"], line["gain covered"], line["no gain covered"]) >= 0.85
        assert line["no gain confirmed"] <= 0.1
    for line in (result["measured"][0], result["measured"][3]):
        assert 0.65 <= line["smallest gain confirmed"] <= 0.95
    assert "Share of 60 data sets" in capsys.readouterr().out
