"""Results are read from files and averaged over runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from preceptor.benchmarks.table import FOLDER, block, methods, read, run, summary, upper_bounds
from preceptor.cli.tools import as_command
from preceptor.errors import DataError


def result(method: str, gain: float, seed: int = 0, task: str = "subj") -> dict[str, object]:
    return {
        "task": task,
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


def test_the_mean_gain_has_students_interval_over_tasks() -> None:
    """Two seeds of one task share its test rows: they count once."""
    seeds = [result("ape", 0.05), result("ape", 0.15, 1)]
    others = [result("ape", 0.2, task="trec"), result("ape", 0.3, task="ethos")]
    found = methods([*seeds, *others, result("gepa", 0.1), result("gepa", 0.1, 1)])

    ape, gepa = found
    assert (ape["method"], ape["runs"], ape["replaced"], ape["gain"]) == ("ape", 4, 4, pytest.approx(0.2))
    assert ape["high"] - ape["gain"] == pytest.approx(4.302653 * 0.1 / 3**0.5)  # t of 2 degrees of freedom
    assert gepa["gain"] == 0.1
    assert math.isnan(gepa["low"])


def test_the_table_prints_every_group_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "smollm-600").mkdir()
    (tmp_path / "smollm-600" / "subj-ape-0.json").write_text(json.dumps(result("ape", 0.25)))

    as_command("table", run, ["--folder", str(tmp_path)])
    told = capsys.readouterr().out
    as_command("table", run, ["--folder", str(tmp_path), "--json"])

    assert "smollm-600 Scores on test rows" in told
    assert "0.750" in told
    assert json.loads(capsys.readouterr().out)["smollm-600"]["methods"][0]["gain"] == 0.25


def test_equal_gains_have_no_interval_in_the_table_or_in_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "smollm-600").mkdir()
    for seed in range(3):
        (tmp_path / "smollm-600" / f"subj-ape-{seed}.json").write_text(json.dumps(result("ape", 0.0, seed)))

    as_command("table", run, ["--folder", str(tmp_path), "--json"])
    told = json.loads(capsys.readouterr().out, parse_constant=refuse)["smollm-600"]
    as_command("table", run, ["--folder", str(tmp_path)])

    assert [(line["gain"], line["low"], line["high"]) for line in told["methods"]] == [(0.0, None, None)]
    assert "Gain over the seed" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("seed_score", 0.51), ("data", "SetFit/subj@1")])
def test_runs_of_another_device_or_data_are_not_compared(tmp_path: Path, name: str, value: object) -> None:
    def write(file: str, run: dict[str, object]) -> None:
        (tmp_path / file).write_text(json.dumps(run))

    other = result("gepa", 0.1) | {"data": "upstream", name: value}
    write("a.json", result("ape", 0.1) | {"data": "upstream"})
    write("b.json", other | {"seed": 1})  # another seed has other rows
    write("c.json", {key: cell for key, cell in result("protegi", 0.1).items() if key != "data"})  # older
    write("d.json", result("copro", 0.1) | {"refused": "too dear", "seed_score": 0.9})
    assert len(read(tmp_path)) == 4
    write("e.json", other)
    with pytest.raises(DataError, match=r"a\.json and .*e\.json are of one task and seed .*a folder of their own"):
        read(tmp_path)


def test_committed_groups_can_be_compared() -> None:
    for folder in (FOLDER, FOLDER.with_name("papers-two-cores")):
        assert [place for place in sorted(folder.iterdir()) if not read(place)] == []


def test_the_candidates_mean_is_over_the_runs_that_scored_one() -> None:
    scored = [result("ape", 0.0) | {"candidate_gain": 0.1}, result("ape", 0.4, 1) | {"candidate_gain": 0.4}]
    [some] = methods([*scored, result("ape", 0.0, 2)])
    [none] = methods([result("ape+mixture", 0.0)])
    assert (some["candidate_gain"], none["candidate_gain"]) == (pytest.approx(0.25), None)
    summary([result("ape+mixture", 0.0)])


def test_a_refused_compile_has_a_line_and_no_part_in_a_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = [result("ape", 0.1), result("ape", 0.3, 1)]
    refused = result("ape", 0.0, 2) | {"refused": "needs 450 calls", "calls": 0}
    alone = result("ape+mixture", 0.0) | {"refused": "needs 450 calls", "calls": 0}

    assert methods([*held, refused, alone]) == methods(held)
    assert block("m-600", [*held, refused, alone]) == block("m-600", held)
    assert "| `ape` | 2 | 0.700 | +20.0 (1 task) |" in block("m-600", held)
    summary([refused, alone])
    told = capsys.readouterr().out
    assert ("ape+mixture" in told, "Gain over the seed" in told) == (True, False)
    (tmp_path / "bounds").mkdir()
    (tmp_path / "bounds" / "subj.json").write_text(
        json.dumps({"task": "subj", "candidates": 9, "oracle": 0.8, "oracle_biased": 0.9})
    )
    for at, each in enumerate([*held, refused]):
        (tmp_path / f"{at}.json").write_text(json.dumps(each))
    assert [line["compiled"] for line in upper_bounds(tmp_path)] == [pytest.approx(0.7)]


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def test_an_empty_folder_is_told_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no results; make some with: preceptor bench papers"):
        as_command("table", run, ["--folder", str(tmp_path)])


def curve(*places: tuple[int, float]) -> list[dict[str, object]]:
    return [{"calls": calls, "instructions": {}, "search_score": None, "test": score} for calls, score in places]


def test_what_the_runs_hold_decides_which_parts_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "smollm-600").mkdir()
    for name, calls in (("ape", 100), ("gepa", 400)):
        told = result(name, 0.25) | {"curve": curve((0, 0.5), (calls, 0.75))}
        (tmp_path / "smollm-600" / f"subj-{name}-0.json").write_text(json.dumps(told))
    (tmp_path / "smollm-600" / "bounds").mkdir()
    told = {"task": "subj", "candidates": 9, "test_rows": 200, "oracle": 0.8, "oracle_biased": 0.9, "instructions": "x"}
    (tmp_path / "smollm-600" / "bounds" / "subj.json").write_text(json.dumps(told))

    as_command("table", run, ["--folder", str(tmp_path), "--json"])
    held = json.loads(capsys.readouterr().out)["smollm-600"]
    as_command("table", run, ["--folder", str(tmp_path), "--task", "subj", "--json"])
    assert json.loads(capsys.readouterr().out)["smollm-600"] == held
    with pytest.raises(DataError, match=r"holds no results of trec; make some with"):
        as_command("table", run, ["--folder", str(tmp_path), "--task", "trec"])

    assert len(held["runs"]) == 2
    assert [line["calls_to_gain"] for line in held["speeds"]] == [100, 400]
    assert held["ratios"][0]["ratio_to_gain"] == pytest.approx(0.25)
    assert held["bounds"] == [
        {"task": "subj", "seed": 0.5, "human": None, "compiled": 0.75, "candidates": 9, "oracle": 0.8}
        | {"oracle_biased": 0.9}
    ]
    assert [line["tasks"] for line in held["comparisons"]] == [1]  # one task can't be halved
    as_command("table", run, ["--folder", str(tmp_path)])
    said = capsys.readouterr().out
    for title in (
        "Upper bounds",
        "Calls after which a search holds 95 %",
        "calls of ours divided by",
        "Ours against peers",
    ):
        assert title in said
    assert "None" not in said.partition("Upper bounds")[2]


def row(task: str, method: str, compiled: float, seed: int = 0) -> dict[str, object]:
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "seed_score": 0.5,
        "compiled": compiled,
        "gain": compiled - 0.5,
    }


def test_the_readmes_table_has_a_row_a_method_and_a_column_a_task_with_the_induction_tasks_in_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        row("trec", "ape", 0.6),
        row("trec", "ape", 0.8, seed=1),
        row("subj", "ape", 0.6),
        row("antonyms", "ape", 0.5),
        row("sum", "ape", 1.0),
        row("subj", "gepa", 0.4),
        row("antonyms", "human", 0.9),
        row("sum", "human", 0.9),
        row("antonyms", "gepa", 0.9),  # of one induction task only
    ]
    expected = """<!-- preceptor bench table --group model-600 --markdown -->
| method | runs | subj | trec | induction (2) | gain in points |
| --- | --- | --- | --- | --- | --- |
| your instructions | | 0.500 | 0.500 | 0.500 | |
| `ape` | 5 | 0.600 | 0.700 | 0.750 | +20.0 (-14.4 to +54.4, 4 tasks) |
| `gepa` | 2 | 0.400 | | | +15.0 (-302.7 to +332.7, 2 tasks) |
| `human` | 2 | | | 0.900 | +40.0 (2 tasks) |
<!-- end of the table -->"""
    assert block("--group model-600", runs) == expected

    (tmp_path / "model-600").mkdir()
    for at, each in enumerate(runs):
        (tmp_path / "model-600" / f"{at}.json").write_text(json.dumps(each))
    as_command("table", run, ["--folder", str(tmp_path), "--group", "model-600", "--markdown"])
    assert capsys.readouterr().out == expected.replace("--group", f"--folder {tmp_path} --group") + "\n"
