from __future__ import annotations

import json
from pathlib import Path

import pytest

from preceptor.benchmarks import overhead
from preceptor.benchmarks.overhead import EVALUATIONS, _instant, _rows, _timed
from preceptor.cli.tools import as_command
from preceptor.errors import ConfigError
from preceptor.testing import asked, simulated, system

WAYS = ("ours", "dspy chat", "dspy direct")


def measured(arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[dict[str, float]]]:
    as_command("overhead", overhead.run, [*arguments, "--repeats", "2", "--out", str(out), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    assert printed["repeats"] == 2
    found: dict[str, list[dict[str, float]]] = printed
    return found


def test_every_way_asks_once_per_row_and_dspy_chat_alone_marks_its_fields() -> None:
    for name, evaluate in EVALUATIONS.items():
        lm = _instant()
        assert evaluate(lm, _rows(6), 2) == 1.0
        assert len(asked(lm)) == 6
        assert all(("[[ ## " in system(request)) is (name == "dspy chat") for request in asked(lm))
    assert tuple(EVALUATIONS) == WAYS


def test_an_evaluation_that_gets_a_row_wrong_is_no_measurement() -> None:
    lm = simulated(lambda request: "spam" if "number 0" in str(request.messages[-1].text) else "mail")
    with pytest.raises(RuntimeError, match=r"the evaluation gave 0\.5"):
        _timed(EVALUATIONS["ours"], lm, _rows(2), 1)


def test_cost_is_measured_per_thread_count_and_size_and_grows_from_the_first_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--rows", "5", "--rows", "20", "--threads", "1", "--threads", "2"]
    found = measured(["--part", "cost", *sizes], tmp_path / "cost.json", capsys)
    assert "waiting" not in found
    for rows in (found["cost"], found["cpu"]):
        assert [(row["threads"], row["rows"]) for row in rows] == [(1, 5), (1, 20), (2, 5), (2, 20)]
        for small, large in (rows[:2], rows[2:]):
            for way in WAYS:
                assert small[f"{way} growth"] == 1.0
                assert large[f"{way} growth"] == pytest.approx(large[f"{way} us"] / small[f"{way} us"])
            assert large["ours / dspy chat"] == pytest.approx(large["ours us"] / large["dspy chat us"])
            assert large["ours / dspy direct"] == pytest.approx(large["ours us"] / large["dspy direct us"])


def test_the_share_is_of_the_calls_that_so_many_in_flight_could_have_had_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = ["--part", "waiting", "--concurrency", "4", "--latency", "0.05", "--rounds", "3"]
    [row] = measured(slow, tmp_path / "waiting.json", capsys)["waiting"]
    assert (row["in flight"], row["rows"], row["ideal rows/s"]) == (4, 12, 80.0)
    for way in WAYS:
        assert row[f"{way} share"] == pytest.approx(row[f"{way} rows/s"] / 80)
        assert 0 < row[f"{way} share"] <= 1  # 3 rounds can't take less than 3 times the latency


def test_the_same_is_measured_over_http_and_printed_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    as_command(
        "overhead",
        overhead.run,
        ["--part", "http", "--concurrency", "2", "--latency", "0.01", "--rounds", "2", "--repeats", "1"],
    )
    title, header, row = capsys.readouterr().out.splitlines()
    assert title == "Throughput beside the ideal, over HTTP; client and server share the cores"
    assert " ".join(header.split()) == (
        "in flight rows ideal rows/s ours rows/s dspy chat rows/s dspy direct rows/s "
        "ours share dspy chat share dspy direct share"
    )
    assert row.split()[:3] == ["2", "4", "200.000"]


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="No part 'disk'; there are cost, waiting, http"):
        as_command("overhead", overhead.run, ["--part", "disk"])
