from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from preceptor.cli import app, run
from preceptor.cli.command import Command
from preceptor.report import REPORT
from preceptor.report.repeat import command
from preceptor.teleprompters import APE
from preceptor.testing import simulated, toy


@pytest.fixture
def searched(tmp_path: Path) -> Path:
    place = tmp_path / "run"
    method = APE(
        metric="accuracy", lm=simulated(toy.answer), proposer=simulated(toy.right), run_dir=place, candidates=2
    )
    method.compile(toy.Sorter(), trainset=toy.rows(8), valset=toy.rows(8, 8))
    return place


def test_the_report_of_a_run_is_written_and_its_place_printed(
    searched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = (searched / REPORT).read_bytes()
    (searched / REPORT).unlink()
    for place in (searched, searched / "program"):
        assert run(["report", str(place)]) == 0
        assert capsys.readouterr().out == f"{searched / REPORT}\n"
        assert (searched / REPORT).read_bytes() == expected


def test_the_report_goes_elsewhere_if_asked(searched: Path, tmp_path: Path) -> None:
    assert run(["report", str(searched), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == (searched / REPORT).read_bytes()


def test_the_report_goes_into_a_folder_if_asked(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["report", str(searched), "--out", "."]) == 0
    assert (tmp_path / REPORT).read_bytes() == (searched / REPORT).read_bytes()


def test_a_place_without_a_run_is_a_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path)]) == 2
    assert "is no run folder: run.json is missing or unreadable." in capsys.readouterr().err


def test_a_place_that_cant_be_written_is_a_wrong_use(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(searched), "--out", str(searched / "none" / "page.html")]) == 2
    assert "No such file or directory. Choose another place with --out." in capsys.readouterr().err


def test_the_command_a_report_shows_is_the_one_the_run_was_started_by() -> None:
    asked = Command(
        target="text -> label: Literal['a', 'b']",
        data="my rows.csv",
        validation="v.csv",
        columns={"text": "Message Body"},
        instructions='Say "a" or "b".',
        method="protegi",
        mixture=4,
        lm="openai/x",
        api_base="http://localhost:1",
        proposer="openai/y",
        metric="accuracy",
        budget="calls=100",
        seed=3,
        threads=2,
        timeout=9.5,
        retries=1,
        prices=["openai/x=0.5/1.5"],
        knobs={"rounds": "2"},
    )
    _, verb, *arguments = shlex.split(command(dataclasses.asdict(asked)).replace("\\\n", ""))
    group: Any = typer.main.get_command(app)
    found = group.get_command(None, verb).make_context(verb, arguments).params
    renamed = {"validation": "val", "columns": "column", "prices": "price", "knobs": "knob"}
    typed = {field.name: found[renamed.get(field.name, field.name)] for field in dataclasses.fields(Command)}
    assert list(typed.pop("columns")) == ["text=Message Body"]
    assert list(typed.pop("prices")) == asked.prices
    assert list(typed.pop("knobs")) == ["rounds=2"]
    assert typed == {name: value for name, value in dataclasses.asdict(asked).items() if name in typed}
